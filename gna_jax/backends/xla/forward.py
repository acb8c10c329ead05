"""Forward pass of the XLA backend: for each query tile, one softmax over its key box and the additional keys.

Memory and work are O(tokens x window): the largest intermediate is one tile's scores. Tiles and boxes come from
`tile_classes`, arithmetic on one tile from `scores`.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gna_jax.backends.xla import scores as tile_scores
from gna_jax.backends.xla.bias import BiasDiagonals
from gna_jax.backends.xla.loop_state import zeros_varying
from gna_jax.backends.xla.tile import grouped, ungrouped
from gna_jax.backends.xla.tile_classes import TileClass
from gna_jax.backends.xla.tile_group import TileGroup, for_each_group, loops, tiles_per_step
from gna_jax.problem import Operands, Problem


def forward(
    problem: Problem, operands: Operands, axes: tuple[tuple[TileClass, ...], ...]
) -> tuple[jax.Array, jax.Array]:
    """`out [B, *space, N, V]` in the query's dtype and `lse [B, *space, N]` in the accumulator's.

    A query that sees no key gets out 0 and lse -inf.
    """
    dilation = problem.neighborhood.dilation
    arrays = operands._replace(
        query=grouped(operands.query, dilation),
        key=grouped(operands.key, dilation),
        value=grouped(operands.value, dilation),
    )
    bias = BiasDiagonals.of(problem, axes)
    if problem.has_bias:
        arrays = arrays._replace(bias=bias.padded(operands.bias))
    space = arrays.query.shape[1:-2]
    heads = (problem.batch, *space, problem.query_heads)
    out = zeros_varying((*heads, problem.value_dim), operands.query.dtype, operands)
    lse = zeros_varying((*heads, 1), problem.accumulator, operands)

    def body(group: TileGroup, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        rows, row_lse = _attend(problem, arrays, bias, group)
        return group.write_queries(carry[0], rows), group.write_queries(carry[1], row_lse)

    carry = (out, lse)
    for classes in loops(axes):
        carry = for_each_group(
            classes, tiles_per_step(problem, classes), rows_first=True, body=body, carry=carry
        )
    out, lse = (ungrouped(x, problem.query_layout) for x in carry)
    return out, lse[..., 0]


class _Part(NamedTuple):
    """Keys of one kind: scores `[G, B, K, M, S]`, and values with their axes in an einsum."""

    scores: jax.Array
    value: jax.Array
    value_axes: str


def _attend(
    problem: Problem, arrays: Operands, bias: BiasDiagonals, group: TileGroup
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention of a group: out `[G, B, T, N, V]`, lse `[G, B, T, N, 1]`."""
    query = tile_scores.split_heads(problem, group.read_queries(arrays.query))
    key = tile_scores.box_heads(problem, group.read_keys(arrays.key))
    value = tile_scores.box_heads(problem, group.read_keys(arrays.value))
    scores = tile_scores.box_scores(problem, arrays, bias, group, query, key)
    parts = [_Part(scores, value, "gbksh")]
    if problem.num_additional:
        key = tile_scores.box_heads(problem, arrays.additional_keys)
        value = tile_scores.box_heads(problem, arrays.additional_values)
        scores = tile_scores.additional_scores(problem, arrays, group, query, key)
        parts.append(_Part(scores, value, "bksh"))
    peaks = [jnp.max(part.scores, axis=-1, keepdims=True) for part in parts]
    peak = functools.reduce(jnp.maximum, peaks)  # [G, B, K, M, 1]
    if problem.is_slab:
        # A row without a key has peak -inf, and -inf - -inf would be NaN.
        peak = jnp.where(peak == -jnp.inf, jnp.zeros((), peak.dtype), peak)
    totals, outs = [], []
    for part in parts:
        weights = jnp.exp(part.scores - peak)
        totals.append(jnp.sum(weights, axis=-1, keepdims=True))
        spec = f"gbkms,{part.value_axes}->gbkmh"
        outs.append(tile_scores.matmul(problem, spec, weights, part.value))
    total, out = functools.reduce(jnp.add, totals), functools.reduce(jnp.add, outs)
    lse = peak + jnp.log(total)
    if problem.is_slab:
        total = jnp.where(total == 0, jnp.ones((), total.dtype), total)
    return (
        tile_scores.merge_heads(problem, out / total),
        tile_scores.merge_heads(problem, lse),
    )
