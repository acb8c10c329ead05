"""The forward kernel, in Triton: out and lse of one Q tile of one head.

A program walks the KV tiles that its Q tile needs: those without a masked pair first, in a loop without masks, then the shell
around them, then the additional keys. Online softmax in powers of two, sums in float32.
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
    load_queries,
    load_values,
    out_base,
    query_base,
    read_rows,
    store_outs,
    tile_places,
    token_numbers,
    value_base,
)


@triton.jit
def _add(sums, scores, value_tile, plan: tl.constexpr):
    """One step of the online softmax: the weighted values, largest score and total weight of every row."""
    values, peak, total = sums
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    # The peak starts at a finite number, so a row that has seen nothing yet makes no NaN.
    weights = tl.exp2(scores - new_peak[:, None])
    shrink = tl.exp2(peak - new_peak)
    total = total * shrink + tl.sum(weights, 1)
    values = values * shrink[:, None]
    values = product(weights.to(value_tile.dtype), value_tile, values, plan)
    return values, new_peak, total


@triton.jit
def forward_kernel(
    query,
    key,
    value,
    query_origin,
    key_origin,
    bias,
    additional_keys,
    additional_values,
    additional_lengths,
    out,
    lse,
    plan: tl.constexpr,
):
    """One Q tile: `out` in its dtype, `lse` float32, natural."""
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
    from_key = key_base(key, sample, kv_head, plan.key_tokens, plan)
    from_value = value_base(value, sample, kv_head, plan.key_tokens, plan)
    rows = load_queries(from_query, numbers, is_read, plan, True)
    values = tl.zeros((plan.q_rows, plan.value_columns), tl.float32)
    peak = tl.full((plan.q_rows,), -1e30, tl.float32)
    total = tl.zeros((plan.q_rows,), tl.float32)
    for step in range(0, clean):
        starts = clean_start(step, box, plan, False)
        scores, _, keys, seen_keys = window_scores(
            rows, from_key, bias, head, starts, places, group, plan, False
        )
        tile_of_values = load_values(from_value, keys, seen_keys, plan, False)
        values, peak, total = _add((values, peak, total), scores, tile_of_values, plan)
    for step in range(0, shell):
        starts = shell_start(step, box, plan, False)
        scores, _, keys, seen_keys = window_scores(
            rows, from_key, bias, head, starts, places, group, plan, True
        )
        tile_of_values = load_values(from_value, keys, seen_keys, plan, True)
        values, peak, total = _add((values, peak, total), scores, tile_of_values, plan)
    if additional_keys is not None:
        from_key = key_base(additional_keys, sample, kv_head, plan.num_additional, plan)
        from_value = value_base(additional_values, sample, kv_head, plan.num_additional, plan)
        count = additional_count(additional_lengths, sample, plan)
        for start in range(0, count, plan.kv_rows):
            scores, _, keys, seen_keys = additional_scores(
                rows, from_key, start, count, plan, plan.kv_rows
            )
            tile_of_values = load_values(from_value, keys, seen_keys, plan, True)
            values, peak, total = _add((values, peak, total), scores, tile_of_values, plan)
    sees_none = total == 0.0  # padding, and queries of a slab
    total = tl.where(sees_none, 1.0, total)
    from_out = out_base(out, sample, head, plan)
    store_outs(from_out, numbers, real, values / total[:, None], plan)
    lse_base = head_base(lse, sample, head, plan.query_tokens, plan.query_heads, 1)
    natural = (peak + tl.log2(total)) / plan.log2_e
    if plan.is_slab:
        natural = tl.where(sees_none, float("-inf"), natural)
    tl.store(lse_base + numbers * plan.query_heads, natural, mask=real)
