"""Additional keys, which every query sees, beside the kernels: dense attention in plain XLA, some queries at a time.

They join the window by log-sum-exp: the merged lse gives every key, of either kind, its final weight, so each kind's gradients follow
from its own scores and nothing else. Tokens past a sample's length are zero already (`gna_jax.attention`), their scores are -inf here.
"""

import math

import jax
import jax.numpy as jnp

from gna_jax.mesh_types import vary_as
from gna_jax.problem import Operands, Problem

SCORES_BYTES = 64 << 20
"""Memory for the scores of the queries that are computed at a time."""

Gradients = tuple[jax.Array, jax.Array, jax.Array]


def attend(problem: Problem, operands: Operands) -> tuple[jax.Array, jax.Array]:
    """Attention to the additional keys alone: `out [B, *space, N, V]` in the query's dtype, `lse [B, *space, N]`."""

    def of_chunk(query: jax.Array) -> tuple[jax.Array, jax.Array]:
        scores = _scores(problem, operands, query)
        peak = jnp.maximum(scores.max(axis=-1, keepdims=True), -1e30)
        weights = jnp.exp(scores - peak)
        total = weights.sum(axis=-1, keepdims=True)
        out = _product("bckrs,bskv->bckrv", weights, operands.additional_values)
        out = out / jnp.where(total == 0, 1.0, total)
        lse = jnp.where(total == 0, -jnp.inf, peak + jnp.log(jnp.where(total == 0, 1.0, total)))
        return out.astype(problem.dtype), lse[..., 0]

    out, lse = jax.lax.map(of_chunk, _chunks(problem, operands.query))
    shape = operands.query.shape[:-1]
    return _tokens(problem, out).reshape(*shape, problem.value_dim), _tokens(problem, lse).reshape(
        shape
    )


def gradients(
    problem: Problem,
    operands: Operands,
    out_cotangent: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
) -> Gradients:
    """Their share of dQ (float32), and the gradients of the additional keys and values.

    Args:
      problem, operands: the call.
      out_cotangent: of the merged out.
      lse, delta: per query, of the merged attention; see `pallas_kernels.row_statistics.delta`.
    """
    keys, values = operands.additional_keys, operands.additional_values

    def of_chunk(sums: tuple[jax.Array, jax.Array], chunk: tuple[jax.Array, ...]) -> tuple:
        query, cotangent, lse, delta = chunk
        weights = jnp.exp(_scores(problem, operands, query) - lse[..., None])
        products = _product("bckrv,bskv->bckrs", cotangent, values)
        change = weights * (products - delta[..., None]) * problem.scale
        change, weights = change.astype(problem.dtype), weights.astype(problem.dtype)
        keys_change = _product("bckrs,bckrh->bskh", change, query)
        values_change = _product("bckrs,bckrv->bskv", weights, cotangent)
        sums = sums[0] + keys_change, sums[1] + values_change
        return sums, _product("bckrs,bskh->bckrh", change, keys)

    rows = [_chunks(problem, array) for array in (operands.query, out_cotangent)]
    # Queries that only fill up the last chunk weigh nothing.
    statistics = [
        _chunks(problem, array[..., None], fill)[..., 0]
        for array, fill in ((lse, jnp.inf), (delta, 0.0))
    ]
    start = jnp.zeros(keys.shape, jnp.float32), jnp.zeros(values.shape, jnp.float32)
    # In shard_map a sum varies over the same devices as what is added to it.
    start = vary_as(start, operands.query)
    sums, query = jax.lax.scan(of_chunk, start, (*rows, *statistics))
    query = _tokens(problem, query).reshape(operands.query.shape)
    return query, sums[0].astype(keys.dtype), sums[1].astype(values.dtype)


def _product(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """A matrix product of 16-bit operands with a float32 sum."""
    return jnp.einsum(equation, a.astype(b.dtype), b, preferred_element_type=jnp.float32)


def _scores(problem: Problem, operands: Operands, query: jax.Array) -> jax.Array:
    """`[B, C, K, R, S]` float32, scaled; -inf past a sample's length."""
    scores = _product("bckrh,bskh->bckrs", query, operands.additional_keys) * problem.scale
    if operands.additional_lengths is None:
        return scores
    column = jnp.arange(problem.num_additional, dtype=jnp.int32)
    seen = column[None, :] < operands.additional_lengths[:, None]
    return jnp.where(seen[:, None, None, None, :], scores, -jnp.inf)


def _chunk_sizes(problem: Problem) -> tuple[int, int]:
    """Number of chunks and tokens per chunk."""
    tokens = math.prod(problem.query_layout)
    of_token = 4 * problem.batch * problem.query_heads * problem.num_additional
    number = -(-tokens // max(1, SCORES_BYTES // of_token))
    return number, -(-tokens // number)


def _chunks(problem: Problem, array: jax.Array, fill: float = 0.0) -> jax.Array:
    """`[B, *space, N, H]` -> `[chunks, B, C, K, R, H]`."""
    number, size = _chunk_sizes(problem)
    tokens = math.prod(problem.query_layout)
    heads = problem.kv_heads, problem.heads_per_kv, array.shape[-1]
    array = array.reshape(problem.batch, tokens, *heads)
    excess = [(0, 0), (0, number * size - tokens), (0, 0), (0, 0), (0, 0)]
    array = jnp.pad(array, excess, constant_values=fill)
    return jnp.moveaxis(array.reshape(problem.batch, number, size, *heads), 1, 0)


def _tokens(problem: Problem, chunks: jax.Array) -> jax.Array:
    """`[chunks, B, C, ..]` -> `[B, tokens, ..]`: the inverse of `_chunks`."""
    array = jnp.moveaxis(chunks, 0, 1)
    array = array.reshape(problem.batch, -1, *chunks.shape[3:])
    return array[:, : math.prod(problem.query_layout)]
