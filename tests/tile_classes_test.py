"""The XLA backend's tile classes against brute force over the dense mask, and the search that sizes its tiles."""

import itertools
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_suite import case_1d, case_of

from gna_jax.backends.xla import query_tile, workload
from gna_jax.backends.xla.tile_classes import (
    axis_classes,
    build_classes,
    slab_class,
)
from gna_jax.neighborhood import AxisNeighborhood
from gna_jax.simulator import query_box_cost
from gna_jax.simulator.counts import attended_pairs
from gna_jax.simulator.query_boxes import MAX_CLASSES, axis_outline, slab_outline
from gna_jax.tiling import Tiles


def random_axis(rng, longest):
    """A random rule, and the length of an axis that holds it."""
    length = int(rng.integers(1, longest + 1))
    dilation = int(rng.integers(1, max(1, length // 2) + 1)) if rng.integers(2) else 1
    group = length // dilation
    window = int(rng.integers(1, group + 1)) if rng.integers(8) else -1
    stride = int(rng.integers(1, (group if window == -1 else window) + 1))
    return AxisNeighborhood(window, stride, dilation, bool(rng.integers(2))), length


def tokens_of(c, n, axis):
    """Layout positions of a tile's rows and columns."""
    rows = (c.query_start[n] + np.arange(c.query_length)) * axis.dilation + c.query_residue[n]
    columns = (c.key_start[n] + np.arange(c.box_length)) * axis.dilation + c.key_residue[n]
    return rows, columns


def seen_of(c, n):
    """`[rows, columns]` bool from a tile's bounds."""
    column = np.arange(c.box_length)
    return (c.first[n][:, None] <= column) & (column < c.end[n][:, None])


@pytest.mark.parametrize("split_edges", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_classes_of_an_axis(seed, split_edges):
    rng = np.random.default_rng(seed)
    for _ in range(150):
        axis, length = random_axis(rng, 40)
        tile = int(rng.integers(1, length + 3))
        classes = axis_classes(axis, length, tile, split_edges)
        mask, answered = axis.mask(length), np.zeros(length, int)
        case = axis, length, tile
        for c in classes:
            assert 1 <= c.query_length <= tile, case
            full, exact = [], []
            for n in range(c.num_tiles):
                rows, columns = tokens_of(c, n, axis)
                # Rows are tokens; a box may end in the padding that makes all dilation groups equally long.
                padded = -(-length // axis.dilation) * axis.dilation
                assert 0 <= rows.min() and rows.max() < length, case
                assert 0 <= columns.min() and columns.max() < padded, case
                # The box holds every row's window, seen through first and end exactly.
                seen, inside = seen_of(c, n), columns < length
                assert not seen[:, ~inside].any(), case
                expected = mask[np.ix_(rows, columns[inside])]
                np.testing.assert_array_equal(seen[:, inside], expected, str(case))
                assert (seen.sum(axis=1) == mask[rows].sum(axis=1)).all(), case
                # What may be read is exactly what some row sees.
                read = np.arange(c.box_length)
                read = (c.column_first[n] <= read) & (read < c.column_end[n])
                np.testing.assert_array_equal(read, seen.any(axis=0), str(case))
                assert c.bias_offset[n] == c.key_start[n] - c.query_start[n], case
                np.add.at(answered, rows, c.owned[n])
                full.append(seen.all())
                exact.append(read.all())
            assert c.is_full == all(full) and c.is_exact == all(exact), case
            assert c.has_owned_all == c.owned.all(), case
        np.testing.assert_array_equal(answered, 1, err_msg=str(case))


@pytest.mark.parametrize("seed", range(4))
def test_outline_is_what_the_classes_cost(seed):
    rng = np.random.default_rng(100 + seed)
    for _ in range(150):
        axis, length = random_axis(rng, 60)
        tile, split_edges = int(rng.integers(1, length + 1)), bool(rng.integers(2))
        classes = axis_classes(axis, length, tile, split_edges)
        outline = axis_outline(axis, length, tile, split_edges)
        tiles = {}
        for c in classes:
            tiles.setdefault(c.query_length, []).append(c)
        assert set(outline.rows) == set(tiles), (axis, length, tile)
        for rows, count, box in zip(outline.rows, outline.count, outline.box, strict=True):
            assert count == sum(c.num_tiles for c in tiles[rows]), (axis, length, tile)
            # Boxes are only ever widened to share a loop.
            built = sum(c.num_tiles * c.box_length for c in tiles[rows])
            read = sum(int((c.column_end - c.column_first).sum()) for c in tiles[rows])
            predicted = round(count * box)
            # Cut at its edges, an axis reads little more than its windows; uncut, one box serves all.
            expected = read == predicted <= built if split_edges else predicted == built
            assert expected, (axis, length, tile, split_edges, read, predicted, built)


def test_number_of_classes_is_bounded():
    """Each class is a loop to compile; lengths of groups, edges and interiors need a few."""
    rng = np.random.default_rng(7)
    counts = []
    for _ in range(400):
        axis, length = random_axis(rng, 80)
        tile, split_edges = int(rng.integers(1, length + 1)), bool(rng.integers(2))
        counts.append(len(axis_classes(axis, length, tile, split_edges)))
    assert np.mean(np.asarray(counts) <= MAX_CLASSES) > 0.9
    assert max(counts) <= 2 * MAX_CLASSES


SLAB_FIELDS = (
    "query_start",
    "query_residue",
    "key_start",
    "key_residue",
    "first",
    "end",
    "column_first",
    "column_end",
    "owned",
)


def slab_tables(axis, length, query_length, key_length, tile, origins):
    """`slab_class` for many pairs of origins `[n, 2]` in one program: its tables, each with a leading axis n."""

    def tables(query_origin, key_origin):
        c = slab_class(
            axis,
            length=length,
            query_length=query_length,
            key_length=key_length,
            query_origin=query_origin,
            key_origin=key_origin,
            tile=tile,
        )
        assert not c.is_full and not c.is_exact
        return [jnp.asarray(getattr(c, name)) for name in SLAB_FIELDS] + [jnp.arange(c.box_length)]

    return [np.asarray(x) for x in jax.jit(jax.vmap(tables))(*np.asarray(origins, np.int32).T)]


def slab_mask(axis, length, query, key):
    """`[queries, keys]` bool for positions in or out of the volume."""
    inside = [(x >= 0) & (x < length) for x in (query, key)]
    mask = np.zeros((len(query), len(key)), bool)
    mask[np.ix_(*inside)] = axis.mask(length)[np.ix_(query[inside[0]], key[inside[1]])]
    return mask


def check_slab(axis, query_length, expected, tables, case):
    """One pair of origins: every query answered once, with exactly its keys; nothing else is read."""
    answered, got = np.zeros(query_length, int), np.zeros_like(expected)
    *tables, column = tables
    for q, q_residue, k, k_residue, first, end, column_first, column_end, owned in zip(
        *tables, strict=True
    ):
        rows = (q + np.arange(len(first))) * axis.dilation + q_residue
        columns = (k + column) * axis.dilation + k_residue
        seen = (first[:, None] <= column) & (column < end[:, None])
        read = (column_first <= column) & (column < column_end)
        real = rows < query_length  # a shorter group's last rows are padding, and see nothing
        assert not seen[~real].any(), case
        # What is read lies between the first and the last column that some row sees, in the slab.
        used = np.flatnonzero(seen.any(axis=0))
        expected_read = np.zeros_like(read)
        if len(used):
            expected_read[used[0] : used[-1] + 1] = True
        np.testing.assert_array_equal(read, expected_read, err_msg=case)
        assert (columns[read] < expected.shape[1]).all() and (columns >= 0).all(), case
        here = np.nonzero(seen & owned[:, None])
        got[rows[here[0]], columns[here[1]]] = True
        np.add.at(answered, rows[real], owned[real])
    np.testing.assert_array_equal(got, expected, err_msg=case)
    np.testing.assert_array_equal(answered, 1, err_msg=case)


@pytest.mark.parametrize("seed", range(12))
def test_slab_class_of_any_slab(seed):
    """Origins anywhere, partly or wholly outside: rows see what their window and the key slab share."""
    rng = np.random.default_rng(300 + seed)
    axis, length = random_axis(rng, 24)
    query_length, key_length = (int(rng.integers(1, length + 4)) for _ in range(2))
    origins = rng.integers(-6, length + 3, (30, 2))
    tile = int(rng.integers(1, query_length + 1))
    tables = slab_tables(axis, length, query_length, key_length, tile, origins)
    for n, (query, key) in enumerate(origins):
        case = f"{axis} {length} {query_length} {key_length} {tile} {query} {key}"
        slabs = np.arange(query_length) + query, np.arange(key_length) + key
        expected = slab_mask(axis, length, *slabs)
        check_slab(axis, query_length, expected, [x[n] for x in tables], case)


@pytest.mark.parametrize("seed", range(6))
def test_slab_class_of_the_whole_volume(seed):
    """It answers as the static classes do."""
    rng = np.random.default_rng(400 + seed)
    axis, length = random_axis(rng, 24)
    tile = int(rng.integers(1, length + 1))
    tables = slab_tables(axis, length, length, length, tile, [(0, 0)])
    check_slab(axis, length, axis.mask(length), [x[0] for x in tables], f"{axis} {length} {tile}")


def test_slab_tiles_have_room_for_the_longest_box_there_is():
    rng = np.random.default_rng(9)
    for _ in range(200):
        axis, length = random_axis(rng, 30)
        group = -(-length // axis.dilation)
        tile = int(rng.integers(1, group + 1))
        first, end = axis.keys(np.arange(group), group)
        longest = max(
            end[min(q + tile, group) - 1] - first[q] for q in range(max(1, group - tile + 1))
        )
        assert longest <= axis.longest_outer(tile, group) <= group
        outline = slab_outline(axis, length, group, group, tile)
        assert outline.rows == (tile,) and outline.box == (axis.longest_outer(tile, group),)


def test_choose_tiles_is_deterministic_and_fast():
    case = case_of((128, 128, 64), (16, 16, 8), stride=(1, 4, 8), head_dim=1, value_dim=1)
    problem = case.problem()
    for backward in (False, True):
        query_box_cost._search.cache_clear()
        query_box_cost._cached_outline.cache_clear()
        begin = time.process_time()
        tiles = query_box_cost.choose_tiles(problem, backward)
        assert time.process_time() - begin < 0.5
        query_box_cost._search.cache_clear()
        assert query_box_cost.choose_tiles(problem, backward) == tiles
        assert all(1 <= size <= n for (size, _), n in zip(tiles, case.layout, strict=True))


def test_chosen_tiles_are_the_cheapest_that_were_predicted():
    problem = case_1d(200, 13).problem()
    tiles = query_box_cost.choose_tiles(problem, False)
    chosen = query_box_cost.predicted_time(problem, tiles, False)
    others = [((size, split),) for size in (1, 4, 16, 64, 200) for split in (False, True)]
    times = [query_box_cost.predicted_time(problem, other, False) for other in others]
    loop_ns = query_box_cost.CPU.loop_ns
    assert all(
        chosen.total + loop_ns * chosen.loops <= time.total + loop_ns * time.loops for time in times
    )


def test_workload_counts_pairs_of_the_wanted_tiles():
    case = case_of((12, 10), (5, 3), stride=(2, 1), dilation=(2, 1))
    problem, tiles = case.problem(), Tiles(q=(3, 4), kv=None, backward_q=(6, 5))
    assert query_tile(problem, tiles, backward=False) == ((3, True), (4, True))
    assert query_tile(problem, tiles, backward=True) == ((6, True), (5, True))
    assert query_tile(problem, Tiles(q=(3, 4), kv=None), backward=True) == ((3, True), (4, True))
    rows, columns = build_classes(problem, query_tile(problem, tiles, backward=False))
    computed = masked = 0
    for both in itertools.product(rows, columns):
        pairs = math.prod(c.num_tiles * c.query_length * c.box_length for c in both)
        computed += pairs
        masked += 0 if all(c.is_full for c in both) else pairs
    work = workload(problem, tiles)
    assert (work.tiles, work.computed_pairs, work.masked_pairs) == (tiles, computed, masked)
    attended = attended_pairs(problem.neighborhood, case.layout)
    assert attended == int(case.neighborhood.mask(case.layout).sum()) <= computed
