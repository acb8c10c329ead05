"""Halos against a brute force over dense masks: what shards need, what they are sent, and that it is never more."""

import dataclasses
import itertools
import math

import numpy as np
import pytest

from gna_jax.halo import axis_halo, exchange_order, exchanged_tokens, halos
from gna_jax.neighborhood import WHOLE_GROUP, AxisNeighborhood, Neighborhood


def random_axes(number):
    """Rules with a length and a number of shards that divides it."""
    random = np.random.default_rng(0)
    while number:
        shards = int(random.integers(1, 9))
        length = shards * int(random.integers(1, 13))
        dilation = int(random.integers(1, 4))
        if length // dilation < 1:
            continue
        window = int(random.integers(1, length // dilation + 1))
        stride = int(random.integers(1, window + 1))
        is_whole = random.random() < 0.1 and stride <= length // dilation
        rule = AxisNeighborhood(
            WHOLE_GROUP if is_whole else window, stride, dilation, bool(random.integers(2))
        )
        yield axis_halo(rule, length, shards)
        number -= 1


AXES = tuple(random_axes(300))


def rows_seen(axis, shard):
    """Rows of the whole axis that some query of a shard sees, from the dense mask."""
    own = slice(shard * axis.rows, (shard + 1) * axis.rows)
    return np.flatnonzero(axis.rule.mask(axis.length)[own].any(axis=0))


def test_needed_rows():
    for axis in AXES:
        for shard in range(axis.shards):
            seen = rows_seen(axis, shard)
            assert axis.needed(shard) == (seen[0], seen[-1] + 1), axis


def test_each_shard_receives_what_it_needs_and_nothing_else():
    """Every needed row outside the shard once, from its owner, into its place of the slab."""
    for axis in AXES:
        for shard in range(axis.shards):
            slab = np.full(axis.slab, -1)
            slab[axis.before : axis.before + axis.rows] = shard * axis.rows + np.arange(axis.rows)
            place = 0
            for piece in axis.pieces:
                if place == axis.before:
                    place += axis.rows
                first, end = piece.rows
                assert 0 <= first < end <= axis.rows
                if shard in piece.receivers:
                    owner = dict((b, a) for a, b in piece.pairs)[shard]
                    assert 0 <= owner < axis.shards
                    slab[place : place + end - first] = owner * axis.rows + np.arange(first, end)
                place += end - first
            origin = shard * axis.rows - axis.before
            held = np.flatnonzero(slab >= 0)
            assert np.array_equal(slab[held], origin + held), axis
            first, end = axis.needed(shard)
            own = range(shard * axis.rows, (shard + 1) * axis.rows)
            assert set(slab[held]) == set(own) | set(range(first, end)), axis


def test_no_room_for_rows_that_no_shard_needs():
    for axis in AXES:
        needs = [axis.needed(shard) for shard in range(axis.shards)]
        before = [n * axis.rows - first for n, (first, _) in enumerate(needs)]
        after = [end - (n + 1) * axis.rows for n, (_, end) in enumerate(needs)]
        assert axis.before == max(0, *before)
        assert axis.after == max(0, *after)


def test_interior_is_the_longest_run_of_queries_that_need_no_halo():
    for axis in AXES:
        mask = axis.rule.mask(axis.length)
        inside = []
        for row in range(axis.rows):
            is_inside = True
            for shard in range(axis.shards):
                seen = np.flatnonzero(mask[shard * axis.rows + row])
                is_inside &= shard * axis.rows <= seen[0] and seen[-1] < (shard + 1) * axis.rows
            inside.append(is_inside)
        first, end = axis.interior
        assert all(inside[first:end])
        runs = "".join("x" if one else " " for one in inside).split()
        assert end - first == max(map(len, runs), default=0), axis


def test_an_axis_that_is_not_cut_has_no_halo():
    axis = axis_halo(AxisNeighborhood(5, 1, 1, False), 12, 1)
    assert (axis.before, axis.after, axis.pieces, axis.interior) == (0, 0, (), (0, 12))
    assert exchanged_tokens((axis,)) == 0


def test_sliding_windows_need_half_a_window_on_each_side():
    axis = axis_halo(AxisNeighborhood(7, 1, 1, False), 32, 4)
    assert (axis.before, axis.after, axis.interior) == (3, 3, (3, 5))
    assert axis.rows_sent == 2 * 3 * 3  # three borders, both ways
    causal = axis_halo(AxisNeighborhood(7, 1, 1, True), 32, 4)
    assert (causal.before, causal.after) == (6, 0)
    blocked = axis_halo(AxisNeighborhood(4, 4, 1, False), 32, 4)
    assert (blocked.before, blocked.after, blocked.interior) == (0, 0, (0, 8))


def test_tokens_of_several_axes():
    """Counted by moving a volume's tokens: axes in order, a later axis's rows with the earlier ones' halos."""
    neighborhood = Neighborhood.of(3, window_size=(5, 3, 4), stride=(2, 1, 1), dilation=(1, 2, 1))
    layout, shards = (12, 18, 8), (2, 3, 2)
    axes = halos(neighborhood, layout, shards)

    def counted(order):
        moved, done = 0, set()
        for number in order:
            extents = [axis.slab if n in done else axis.rows for n, axis in enumerate(axes)]
            for device in itertools.product(*map(range, shards)):
                for piece in axes[number].pieces:
                    if device[number] in piece.receivers:
                        others = math.prod(extents[:number] + extents[number + 1 :])
                        moved += (piece.rows[1] - piece.rows[0]) * others
            done.add(number)
        return moved

    every = [counted(order) for order in itertools.permutations(range(3))]
    assert exchanged_tokens(axes) == min(every) == counted(exchange_order(axes))
    assert min(every) < max(every)


def test_far_less_than_all_keys():
    """HunyuanVideo's volume on 8 devices: a ring would pass 7 shards to each."""
    axes = halos(Neighborhood.of(3, window_size=(18, 24, 24)), (30, 48, 80), (1, 1, 8))
    assert exchanged_tokens(axes) < 0.35 * 7 * math.prod((30, 48, 80))


def test_uneven_shards_are_refused_with_the_numbers_that_divide():
    neighborhood = Neighborhood.of(2, window_size=3)
    with pytest.raises(
        ValueError,
        match=r"got 4 shards for 30 tokens on spatial axis 1.*1, 2, 3, 5, 6, 10, 15, 30.*32",
    ):
        halos(neighborhood, (8, 30), (1, 4))
    with pytest.raises(ValueError, match="window_size must not exceed"):
        halos(neighborhood, (2, 30), (1, 2))


def test_pieces_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        AXES[0].length = 3
