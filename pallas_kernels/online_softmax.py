"""Online softmax in base 2, float32: the running state of a block of rows, and one tile's step. No memory, no layouts."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

LOG2_E = math.log2(math.e)
LEAST = -1e30
"""Where a row's running maximum starts: below every score, and finite, so that a row without keys stays free of NaN."""


class Softmax(NamedTuple):
    """The running state of a worker's rows: output by chunk of columns, largest score and sum of weights."""

    out: tuple[Any, ...]
    largest: Any
    total: Any


class Statistics(NamedTuple):
    """The running state of rows whose output is kept elsewhere: the score that counts as largest, and the sum of weights."""

    largest: Any
    total: Any


LARGEST_WEIGHT_LOG2 = 8.0
"""How far, in powers of 2, a score may pass what counts as the largest before the output is rescaled."""


def exponent_scale(scale: float) -> float:
    """What a score is multiplied by in the exponent of 2: above 0, since `update` applies the sign of `scale` before."""
    return (abs(scale) or 1.0) * LOG2_E


def update(
    state: Softmax, scores: jax.Array, mask: jax.Array | None, scale: float
) -> tuple[Softmax, jax.Array]:
    """Online softmax: `state` with the tile's rows summed and its output rescaled, and the tile's weights.

    Hidden scores are -inf and the running maximum is finite, so hidden weights are exactly 0, in rows without any key too.
    """
    shape, factor = scores.shape, exponent_scale(scale)
    rows = lambda x, shape: lax.broadcast_in_dim(x, shape, (0,))
    if scale <= 0:
        scores = scores * (-1.0 if scale else 0.0)
    if mask is not None:
        scores = jnp.where(mask, scores, -jnp.inf)
    largest = jnp.maximum(state.largest, scores.max(axis=1))
    decay = jnp.exp2((state.largest - largest) * factor)
    # One fused multiply-add per score: the scale is applied here, not to the scores.
    weights = jnp.exp2(scores * factor - rows(largest * factor, shape))
    total = state.total * decay + weights.sum(axis=1)
    out = tuple(accumulated * rows(decay, accumulated.shape) for accumulated in state.out)
    return Softmax(out, largest, total), weights


def signed(scores: jax.Array, scale: float) -> jax.Array:
    """Scores in the order of their weights: `exponent_scale` has lost the sign of `scale`."""
    return scores if scale > 0 else scores * (-1.0 if scale else 0.0)


def move_largest(
    state: Statistics, scores: Sequence[jax.Array], scale: float
) -> tuple[Statistics, jax.Array, jax.Array]:
    """First half of a lazy step: the state before the tile's weights, each row's decay of the output, and whether any decays.

    What counts as a row's largest score moves only where a score passes it by more than `LARGEST_WEIGHT_LOG2`. Weights and
    sums are relative to it, so the result is the same; weights are at most 256.

    Args:
      state: of the tiles before.
      scores: the tile's, in blocks of columns, `signed`, hidden ones -inf.
      scale: of the scores.
    """
    factor, largest = exponent_scale(scale), state.largest
    for block in scores:
        largest = jnp.maximum(largest, block.max(axis=1))
    growth = (largest - state.largest) * factor
    largest = jnp.where(growth > LARGEST_WEIGHT_LOG2, largest, state.largest)
    decay = jnp.exp2((state.largest - largest) * factor)
    return Statistics(largest, state.total * decay), decay, growth.max() > LARGEST_WEIGHT_LOG2


def weigh(state: Statistics, scores: jax.Array, scale: float) -> tuple[Statistics, jax.Array]:
    """Second half of a lazy step, a block of columns at a time: the state with the block's weights summed, and the weights."""
    factor = exponent_scale(scale)
    offset = lax.broadcast_in_dim(state.largest * factor, scores.shape, (0,))
    weights = jnp.exp2(scores * factor - offset)
    return state._replace(total=state.total + weights.sum(axis=1)), weights
