"""Arithmetic on a group of tiles: heads, scores with mask and bias, products.

Shapes: rows `[G, B, K, M, H]` and boxes `[G, B, K, S, H]` of G tiles, where K counts key/value heads, M = (query heads
per key/value head) x (queries of a tile), S keys of a box. A product is fast when it reads the scores as they lie, so they lie
as most products of a pass want them: the forward's `[.., M, S]`, for out = P V; the backward's `[.., S, M]`, for dV and dK
(its dQ needs the box transposed, which is the smaller operand). `TileGroup.rows_first` tells them apart.
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


def merge_heads(problem: Problem, rows: jax.Array) -> jax.Array:
    """`[G, B, K, M, H]` -> `[G, B, T, N, H]`."""
    *lead, kv_heads, count, dim = rows.shape
    per_kv = problem.heads_per_kv
    rows = rows.reshape(*lead, kv_heads, per_kv, count // per_kv, dim).transpose(0, 1, 4, 2, 3, 5)
    return rows.reshape(*lead, count // per_kv, problem.query_heads, dim)


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
    scores = _products(problem, group, query, key) * problem.scale
    if problem.has_bias:
        scores = scores + bias.of_group(arrays.bias, group)
    return masked(problem, group, scores, -jnp.inf)


def _products(problem: Problem, group: TileGroup, query: jax.Array, key: jax.Array) -> jax.Array:
    """Dot products of rows and columns, as the pass's scores lie; `key` `[.., S, H]` with or without G."""
    columns = "gbksh" if key.ndim == 5 else "bksh"
    if group.rows_first:
        return matmul(problem, f"gbkmh,{columns}->gbkms", query, key)
    return matmul(problem, f"{columns},gbkmh->gbksm", key, query)


def masked(problem: Problem, group: TileGroup, scores: jax.Array, fill: float) -> jax.Array:
    """`scores` with `fill` where the row does not see the column.

    A select, never arithmetic: whatever stands outside the window, huge or infinite, is replaced.
    """
    if group.is_full:
        return scores
    seen, rows = group.seen(), (problem.heads_per_kv, group.num_queries)
    if group.rows_first:
        by_head = (*scores.shape[:-2], *rows, group.num_keys)
        seen = seen.reshape(seen.shape[0], 1, 1, 1, group.num_queries, group.num_keys)
    else:
        by_head = (*scores.shape[:-1], *rows)
        seen = seen.reshape(seen.shape[0], 1, 1, group.num_keys, 1, group.num_queries)
    filled = jnp.where(seen, scores.reshape(by_head), jnp.asarray(fill, scores.dtype))
    return filled.reshape(scores.shape)


def additional_scores(
    problem: Problem, arrays: Operands, group: TileGroup, query: jax.Array, key: jax.Array
) -> jax.Array:
    """Scaled scores against the additional keys, -inf past a sample's length."""
    scores = _products(problem, group, query, key) * problem.scale
    return mask_additional(arrays, group, scores, -jnp.inf)


def mask_additional(
    arrays: Operands, group: TileGroup, scores: jax.Array, fill: float
) -> jax.Array:
    """Scores against the additional keys with `fill` past each sample's length."""
    if arrays.additional_lengths is None:
        return scores
    column = jnp.arange(arrays.additional_keys.shape[1], dtype=jnp.int32)[None, :]
    seen = (column < arrays.additional_lengths[:, None])[None, :, None]  # [1, B, 1, S]
    seen = seen[..., None, :] if group.rows_first else seen[..., None]
    return jnp.where(seen, scores, jnp.asarray(fill, scores.dtype))
