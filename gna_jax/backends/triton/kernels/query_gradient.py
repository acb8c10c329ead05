"""The kernel of dQ, in Triton: the walk of the forward, with the weights from lse.

dS = P * (dO V^T - delta), dQ = scale * dS K. The additional keys come last, as in the forward.
"""

import triton
import triton.language as tl

from gna_jax.backends.triton.kernels.geometry import clean_start, own_place, shell_start, walk
from gna_jax.backends.triton.kernels.products import product
from gna_jax.backends.triton.kernels.scores import (
    additional_count,
    additional_scores,
    num_visits,
    program_of,
    window_scores,
)
from gna_jax.backends.triton.kernels.token_tiles import (
    before,
    head_base,
    key_base,
    load_outs,
    load_queries,
    load_values,
    out_base,
    query_base,
    read_rows,
    store_queries,
    tile_places,
    token_numbers,
    value_base,
)


@triton.jit
def load_statistics(lse, delta, sample, head, numbers, real, plan: tl.constexpr):
    """lse in powers of two and delta of queries. Padding weighs nothing: its lse is infinite. Nor does a slab's query without keys."""
    lse_base = head_base(lse, sample, head, plan.query_tokens, plan.query_heads, 1)
    delta_base = head_base(delta, sample, head, plan.query_tokens, plan.query_heads, 1)
    places = numbers * plan.query_heads
    powers = tl.load(lse_base + places, mask=real, other=float("inf")) * plan.log2_e
    less = tl.load(delta_base + places, mask=real, other=0.0)
    if plan.is_slab:
        sees_none = powers == float("-inf")
        powers = tl.where(sees_none, float("inf"), powers)
        less = tl.where(sees_none, 0.0, less)
    return powers, less


@triton.jit
def score_gradient(scores, cotangent, value_tile, powers, delta, plan: tl.constexpr):
    """dS of a Q tile and a tile of keys, before the scale; 0 where the score is -inf."""
    weights = tl.exp2(scores - powers[:, None])
    products = product(cotangent, tl.trans(value_tile), None, plan)
    return weights * (products - delta[:, None])


@triton.jit
def _add(sums, scores, rows, key_tile, value_tile, plan: tl.constexpr):
    """dQ before the scale with one more tile of keys. `rows` are dO, lse in powers of two and delta of the queries."""
    cotangent, powers, delta = rows
    change = score_gradient(scores, cotangent, value_tile, powers, delta, plan)
    return product(change.to(key_tile.dtype), key_tile, sums, plan)


@triton.jit
def additional_change(sums, queries, rows, additional, sample, kv_head, plan: tl.constexpr):
    """dQ before the scale with the additional keys."""
    keys, values, lengths = additional
    from_key = key_base(keys, sample, kv_head, plan.num_additional, plan)
    from_value = value_base(values, sample, kv_head, plan.num_additional, plan)
    count = additional_count(lengths, sample, plan)
    for start in range(0, count, plan.kv_rows):
        scores, key_tile, columns, seen_keys = additional_scores(
            queries, from_key, start, count, plan, plan.kv_rows
        )
        value_tile = load_values(from_value, columns, seen_keys, plan, True)
        sums = _add(sums, scores, rows, key_tile, value_tile, plan)
    return sums


@triton.jit
def query_gradient_kernel(
    query,
    key,
    value,
    query_origin,
    key_origin,
    bias,
    additional_keys,
    additional_values,
    additional_lengths,
    out_cotangent,
    lse,
    delta,
    query_change,
    plan: tl.constexpr,
):
    """dQ of one Q tile, in its dtype."""
    sample, tile, head = program_of(tl.program_id(0), plan.q_tiles, plan.query_heads)
    kv_head = head // plan.heads_per_kv
    own, visited, lengths, is_real = own_place(tile, (query_origin, key_origin), plan, False)
    box = walk(own, visited, lengths, plan, False)
    clean, shell = num_visits(box, is_real)
    offsets, own_starts, ends = own
    places = tile_places(own_starts, plan, False)
    group = (visited[0], lengths, ends, box[1])
    real = before(places, ends, plan)
    is_read = read_rows(real, places, lengths, plan, False)
    numbers = token_numbers(places, offsets, plan, False)
    from_query = query_base(query, sample, head, plan)
    from_out = out_base(out_cotangent, sample, head, plan)
    from_key = key_base(key, sample, kv_head, plan.key_tokens, plan)
    from_value = value_base(value, sample, kv_head, plan.key_tokens, plan)
    queries = load_queries(from_query, numbers, is_read, plan, True)
    cotangent = load_outs(from_out, numbers, is_read, plan, True)
    powers, less = load_statistics(lse, delta, sample, head, numbers, is_read, plan)
    rows = (cotangent, powers, less)
    sums = tl.zeros((plan.q_rows, plan.head_columns), tl.float32)
    for step in range(0, clean):
        starts = clean_start(step, box, plan, False)
        scores, keys, columns, seen_keys = window_scores(
            queries, from_key, bias, head, starts, places, group, plan, False
        )
        values = load_values(from_value, columns, seen_keys, plan, False)
        sums = _add(sums, scores, rows, keys, values, plan)
    for step in range(0, shell):
        starts = shell_start(step, box, plan, False)
        scores, keys, columns, seen_keys = window_scores(
            queries, from_key, bias, head, starts, places, group, plan, True
        )
        values = load_values(from_value, columns, seen_keys, plan, True)
        sums = _add(sums, scores, rows, keys, values, plan)
    if additional_keys is not None:
        additional = (additional_keys, additional_values, additional_lengths)
        sums = additional_change(sums, queries, rows, additional, sample, kv_head, plan)
    change_base = query_base(query_change, sample, head, plan)
    store_queries(change_base, numbers, real, sums * plan.scale, plan)
