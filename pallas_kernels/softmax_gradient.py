"""The softmax's derivative for one tile of scores, float32: weights and the gradient of the scores. No memory, no layouts."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.online_softmax import LOG2_E


def weights_and_gradient(
    scores: jax.Array,
    products: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    mask: jax.Array | None,
    *,
    scale: float,
    query_axis: int,
) -> tuple[jax.Array, jax.Array]:
    """`P = exp(scale * S - lse)` and `dS / scale = P * (dO V^T - delta)`; hidden pairs are exactly 0 in both.

    Args:
      scores: S, query times key, not scaled: [queries, keys], or [keys, queries].
      products: dO V^T in the same order.
      lse: one per query, in base 2.
      delta: one per query, see `row_statistics.delta`.
      mask: whether the query sees the key; None where every one does.
      scale: the call's. The gradient leaves it out: it is applied once, to dQ and dK.
      query_axis: the axis of scores that counts queries.
    """
    spread = lambda x: lax.broadcast_in_dim(x, scores.shape, (query_axis,))
    weights = jnp.exp2(scores * (scale * LOG2_E) - spread(lse))
    if mask is not None:
        weights = jnp.where(mask, weights, 0.0)
    return weights, weights * (products - spread(delta))
