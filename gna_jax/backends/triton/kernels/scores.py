"""What programs that own a Q tile share, in Triton: their place in the grid, and scores of a Q tile and a tile of keys."""

import triton
import triton.language as tl

from gna_jax.backends.triton.kernels.geometry import key_end, key_first, visible_end
from gna_jax.backends.triton.kernels.products import product
from gna_jax.backends.triton.kernels.token_tiles import (
    before,
    key_bias_numbers,
    load_bias,
    load_keys,
    query_bias_numbers,
    seen,
    tile_places,
    token_numbers,
)


@triton.jit
def key_intervals(places, lengths, box_ends, plan: tl.constexpr):
    """Per axis, the keys `[first, end)` that queries at these places see; of slabs, none after the walk's box."""
    firsts = ()
    ends = ()
    for i in tl.static_range(3):
        first = key_first(places[i], lengths[i], plan.axes[i])
        end = key_end(places[i], lengths[i], plan.axes[i])
        end = visible_end(first, end, places[i], lengths[i], box_ends[i], plan.axes[i])
        firsts = firsts + (first,)  # noqa: RUF005
        ends = ends + (end,)  # noqa: RUF005
    return firsts, ends


@triton.jit
def program_of(number, tiles, heads):
    """Sample, tile and head of a program: heads side by side in memory start side by side in time."""
    rest = number // heads
    return rest // tiles, rest % tiles, number % heads


@triton.jit
def num_visits(box, is_real):
    """Clean visits and shell visits of a walk; none for a tile without tokens."""
    _, _, counts, _, cleans = box
    clean = cleans[0] * cleans[1] * cleans[2]
    shell = counts[0] * counts[1] * counts[2] - clean
    return tl.where(is_real, clean, 0), tl.where(is_real, shell, 0)


@triton.jit
def window_scores(
    query_tile,
    from_key,
    bias,
    head,
    starts,
    queries,
    group,
    plan: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Scores of a Q tile and the KV tile at `starts`, in powers of two; -inf for masked pairs.

    `queries` are places; `group` is offsets of keys, lengths, and ends of own queries and of the walk's box. Returns the K tile, the
    numbers of its tokens and which lie in the box too: where `MASKED`, no others are read.
    """
    offsets, lengths, own_ends, ends = group
    keys = tile_places(starts, plan, True)
    numbers = token_numbers(keys, offsets, plan, True)
    real = before(keys, ends, plan)
    tile = load_keys(from_key, numbers, real, plan, MASKED)
    scores = product(query_tile, tl.trans(tile), None, plan) * plan.scale_log2
    if MASKED:
        firsts, lasts = key_intervals(queries, lengths, ends, plan)
        mask = seen(firsts, lasts, keys, plan)
    else:
        mask = True
    if bias is not None:
        rows = query_bias_numbers(queries, own_ends, plan)
        pairs = key_bias_numbers(keys, plan)[None, :] - rows[:, None]
        scores += load_bias(bias, head, pairs, mask, plan, MASKED)
    if MASKED:
        scores = tl.where(mask, scores, float("-inf"))
    return scores, tile, numbers, real


@triton.jit
def additional_scores(
    query_tile, from_key, start, count, plan: tl.constexpr, COLUMNS: tl.constexpr
):
    """`window_scores` of additional keys from number `start` on; `count` of them are seen."""
    numbers = start + tl.arange(0, COLUMNS)
    real = numbers < count
    tile = load_keys(from_key, numbers, real, plan, True)
    scores = product(query_tile, tl.trans(tile), None, plan) * plan.scale_log2
    return tl.where(real[None, :], scores, float("-inf")), tile, numbers, real


@triton.jit
def additional_count(additional_lengths, sample, plan: tl.constexpr):
    """Additional keys that a sample's queries see."""
    if additional_lengths is None:
        return plan.num_additional + 0 * sample
    else:
        count = tl.load(additional_lengths + sample).to(tl.int32)
        return tl.minimum(count, plan.num_additional)
