"""Arithmetic on a group of tiles: heads, scores with mask and bias, products.

Shapes: rows `[G, B, K, M, H]` and boxes `[G, B, K, S, H]` of G tiles, where K counts key/value heads, M = (query heads
per key/value head) x (queries of a tile), S keys of a box. Scores are kept transposed, `[G, B, K, S, M]`: then four of
the backward's five products, and the forward's first, read both operands as they lie; the fifth (and the forward's
second) needs the box transposed, which is the smaller operand.
"""

from typing import Any

import jax
import jax.numpy as jnp

from gna_jax.backends.xla.bias import BiasDiagonals
from gna_jax.backends.xla.tile_group import TileGroup
from gna_jax.problem import Operands, Problem


def split_heads(problem: Problem, rows: jax.Array) -> jax.Array:
    """`[G, B, T, N, H]` -> `[G, B, K, M, H]`."""
    *lead, count, _, dim = rows.shape
    kv_heads, per_kv = problem.kv_heads, problem.heads_per_kv
    rows = rows.reshape(*lead, count, kv_heads, per_kv, dim).transpose(0, 1, 3, 4, 2, 5)
    return rows.reshape(*lead, kv_heads, per_kv * count, dim)


def merge_heads(problem: Problem, columns: jax.Array) -> jax.Array:
    """`[G, B, K, H, M]` -> `[G, B, T, N, H]`."""
    *lead, kv_heads, dim, rows = columns.shape
    per_kv = problem.heads_per_kv
    columns = columns.reshape(*lead, kv_heads, dim, per_kv, rows // per_kv)
    columns = columns.transpose(0, 1, 5, 2, 4, 3)
    return columns.reshape(*lead, rows // per_kv, problem.query_heads, dim)


def box_heads(problem: Problem, columns: jax.Array) -> jax.Array:
    """`[.., S, K, H]` -> `[.., K, S, H]` in the dtype that is multiplied.

    The barrier keeps XLA from fusing the strided read of the box into the product's own copy: on a CPU that fused
    copy takes ten times as long as the two apart.
    """
    columns = jax.lax.optimization_barrier(columns)
    return jnp.swapaxes(columns, -2, -3).astype(multiplied_dtype(problem))


def box_heads_transposed(problem: Problem, columns: jax.Array) -> jax.Array:
    """`[.., S, K, H]` -> `[.., K, H, S]`, written out: a product that contracts S then reads both operands as they lie.

    Without the second barrier XLA folds the transpose back into the product, which a CPU then runs three times slower.
    """
    return jax.lax.optimization_barrier(jnp.swapaxes(box_heads(problem, columns), -1, -2))


def merge_box(columns: jax.Array) -> jax.Array:
    """`[.., K, S, H]` -> `[.., S, K, H]`."""
    return jnp.swapaxes(columns, -2, -3)


def multiplied_dtype(problem: Problem) -> Any:
    """Dtype of matrix operands: the inputs', but float32 on a CPU, which has no faster narrow product."""
    if problem.device.platform == "cpu":
        return problem.accumulator
    return problem.dtype


def matmul(problem: Problem, spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """einsum with accumulation in the accumulator's dtype."""
    dtype = multiplied_dtype(problem)
    return jnp.einsum(
        spec,
        a.astype(dtype),
        b.astype(dtype),
        precision=problem.precision,
        preferred_element_type=problem.accumulator,
    )


def box_scores(
    problem: Problem,
    arrays: Operands,
    bias: BiasDiagonals,
    group: TileGroup,
    query: jax.Array,
    key: jax.Array,
) -> jax.Array:
    """Scaled scores of tiles against their boxes, plus bias, -inf where the row does not see the column."""
    scores = matmul(problem, "gbksh,gbkmh->gbksm", key, query) * problem.scale
    if problem.has_bias:
        scores = scores + bias.of_group(arrays.bias, group)
    return masked(problem, group, scores, -jnp.inf)


def masked(problem: Problem, group: TileGroup, scores: jax.Array, fill: float) -> jax.Array:
    """`scores` with `fill` where the row does not see the column.

    A select, never arithmetic: whatever stands outside the window, huge or infinite, is replaced.
    """
    if group.is_full:
        return scores
    by_head = (*scores.shape[:-1], problem.heads_per_kv, group.num_queries)
    seen = group.seen()
    seen = seen.reshape(seen.shape[0], 1, 1, group.num_keys, 1, group.num_queries)
    filled = jnp.where(seen, scores.reshape(by_head), jnp.asarray(fill, scores.dtype))
    return filled.reshape(scores.shape)


def additional_scores(
    problem: Problem, arrays: Operands, query: jax.Array, key: jax.Array
) -> jax.Array:
    """Scaled scores against the additional keys, -inf past a sample's length: `[G, B, K, S, M]`."""
    scores = matmul(problem, "bksh,gbkmh->gbksm", key, query) * problem.scale
    return mask_additional(arrays, scores, -jnp.inf)


def mask_additional(arrays: Operands, scores: jax.Array, fill: float) -> jax.Array:
    """`scores [G, B, K, S, M]` with `fill` past each sample's additional length."""
    if arrays.additional_lengths is None:
        return scores
    column = jnp.arange(scores.shape[3], dtype=jnp.int32)[None, :]
    seen = column < arrays.additional_lengths[:, None]
    return jnp.where(seen[None, :, None, :, None], scores, jnp.asarray(fill, scores.dtype))
