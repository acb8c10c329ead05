"""Which tiles a program visits, in Triton: the window rules of `gna_jax.neighborhood`, the boxes of `gna_jax.tiling` and the order of
`pallas_kernels.plan`, mirrored once. `tests/triton_geometry_test.py` holds all three against the originals.

Positions are int32 and count tokens of a dilation group. Triton's division rounds towards zero, which is Python's for numbers
that are not negative; where one may be, the result is not used, or it is floored. An axis is a `plan.Axis`, static. A function that
returns from an `if` has all else in its `else`: what follows a return is compiled too.

On slabs positions are those of the volume's dilation groups too, and below 0 or past the group's end outside the volume. Only addresses
count from a slab's origin. What is visited is clipped to what the visited slab holds of the volume.
"""

import triton
import triton.language as tl


@triton.jit
def key_first(query, length, axis: tl.constexpr):
    """The first key that a query sees."""
    window = length if axis.is_whole else axis.window
    group_start = (query // axis.stride) * axis.stride
    if axis.is_causal:
        centre = tl.minimum(group_start + (axis.stride - 1), length - 1)
        return tl.maximum(centre - window + 1, 0)
    else:
        centre = tl.minimum(group_start + axis.stride // 2, length - 1)
        return tl.minimum(tl.maximum(centre - window // 2, 0), length - window)


@triton.jit
def key_end(query, length, axis: tl.constexpr):
    """The end of the keys that a query sees."""
    if axis.is_causal:
        return query + 1
    else:
        window = length if axis.is_whole else axis.window
        return key_first(query, length, axis) + window


@triton.jit
def query_first(key, length, axis: tl.constexpr):
    """The first query that sees a key."""
    if axis.is_causal:
        return key
    else:
        window = length if axis.is_whole else axis.window
        right = window - 1 - window // 2
        offset = axis.stride - axis.stride // 2 - 1
        # Not negative where it is used: for a key at or after `window`.
        first = (tl.maximum(key - right + offset, 0) // axis.stride) * axis.stride
        return tl.where(key < window, 0, first)


@triton.jit
def query_end(key, length, axis: tl.constexpr):
    """The end of the queries that see a key."""
    window = length if axis.is_whole else axis.window
    if axis.is_causal:
        end = ((key + window) // axis.stride) * axis.stride
        return tl.where(key + window >= length, length, end)
    else:
        offset = axis.stride - axis.stride // 2 - 1
        end = ((key + window // 2 + offset + 1) // axis.stride) * axis.stride
        return tl.where(key >= length - window, length, end)


@triton.jit
def visible_end(first, end, place, length, box_end, axis: tl.constexpr):
    """The end of the interval that a token at `place` sees, cut to the end of the walk's box. Outside the volume nothing is seen."""
    if axis.is_slab:
        is_inside = (place >= 0) & (place < length)
        return tl.where(is_inside, tl.maximum(tl.minimum(end, box_end), first), first)
    else:
        return end


@triton.jit
def group_length(residue, axis: tl.constexpr):
    """Tokens of a dilation group."""
    if axis.is_even:
        return axis.length // axis.dilation
    else:
        return (axis.length - residue + axis.dilation - 1) // axis.dilation


@triton.jit
def _visits(start, outer_end, inner_first, inner_end, tile: tl.constexpr):
    """Visits of the outer interval from `start` in steps of `tile`; the first that needs no mask, and how many such there are.

    An inner interval holds real tokens alone, so a visit inside it has no padding either.
    """
    clean_first = (inner_first - start + (tile - 1)) // tile
    clean = tl.maximum((inner_end - start) // tile - clean_first, 0)
    return (outer_end - start + (tile - 1)) // tile, clean_first, clean


@triton.jit
def _slab_visits(outer, inner, held, sees, is_inside, tile: tl.constexpr):
    """`_visits` of the tokens that the visited slab holds: none where no own token `sees`, none clean unless all are inside the volume."""
    start = tl.maximum(outer[0], held[0])
    end = tl.maximum(tl.minimum(outer[1], held[1]), start)
    end = tl.where(sees, end, start)
    visits, clean_first, clean = _visits(
        start, end, tl.maximum(inner[0], start), tl.minimum(inner[1], end), tile
    )
    return start, end, visits, clean_first, tl.where(is_inside, clean, 0)


@triton.jit
def _ends_in_volume(start, end, length):
    """First and last token of `[start, end)` in the volume, whether there is any, and whether all are."""
    first = tl.maximum(start, 0)
    last = tl.minimum(end, length) - 1
    is_inside = (start >= 0) & (end <= length)
    # Defined where there is none too.
    return tl.minimum(first, length - 1), tl.maximum(last, 0), first <= last, is_inside


@triton.jit
def key_walk(q_start, q_end, held, length, axis: tl.constexpr):
    """What a Q tile visits on one axis: first key, end of the keys, visits, first clean visit, clean visits.

    Args:
      q_start: the tile's first query.
      q_end: end of the own slab's queries.
      held: `[first, end)` of the keys that there are.
      length: of the group.
      axis: the rule.
    """
    if axis.is_flat:
        return 0, 1, 1, 0, 1
    elif axis.is_slab:
        end = tl.minimum(q_start + axis.q_tile, q_end)
        first, last, sees, is_inside = _ends_in_volume(q_start, end, length)
        outer = key_first(first, length, axis), key_end(last, length, axis)
        inner = key_first(last, length, axis), key_end(first, length, axis)
        return _slab_visits(outer, inner, held, sees, is_inside, axis.kv_tile)
    else:
        # A tile past the end of a short group does no work, but its walk must be defined.
        q_start = tl.minimum(q_start, length - 1)
        q_last = tl.minimum(q_start + axis.q_tile, length) - 1
        start, end = key_first(q_start, length, axis), key_end(q_last, length, axis)
        visits, clean_first, clean = _visits(
            start,
            end,
            key_first(q_last, length, axis),
            key_end(q_start, length, axis),
            axis.kv_tile,
        )
        return start, end, visits, clean_first, clean


@triton.jit
def query_walk(kv_start, kv_end, held, length, axis: tl.constexpr):
    """`key_walk` with the roles exchanged: what a KV tile visits."""
    if axis.is_flat:
        return 0, 1, 1, 0, 1
    elif axis.is_slab:
        end = tl.minimum(kv_start + axis.kv_tile, kv_end)
        first, last, sees, is_inside = _ends_in_volume(kv_start, end, length)
        outer = query_first(first, length, axis), query_end(last, length, axis)
        inner = query_first(last, length, axis), query_end(first, length, axis)
        return _slab_visits(outer, inner, held, sees, is_inside, axis.q_tile)
    else:
        kv_start = tl.minimum(kv_start, length - 1)
        kv_last = tl.minimum(kv_start + axis.kv_tile, length) - 1
        start, end = query_first(kv_start, length, axis), query_end(kv_last, length, axis)
        visits, clean_first, clean = _visits(
            start,
            end,
            query_first(kv_last, length, axis),
            query_end(kv_start, length, axis),
            axis.q_tile,
        )
        return start, end, visits, clean_first, clean


@triton.jit
def _tile_digit(tiles, axis: tl.constexpr, IS_INVERSE: tl.constexpr):
    """First token of the innermost axis' tile in a number of tiles, and the number without it."""
    count: tl.constexpr = axis.kv_tiles if IS_INVERSE else axis.q_tiles
    size: tl.constexpr = axis.kv_tile if IS_INVERSE else axis.q_tile
    digit = tiles % count
    if axis.is_causal and not IS_INVERSE:
        digit = count - 1 - digit
    return digit * size, tiles // count


@triton.jit
def _floor_divide(number, divisor: tl.constexpr):
    if divisor == 1:
        return number
    else:
        quotient = number // divisor
        return tl.where(quotient * divisor > number, quotient - 1, quotient)


@triton.jit
def _slab_axis(
    residue, start, own_origin, visited_origin, axis: tl.constexpr, IS_INVERSE: tl.constexpr
):
    """`own_place` on one axis, from a residue of the own slab and the number of a token in its group.

    Returns:
      offset, start and end of the own tokens; offset, first and end of the visited ones; length of the volume's group.
    """
    own_tokens: tl.constexpr = axis.key_tokens if IS_INVERSE else axis.query_tokens
    visited_tokens: tl.constexpr = axis.query_tokens if IS_INVERSE else axis.key_tokens
    past: tl.constexpr = axis.dilation - 1
    first = _floor_divide(own_origin + residue, axis.dilation)
    volume_residue = own_origin + residue - first * axis.dilation
    length = group_length(volume_residue, axis)
    end = first + (own_tokens - residue + past) // axis.dilation
    offset = volume_residue - visited_origin
    held = _floor_divide(past - offset, axis.dilation)
    held_end = _floor_divide(visited_tokens - offset + past, axis.dilation)
    own = (volume_residue - own_origin, first + start, end)
    return own, (offset, held, held_end), length


@triton.jit
def own_place(number, origins, plan: tl.constexpr, IS_INVERSE: tl.constexpr):
    """Where own tile `number` lies, in positions of its dilation group. `origins` point to those of queries and keys; None: the whole volume.

    Groups row-major, tiles of a group row-major; Q tiles of a causal axis from the last on: the later a query the more keys it
    sees, and the GPU starts programs in their order.

    Returns:
      per axis offset, start and end of the own tokens (token `p` of the group is the array's `offset + dilation * p`); offset, first and
      end of the tokens that may be visited; length of the group. And whether the tile holds any token.
    """
    third, rest = _tile_digit(number, plan.axes[2], IS_INVERSE)
    second, rest = _tile_digit(rest, plan.axes[1], IS_INVERSE)
    first, rest = _tile_digit(rest, plan.axes[0], IS_INVERSE)
    starts = (first, second, third)
    rest_of_axes = rest // plan.axes[2].dilation
    residues = (
        rest_of_axes // plan.axes[1].dilation,
        rest_of_axes % plan.axes[1].dilation,
        rest % plan.axes[2].dilation,
    )
    owns = ()
    visited = ()
    lengths = ()
    is_real = number >= 0
    for i in tl.static_range(3):
        if plan.axes[i].is_slab:
            own_origin = tl.load(origins[1 if IS_INVERSE else 0] + (i - plan.leading_axes))
            visited_origin = tl.load(origins[0 if IS_INVERSE else 1] + (i - plan.leading_axes))
            own, held, length = _slab_axis(
                residues[i], starts[i], own_origin, visited_origin, plan.axes[i], IS_INVERSE
            )
        else:
            length = group_length(residues[i], plan.axes[i])
            own = (residues[i], starts[i], length)
            held = (residues[i], 0, length)
        owns = owns + (own,)  # noqa: RUF005
        visited = visited + (held,)  # noqa: RUF005
        lengths = lengths + (length,)  # noqa: RUF005
        is_real = is_real & (own[1] < own[2])
    return _transposed(owns), _transposed(visited), lengths, is_real


@triton.jit
def _transposed(axes):
    """Three tuples of an entry per axis, from three of an entry per kind."""
    first, second, third = axes
    return (
        (first[0], second[0], third[0]),
        (first[1], second[1], third[1]),
        (first[2], second[2], third[2]),
    )


@triton.jit
def walk(own, visited, lengths, plan: tl.constexpr, IS_INVERSE: tl.constexpr):
    """The walk of an own tile, per axis: first visited tokens, their ends, visits, first clean visits, clean visits.

    First tokens and ends are the outer box: all tokens that one of the own tile's sees, none of them padding or outside the volume.
    """
    _, starts, own_ends = own
    _, held_firsts, held_ends = visited
    firsts = ()
    ends = ()
    counts = ()
    clean_firsts = ()
    clean_counts = ()
    for i in tl.static_range(3):
        held = (held_firsts[i], held_ends[i])
        if IS_INVERSE:
            first, end, count, clean_first, clean = query_walk(
                starts[i], own_ends[i], held, lengths[i], plan.axes[i]
            )
        else:
            first, end, count, clean_first, clean = key_walk(
                starts[i], own_ends[i], held, lengths[i], plan.axes[i]
            )
        firsts = firsts + (first,)  # noqa: RUF005
        ends = ends + (end,)  # noqa: RUF005
        counts = counts + (count,)  # noqa: RUF005
        clean_firsts = clean_firsts + (clean_first,)  # noqa: RUF005
        clean_counts = clean_counts + (clean,)  # noqa: RUF005
    return firsts, ends, counts, clean_firsts, clean_counts


@triton.jit
def clean_start(step, box, plan: tl.constexpr, IS_INVERSE: tl.constexpr):
    """First tokens of clean visit `step` of a walk, row-major."""
    firsts, _, _, clean_firsts, cleans = box
    rest = step // cleans[2]
    third = step - rest * cleans[2]
    first = rest // cleans[1]
    second = rest - first * cleans[1]
    place = (clean_firsts[0] + first, clean_firsts[1] + second, clean_firsts[2] + third)
    return _starts(firsts, place, plan, IS_INVERSE)


@triton.jit
def shell_start(step, box, plan: tl.constexpr, IS_INVERSE: tl.constexpr):
    """First tokens of shell visit `step`: the box of all visits without the box of the clean ones.

    Slices of an axis outside its clean range come first, whole; then those inside it, each with the shell of the axes after it.
    """
    firsts, _, counts, clean_firsts, cleans = box
    if plan.axes[0].is_flat and plan.axes[1].is_flat:
        place = (0, 0, _shell_line(step, clean_firsts[2], cleans[2]))
    elif plan.axes[0].is_flat:
        second, third = _shell_plane(step, counts, clean_firsts, cleans)
        place = (0, second, third)
    else:
        slice_ = counts[1] * counts[2]
        outside = (counts[0] - cleans[0]) * slice_
        is_outside = step < outside
        whole = step // slice_
        whole_rest = step - whole * slice_
        whole_second = whole_rest // counts[2]
        shell = tl.maximum(slice_ - cleans[1] * cleans[2], 1)
        beyond = tl.maximum(step - outside, 0)
        inner = beyond // shell
        second, third = _shell_plane(beyond - inner * shell, counts, clean_firsts, cleans)
        first = tl.where(
            is_outside, _shell_line(whole, clean_firsts[0], cleans[0]), clean_firsts[0] + inner
        )
        place = (
            first,
            tl.where(is_outside, whole_second, second),
            tl.where(is_outside, whole_rest - whole_second * counts[2], third),
        )
    return _starts(firsts, place, plan, IS_INVERSE)


@triton.jit
def _shell_line(step, clean_first, clean):
    return tl.where(step < clean_first, step, step + clean)


@triton.jit
def _shell_plane(step, counts, clean_firsts, cleans):
    """Second and third visit number of a step in the shell of the last two axes."""
    outside = (counts[1] - cleans[1]) * counts[2]
    is_outside = step < outside
    whole = step // counts[2]
    shell = tl.maximum(counts[2] - cleans[2], 1)
    beyond = tl.maximum(step - outside, 0)
    inner = beyond // shell
    second = tl.where(
        is_outside, _shell_line(whole, clean_firsts[1], cleans[1]), clean_firsts[1] + inner
    )
    third = _shell_line(beyond - inner * shell, clean_firsts[2], cleans[2])
    return second, tl.where(is_outside, step - whole * counts[2], third)


@triton.jit
def _starts(firsts, place, plan: tl.constexpr, IS_INVERSE: tl.constexpr):
    starts = ()
    for i in tl.static_range(3):
        if IS_INVERSE:
            starts = starts + (firsts[i] + place[i] * plan.axes[i].q_tile,)  # noqa: RUF005
        else:
            starts = starts + (firsts[i] + place[i] * plan.axes[i].kv_tile,)  # noqa: RUF005
    return starts
