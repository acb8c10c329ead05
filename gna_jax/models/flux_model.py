"""FLUX.1: an image transformer of MM-DiT blocks, on neighborhood attention.

Packed latents stay on their grid: `[B, y, x, C]` in and out, where others flatten them. Its weights: `flux_checkpoint`. Text
encoders, the autoencoder and the sampler are not here.
"""

import dataclasses
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
from gna_jax.models.flux_checkpoint import flux_entries
from gna_jax.models.joint import as_text_lengths, hide_padding
from gna_jax.models.mmdit import (
    JointTransformer,
    check_batch,
    check_rotary_dims,
    check_width,
)
from gna_jax.models.rotary import Rotation, axial_rotation, inverse_frequencies
from gna_jax.models.schedule import Rule, resolve_rules
from gna_jax.tiling import Tiles


@dataclasses.dataclass(frozen=True)
class FluxConfig:
    """Size of a FLUX.1 transformer; the defaults are FLUX.1-dev's.

    Attributes:
      in_channels, out_channels: of a packed latent, 2 x 2 pixels of 16 channels.
      num_double, num_single: blocks of each kind; the double ones come first.
      num_heads, head_dim: their product is the width.
      text_features, pooled_features: of the text tokens (T5) and of the pooled text (CLIP).
      guidance: whether the guidance scale is an input (distilled models).
      rotary_dims: rotated features per head for (index of the image, y, x); their sum is `head_dim`.
      theta: base of the rotary frequencies.
      mlp_ratio: width of the MLPs over the width.
    """

    in_channels: int = 64
    out_channels: int = 64
    num_double: int = 19
    num_single: int = 38
    num_heads: int = 24
    head_dim: int = 128
    text_features: int = 4096
    pooled_features: int = 768
    guidance: bool = True
    rotary_dims: tuple[int, int, int] = (16, 56, 56)
    theta: float = 10000.0
    mlp_ratio: float = 4.0

    def __post_init__(self):
        check_rotary_dims(self.rotary_dims, self.head_dim)

    @property
    def features(self) -> int:
        """Width of the transformer."""
        return self.num_heads * self.head_dim


FLUX = {"dev": FluxConfig(), "schnell": FluxConfig(guidance=False)}
"""Published sizes by name."""


class FluxTransformer(JointTransformer):
    """Velocity of packed latents, given text, pooled text, time and (distilled models) guidance.

    Args:
      config: the size.
      implementation, tiles, spec: as in the blocks; latents are sharded as the spec's batch and space.
      remat: recompute each block in the backward, except its attention.
      dtype, param_dtype: of the computation (None: the common dtype of inputs and parameters) and of the parameters.
      rngs: `params`.

    To load weights without making random ones first, make the model abstract:
    `model = nnx.eval_shape(lambda: flux("dev", param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))`.
    """

    TIME_FACTOR = 1000.0
    """Timesteps run from 0 to 1."""

    def __init__(
        self,
        config: FluxConfig,
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
        check_spec(spec, rank=2)
        options = {"implementation": implementation, "tiles": tiles, "spec": spec, "remat": remat}
        super().__init__(config, config.out_channels, **options, **made)
        self.image_embedder = nnx.Linear(config.in_channels, config.features, **made)
        self.text_embedder = nnx.Linear(config.text_features, config.features, **made)

    def __call__(
        self,
        latents: Float[Array, "B y x C"],
        text: Float[Array, "B S text_features"],
        pooled_text: Float[Array, "B pooled_features"],
        timestep: Float[Array, " B"],
        guidance: Float[Array, " B"] | None = None,
        *,
        text_lengths: Int[Array, " B"] | None = None,
        rules: Rule | Sequence[Rule] = None,
    ) -> Float[Array, "B y x out_channels"]:
        """One evaluation.

        Args:
          latents: packed latents on their grid.
          text: embedded text tokens.
          pooled_text: one vector per sample.
          timestep: 0 to 1.
          guidance: guidance scale per sample, for distilled models only.
          text_lengths: text tokens of each sample; the published pipelines let padding take part (None).
          rules: window of every layer at this step, static: `AttentionSchedule.at(step)`, one rule for all layers, or None:
            dense.

        Raises:
          ValueError: for inputs of another width or batch, guidance that is missing or unasked for, rules that do not fit, or a
            grid that a window does not fit.
        """
        config = self.config
        check_width("latents", latents, 4, config.in_channels)
        check_width("text", text, 3, config.text_features)
        check_width("pooled_text", pooled_text, 2, config.pooled_features)
        named = {"text": text, "pooled_text": pooled_text, "timestep": timestep}
        check_batch(latents.shape[0], **named, guidance=guidance)
        text_lengths = as_text_lengths(text_lengths, *text.shape[:2])
        rules = resolve_rules(rules, self.num_layers, latents.shape[1:3])
        vector = self.condition(pooled_text, timestep, guidance)
        image = self.image_embedder(latents)
        text = self.text_embedder(hide_padding(text, text_lengths))
        rotation = self._rotation(latents.shape[1], latents.shape[2])
        image = self.run_blocks(image, text, vector, rotation, text_lengths, rules)
        return self.output(image, vector)

    def load_pretrained(self, path: str | Path) -> None:
        """Take the weights of a checkpoint in diffusers' layout, a file or a folder (`transformer/`).

        Raises:
          ValueError: naming keys that are missing, unused, or of another size than the model.
        """
        config = self.config
        entries = flux_entries(
            config.num_double, config.num_single, config.num_heads, config.features, config.guidance
        )
        load_parameters(self, open_checkpoint(path), entries)

    def _rotation(self, height: int, width: int) -> Rotation:
        """`[y, x, head_dim / 2]`: the first share of the pairs counts images, and there is one."""
        frequencies = [
            inverse_frequencies(dim, self.config.theta) for dim in self.config.rotary_dims
        ]
        positions = np.zeros(1), np.arange(height), np.arange(width)
        table = axial_rotation(positions, frequencies)
        return Rotation(table.cos[0], table.sin[0])


def flux(name: str, *, rngs: nnx.Rngs, **options: Any) -> FluxTransformer:
    """A FLUX.1 transformer of a published size, `"dev"` or `"schnell"`, with random weights; options as `FluxTransformer`'s.

    Raises:
      ValueError: for another name.
    """
    if name not in FLUX:
        raise ValueError(
            f"FLUX.1 comes as {' or '.join(map(repr, FLUX))}; got {name!r}; for another size use FluxTransformer(FluxConfig(..))"
        )
    return FluxTransformer(FLUX[name], rngs=rngs, **options)
