"""Backward pass of the XLA backend: one walk over the query tiles, five products per tile, no stored probabilities.

With P = exp(S - lse) recomputed and `delta = sum(out * dout) - dlse`:

    dV += P^T dO      dP = dO V^T      dS = P * (dP - delta)      dQ = scale * dS K      dK += scale * dS^T Q

dK and dV of a tile's box are added in place to the loop's carry: boxes overlap, so a second walk over key tiles would
have to recompute S and dP (seven products instead of five). The order of additions is fixed, hence the result is too.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gna_jax.backends.xla import scores as tile_scores
from gna_jax.backends.xla.bias import BiasDiagonals
from gna_jax.backends.xla.loop_state import zeros_varying
from gna_jax.backends.xla.tile import Tile, for_each_tile, grouped, loops, ungrouped
from gna_jax.backends.xla.tile_classes import TileClass
from gna_jax.problem import Operands, Problem


class _Sums(NamedTuple):
    """The loop's carry: gradients, in the accumulator's dtype where tiles add to them."""

    query: jax.Array
    key: jax.Array
    value: jax.Array
    additional_keys: jax.Array | None
    additional_values: jax.Array | None
    bias: jax.Array | None


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

    def body(tile: Tile, sums: _Sums) -> _Sums:
        return _tile_gradients(problem, arrays, bias, rows, tile, sums)

    sums = _zero_sums(problem, arrays, operands, bias)
    for classes in loops(axes):
        sums = for_each_tile(classes, body, sums)
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
    delta = jnp.sum(out.astype(wide) * dout.astype(wide), axis=-1) - dlse.astype(wide)
    if problem.is_slab:
        # exp(S - inf) = 0: a row without a key has no gradient, and -inf - -inf would be NaN.
        lse = jnp.where(lse == -jnp.inf, jnp.asarray(jnp.inf, lse.dtype), lse)
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


def _tile_gradients(
    problem: Problem,
    arrays: Operands,
    bias: BiasDiagonals,
    rows: _Rows,
    tile: Tile,
    sums: _Sums,
) -> _Sums:
    """`sums` plus what one query tile contributes."""
    query = tile_scores.split_heads(problem, tile.read_queries(arrays.query))
    key = tile_scores.box_heads(problem, tile.read_keys(arrays.key))
    value = tile_scores.box_heads(problem, tile.read_keys(arrays.value))
    saved = _SavedRows(
        dout=tile_scores.split_heads(problem, _owned(tile, rows.dout)),
        lse=_row_vector(problem, tile.read_queries(rows.lse)),
        delta=_row_vector(problem, _owned(tile, rows.delta)),
    )
    scores = tile_scores.box_scores(problem, arrays, bias, tile, query, key)
    pairs = _pair_gradients(problem, scores, value, saved)
    dscores = tile_scores.masked(problem, tile, pairs.dscores, 0)
    dquery = tile_scores.matmul(problem, "bksh,bksm->bkhm", key, dscores)
    dkey = tile_scores.matmul(problem, "bksm,bkmh->bksh", dscores, query) * problem.scale
    sums = sums._replace(
        key=tile.add_keys(sums.key, tile_scores.merge_box(dkey)),
        value=tile.add_keys(sums.value, tile_scores.merge_box(pairs.dvalue)),
    )
    if sums.bias is not None:
        sums = sums._replace(bias=bias.add_gradient(sums.bias, tile, dscores))
    if problem.num_additional:
        more, sums = _additional_gradients(problem, arrays, query, saved, sums)
        dquery = dquery + more
    dquery = tile_scores.merge_heads(problem, dquery * problem.scale)
    return sums._replace(query=tile.write_queries(sums.query, dquery))


class _SavedRows(NamedTuple):
    """What the forward and the loss left for a tile's rows: dout `[B, K, M, V]`, lse and delta `[B, K, 1, M]`."""

    dout: jax.Array
    lse: jax.Array
    delta: jax.Array


class _PairGradients(NamedTuple):
    """dS `[B, K, S, M]`, not yet masked, and dV `[B, K, S, V]`."""

    dscores: jax.Array
    dvalue: jax.Array


def _pair_gradients(
    problem: Problem, scores: jax.Array, value: jax.Array, saved: _SavedRows
) -> _PairGradients:
    weights = jnp.exp(scores - saved.lse)
    dweights = tile_scores.matmul(problem, "bksh,bkmh->bksm", value, saved.dout)
    return _PairGradients(
        dscores=weights * (dweights - saved.delta),
        dvalue=tile_scores.matmul(problem, "bksm,bkmh->bksh", weights, saved.dout),
    )


def _owned(tile: Tile, grouped_rows: jax.Array) -> jax.Array:
    """The tile's rows `[B, T, N, ..]`, zero where another tile answers for them.

    With dout and delta zero a row adds nothing to dK and dV, so overlapping tiles do not count twice.
    """
    rows = tile.read_queries(grouped_rows)
    if all(c.has_owned_all for c in tile.classes):
        return rows
    owned = tile.owned_rows().reshape(1, -1, 1, 1)
    return jnp.where(owned, rows, jnp.zeros((), rows.dtype))


def _row_vector(problem: Problem, rows: jax.Array) -> jax.Array:
    """`[B, T, N, 1]` -> `[B, K, 1, M]`."""
    return tile_scores.split_heads(problem, rows).transpose(0, 1, 3, 2)


def _additional_gradients(
    problem: Problem, arrays: Operands, query: jax.Array, saved: _SavedRows, sums: _Sums
) -> tuple[jax.Array, _Sums]:
    """What a tile's rows get from the additional keys in dQ `[B, K, H, M]` (unscaled), and `sums` with what they give."""
    key = tile_scores.box_heads(problem, arrays.additional_keys)
    value = tile_scores.box_heads(problem, arrays.additional_values)
    scores = tile_scores.additional_scores(problem, arrays, query, key)
    pairs = _pair_gradients(problem, scores, value, saved)
    dscores = tile_scores.mask_additional(arrays, pairs.dscores, 0)
    dquery = tile_scores.matmul(problem, "bksh,bksm->bkhm", key, dscores)
    dkey = tile_scores.matmul(problem, "bksm,bkmh->bksh", dscores, query) * problem.scale
    return dquery, sums._replace(
        additional_keys=sums.additional_keys + dkey,
        additional_values=sums.additional_values + pairs.dvalue,
    )
