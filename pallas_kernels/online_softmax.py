"""Online softmax in base 2, float32: the running state of a block of rows, and one tile's step. No memory, no layouts."""

import math
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
