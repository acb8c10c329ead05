"""The kernel of dQ and the relative position bias' gradient, in Triton: one run of Q tiles of one head and sample.

A bias entry collects dS of every pair at its offset: a sum over diagonals. Atomics would add in any order, so every tile takes two
steps instead. Its dS goes to a scratch memory of the program, by query and by the key's number in the query's window; then every
entry reads, query by query, the one key that lies at its offset. The scratch is used again by the next tile and stays in cache.
"""

import triton
import triton.language as tl

from gna_jax.backends.triton.kernels.geometry import clean_start, own_place, shell_start, walk
from gna_jax.backends.triton.kernels.products import product
from gna_jax.backends.triton.kernels.query_gradient import (
    additional_change,
    load_statistics,
    score_gradient,
)
from gna_jax.backends.triton.kernels.scores import (
    key_intervals,
    num_visits,
    program_of,
    window_scores,
)
from gna_jax.backends.triton.kernels.token_tiles import (
    before,
    key_base,
    load_outs,
    load_queries,
    load_values,
    out_base,
    query_base,
    read_rows,
    seen,
    store_queries,
    tile_places,
    token_numbers,
    value_base,
)


@triton.jit
def _window_slots(keys, firsts, plan: tl.constexpr):
    """`[queries, keys]`: the key's number in the query's window, row-major."""
    number = 0
    for i in tl.static_range(3):
        if not plan.axes[i].is_flat:
            place = keys[i][None, :] - firsts[i][:, None]
            number = number + place * plan.slot_strides[i]
    return number


@triton.jit
def _entry_axis(entries, query, first, end, box_first, axis: tl.constexpr):
    """On one axis, a bias entry's key as its number in the window of one query, and whether the query sees it."""
    key = query + entries - (axis.extent - 1)
    has = (key >= first) & (key < end)
    if axis.is_slab:
        has = has & (key >= box_first)
    return key - first, has


@triton.jit
def _entry_slots(entries, queries, group, box, plan: tl.constexpr):
    """For one query: the window slots of bias entries, and which of them the query has."""
    number = 0
    has = entries < plan.bias_entries
    _, lengths, own_ends, box_ends = group
    firsts, ends = key_intervals(queries, lengths, box_ends, plan)
    for i in tl.static_range(3):
        if not plan.axes[i].is_flat:
            entry = (entries // plan.bias_strides[i]) % plan.axes[i].offsets
            # Padding sees nothing.
            end = tl.where(queries[i] < own_ends[i], ends[i], 0)
            slot, is_key = _entry_axis(entry, queries[i], firsts[i], end, box[0][i], plan.axes[i])
            number = number + slot * plan.slot_strides[i]
            has = has & is_key
    return number, has


@triton.jit
def _query_at(row, starts, plan: tl.constexpr):
    """Places of one query of a tile, by its row."""
    second: tl.constexpr = plan.axes[1].q_tile
    third: tl.constexpr = plan.axes[2].q_tile
    return (
        starts[0] + row // (second * third),
        starts[1] + (row // third) % second,
        starts[2] + row % third,
    )


@triton.jit
def _scatter_visit(
    sums,
    scratch,
    tile,
    bases,
    bias,
    head,
    starts,
    queries,
    group,
    plan: tl.constexpr,
    MASKED: tl.constexpr,
):
    """dS of the pairs of one KV tile, to their slots; returns dQ before the scale with it."""
    rows, (cotangent, powers, less), real = tile
    from_key, from_value = bases
    _, lengths, _, box_ends = group
    scores, key_tile, columns, seen_keys = window_scores(
        rows, from_key, bias, head, starts, queries, group, plan, MASKED
    )
    values = load_values(from_value, columns, seen_keys, plan, MASKED)
    change = score_gradient(scores, cotangent, values, powers, less, plan)
    keys = tile_places(starts, plan, True)
    firsts, ends = key_intervals(queries, lengths, box_ends, plan)
    slots = _window_slots(keys, firsts, plan)
    places = tl.arange(0, plan.q_rows)[:, None] * plan.slots + slots
    mask = real[:, None]
    if MASKED:
        mask = mask & seen(firsts, ends, keys, plan)
    tl.store(scratch + places, change, mask=mask)
    return product(change.to(key_tile.dtype), key_tile, sums, plan)


@triton.jit
def _collect(scratch, target, starts, group, box, is_first, plan: tl.constexpr):
    """Add a tile's dS to the bias entries of the program."""
    for block in range(0, plan.bias_blocks):
        entries = block * plan.bias_block + tl.arange(0, plan.bias_block)
        is_entry = entries < plan.bias_entries
        total = tl.load(target + entries, mask=is_entry, other=0.0)
        total = tl.where(is_first, 0.0, total)  # nothing was stored yet
        for row in range(0, plan.q_rows):
            slots, has = _entry_slots(entries, _query_at(row, starts, plan), group, box, plan)
            total += tl.load(scratch + row * plan.slots + slots, mask=has, other=0.0)
        tl.store(target + entries, total, mask=is_entry)


@triton.jit
def bias_gradient_kernel(
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
    scratch,
    bias_change,
    plan: tl.constexpr,
):
    """dQ of one run of tiles, in its dtype, and its share of the bias' gradient.

    `bias_change [B, runs, N, entries]` float32; `scratch [programs, queries of a tile, window slots]`.
    """
    program = tl.program_id(0)
    sample, run, head = program_of(program, plan.runs, plan.query_heads)
    kv_head = head // plan.heads_per_kv
    scratch += program.to(tl.int64) * (plan.q_rows * plan.slots)
    bias_change += program.to(tl.int64) * plan.bias_entries
    bases = (
        key_base(key, sample, kv_head, plan.key_tokens, plan),
        value_base(value, sample, kv_head, plan.key_tokens, plan),
    )
    from_query = query_base(query, sample, head, plan)
    from_out = out_base(out_cotangent, sample, head, plan)
    change_base = query_base(query_change, sample, head, plan)
    additional = (additional_keys, additional_values, additional_lengths)
    first_tile = run * plan.run_tiles
    for tile in range(first_tile, tl.minimum(first_tile + plan.run_tiles, plan.q_tiles)):
        own, visited, lengths, is_real = own_place(tile, (query_origin, key_origin), plan, False)
        box = walk(own, visited, lengths, plan, False)
        offsets, own_starts, ends = own
        group = (visited[0], lengths, ends, box[1])
        clean, shell = num_visits(box, is_real)
        places = tile_places(own_starts, plan, False)
        real = before(places, ends, plan)
        is_read = read_rows(real, places, lengths, plan, False)
        numbers = token_numbers(places, offsets, plan, False)
        queries = load_queries(from_query, numbers, is_read, plan, True)
        cotangent = load_outs(from_out, numbers, is_read, plan, True)
        powers, less = load_statistics(lse, delta, sample, head, numbers, is_read, plan)
        rows = (cotangent, powers, less)
        loaded = (queries, rows, real)
        sums = tl.zeros((plan.q_rows, plan.head_columns), tl.float32)
        for step in range(0, clean):
            starts = clean_start(step, box, plan, False)
            sums = _scatter_visit(
                sums, scratch, loaded, bases, bias, head, starts, places, group, plan, False
            )
        for step in range(0, shell):
            starts = shell_start(step, box, plan, False)
            sums = _scatter_visit(
                sums, scratch, loaded, bases, bias, head, starts, places, group, plan, True
            )
        if additional_keys is not None:
            sums = additional_change(sums, queries, rows, additional, sample, kv_head, plan)
        store_queries(change_base, numbers, real, sums * plan.scale, plan)
        tl.debug_barrier()
        _collect(scratch, bias_change, own_starts, group, box, tile == first_tile, plan)
        tl.debug_barrier()
