"""The Cosmos-Predict diffusion transformers, 1 (7B, 14B) and 2 (2B, 14B), with neighborhood attention over the video's tokens.

Text enters by cross attention only, so `gna` takes the place of self-attention and nothing has to be merged. Blocks:
`cosmos_blocks`; sizes: `cosmos_presets`; published windows: `cosmos_windows`; weights: `cosmos_checkpoint`. Neither the video
tokenizer nor the text encoder nor a sampler lives here.

A video is [B, T, Y, X, C], latents of the tokenizer; a patch of it is a token. Architecture: arXiv 2501.03575.
"""

import functools
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
from gna_jax.models.cosmos_blocks import (
    NORM_EPSILON,
    AdaptiveNorm,
    CosmosBlock,
    TimeVectors,
    rms_norm,
)
from gna_jax.models.cosmos_checkpoint import cosmos_entries
from gna_jax.models.cosmos_presets import COSMOS, CosmosConfig
from gna_jax.models.joint import as_text_lengths
from gna_jax.models.mmdit import check_batch, check_width
from gna_jax.models.remat import run_block
from gna_jax.models.rotary import Rotation, axial_rotation, inverse_frequencies
from gna_jax.models.schedule import Rule, resolve_rules
from gna_jax.models.timestep import sinusoidal_features
from gna_jax.tiling import Tiles

TRAINING_FPS = 24
"""Frames per second at which a latent frame is one position of the rotary embedding."""
_THETA = 10000.0


class LearnedPositions(nnx.Module):
    """Learned positions per axis, added up over the grid and divided by their root mean square."""

    def __init__(self, config: CosmosConfig, *, param_dtype: Dtype, rngs: nnx.Rngs):
        self.t, self.y, self.x = (
            nnx.Param(0.02 * rngs.params.normal((length, config.features), param_dtype))
            for length in config.max_layout
        )

    def __call__(self, layout: tuple[int, int, int]) -> Float[Array, "1 T Y X C"]:
        """Positions of a grid, float32."""
        t, y, x = (
            param[:length].astype(jnp.float32)
            for param, length in zip((self.t, self.y, self.x), layout, strict=True)
        )
        total = t[:, None, None] + y[None, :, None] + x[None, None]
        square = jnp.mean(total**2, axis=-1, keepdims=True)
        some = square > 0  # the root's derivative at 0 is infinite
        size = jnp.where(some, jnp.sqrt(jnp.where(some, square, 1)), 0)
        return (total / (NORM_EPSILON + size))[None]


class CosmosTransformer(nnx.Module):
    """A whole Cosmos-Predict diffusion transformer: a video's latents, a timestep and text to a prediction for the latents.

    Args:
      config: the size.
      implementation, tiles, spec: as in `CosmosSelfAttention`; latents are sharded as the spec's batch and space.
      remat: recompute each block in the backward, except its attention.
      dtype, param_dtype: of the computation (None: the common dtype of inputs and parameters) and of the parameters.
      rngs: `params`.

    To load weights without making random ones first, make the model abstract:
    `model = nnx.eval_shape(lambda: cosmos("predict2-2b-video2world", param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))`.
    """

    def __init__(
        self,
        config: CosmosConfig,
        *,
        implementation: str | Sequence[str] | None = None,
        tiles: Tiles | None = None,
        spec: PartitionSpec | None = None,
        remat: bool = False,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_spec(spec, rank=3)
        self.config = config
        self.remat = remat
        made: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        linear = functools.partial(nnx.Linear, use_bias=False, **made)
        width, patch = config.features, math.prod(config.patch_size)
        self.patch_embed = linear((config.in_channels + config.padding_mask) * patch, width)
        self.positions = (
            LearnedPositions(config, param_dtype=param_dtype, rngs=rngs)
            if config.learned_positions
            else None
        )
        self.time_1 = linear(width, width)
        self.time_2 = linear(width, 3 * width)
        self.time_norm = rms_norm(width, NORM_EPSILON, **made)
        options: dict[str, Any] = {"implementation": implementation, "tiles": tiles, "spec": spec}
        self.blocks = nnx.List(
            [CosmosBlock(config, **options, **made) for _ in range(config.num_layers)]
        )
        self.norm_out = AdaptiveNorm(width, config.modulation_rank, vectors=2, **made)
        self.out = linear(width, config.out_channels * patch)

    @property
    def num_layers(self) -> int:
        """Attention layers that rules are for."""
        return self.config.num_layers

    def __call__(
        self,
        latents: Float[Array, "B T Y X C"],
        timesteps: Float[Array, " B *frames"],
        text: Float[Array, "B S text_features"],
        *,
        text_lengths: Int[Array, " B"] | None = None,
        fps: float | None = None,
        condition_mask: Float[Array, "B T Y X 1"] | None = None,
        padding_mask: Float[Array, "b y x"] | None = None,
        rules: Rule | Sequence[Rule] = None,
    ) -> Float[Array, "B T Y X out_channels"]:
        """One evaluation.

        Args:
          latents: noisy latents, T, Y and X multiples of the patch size.
          timesteps: one per sample, or one per sample and frame; as the sampler scales them.
          text: text tokens. `text_lengths`: how many of them each sample sees; None: all, padding too, as published.
          fps: frames per second of the video; None: as in training, or an image.
          condition_mask: 1 where a frame is given and not predicted: the last input channel of video2world models.
          padding_mask: 1 where pixels are padding, at any resolution, for one sample or each. None: no padding.
          rules: window of every layer at this step, static: `AttentionSchedule.at(step)`, one rule for all layers, or None:
            dense. For the published ones see `cosmos_windows`.

        Raises:
          ValueError: inputs of another width or shape, a size that patches do not divide or that is larger than
            `config.max_size`, rules that do not fit, or a grid that a window does not fit.
        """
        config = self.config
        check_width("text", text, 3, config.text_features)
        inputs = _with_masks(config, latents, condition_mask, padding_mask)
        layout = _layout(config, latents.shape[1:4])
        check_batch(latents.shape[0], timesteps=timesteps, text=text, condition_mask=condition_mask)
        text_lengths = as_text_lengths(text_lengths, *text.shape[:2])
        rules = resolve_rules(rules, self.num_layers, layout)
        x = self.patch_embed(_to_patches(inputs, config.patch_size))
        time = self._time_vectors(timesteps, layout, x.dtype)
        rotation = cosmos_rotation(config, layout, fps)
        positions = None if self.positions is None else self.positions(layout)
        for block, rule in zip(self.blocks, rules, strict=True):
            x = run_block(
                block, self.remat, x, text, time, rotation, positions, text_lengths, rule=rule
            )
        x, _ = self.norm_out(x, time)
        return _from_patches(self.out(x), config.patch_size)

    def load_pretrained(self, path: str | Path) -> None:
        """Take the weights of a checkpoint in diffusers' layout: a `.safetensors` file, its index or its folder.

        Raises:
          ValueError: keys that are missing or unused, or a tensor of another size; the message names them.
        """
        load_parameters(self, open_checkpoint(path), cosmos_entries(self.config))

    def _time_vectors(
        self, timesteps: Array, layout: tuple[int, int, int], dtype: Dtype
    ) -> TimeVectors:
        """Vectors of the timesteps, with axes for the video's."""
        timesteps = jnp.asarray(timesteps)
        if timesteps.ndim not in (1, 2) or timesteps.shape[1:] not in ((), layout[:1]):
            raise ValueError(
                f"timesteps must be one per sample [B] or one per sample and frame [B, {layout[0]}];"
                f" got shape {timesteps.shape}"
            )
        features = sinusoidal_features(timesteps.reshape(-1), self.config.features).astype(dtype)
        features = features.reshape(timesteps.shape[0], -1, 1, 1, self.config.features)
        modulation = self.time_2(nnx.silu(self.time_1(features)))
        return TimeVectors(self.time_norm(features), modulation)


def cosmos(name: str, *, rngs: nnx.Rngs, **options: Any) -> CosmosTransformer:
    """A Cosmos-Predict transformer of a published size, `"predict2-2b-video2world"` say, with random weights.

    Options are `CosmosTransformer`'s.

    Raises:
      ValueError: for another name.
    """
    if name not in COSMOS:
        raise ValueError(
            f"Cosmos-Predict comes as {', '.join(COSMOS)}; got {name!r};"
            " for another size use CosmosTransformer(CosmosConfig(..))"
        )
    return CosmosTransformer(COSMOS[name], rngs=rngs, **options)


def _layout(config: CosmosConfig, video: tuple[int, ...]) -> tuple[int, int, int]:
    """Tokens along T, Y and X."""
    axes = tuple(zip("TYX", video, config.patch_size, config.max_size, strict=True))
    for axis, latents, patch, largest in axes:
        if latents % patch or latents > largest:
            raise ValueError(
                f"latents along {axis} must be a multiple of the patch, {patch}, and at most {largest};"
                f" got {latents}; pad or crop the video, or make the model with a larger max_size"
            )
    t, y, x = (latents // patch for _, latents, patch, _ in axes)
    return t, y, x


def _with_masks(
    config: CosmosConfig,
    latents: Array,
    condition_mask: Array | None,
    padding_mask: Array | None,
) -> Array:
    """The latents with the masks as further channels."""
    parts = [latents] if condition_mask is None else [latents, condition_mask.astype(latents.dtype)]
    channels = sum(part.shape[-1] for part in parts)
    if latents.ndim != 5 or channels != config.in_channels:
        raise ValueError(
            f"latents must be [B, T, Y, X, channels] with {config.in_channels} channels, the condition mask's included;"
            f" got latents of shape {latents.shape},"
            f" {'no condition_mask' if condition_mask is None else f'condition_mask of shape {condition_mask.shape}'}"
        )
    if padding_mask is not None and not config.padding_mask:
        raise ValueError("this model takes no padding_mask; got one; leave it out")
    if config.padding_mask:
        batch, frames, *plane = latents.shape[:-1]
        if padding_mask is None:
            padding_mask = jnp.zeros((1, *plane), latents.dtype)
        nearest = [
            np.arange(size) * given // size
            for size, given in zip(plane, padding_mask.shape[1:], strict=True)
        ]
        small = padding_mask[:, nearest[0]][:, :, nearest[1]].astype(latents.dtype)
        parts.append(jnp.broadcast_to(small[:, None, ..., None], (batch, frames, *plane, 1)))
    return jnp.concatenate(parts, axis=-1)


def _to_patches(video: Array, patch: tuple[int, int, int]) -> Float[Array, "B T Y X features"]:
    """Tokens; features of a patch in the order channel, t, y, x."""
    batch, *size, channels = video.shape
    (t, y, x), (pt, py, px) = (n // p for n, p in zip(size, patch, strict=True)), patch
    cut = video.reshape(batch, t, pt, y, py, x, px, channels).transpose(0, 1, 3, 5, 7, 2, 4, 6)
    return cut.reshape(batch, t, y, x, -1)


def _from_patches(tokens: Array, patch: tuple[int, int, int]) -> Float[Array, "B T Y X C"]:
    """A video of tokens whose features are in the order y, x, t, channel: not the order of the input's, as published."""
    batch, *layout, _ = tokens.shape
    pt, py, px = patch
    cut = tokens.reshape(batch, *layout, py, px, pt, -1).transpose(0, 1, 6, 2, 4, 3, 5, 7)
    return cut.reshape(batch, *(n * p for n, p in zip(layout, patch, strict=True)), -1)


def cosmos_rotation(
    config: CosmosConfig, layout: tuple[int, int, int], fps: Any = None
) -> Rotation:
    """Rotary table of a grid: a third of the pairs for Y and for X each, the rest for T."""
    plane = config.head_dim // 6 * 2
    dims = (config.head_dim - 2 * plane, plane, plane)
    # Stretches the longest period by the scale and leaves the shortest as it is.
    frequencies = [
        inverse_frequencies(dim, _THETA * scale ** (dim / (dim - 2)))
        for dim, scale in zip(dims, config.rope_scale, strict=True)
    ]
    positions: list[Any] = [np.arange(length) for length in layout]
    if fps is not None:
        positions[0] = positions[0] / fps * TRAINING_FPS
    return axial_rotation(positions, frequencies)
