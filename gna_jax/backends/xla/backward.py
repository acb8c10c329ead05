"""Backward pass of the XLA backend: one walk over the query tiles, five products per tile, no stored probabilities.

With P = exp(S - lse) recomputed and `delta = sum(out * dout) - dlse`:

    dV += P^T dO      dP = dO V^T      dS = P * (dP - delta)      dQ = scale * dS K      dK += scale * dS^T Q

dK and dV of a tile's box are added in place to the loop's carry: boxes overlap, so a second walk over key tiles would
have to recompute S and dP (seven products instead of five). The order of additions is fixed, hence the result is too.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gna_jax.backends.xla import scores as tile_scores
from gna_jax.backends.xla.bias import BiasDiagonals
from gna_jax.backends.xla.loop_state import zeros_varying
from gna_jax.backends.xla.tile import grouped, ungrouped
from gna_jax.backends.xla.tile_classes import TileClass
from gna_jax.backends.xla.tile_group import TileGroup, for_each_group, loops, tiles_per_step
from gna_jax.problem import Operands, Problem


class _Sums(NamedTuple):
    """The loop's carry: gradients, in the accumulator's dtype where tiles add to them."""

    query: jax.Array
    key: jax.Array
    value: jax.Array
    additional_keys: Any  # None where the call has none, so is the bias
    additional_values: Any
    bias: Any


class _Rows(NamedTuple):
    """Grouped arrays with a row per query that only the backward needs: dout `[.., N, V]`, lse and delta `[.., N, 1]`."""

    dout: jax.Array
    lse: jax.Array
    delta: jax.Array


def backward(
    problem: Problem,
    operands: Operands,
    axes: tuple[tuple[TileClass, ...], ...],
    saved: tuple[jax.Array, jax.Array],
    cotangents: tuple[jax.Array, jax.Array],
) -> Operands:
    """Gradients of the floating operands; the bias's is `[B, N, ..]`, one table per sample.

    Args:
      problem, operands, axes: as in the forward pass (tiles may differ).
      saved: the forward's out and lse.
      cotangents: of out and lse.
    """
    dilation = problem.neighborhood.dilation
    bias = BiasDiagonals.of(problem, axes)
    arrays = operands._replace(
        query=grouped(operands.query, dilation),
        key=grouped(operands.key, dilation),
        value=grouped(operands.value, dilation),
        bias=bias.padded(operands.bias) if problem.has_bias else None,
    )
    rows = _rows(problem, saved, cotangents)

    def body(group: TileGroup, sums: _Sums) -> _Sums:
        return _group_gradients(problem, arrays, bias, rows, group, sums)

    sums = _zero_sums(problem, arrays, operands, bias)
    for classes in loops(axes):
        sums = for_each_group(
            classes, tiles_per_step(problem, classes), rows_first=False, body=body, carry=sums
        )
    return Operands(
        query=ungrouped(sums.query, problem.query_layout),
        key=ungrouped(sums.key, problem.key_layout).astype(operands.key.dtype),
        value=ungrouped(sums.value, problem.key_layout).astype(operands.value.dtype),
        additional_keys=_as(sums.additional_keys, problem),
        additional_values=_as(sums.additional_values, problem),
        bias=None if sums.bias is None else bias.cropped(sums.bias),
    )


def _as(heads_first: jax.Array | None, problem: Problem) -> jax.Array | None:
    if heads_first is None:
        return None
    return tile_scores.merge_box(heads_first).astype(problem.dtype)


def _rows(
    problem: Problem,
    saved: tuple[jax.Array, jax.Array],
    cotangents: tuple[jax.Array, jax.Array],
) -> _Rows:
    (out, lse), (dout, dlse) = saved, cotangents
    wide = problem.accumulator
    products = jnp.where(dout == 0, jnp.zeros((), wide), out.astype(wide) * dout.astype(wide))
    delta = jnp.sum(products, axis=-1) - dlse.astype(wide)
    # exp(S - inf) = 0: rows that the loss does not use, which may have overflowed, keep NaN from the keys that they
    # share with others; and a row without a key has no gradient, where -inf - -inf would be NaN.
    is_idle = jnp.all(dout == 0, axis=-1) & (dlse == 0)
    if problem.is_slab:
        is_idle = is_idle | (lse == -jnp.inf)
    lse = jnp.where(is_idle, jnp.asarray(jnp.inf, lse.dtype), lse)
    dilation = problem.neighborhood.dilation
    return _Rows(*(grouped(x, dilation) for x in (dout, lse[..., None], delta[..., None])))


def _zero_sums(
    problem: Problem, arrays: Operands, operands: Operands, bias: BiasDiagonals
) -> _Sums:
    def zeros(shape: tuple[int, ...], dtype: object = problem.accumulator) -> jax.Array:
        return zeros_varying(shape, dtype, operands)

    def heads_first(tokens: jax.Array | None) -> jax.Array | None:
        if tokens is None:
            return None
        batch, count, heads, dim = tokens.shape
        return zeros((batch, heads, count, dim))

    return _Sums(
        query=zeros(arrays.query.shape, operands.query.dtype),
        key=zeros(arrays.key.shape),
        value=zeros(arrays.value.shape),
        additional_keys=heads_first(operands.additional_keys),
        additional_values=heads_first(operands.additional_values),
        bias=zeros(bias.gradient_shape()) if problem.has_bias else None,
    )


def _group_gradients(
    problem: Problem,
    arrays: Operands,
    bias: BiasDiagonals,
    rows: _Rows,
    group: TileGroup,
    sums: _Sums,
) -> _Sums:
    """`sums` plus what a group of query tiles contributes."""
    query = tile_scores.split_heads(problem, group.read_queries(arrays.query))
    key_box = group.read_keys(arrays.key)
    key = tile_scores.box_heads(problem, key_box)
    value = tile_scores.box_heads(problem, group.read_keys(arrays.value))
    saved = _SavedRows(
        dout=tile_scores.split_heads(problem, _owned(group, rows.dout)),
        lse=_row_vector(problem, group.read_queries(rows.lse)),
        delta=_row_vector(problem, _owned(group, rows.delta)),
    )
    scores = tile_scores.box_scores(problem, arrays, bias, group, query, key)
    pairs = _pair_gradients(problem, scores, value, saved)
    dscores = tile_scores.masked(problem, group, pairs.dscores, 0.0)
    key = tile_scores.box_heads_transposed(problem, key_box)
    dquery = tile_scores.matmul(problem, "gbkhs,gbksm->gbkhm", key, dscores)
    dkey = tile_scores.matmul(problem, "gbksm,gbkmh->gbksh", dscores, query) * problem.scale
    dvalue = tile_scores.matmul(problem, "gbksm,gbkmh->gbksh", pairs.weights, saved.dout)
    sums = sums._replace(
        key=group.add_keys(sums.key, tile_scores.merge_box(dkey)),
        value=group.add_keys(sums.value, tile_scores.merge_box(dvalue)),
    )
    if sums.bias is not None:
        sums = sums._replace(bias=bias.add_gradient(sums.bias, group, dscores))
    if problem.num_additional:
        more, sums = _additional_gradients(problem, arrays, group, query, saved, sums)
        dquery = dquery + more
    dquery = jnp.swapaxes(dquery, -1, -2) * problem.scale
    dquery = tile_scores.merge_heads(problem, dquery)
    return sums._replace(query=group.write_queries(sums.query, dquery))


class _SavedRows(NamedTuple):
    """What the forward and the loss left for tiles' rows: dout `[G, B, K, M, V]`, lse and delta `[G, B, K, 1, M]`."""

    dout: jax.Array
    lse: jax.Array
    delta: jax.Array


class _PairGradients(NamedTuple):
    """dS `[G, B, K, S, M]`, not yet masked, and P."""

    dscores: jax.Array
    weights: jax.Array


def _pair_gradients(
    problem: Problem, scores: jax.Array, value: jax.Array, saved: _SavedRows
) -> _PairGradients:
    # Both dV and dS read them; without the barrier each computes them anew.
    weights = jax.lax.optimization_barrier(jnp.exp(scores - saved.lse))
    axes = "gbksh" if value.ndim == 5 else "bksh"
    dweights = tile_scores.matmul(problem, f"{axes},gbkmh->gbksm", value, saved.dout)
    return _PairGradients(dscores=weights * (dweights - saved.delta), weights=weights)


def _owned(group: TileGroup, grouped_rows: jax.Array) -> jax.Array:
    """The tiles' rows `[G, B, T, N, ..]`, zero where another tile answers for them.

    With dout and delta zero a row adds nothing to dK and dV, so overlapping tiles do not count twice.
    """
    rows = group.read_queries(grouped_rows)
    owned = group.owned_rows()
    if owned is None:
        return rows
    return jnp.where(owned[:, None, :, None, None], rows, jnp.zeros((), rows.dtype))


def _row_vector(problem: Problem, rows: jax.Array) -> jax.Array:
    """`[G, B, T, N, 1]` -> `[G, B, K, 1, M]`, written out: every pass over the scores reads it."""
    vector = jnp.swapaxes(tile_scores.split_heads(problem, rows), -1, -2)
    return jax.lax.optimization_barrier(vector)


def _additional_gradients(
    problem: Problem,
    arrays: Operands,
    group: TileGroup,
    query: jax.Array,
    saved: _SavedRows,
    sums: _Sums,
) -> tuple[jax.Array, _Sums]:
    """What tiles' rows get from the additional keys in dQ `[G, B, K, H, M]` (unscaled), and `sums` with what they give."""
    key = tile_scores.box_heads(problem, arrays.additional_keys)
    value = tile_scores.box_heads(problem, arrays.additional_values)
    scores = tile_scores.additional_scores(problem, arrays, group, query, key)
    pairs = _pair_gradients(problem, scores, value, saved)
    dscores = tile_scores.mask_additional(arrays, group, pairs.dscores, 0.0)
    dquery = tile_scores.matmul(problem, "bksh,gbksm->gbkhm", key, dscores)
    dkey = tile_scores.matmul(problem, "gbksm,gbkmh->bksh", dscores, query) * problem.scale
    dvalue = tile_scores.matmul(problem, "gbksm,gbkmh->bksh", pairs.weights, saved.dout)
    return dquery, sums._replace(
        additional_keys=sums.additional_keys + dkey,
        additional_values=sums.additional_values + dvalue,
    )
