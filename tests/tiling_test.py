"""Boxes, walks and plans of tiles against scans of the dense mask over real tokens."""

import dataclasses
import functools
import itertools
import math
import operator

import jax
import numpy as np
import pytest

from gna_jax.neighborhood import WHOLE_GROUP, AxisNeighborhood, Neighborhood
from gna_jax.tiling import (
    KeyTilePlan,
    QueryTilePlan,
    Tiles,
    dilation_groups,
    group_lengths,
    inner_keys,
    inner_queries,
    key_walk,
    outer_keys,
    outer_queries,
    query_walk,
)


def axes_of(length):
    """Every undilated rule that fits an axis of `length` tokens."""
    for window in (WHOLE_GROUP, *range(1, length + 1)):
        for stride in range(1, (length if window == WHOLE_GROUP else window) + 1):
            for is_causal in (False, True):
                yield AxisNeighborhood(window, stride, 1, is_causal)


def row_bits(mask):
    """Each row of a dense mask as the set bits of an int."""
    return [sum(1 << int(place) for place in np.flatnonzero(row)) for row in mask]


def scan_walk(rows, length, tile, dynamic):
    """Needed places as set bits, and `[(visited start, is full)]`, from the mask rows of one tile and nothing else."""
    needed = functools.reduce(operator.or_, rows)
    unmasked = functools.reduce(operator.and_, rows)
    first = (needed & -needed).bit_length() - 1 if dynamic else 0
    visits = []
    for visited in range(first, length, tile):
        places = (1 << min(visited + tile, length)) - (1 << visited)
        if needed & places:
            visits.append((visited, not places & ~unmasked))
    return needed, visits


@pytest.mark.parametrize("length", range(1, 11))
def test_outer_and_inner_intervals(length):
    for axis in axes_of(length):
        mask = axis.mask(length)
        for first, last in itertools.combinations_with_replacement(range(length), 2):
            rows, columns = mask[first : last + 1], mask[:, first : last + 1]
            arguments = axis, length, first, last
            for interval, expected in (
                (outer_keys(*arguments), rows.any(axis=0)),
                (inner_keys(*arguments), rows.all(axis=0)),
                (outer_queries(*arguments), columns.any(axis=1)),
                (inner_queries(*arguments), columns.all(axis=1)),
            ):
                assert set(range(*interval)) == set(np.flatnonzero(expected)), arguments


@pytest.mark.parametrize("walk_of", [key_walk, query_walk])
@pytest.mark.parametrize("length", range(1, 11))
def test_axis_walks(walk_of, length):
    for axis in axes_of(length):
        mask = axis.mask(length)
        rows = row_bits(mask if walk_of is key_walk else mask.T)
        sizes = itertools.product(range(1, 6), range(1, 6), (False, True))
        for size, tile, dynamic in sizes:
            q_tile, kv_tile = (size, tile) if walk_of is key_walk else (tile, size)
            for start in range(0, length, size):
                walk = walk_of(axis, length, start, q_tile=q_tile, kv_tile=kv_tile, dynamic=dynamic)
                needed, expected = scan_walk(rows[start : start + size], length, tile, dynamic)
                case = axis, length, start, size, tile, dynamic
                first, end = walk.outer
                assert (1 << end) - (1 << first) == needed, case
                visits = [
                    (walk.start + n * walk.tile, walk.full[0] <= n < walk.full[1])
                    for n in range(walk.num_visits)
                ]
                assert visits == expected, case
                assert walk.num_full == sum(is_full for _, is_full in expected), case
                assert walk.padding == max(expected[-1][0] + tile - length, 0), case


@pytest.mark.parametrize("walk_of", [key_walk, query_walk])
def test_walks_of_arrays_and_traced_starts_equal_walks_of_ints(walk_of):
    length, sizes = 23, {"q_tile": 4, "kv_tile": 3}
    starts = np.arange(0, length, 4 if walk_of is key_walk else 3)
    cases = [(5, 1, False, True), (8, 3, False, False), (5, 2, True, True), (-1, 4, True, False)]
    for window, stride, is_causal, dynamic in cases:
        axis = AxisNeighborhood(window, stride, 1, is_causal)

        def fields(length, start, axis=axis, dynamic=dynamic):
            walk = walk_of(axis, length, start, **sizes, dynamic=dynamic)
            return dataclasses.astuple(walk), walk.num_full, walk.padding

        of_ints = [jax.tree.leaves(fields(length, int(start))) for start in starts]
        assert {type(leaf) for leaves in of_ints for leaf in leaves} == {int}
        of_array = fields(length, starts)
        of_traced = jax.jit(fields)(length, starts)
        for walks in (of_array, of_traced):
            columns = [np.broadcast_to(leaf, starts.shape) for leaf in jax.tree.leaves(walks)]
            np.testing.assert_array_equal(np.stack(columns, axis=1), of_ints, err_msg=str(axis))


def random_problem(random, rank):
    """A neighborhood and a layout that fits it, small enough for the dense mask, and two tile shapes."""
    largest = {1: 40, 2: 10, 3: 6}[rank]
    layout = tuple(int(n) for n in random.integers(1, largest + 1, rank))
    rules = []
    for length in layout:
        dilation = int(random.integers(1, min(length, 3) + 1))
        window = int(random.integers(1, length // dilation + 1))
        stride = int(random.integers(1, window + 1))
        window = WHOLE_GROUP if random.random() < 0.2 else window
        rules.append((window, stride, dilation, bool(random.random() < 0.3)))
    q_tile, kv_tile = (tuple(int(n) for n in random.integers(1, 6, rank)) for _ in range(2))
    return Neighborhood(*zip(*rules, strict=True)), layout, q_tile, kv_tile


def group_mask(neighborhood, layout, group):
    """`[*group layout, *group layout]`: the dense mask between the tokens of one dilation group."""
    steps = tuple(slice(r, None, d) for r, d in zip(group, neighborhood.dilation, strict=True))
    return neighborhood.mask(layout)[steps + steps]


def box_at(start, tile):
    return tuple(slice(first, first + size) for first, size in zip(start, tile, strict=True))


def scan_plan(mask, start, tile, visited_tile, dynamic):
    """Visited boxes in row-major order `[(start, is full)]`, from a dense mask `[*rows, *columns]`."""
    rank = mask.ndim // 2
    rows = mask[box_at(start, tile)]
    needed = rows.any(axis=tuple(range(rank)))
    first = np.argwhere(needed).min(axis=0) if dynamic else (0,) * rank
    axes = zip(first, needed.shape, visited_tile, strict=True)
    visits = []
    for corner in itertools.product(*(range(int(i), n, size) for i, n, size in axes)):
        box = box_at(corner, visited_tile)
        if needed[box].any():
            visits.append((corner, bool(rows[(..., *box)].all())))
    return visits, needed


def tile_starts(layout, tile):
    return itertools.product(*(range(0, n, size) for n, size in zip(layout, tile, strict=True)))


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("seed", range(12))
def test_plans_of_random_problems(rank, seed):
    random = np.random.default_rng([rank, seed])
    neighborhood, layout, q_tile, kv_tile = random_problem(random, rank)
    groups = list(np.ndindex(neighborhood.dilation))
    group = groups[random.integers(len(groups))]
    mask = group_mask(neighborhood, layout, group)
    group_layout = mask.shape[:rank]
    swapped = np.moveaxis(mask, range(rank), range(rank, 2 * rank))
    for plan_type, dense, tile, visited_tile, start_name in (
        (QueryTilePlan, mask, q_tile, kv_tile, "q_start"),
        (KeyTilePlan, swapped, kv_tile, q_tile, "kv_start"),
    ):
        for start, dynamic in itertools.product(tile_starts(group_layout, tile), (False, True)):
            plan = plan_type(
                neighborhood,
                layout,
                **{start_name: start},
                q_tile=q_tile,
                kv_tile=kv_tile,
                dynamic=dynamic,
                group=group,
            )
            expected, needed = scan_plan(dense, start, tile, visited_tile, dynamic)
            visits = plan.visits()
            assert plan.group_layout == group_layout
            # Stable: the full tiles first, row-major within both parts.
            assert list(visits) == sorted(expected, key=lambda visit: not visit[1]), plan
            assert plan.num_visits == len(expected), plan
            assert plan.num_full == sum(is_full for _, is_full in expected), plan
            outer, inner = np.zeros_like(needed), np.zeros_like(needed)
            outer[tuple(slice(*interval) for interval in plan.outer_box)] = True
            inner[np.ix_(*(range(*interval) for interval in plan.inner_box))] = True
            np.testing.assert_array_equal(outer, needed)
            np.testing.assert_array_equal(
                inner, dense[box_at(start, tile)].all(axis=tuple(range(rank)))
            )
            reads = np.zeros(needed.shape, dtype=int)
            for corner, _ in visits:
                reads[box_at(corner, visited_tile)] += 1
            assert reads.max() == 1 and (reads[needed] == 1).all(), plan


def test_plan_normalises_hashes_and_defaults_to_the_first_group():
    neighborhood = Neighborhood.of(2, window_size=3, dilation=(2, 1))
    plan = QueryTilePlan(
        neighborhood, [9, 8], np.array([0, 4]), q_tile=4, kv_tile=[2, 4], dynamic=True
    )
    same = QueryTilePlan(
        neighborhood, (9, 8), (0, 4), q_tile=(4, 4), kv_tile=(2, 4), dynamic=True, group=(0, 0)
    )
    assert plan == same and hash(plan) == hash(same)
    assert plan.group_layout == (5, 8)
    assert dataclasses.replace(same, group=(1, 0)).group_layout == (4, 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layout": (8,)}, r"layout must be one value or one per spatial axis; got layout=\(8,\)"),
        ({"layout": (5, 8)}, r"window_size \* dilation must not exceed the layout"),
        ({"q_start": (4, 0)}, r"q_start must lie inside .* got q_start=\(4, 0\), group layout \(4"),
        ({"q_start": (0, -1)}, r"q_start must lie inside the dilation group"),
        ({"group": (2, 0)}, r"0 <= residue < dilation .* got group=\(2, 0\), dilation=\(2, 1\)"),
        ({"group": (-1, 0)}, r"group must hold a residue"),
        ({"q_tile": (0, 4)}, r"q_tile must be at least 1 on every axis; got q_tile=\(0, 4\)"),
        ({"kv_tile": (4, 4, 4)}, r"kv_tile must be one value or one per spatial axis"),
    ],
)
def test_plan_rejects(changes, message):
    arguments = {
        "neighborhood": Neighborhood.of(2, window_size=3, dilation=(2, 1)),
        "layout": (8, 8),
        "q_start": (0, 0),
        "q_tile": (4, 4),
        "kv_tile": (4, 4),
        "dynamic": False,
    }
    with pytest.raises(ValueError, match=message):
        QueryTilePlan(**arguments | changes)
    if "q_start" not in changes:
        start = {"kv_start": arguments.pop("q_start")}
        with pytest.raises(ValueError, match=message):
            KeyTilePlan(**arguments | start | changes)


def test_dilation_groups():
    layout, dilation = (7, 5, 4), (3, 1, 2)
    groups = list(dilation_groups(layout, dilation))
    assert [group for group, _ in groups] == list(np.ndindex(dilation))
    for group, group_layout in groups:
        axes = zip(layout, dilation, group, strict=True)
        assert group_layout == tuple(len(range(residue, n, d)) for n, d, residue in axes)
    assert sum(math.prod(group_layout) for _, group_layout in groups) == math.prod(layout)


def test_group_lengths_with_multiplicity():
    assert group_lengths(7, 3) == ((3, 1), (2, 2))
    assert group_lengths(6, 3) == ((2, 3),)
    for length in range(1, 20):
        for dilation in range(1, length + 1):
            lengths = [len(range(residue, length, dilation)) for residue in range(dilation)]
            expected = {tokens: lengths.count(tokens) for tokens in lengths}
            assert dict(group_lengths(length, dilation)) == expected
            assert len(group_lengths(length, dilation)) == len(expected) <= 2


def test_tiles_become_tuples_of_ints():
    tiles = Tiles([8, np.int32(16)], np.array([8, 8]), backward_q=(4, 8), dynamic=np.bool_(True))
    same = Tiles((8, 16), (8, 8), (4, 8), None, True)
    assert tiles == same and hash(tiles) == hash(same)
    assert {type(size) for size in tiles.q + tiles.kv} == {int} and type(tiles.dynamic) is bool
    assert Tiles(128, np.int64(64)) == Tiles((128,), (64,), None, None, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"q": (8, 0), "kv": (8, 8)}, r"tiles.q must be at least 1 on every axis; got .*\(8, 0\)"),
        ({"q": 8, "kv": -1}, r"tiles.kv must be at least 1 .*; use 1 on an axis that is not tiled"),
        ({"q": 8, "kv": 8, "backward_q": 0}, r"tiles.backward_q must be at least 1"),
        ({"q": 8, "kv": 8, "backward_kv": [0]}, r"tiles.backward_kv must be at least 1"),
        (
            {"q": (8, 8), "kv": 64},
            r"one size per spatial axis; got q=\(8, 8\), kv=\(64,\); write the sizes",
        ),
        (
            {"q": 8, "kv": 8, "backward_kv": (8, 8)},
            r"one size per spatial axis; got q=\(8,\), kv=\(8,\), backward_kv=\(8, 8\)",
        ),
        ({"q": (), "kv": ()}, r"tiles must all have one size per spatial axis; got q=\(\)"),
    ],
)
def test_tiles_reject_values(arguments, message):
    with pytest.raises(ValueError, match=message):
        Tiles(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"q": 8.0, "kv": 8}, r"tiles.q must be an integer or a tuple of integers; got 8.0"),
        ({"q": None, "kv": 8}, r"tiles.q must be an integer or a tuple of integers; got None"),
        ({"q": 8, "kv": "64"}, r"tiles.kv must be an integer .* got '64'"),
        ({"q": 8, "kv": (8, None)}, r"tiles.kv must be an integer .* got None"),
        ({"q": 8, "kv": 8, "dynamic": "yes"}, r"tiles.dynamic must be a bool .* got 'yes'"),
    ],
)
def test_tiles_reject_kinds(arguments, message):
    with pytest.raises(TypeError, match=message):
        Tiles(**arguments)


def test_tiles_reject_traced_sizes():
    for build in (lambda size: Tiles(8, size).q[0], lambda size: Tiles((8, 8), (8, size)).q[0]):
        with pytest.raises(TypeError, match=r"tiles.kv must be static"):
            jax.jit(build)(8)
