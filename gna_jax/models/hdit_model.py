"""HDiT, the hourglass diffusion transformer (arXiv 2401.11605), in the form that k-diffusion published.

Neighborhood attention on the fine levels, global attention in the middle; token merging down, token splitting with a
learned interpolation to the skip connection up. Every layer is told the noise level by `AdaRMSNorm`. Preconditioning,
losses and samplers are in `hdit_diffusion`, published weights in `hdit_checkpoint`.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from gna_jax.flax.partition import check_spec
from gna_jax.models import hdit_checkpoint
from gna_jax.models.hdit_layers import (
    GLOBAL,
    FourierFeatures,
    Layer,
    Level,
    Mapping,
    MappingNetwork,
    RMSNorm,
    Split,
    depth_to_space,
    level_rotation,
    rows,
    space_to_depth,
)
from gna_jax.models.mmdit import check_batch
from gna_jax.models.remat import KEEP_ATTENTION

AUGMENTATION_FEATURES = 9
_ZEROS = nnx.initializers.zeros_init()


@dataclasses.dataclass(frozen=True)
class HDiTConfig:
    """Shape of a model.

    Args:
      levels: from fine to coarse; each halves the layout of the one before.
      mapping: the conditioning network.
      channels: of an image, in and out.
      patch_size: pixels of a token on the finest level, per axis.
      num_classes: rows of the class embedding; 0: not conditioned on a class.
      condition_features: length of a further condition vector; 0: none.
    """

    levels: tuple[Level, ...]
    mapping: Mapping = dataclasses.field(default_factory=Mapping)
    channels: int = 3
    patch_size: tuple[int, int] = (4, 4)
    num_classes: int = 0
    condition_features: int = 0

    def check_layout(self, height: int, width: int) -> None:
        """Raise ValueError unless every level cuts the image into whole tokens."""
        merges = 2 ** (len(self.levels) - 1)
        for axis, size, patch in zip("yx", (height, width), self.patch_size, strict=True):
            if size % (patch * merges):
                raise ValueError(
                    f"each axis of an image must be a multiple of {patch * merges}, patch_size {patch} times 2 per further"
                    f" level; got {size} pixels on axis {axis}; crop or pad the image"
                )


PRESETS = {
    "oxford-flowers": HDiTConfig(
        levels=(Level(2, 128), Level(2, 256), Level(4, 512, GLOBAL, dropout=0.1)),
    ),
    "digits": HDiTConfig(
        levels=(
            Level(1, 32, feed_forward=64, head_dim=32),
            Level(3, 96, GLOBAL, feed_forward=192, head_dim=32),
        ),
        mapping=Mapping(depth=1, width=96, feed_forward=192),
        channels=1,
        patch_size=(2, 2),
        num_classes=11,  # the last one stands for no class: classifier-free guidance
    ),
}


def hdit(preset: str, *, rngs: nnx.Rngs, **options: Any) -> "HDiT":
    """The model of a preset: `oxford-flowers` (256x256 pixels) or `digits` (28x28, class-conditional).

    `options` are those of `HDiT`; fields of `HDiTConfig` among them replace the preset's.

    Raises:
      ValueError: for an unknown preset.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}; got preset={preset!r}")
    names = {field.name for field in dataclasses.fields(HDiTConfig)}
    changes = {name: options.pop(name) for name in names & options.keys()}
    return HDiT(dataclasses.replace(PRESETS[preset], **changes), rngs=rngs, **options)


class HDiT(nnx.Module):
    """Images and their noise level to images of the same shape: `[B, H, W, channels]`.

    Args:
      config: shape of the model.
      dtype: of the computation; statistics of norms, softmax and the embedding of the noise level are float32.
      param_dtype: of the parameters.
      remat: recompute each layer's activations in the backward, except those attention stores.
      implementation: of the levels with a window, as in `gna_jax.gna`.
      spec: sharding of `[B, y, x, heads, head_dim]` on every level, one entry per axis, as in `gna_jax.gna_sharded`; images
        are sharded as its batch and space. Where it shards heads, the attention's weights are sharded alike. None: space
        is not sharded.
      rngs: `params`, and `dropout` where a rate is above 0.
    """

    def __init__(
        self,
        config: HDiTConfig,
        *,
        dtype: Dtype = jnp.float32,
        param_dtype: Dtype = jnp.float32,
        remat: bool = False,
        implementation: str | Sequence[str] | None = None,
        spec: PartitionSpec | None = None,
        rngs: nnx.Rngs,
    ):
        check_spec(spec, rank=2)
        self.config, self.dtype, self.spec = config, dtype, spec
        levels, features, mapping = config.levels, config.channels, config.mapping
        linear = functools.partial(
            nnx.Linear, use_bias=False, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.patch_in = linear(features * math.prod(config.patch_size), levels[0].width)
        self.noise_features = FourierFeatures(1, mapping.width, rngs=rngs)
        self.noise_in = linear(mapping.width, mapping.width)
        self.augmentation_features = FourierFeatures(
            AUGMENTATION_FEATURES, mapping.width, rngs=rngs
        )
        self.augmentation_in = linear(mapping.width, mapping.width)
        self.class_embedding = (
            nnx.Embed(
                config.num_classes,
                mapping.width,
                embedding_init=nnx.initializers.normal(1.0),
                **kinds,
            )
            if config.num_classes
            else None
        )
        self.condition_in = (
            linear(config.condition_features, mapping.width) if config.condition_features else None
        )
        self.mapping = MappingNetwork(mapping, **kinds)

        def layers(level: Level) -> nnx.List:
            make = functools.partial(Layer, level, mapping.width, remat=remat, **kinds)
            attention = {"implementation": implementation, "spec": spec}
            return nnx.List([make(**attention) for _ in range(level.depth)])

        pairs = list(itertools.pairwise(levels))
        self.down = nnx.List([layers(level) for level in levels[:-1]])
        self.merges = nnx.List([linear(4 * fine.width, coarse.width) for fine, coarse in pairs])
        self.middle = layers(levels[-1])
        self.splits = nnx.List(
            [Split(coarse.width, fine.width, spec=spec, **kinds) for fine, coarse in pairs]
        )
        self.up = nnx.List([layers(level) for level in levels[:-1]])
        self.out_norm = RMSNorm(levels[0].width, param_dtype=param_dtype)
        self.patch_out = linear(
            levels[0].width, features * math.prod(config.patch_size), kernel_init=_ZEROS
        )

    def __call__(
        self,
        images: Float[Array, "B H W channels"],
        sigma: Float[Array, " B"],
        class_labels: Int[Array, " B"] | None = None,
        *,
        augmentation: Float[Array, "B 9"] | None = None,
        condition: Float[Array, "B features"] | None = None,
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "B H W channels"]:
        """What the network says about noisy images; `hdit_diffusion` makes denoised images of it.

        Args:
          images: noisy images, scaled to variance 1.
          sigma: standard deviation of each one's noise, above 0.
          class_labels: of each image; given if and only if the model has classes.
          augmentation: how the image was augmented; default zeros.
          condition: given if and only if the model has `condition_features`.
          deterministic: no dropout.
          rngs: source of the dropout keys; default the constructor's.

        Raises:
          ValueError: for images that the levels do not cut into whole tokens, conditions of another batch, a missing or unexpected condition, or a
            level's layout smaller than its window.
        """
        if images.ndim != 4 or images.shape[-1] != self.config.channels:
            raise ValueError(
                f"images must be [batch, height, width, {self.config.channels}]; got shape {tuple(images.shape)}"
            )
        self.config.check_layout(*images.shape[1:3])
        check_batch(len(images), sigma=sigma, class_labels=class_labels)
        check_batch(len(images), augmentation=augmentation, condition=condition)
        vector = self.embed(sigma, class_labels, augmentation, condition, deterministic, rngs)
        run = functools.partial(
            _run, vector=vector, deterministic=deterministic, rngs=rngs, config=self.config
        )
        patches = space_to_depth(images.astype(self.dtype), self.config.patch_size)
        x = rows(self.patch_in, patches, self.spec)
        skips = []
        for number, (layers, merge) in enumerate(zip(self.down, self.merges, strict=True)):
            x = run(layers, x, number)
            skips.append(x)
            x = rows(merge, space_to_depth(x, (2, 2)), self.spec)
        x = run(self.middle, x, len(skips))
        for number in reversed(range(len(skips))):
            x = run(self.up[number], self.splits[number](x, skips[number]), number)
        patches = rows(self.patch_out, self.out_norm(x), self.spec)
        return depth_to_space(patches, self.config.patch_size)

    def load_pretrained(self, path: str | Path) -> None:
        """Take every parameter from a checkpoint of k-diffusion's `image_transformer_v2`.

        Args:
          path: a `.safetensors`, `.pth`, `.pt` or `.bin` file, or a folder that holds the first.

        Raises:
          ValueError: a checkpoint of another model or size, naming keys; nothing is loaded then.
        """
        hdit_checkpoint.load_pretrained(self, path)

    def embed(
        self,
        sigma: Float[Array, " B"],
        class_labels: Int[Array, " B"] | None = None,
        augmentation: Float[Array, "B 9"] | None = None,
        condition: Float[Array, "B features"] | None = None,
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "B width"]:
        """The vector that conditions every layer; arguments as in `__call__`."""
        for name, given, module, field in (
            ("class_labels", class_labels, self.class_embedding, "num_classes"),
            ("condition", condition, self.condition_in, "condition_features"),
        ):
            if (given is None) != (module is None):
                raise ValueError(
                    f"{name} must be given if and only if the model has {field};"
                    f" got {name} {'absent' if given is None else 'present'},"
                    f" {field}={getattr(self.config, field)}"
                )
        if augmentation is None:
            augmentation = jnp.zeros((len(sigma), AUGMENTATION_FEATURES), jnp.float32)
        noise = jnp.log(sigma.astype(jnp.float32))[:, None] / 4
        vector = self.noise_in(self.noise_features(noise))
        vector += self.augmentation_in(self.augmentation_features(augmentation))
        if self.class_embedding is not None and class_labels is not None:
            vector += self.class_embedding(class_labels)
        if self.condition_in is not None and condition is not None:
            vector += self.condition_in(condition)
        return self.mapping(vector, deterministic, rngs)


def _run(
    layers: nnx.List,
    x: Array,
    number: int,
    *,
    vector: Array,
    deterministic: bool,
    rngs: nnx.Rngs | None,
    config: HDiTConfig,
) -> Array:
    """The layers of one level."""
    rotation = level_rotation(x.shape[1:3], config.levels[number])
    for layer in layers:
        run = _with_remat if layer.remat else Layer.__call__
        x = run(layer, x, vector, rotation, deterministic, rngs)
    return x


_with_remat = nnx.remat(
    Layer.__call__,
    static_argnums=(4,),
    policy=KEEP_ATTENTION,
)
