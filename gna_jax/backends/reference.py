"""The specification: dense masked attention in plain jnp, tokens squared in time and memory.

Differentiable by JAX alone, to any order and in both modes; every other backend is tested against it in float64.
"""

import math

import jax
import jax.numpy as jnp

from gna_jax.problem import Operands, Problem, Workload
from gna_jax.tiling import Tiles


def attend(problem: Problem, operands: Operands) -> tuple[jax.Array, jax.Array]:
    """`out [B, *space, N, V]` in `problem.out_dtype` and `lse [B, *space, N]` of masked dense attention."""
    wide, precision = problem.accumulator, problem.precision
    query = operands.query.astype(wide).reshape(
        problem.batch, -1, problem.kv_heads, problem.heads_per_kv, problem.head_dim
    )
    key, value = (
        x.astype(wide).reshape(problem.batch, -1, *x.shape[-2:])
        for x in (operands.key, operands.value)
    )
    scores = jnp.einsum("bqkrh,bskh->bkrqs", query, key, precision=precision) * problem.scale
    seen, offsets = _mask_and_offsets(problem, operands)
    if problem.has_bias:
        scores = scores + operands.bias.astype(wide)[(slice(None), *offsets)].reshape(
            1, *scores.shape[1:]
        )
    scores = jnp.where(seen[None, None, None], scores, -jnp.inf)
    if problem.num_additional:
        more = jnp.einsum(
            "bqkrh,bskh->bkrqs", query, operands.additional_keys.astype(wide), precision=precision
        )
        more = more * problem.scale
        if operands.additional_lengths is not None:
            column = jnp.arange(problem.num_additional, dtype=jnp.int32)[None, :]
            visible = column < operands.additional_lengths[:, None]
            more = jnp.where(visible[:, None, None, None], more, -jnp.inf)
        scores = jnp.concatenate([scores, more], axis=-1)
        value = jnp.concatenate([value, operands.additional_values.astype(wide)], axis=1)
    lse = jax.nn.logsumexp(scores, axis=-1, keepdims=True)  # -inf where nothing is seen
    weights = jnp.exp(scores - jnp.where(lse == -jnp.inf, 0, lse))
    out = jnp.einsum("bkrqs,bskh->bqkrh", weights, value, precision=precision)
    rows = (problem.batch, *problem.query_layout, problem.query_heads)
    lse = lse[..., 0].transpose(0, 3, 1, 2).reshape(rows)
    return out.reshape(*rows, problem.value_dim).astype(problem.out_dtype), lse


def _mask_and_offsets(problem: Problem, operands: Operands) -> tuple[jax.Array, list[jax.Array]]:
    """`[queries, keys]` bool, and per axis the index of each pair's bias entry (clipped where unseen)."""
    rank, offsets = problem.rank, []
    seen = jnp.ones((1,) * (2 * rank), bool)
    zero = jnp.zeros(rank, jnp.int32)
    origins = [zero if x is None else x for x in (operands.query_origin, operands.key_origin)]
    for n, (axis, length) in enumerate(
        zip(problem.neighborhood.axes, problem.global_layout, strict=True)
    ):
        i = (origins[0][n] + jnp.arange(problem.query_layout[n], dtype=jnp.int32))[:, None]
        j = (origins[1][n] + jnp.arange(problem.key_layout[n], dtype=jnp.int32))[None, :]
        pairs = axis.sees(i, j, length)
        extent = problem.window_extent[n]
        offset = j // axis.dilation - i // axis.dilation + extent - 1
        offset = jnp.clip(offset, 0, 2 * extent - 2)
        shape = [1] * (2 * rank)
        shape[n], shape[rank + n] = pairs.shape
        seen = seen & pairs.reshape(shape)
        offsets.append(offset.reshape(shape))
    return seen.reshape(math.prod(problem.query_layout), math.prod(problem.key_layout)), offsets


def supports(problem: Problem, tiles: Tiles | None) -> str | None:
    """None, or why the reference cannot run with these tiles."""
    return None if tiles is None else "reference is dense and has no tiles; pass tiles=None"


def workload(problem: Problem, tiles: Tiles | None) -> Workload:
    """Every pair of tokens, all masked."""
    pairs = math.prod(problem.query_layout) * math.prod(problem.key_layout)
    return Workload(tiles, pairs, pairs, seconds=None)
