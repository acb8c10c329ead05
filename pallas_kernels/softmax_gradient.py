"""The softmax's derivative for one tile of scores, float32: weights and the gradient of the scores. No memory, no layouts."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.online_softmax import LOG2_E


def weights_of(
    scores: jax.Array, lse: jax.Array, mask: jax.Array | None, *, scale: float, query_axis: int
) -> jax.Array:
    """`P = exp(scale * S - lse)`; hidden pairs are exactly 0.

    Args:
      scores: S, query times key, not scaled: [queries, keys], or [keys, queries].
      lse: one per query, in base 2.
      mask: whether the query sees the key; None where every one does.
      scale: the call's.
      query_axis: the axis of scores that counts queries.
    """
    weights = jnp.exp2(scores * (scale * LOG2_E) - _spread(lse, scores, query_axis))
    return weights if mask is None else jnp.where(mask, weights, 0.0)


def less_delta(delta: jax.Array, scores: jax.Array, *, query_axis: int) -> jax.Array:
    """`-delta` in the shape of `scores`: where the sum `dO V^T - delta` starts.

    The gradient of the scores is `dS / scale = P * (dO V^T - delta)`: the scale is left out and applied once, to dQ and dK.

    Args:
      delta: one per query, see `row_statistics.delta`.
      scores: as in `weights_of`.
      query_axis: the axis of scores that counts queries.
    """
    return _spread(-delta, scores, query_axis)


def _spread(statistic: jax.Array, scores: jax.Array, query_axis: int) -> jax.Array:
    return lax.broadcast_in_dim(statistic, scores.shape, (query_axis,))
