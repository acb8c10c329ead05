"""NAT and DiNAT: image transformers whose layers attend to neighborhoods, dilated in every other layer of DiNAT.

One class builds all variants from a `NATConfig`; `nat`, `dinat`, .. make the published sizes (`nat_presets`). Layers stand
in `nat_layers`, the keys of PyTorch's checkpoints in `nat_checkpoint`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer, PrecisionLike
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from gna_jax.flax.partition import check_spec
from gna_jax.models import nat_checkpoint
from gna_jax.models.nat_layers import (
    PUBLISHED_INITIAL,
    ConvolutionStem,
    Layers,
    Level,
    PatchStem,
    Rngs,
)
from gna_jax.models.nat_presets import (
    DINAT_ISOTROPIC_SIZES,
    DINAT_S_SIZES,
    DINAT_SIZES,
    NAT_ISOTROPIC_SIZES,
    NAT_SIZES,
    NATConfig,
)


class NAT(nnx.Module):
    """NAT or DiNAT: images `[B, height, width, channels]` to logits `[B, num_classes]`.

    Tokens, then levels of layers `x + drop_path(s1 * attention(norm1(x)))`, `x + drop_path(s2 * mlp(norm2(x)))`, then a
    norm, the mean over space and a linear head. Every layer has a learned relative position bias. A map smaller than
    window x dilation is padded with zeros on the right and the bottom before the projections, and cropped after; padding
    is seen by queries, as in the published models (arXiv 2204.07143, 2209.15001).

    Weight decay, as published, spares `relative_position_bias`.

    Args:
      config: the architecture.
      num_classes: 0: no head; the model returns the mean features `[B, C]`.
      in_channels: channels of the images.
      deterministic: no drop path if True. Default: what `train()` or `eval()` set, or the call says.
      dtype: dtype of the computation. Default: the common one of inputs and parameters.
      param_dtype: dtype of the parameters.
      precision: of all matrix products.
      implementation: of the attention, as in `gna_jax.gna`.
      remat: compute each layer again in the backward pass instead of keeping what is inside; attention's outputs are kept.
      kernel_init: of all matrix products. The published one suits hundreds of features; tens of features learn nothing from
        it for hundreds of steps, and do at once from `nnx.initializers.lecun_normal()`.
      spec: sharding of `[B, rows, columns, heads, head_dim]` over the mesh of `jax.set_mesh`: batch and heads, one entry per
        axis; weights of attention and MLP are sharded as the heads. None: not sharded.
      rngs: `params`, and `dropout` if the configuration's `drop_path` is above 0.

    Raises:
      NotImplementedError: for a spec that shards space.
    """

    def __init__(
        self,
        config: NATConfig,
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        deterministic: bool | None = None,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        precision: PrecisionLike = None,
        implementation: str | Sequence[str] | None = None,
        remat: bool = False,
        kernel_init: Initializer = PUBLISHED_INITIAL,
        spec: PartitionSpec | None = None,
        rngs: nnx.Rngs,
    ):
        check_spec(spec, rank=2)
        if spec is not None and any(entry is not None for entry in spec[1:3]):
            raise NotImplementedError(
                "NAT shards batch and heads: its maps shrink to a few tokens, which strided convolutions and padding to"
                f' whole windows cut unequally; got spec={spec}; write e.g. P("data", None, None, "heads", None)'
            )
        layers = Layers(
            dtype, param_dtype, precision, implementation, deterministic, kernel_init, rngs, spec
        )
        self.config = config
        self.num_classes = num_classes
        self.in_channels = in_channels
        if config.patch_size is None:
            self.stem = ConvolutionStem(layers, in_channels, config.dim)
        else:
            self.stem = PatchStem(layers, in_channels, config.dim, config.patch_size)
        self.levels = nnx.List(
            Level(layers, config, level, remat) for level in range(len(config.depths))
        )
        self.norm = layers.norm(config.level_dims[-1])
        self.head = layers.linear(config.level_dims[-1], num_classes) if num_classes else None

    def __call__(
        self,
        images: Float[Array, "B height width channels"],
        *,
        deterministic: bool | None = None,
        rngs: Rngs | None = None,
    ) -> Float[Array, "B classes"]:
        """Logits, or the mean features of a model without head.

        Args:
          images: one batch axis, channels last, normalized as the weights ask for (ImageNet's mean and deviation).
          deterministic: no drop path if True; takes precedence over the constructor's.
          rngs: source of the drop paths' keys; takes precedence over the constructor's.

        Raises:
          ValueError: for images of another rank or number of channels.
        """
        last = self.features(images, deterministic=deterministic, rngs=rngs)[-1]
        pooled = jnp.mean(self.norm(last), axis=(1, 2))
        return pooled if self.head is None else self.head(pooled)

    def features(
        self,
        images: Float[Array, "B height width channels"],
        *,
        deterministic: bool | None = None,
        rngs: Rngs | None = None,
    ) -> tuple[Float[Array, "B rows columns features"], ...]:
        """The map of each level before it is halved, as detectors use them; they add a norm of their own to each.

        Arguments and errors as in the call. The last map has not passed the final norm.
        """
        self._check(images)
        if isinstance(rngs, jax.Array):  # one key, and every drop path takes one of its own
            rngs = nnx.Rngs(dropout=rngs)
        x = self.stem(images)
        maps = []
        for level in self.levels:
            x = level(x, deterministic, rngs)
            maps.append(x)
            if level.downsample is not None:
                x = level.downsample(x)
        return tuple(maps)

    def load_pretrained(self, path: str | Path, *, head: bool = True) -> None:
        """Take every parameter from a PyTorch checkpoint: of the authors' repository, or of transformers (nat, dinat).

        For inference `model = nnx.eval_shape(lambda: dinat("base", drop_path=0.0, rngs=nnx.Rngs(0)))` is a model to load
        into that has spent neither time nor memory on initial values.

        Args:
          path: a `.pth` or `.safetensors` file, or a folder as transformers writes it.
          head: False: the model keeps its own head, to be trained on other classes.

        Raises:
          ValueError: a checkpoint of another model or size, naming keys; nothing is loaded then.
        """
        nat_checkpoint.load_pretrained(self, path, head=head)

    def _check(self, images: Any) -> None:
        if images.ndim != 4 or images.shape[-1] != self.in_channels:
            raise ValueError(
                f"images must be [batch, height, width, in_channels={self.in_channels}], channels last;"
                f" got images of shape {tuple(images.shape)}"
            )


def nat(size: str, *, drop_path: float | None = None, rngs: nnx.Rngs, **options: Any) -> NAT:
    """NAT (arXiv 2204.07143): `mini`, `tiny`, `small` or `base`.

    Args:
      size: one of `NAT_SIZES`.
      drop_path: rate of the last layer. Default: the published one.
      rngs: `params`, and `dropout` where the rate is above 0.
      **options: of `NAT`: `num_classes`, `in_channels`, `dtype`, `remat`, ..

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> from gna_jax.models.nat_model import nat
    >>> model = nnx.eval_shape(lambda: nat("tiny", rngs=nnx.Rngs(0)))
    >>> nnx.eval_shape(lambda m: m(jnp.zeros((2, 224, 224, 3)), deterministic=True), model).shape
    (2, 1000)
    """
    return _make("nat", NAT_SIZES, size, drop_path, rngs, options)


def dinat(size: str, *, drop_path: float | None = None, rngs: nnx.Rngs, **options: Any) -> NAT:
    """DiNAT (arXiv 2209.15001), NAT with every other layer dilated: `mini` to `large`, and variants of `large`.

    `large_384` and `large_384_11x11` are for images of 384 pixels, the latter with windows of 11; `large_21k` and
    `large_21k_11x11` for training on ImageNet-22K (`num_classes` then is the checkpoint's). Arguments as in `nat`.
    """
    return _make("dinat", DINAT_SIZES, size, drop_path, rngs, options)


def dinat_s(size: str, *, drop_path: float | None = None, rngs: nnx.Rngs, **options: Any) -> NAT:
    """DiNAT_s (arXiv 2209.15001): Swin's patches, merging and sizes. `tiny` to `large`, `large_384`, `large_21k`.

    Arguments as in `nat`.
    """
    return _make("dinat_s", DINAT_S_SIZES, size, drop_path, rngs, options)


def nat_isotropic(
    size: str, *, drop_path: float | None = None, rngs: nnx.Rngs, **options: Any
) -> NAT:
    """A ViT's layout with neighborhoods of 7x7 (arXiv 2209.15001): `small` or `base`. Arguments as in `nat`."""
    return _make("nat_isotropic", NAT_ISOTROPIC_SIZES, size, drop_path, rngs, options)


def dinat_isotropic(
    size: str, *, drop_path: float | None = None, rngs: nnx.Rngs, **options: Any
) -> NAT:
    """`nat_isotropic` with every other layer dilated by 2 (arXiv 2209.15001). Arguments as in `nat`."""
    return _make("dinat_isotropic", DINAT_ISOTROPIC_SIZES, size, drop_path, rngs, options)


def _make(
    family: str,
    sizes: Mapping[str, NATConfig],
    size: str,
    drop_path: float | None,
    rngs: nnx.Rngs,
    options: dict[str, Any],
) -> NAT:
    if size not in sizes:
        raise ValueError(
            f"{family} is published as {', '.join(sizes)}; got size={size!r};"
            " for another architecture write NAT(NATConfig(..), rngs=..)"
        )
    config = sizes[size]
    if drop_path is not None:
        config = dataclasses.replace(config, drop_path=drop_path)
    return NAT(config, rngs=rngs, **options)
