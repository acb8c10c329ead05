"""HunyuanVideo: a video transformer of MM-DiT blocks, on neighborhood attention.

Latents keep their grid, channels last: `[B, t, y, x, C]` in and out; patches are cut inside. Its text tokens:
`text_refiner`; its weights: `hunyuan_video_checkpoint`. Text encoders, the autoencoder and the sampler are not here, nor is the
image-to-video variant that replaces tokens.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Dtype
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from gna_jax.flax.partition import check_spec
from gna_jax.models.checkpoint import load_parameters, open_checkpoint
from gna_jax.models.hunyuan_video_checkpoint import hunyuan_video_entries
from gna_jax.models.joint import as_text_lengths
from gna_jax.models.mmdit import (
    TIME_FEATURES,
    JointTransformer,
    check_batch,
    check_rotary_dims,
    check_width,
)
from gna_jax.models.rotary import axial_rotation, inverse_frequencies
from gna_jax.models.schedule import Rule, resolve_rules
from gna_jax.models.text_refiner import TextRefiner
from gna_jax.tiling import Tiles


@dataclasses.dataclass(frozen=True)
class HunyuanVideoConfig:
    """Size of a HunyuanVideo transformer; the defaults are the published text-to-video model's.

    Attributes:
      in_channels, out_channels: of the latents.
      patch_size: latents per token, (t, y, x).
      num_double, num_single: blocks of each kind; the double ones come first.
      num_refiner: blocks of the text refiner.
      num_heads, head_dim: their product is the width.
      text_features, pooled_features: of the text tokens (an LLM's) and of the pooled text (CLIP).
      guidance: whether the guidance scale is an input (distilled models).
      rotary_dims: rotated features per head for (t, y, x); their sum is `head_dim`.
      theta: base of the rotary frequencies.
      mlp_ratio: width of the MLPs over the width.
    """

    in_channels: int = 16
    out_channels: int = 16
    patch_size: tuple[int, int, int] = (1, 2, 2)
    num_double: int = 20
    num_single: int = 40
    num_refiner: int = 2
    num_heads: int = 24
    head_dim: int = 128
    text_features: int = 4096
    pooled_features: int = 768
    guidance: bool = True
    rotary_dims: tuple[int, int, int] = (16, 56, 56)
    theta: float = 256.0
    mlp_ratio: float = 4.0

    def __post_init__(self):
        check_rotary_dims(self.rotary_dims, self.head_dim)

    @property
    def features(self) -> int:
        """Width of the transformer."""
        return self.num_heads * self.head_dim


HUNYUAN_VIDEO = {"t2v": HunyuanVideoConfig()}
"""Published sizes by name."""


class HunyuanVideoTransformer(JointTransformer):
    """Velocity of video latents, given text of different lengths, pooled text, time and (distilled models) guidance.

    Args:
      config: the size.
      implementation, tiles, spec: as in the blocks; latents are sharded as the spec's batch and space.
      remat: recompute each block in the backward, except its attention.
      dtype, param_dtype: of the computation (None: the common dtype of inputs and parameters) and of the parameters.
      rngs: `params`.

    To load weights without making random ones first, make the model abstract:
    `model = nnx.eval_shape(lambda: hunyuan_video("t2v", param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))`.
    """

    def __init__(
        self,
        config: HunyuanVideoConfig,
        *,
        implementation: str | Sequence[str] | None = None,
        tiles: Tiles | None = None,
        spec: PartitionSpec | None = None,
        remat: bool = False,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        made: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        check_spec(spec, rank=3)
        options = {"implementation": implementation, "tiles": tiles, "spec": spec, "remat": remat}
        width, patch = config.features, math.prod(config.patch_size)
        super().__init__(config, patch * config.out_channels, **options, **made)
        self.patch_embedder = nnx.Linear(patch * config.in_channels, width, **made)
        self.text_refiner = TextRefiner(
            config.text_features, width, config.num_heads, config.num_refiner, TIME_FEATURES, **made
        )

    def __call__(
        self,
        latents: Float[Array, "B t y x C"],
        text: Float[Array, "B S text_features"],
        pooled_text: Float[Array, "B pooled_features"],
        timestep: Float[Array, " B"],
        guidance: Float[Array, " B"] | None = None,
        *,
        text_lengths: Int[Array, " B"] | None = None,
        rules: Rule | Sequence[Rule] = None,
    ) -> Float[Array, "B t y x out_channels"]:
        """One evaluation.

        Args:
          latents: video latents, every axis a multiple of the patch.
          text: text tokens, each sample's own first.
          pooled_text: one vector per sample.
          timestep: 0 to 1000.
          guidance: guidance scale times 1000, for distilled models only.
          text_lengths: text tokens of each sample; None: all. Nothing depends on the tokens after them.
          rules: window of every layer at this step, in tokens (after patches), static: `AttentionSchedule.at(step)`, one
            rule for all layers, or None: dense.

        Raises:
          ValueError: for inputs of another width or batch, a grid that the patch does not divide, guidance that is missing or
            unasked for, rules that do not fit, or a grid that a window does not fit.
        """
        config = self.config
        check_width("latents", latents, 5, config.in_channels)
        check_width("text", text, 3, config.text_features)
        check_width("pooled_text", pooled_text, 2, config.pooled_features)
        named = {"text": text, "pooled_text": pooled_text, "timestep": timestep}
        check_batch(latents.shape[0], **named, guidance=guidance)
        text_lengths = as_text_lengths(text_lengths, *text.shape[:2])
        vector = self.condition(pooled_text, timestep, guidance)
        patches = _patches(latents, config.patch_size)
        rules = resolve_rules(rules, self.num_layers, patches.shape[1:4])
        video = self.patch_embedder(patches)
        tokens = self.text_refiner(text, timestep, text_lengths)
        frequencies = [inverse_frequencies(dim, config.theta) for dim in config.rotary_dims]
        rotation = axial_rotation([np.arange(length) for length in video.shape[1:4]], frequencies)
        video = self.run_blocks(video, tokens, vector, rotation, text_lengths, rules)
        return _latents(self.output(video, vector), config.patch_size)

    def load_pretrained(self, path: str | Path) -> None:
        """Take the weights of a checkpoint in diffusers' layout, a file or a folder (`transformer/`).

        Raises:
          ValueError: naming keys that are missing, unused, or of another size than the model.
        """
        config = self.config
        entries = hunyuan_video_entries(
            config.num_double,
            config.num_single,
            config.num_refiner,
            config.num_heads,
            config.features,
            config.guidance,
        )
        load_parameters(self, open_checkpoint(path), entries)


def hunyuan_video(name: str = "t2v", *, rngs: nnx.Rngs, **options: Any) -> HunyuanVideoTransformer:
    """A HunyuanVideo transformer of a published size, with random weights; options as `HunyuanVideoTransformer`'s.

    Raises:
      ValueError: for another name.
    """
    if name not in HUNYUAN_VIDEO:
        raise ValueError(
            f"HunyuanVideo comes as {' or '.join(map(repr, HUNYUAN_VIDEO))}; got {name!r};"
            " for another size use HunyuanVideoTransformer(HunyuanVideoConfig(..))"
        )
    return HunyuanVideoTransformer(HUNYUAN_VIDEO[name], rngs=rngs, **options)


def _patches(latents: Array, patch_size: tuple[int, ...]) -> Float[Array, "B t y x features"]:
    """Tokens of `patch_size` latents each, features in the order (t, y, x, channel)."""
    batch, *lengths, channels = latents.shape
    if any(length % patch for length, patch in zip(lengths, patch_size, strict=True)):
        raise ValueError(
            f"latents must be a multiple of the patch {patch_size} on every axis (t, y, x); got {tuple(lengths)}"
        )
    (t, y, x), (pt, py, px) = lengths, patch_size
    split = latents.reshape(batch, t // pt, pt, y // py, py, x // px, px, channels)
    grid = split.transpose(0, 1, 3, 5, 2, 4, 6, 7)
    return grid.reshape(*grid.shape[:4], -1)


def _latents(tokens: Array, patch_size: tuple[int, ...]) -> Float[Array, "B t y x C"]:
    """Back to latents; here a token's features are in the order (channel, t, y, x), as the published weights have it."""
    batch, t, y, x, _ = tokens.shape
    pt, py, px = patch_size
    split = tokens.reshape(batch, t, y, x, -1, pt, py, px)
    return split.transpose(0, 1, 5, 2, 6, 3, 7, 4).reshape(batch, t * pt, y * py, x * px, -1)
