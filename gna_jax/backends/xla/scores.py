"""Arithmetic on one tile: heads, scores with mask and bias, products.

Shapes of a tile: rows `[B, K, M, H]` and box `[B, K, S, H]`, where K counts key/value heads, M = (query heads per
key/value head) x (queries of the tile), S keys of the box. Scores are kept transposed, `[B, K, S, M]`: then four of the
backward's five products, and the forward's first, read both operands as they lie; a product that contracts a
matrix's first axis makes XLA transpose it.
"""

from typing import Any

import jax
import jax.numpy as jnp

from gna_jax.backends.xla.bias import BiasDiagonals
from gna_jax.backends.xla.tile import Tile
from gna_jax.problem import Operands, Problem


def split_heads(problem: Problem, rows: jax.Array) -> jax.Array:
    """`[B, T, N, H]` -> `[B, K, M, H]`."""
    batch, count, _, dim = rows.shape
    kv_heads, per_kv = problem.kv_heads, problem.heads_per_kv
    rows = rows.reshape(batch, count, kv_heads, per_kv, dim).transpose(0, 2, 3, 1, 4)
    return rows.reshape(batch, kv_heads, per_kv * count, dim)


def merge_heads(problem: Problem, columns: jax.Array) -> jax.Array:
    """`[B, K, H, M]` -> `[B, T, N, H]`."""
    batch, kv_heads, dim, rows = columns.shape
    per_kv = problem.heads_per_kv
    columns = columns.reshape(batch, kv_heads, dim, per_kv, rows // per_kv)
    return columns.transpose(0, 4, 1, 3, 2).reshape(batch, rows // per_kv, problem.query_heads, dim)


def box_heads(problem: Problem, columns: jax.Array) -> jax.Array:
    """`[B, S, K, H]` -> `[B, K, S, H]` in the dtype that is multiplied, written out.

    The barrier keeps XLA from fusing the strided read of the box into the product's own copies: on a CPU that fused
    copy takes ten times as long as the two apart.
    """
    columns = columns.transpose(0, 2, 1, 3).astype(multiplied_dtype(problem))
    return jax.lax.optimization_barrier(columns)


def merge_box(columns: jax.Array) -> jax.Array:
    """`[B, K, S, H]` -> `[B, S, K, H]`."""
    return columns.transpose(0, 2, 1, 3)


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
    tile: Tile,
    query: jax.Array,
    key: jax.Array,
) -> jax.Array:
    """Scaled scores of a tile against its box, plus bias, -inf where the row does not see the column."""
    scores = matmul(problem, "bksh,bkmh->bksm", key, query) * problem.scale
    if problem.has_bias:
        scores = scores + bias.of_tile(arrays.bias, tile)
    return masked(problem, tile, scores, -jnp.inf)


def masked(problem: Problem, tile: Tile, scores: jax.Array, fill: float) -> jax.Array:
    """`scores` with `fill` where the row does not see the column.

    A select, never arithmetic: whatever stands outside the window, huge or infinite, is replaced.
    """
    if tile.is_full:
        return scores
    by_head = (*scores.shape[:3], problem.heads_per_kv, tile.num_queries)
    seen = tile.mask().T.reshape(1, 1, tile.num_keys, 1, tile.num_queries)
    filled = jnp.where(seen, scores.reshape(by_head), jnp.asarray(fill, scores.dtype))
    return filled.reshape(scores.shape)


def additional_scores(
    problem: Problem, arrays: Operands, query: jax.Array, key: jax.Array
) -> jax.Array:
    """Scaled scores against the additional keys, -inf past a sample's length: `[B, K, S, M]`."""
    scores = matmul(problem, "bksh,bkmh->bksm", key, query) * problem.scale
    return mask_additional(arrays, scores, -jnp.inf)


def mask_additional(arrays: Operands, scores: jax.Array, fill: float) -> jax.Array:
    """`scores [B, K, S, M]` with `fill` past each sample's additional length."""
    if arrays.additional_lengths is None:
        return scores
    column = jnp.arange(scores.shape[2], dtype=jnp.int32)[None, :]
    seen = column < arrays.additional_lengths[:, None]
    return jnp.where(seen[:, None, :, None], scores, jnp.asarray(fill, scores.dtype))
