"""The kernels of dK and dV, in Triton: of the window's keys, and of additional keys.

A program owns a tile of keys of one key/value head and visits the Q tiles that see it, for all query heads that share the head.
S^T = K Q^T and dS^T come with keys as rows, so that dV += P^T dO and dK += dS^T Q need no transposed weights.
"""

import triton
import triton.language as tl

from gna_jax.backends.triton.kernels.geometry import (
    clean_start,
    own_place,
    query_end,
    query_first,
    shell_start,
    visible_end,
    walk,
)
from gna_jax.backends.triton.kernels.products import product
from gna_jax.backends.triton.kernels.query_gradient import load_statistics
from gna_jax.backends.triton.kernels.scores import additional_count, num_visits, program_of
from gna_jax.backends.triton.kernels.token_tiles import (
    before,
    key_base,
    key_bias_numbers,
    load_bias,
    load_keys,
    load_outs,
    load_queries,
    load_values,
    out_base,
    query_base,
    query_bias_numbers,
    read_rows,
    seen,
    store_keys,
    store_values,
    tile_places,
    token_numbers,
    value_base,
)


@triton.jit
def _query_intervals(places, lengths, box_ends, plan: tl.constexpr):
    """Per axis, the queries `[first, end)` that see keys at these places; of slabs, none after the walk's box."""
    firsts = ()
    ends = ()
    for i in tl.static_range(3):
        first = query_first(places[i], lengths[i], plan.axes[i])
        end = query_end(places[i], lengths[i], plan.axes[i])
        end = visible_end(first, end, places[i], lengths[i], box_ends[i], plan.axes[i])
        firsts = firsts + (first,)  # noqa: RUF005
        ends = ends + (end,)  # noqa: RUF005
    return firsts, ends


@triton.jit
def _add(sums, weights, queries, cotangent, value_tile, delta, plan: tl.constexpr):
    """dK before the scale and dV with one more Q tile: `weights` are P^T."""
    key_change, value_change = sums
    value_change = product(weights.to(cotangent.dtype), cotangent, value_change, plan)
    products = product(value_tile, tl.trans(cotangent), None, plan)
    change = weights * (products - delta[None, :])
    key_change = product(change.to(queries.dtype), queries, key_change, plan)
    return key_change, value_change


@triton.jit
def _head_and_visit(step, visits, plan: tl.constexpr):
    """Query head, counted from the first that shares the key/value head, and number of its visit."""
    if plan.heads_per_kv == 1:
        return 0, step
    else:
        head = step // visits
        return head, step - head * visits


@triton.jit
def _visit(
    sums, own, arrays, sample, head, starts, group, plan: tl.constexpr, MASKED: tl.constexpr
):
    """One Q tile of one head."""
    key_tile, value_tile, key_places = own
    query, bias, out_cotangent, lse, delta = arrays
    offsets, lengths, ends = group
    places = tile_places(starts, plan, False)
    numbers = token_numbers(places, offsets, plan, False)
    real = before(places, ends, plan)
    from_query = query_base(query, sample, head, plan)
    from_out = out_base(out_cotangent, sample, head, plan)
    queries = load_queries(from_query, numbers, real, plan, MASKED)
    cotangent = load_outs(from_out, numbers, real, plan, MASKED)
    powers, less = load_statistics(lse, delta, sample, head, numbers, real, plan)
    scores = product(key_tile, tl.trans(queries), None, plan) * plan.scale_log2
    if MASKED:
        firsts, lasts = _query_intervals(key_places, lengths, ends, plan)
        mask = seen(firsts, lasts, places, plan)
    else:
        mask = True
    if bias is not None:
        columns = query_bias_numbers(places, lengths, plan)
        pairs = key_bias_numbers(key_places, plan)[:, None] - columns[None, :]
        scores += load_bias(bias, head, pairs, mask, plan, MASKED)
    if MASKED:
        scores = tl.where(mask, scores, float("-inf"))
    weights = tl.exp2(scores - powers[None, :])
    return _add(sums, weights, queries, cotangent, value_tile, less, plan)


@triton.jit
def key_gradient_kernel(
    query,
    key,
    value,
    query_origin,
    key_origin,
    bias,
    out_cotangent,
    lse,
    delta,
    key_change,
    value_change,
    plan: tl.constexpr,
):
    """dK and dV of one KV tile, in their dtype."""
    sample, tile, kv_head = program_of(tl.program_id(0), plan.kv_tiles, plan.kv_heads)
    own, visited, lengths, is_real = own_place(tile, (query_origin, key_origin), plan, True)
    box = walk(own, visited, lengths, plan, True)
    clean, shell = num_visits(box, is_real)
    offsets, own_starts, ends = own
    places = tile_places(own_starts, plan, True)
    group = (visited[0], lengths, box[1])
    real = before(places, ends, plan)
    is_read = read_rows(real, places, lengths, plan, True)
    numbers = token_numbers(places, offsets, plan, True)
    from_key = key_base(key, sample, kv_head, plan.key_tokens, plan)
    from_value = value_base(value, sample, kv_head, plan.key_tokens, plan)
    keys = load_keys(from_key, numbers, is_read, plan, True)
    values = load_values(from_value, numbers, is_read, plan, True)
    # A padded key may fall outside the bias table; the last real one's entries serve as well.
    clamped = ()
    for i in tl.static_range(3):
        clamped = clamped + (tl.minimum(places[i], ends[i] - 1),)  # noqa: RUF005
    tiles = (keys, values, clamped)
    arrays = (query, bias, out_cotangent, lse, delta)
    sums = (
        tl.zeros((plan.kv_rows, plan.head_columns), tl.float32),
        tl.zeros((plan.kv_rows, plan.value_columns), tl.float32),
    )
    first_head = kv_head * plan.heads_per_kv
    for step in range(0, clean * plan.heads_per_kv):
        head, visit = _head_and_visit(step, clean, plan)
        starts = clean_start(visit, box, plan, True)
        sums = _visit(sums, tiles, arrays, sample, first_head + head, starts, group, plan, False)
    for step in range(0, shell * plan.heads_per_kv):
        head, visit = _head_and_visit(step, shell, plan)
        starts = shell_start(visit, box, plan, True)
        sums = _visit(sums, tiles, arrays, sample, first_head + head, starts, group, plan, True)
    key_change_base = key_base(key_change, sample, kv_head, plan.key_tokens, plan)
    value_change_base = value_base(value_change, sample, kv_head, plan.key_tokens, plan)
    keys_sum, values_sum = sums
    store_keys(key_change_base, numbers, real, keys_sum * plan.scale, plan)
    store_values(value_change_base, numbers, real, values_sum, plan)


@triton.jit
def additional_gradient_kernel(
    query,
    additional_keys,
    additional_values,
    additional_lengths,
    out_cotangent,
    lse,
    delta,
    key_change,
    value_change,
    plan: tl.constexpr,
):
    """A part of dK and dV of a tile of additional keys, float32: from one run of the tokens, in the order of the layout.

    `key_change` and `value_change` are `[runs, B, tokens, K, H]`: their sum over the runs is the gradient.
    """
    rest, part, kv_head = program_of(tl.program_id(0), plan.additional_tiles, plan.kv_heads)
    sample = rest // plan.runs
    run = rest % plan.runs
    numbers = part * plan.kv_rows + tl.arange(0, plan.kv_rows)
    is_token = numbers < plan.num_additional
    is_seen = numbers < additional_count(additional_lengths, sample, plan)
    from_key = key_base(additional_keys, sample, kv_head, plan.num_additional, plan)
    from_value = value_base(additional_values, sample, kv_head, plan.num_additional, plan)
    keys = load_keys(from_key, numbers, is_seen, plan, True)
    values = load_values(from_value, numbers, is_seen, plan, True)
    keys_sum = tl.zeros((plan.kv_rows, plan.head_columns), tl.float32)
    values_sum = tl.zeros((plan.kv_rows, plan.value_columns), tl.float32)
    first_token = run * plan.run_tokens
    end = tl.minimum(first_token + plan.run_tokens, plan.query_tokens)
    steps = (end - first_token + plan.q_rows - 1) // plan.q_rows
    for step in range(0, tl.maximum(steps, 0) * plan.heads_per_kv):
        head = kv_head * plan.heads_per_kv + step % plan.heads_per_kv
        tokens = first_token + (step // plan.heads_per_kv) * plan.q_rows
        tokens = tokens + tl.arange(0, plan.q_rows)
        real = tokens < end
        from_query = query_base(query, sample, head, plan)
        from_out = out_base(out_cotangent, sample, head, plan)
        queries = load_queries(from_query, tokens, real, plan, True)
        cotangent = load_outs(from_out, tokens, real, plan, True)
        powers, less = load_statistics(lse, delta, sample, head, tokens, real, plan)
        scores = product(keys, tl.trans(queries), None, plan) * plan.scale_log2
        scores = tl.where(is_seen[:, None], scores, float("-inf"))
        weights = tl.exp2(scores - powers[None, :])
        keys_sum, values_sum = _add(
            (keys_sum, values_sum), weights, queries, cotangent, values, less, plan
        )
    samples = tl.num_programs(0) // (plan.runs * plan.additional_tiles * plan.kv_heads)
    place = run * samples + sample
    key_change_base = key_base(key_change, place, kv_head, plan.num_additional, plan)
    value_change_base = value_base(value_change, place, kv_head, plan.num_additional, plan)
    store_keys(key_change_base, numbers, is_token, keys_sum * plan.scale, plan)
    store_values(value_change_base, numbers, is_token, values_sum, plan)
