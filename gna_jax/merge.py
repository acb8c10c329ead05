"""Merging attention over disjoint sets of keys, from each set's output and log-sum-exp."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def merge_attentions(
    outputs: Sequence[Float[Array, "*rows V"]], lses: Sequence[Float[Array, "*rows"]]
) -> tuple[Float[Array, "*rows V"], Float[Array, "*rows"]]:
    """One softmax over all keys, from attentions over parts of them: exact, and differentiable as such.

    `lse = log(sum_p exp(lse_p))`, `out = sum_p exp(lse_p - lse) out_p`, in float32 (float64 for float64). A row that no
    part sees (every lse -inf) gets out 0, lse -inf and no gradient; nothing is ever NaN for it.

    Args:
      outputs: one array per part, same shape and dtype.
      lses: their natural log-sum-exps, the outputs' shape without its last axis.

    Returns:
      Merged out in the outputs' dtype, merged lse in the lses'.

    Raises:
      ValueError: for no parts, or parts that disagree in number or shape.
    """
    outputs, lses = [jnp.asarray(x) for x in outputs], [jnp.asarray(x) for x in lses]
    if not outputs or len(outputs) != len(lses):
        raise ValueError(
            f"merge_attentions needs as many lses as outputs, at least one; got {len(outputs)} outputs, {len(lses)} lses"
        )
    for out, lse in zip(outputs, lses, strict=True):
        if out.shape != outputs[0].shape or lse.shape != out.shape[:-1]:
            raise ValueError(
                "outputs must share one shape [.., V] and lses be that shape without V;"
                f" got outputs {[x.shape for x in outputs]}, lses {[x.shape for x in lses]}"
            )
    stacked = jnp.stack(lses)  # [parts, *rows]
    peak = jax.lax.stop_gradient(jnp.max(stacked, axis=0))
    seen = peak != -jnp.inf
    # Where a part is -inf its weight is a constant 0: a select keeps -inf - -inf, and its gradient, out.
    finite = stacked != -jnp.inf
    shifted = jnp.where(finite, stacked, 0) - jnp.where(seen, peak, 0)[None]
    weights = jnp.where(finite, jnp.exp(jnp.where(finite, shifted, 0)), 0)
    total = jnp.where(seen, jnp.sum(weights, axis=0), 1)
    share = (weights / total[None])[..., None]
    # A part that a row does not see adds nothing, forward or backward, whatever its out holds.
    wide = jnp.where(share != 0, jnp.stack(outputs).astype(share.dtype), 0)
    out = jnp.sum(share * wide, axis=0)
    lse = jnp.where(seen, jnp.where(seen, peak, 0) + jnp.log(total), -jnp.inf)
    return out.astype(outputs[0].dtype), lse
