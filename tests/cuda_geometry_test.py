"""The C++ geometry of the CUDA kernels (`cuda_ffi/include/gna`), on the host, against the Python that it mirrors.

Rules and walks are compared with `gna_jax.neighborhood`, `gna_jax.tiling` and `pallas_kernels.plan`, boxes with numpy's indexing, and
who meets whom at the end of it all with `Neighborhood.mask`.
"""

import ctypes
import itertools
import math
import random

import numpy as np
import pytest
from cuda_harness import CHECKED, MAX_RANK, axis_row, call, compiled, problem_row, stored

from gna_jax.device import KNOWN_DEVICES
from gna_jax.neighborhood import (
    WHOLE_GROUP,
    AxisNeighborhood,
    Neighborhood,
    group_length,
)
from gna_jax.problem import Problem
from gna_jax.tiling import QueryTilePlan, key_walk
from pallas_kernels.plan import TilePlan, clean_visits, tile_walk

LONGEST = 16
TILES = np.array([1, 2, 4, 8, 16])
WALK_INTS = 12
TILE_WALK_INTS = 3 * MAX_RANK + MAX_RANK * WALK_INTS + 2


@pytest.fixture(scope="module")
def geometry(tmp_path_factory):
    library = compiled("geometry.cc", tmp_path_factory.mktemp("geometry"), *CHECKED)
    library.meetings.restype = ctypes.c_int64
    return library


def ints(rows):
    return np.ascontiguousarray(rows, np.int32)


def on_rows(function, width, *arrays):
    """A batch function of the harness on arrays with one row per call: `[n, width]` ints."""
    out = np.full((len(arrays[0]), width), -7, np.int32)
    call(function, ctypes.c_int64(len(out)), *map(ints, arrays), out)
    return out


def every_rule(length):
    """Every legal rule of an axis of `length` tokens."""
    for dilation in range(1, length + 1):
        group = length // dilation
        for window in (WHOLE_GROUP, *range(1, group + 1)):
            strides = range(1, (group if window == WHOLE_GROUP else window) + 1)
            for stride, is_causal in itertools.product(strides, (False, True)):
                yield AxisNeighborhood(window, stride, dilation, is_causal)


def every_group():
    """Every legal rule of every axis of up to `LONGEST` tokens, and every length of its dilation groups."""
    for length in range(1, LONGEST + 1):
        for rule in every_rule(length):
            groups = {group_length(length, rule.dilation, r) for r in range(rule.dilation)}
            for group in groups:
                yield rule, length, group


def random_axis(rng, longest):
    """A rule and the length of its axis; `rng` is Python's, which draws single numbers ten times faster than numpy's."""
    to = lambda most: 1 + int(rng.random() * most)
    length = to(longest)
    dilation = to(min(length, rng.choice((1, 1, 4, longest))))
    group = length // dilation
    window = to(min(group, rng.choice((16, 256, longest))))
    stride = to(window) if rng.random() < 0.5 else 1
    window = WHOLE_GROUP if rng.random() < 0.15 else window
    return AxisNeighborhood(window, stride, dilation, rng.random() < 0.3), length


def random_neighborhood(rng, rank, longest):
    """A neighborhood and a layout that fits it."""
    axes, layout = zip(*(random_axis(rng, longest) for _ in range(rank)), strict=True)
    rules = [(axis.window, axis.stride, axis.dilation, axis.is_causal) for axis in axes]
    return Neighborhood(*zip(*rules, strict=True)), layout


def random_tile(rng, rank, most):
    """Powers of two up to `2**most`."""
    return tuple(2 ** int(rng.random() * (most + 1)) for _ in range(rank))


def plan_of(neighborhood, layout, q_tile, kv_tile, *, batch=1, query_heads=1, kv_heads=1):
    """The plan of the forward that the C++ mirrors."""
    problem = Problem(
        neighborhood=neighborhood,
        global_layout=layout,
        query_layout=layout,
        key_layout=layout,
        batch=batch,
        query_heads=query_heads,
        kv_heads=kv_heads,
        head_dim=64,
        value_dim=64,
        dtype=np.dtype("float16"),
        scale=1.0,
        is_slab=False,
        num_additional=0,
        has_additional_lengths=False,
        has_bias=False,
        precision=None,
        device=KNOWN_DEVICES["b200"],
    )
    return TilePlan(problem, q_tile, kv_tile, 1, 0, 2, 2)


def test_group_lengths(geometry):
    small = [(n, d, r) for n in range(1, 65) for d in range(1, n + 1) for r in range(d)]
    rng = np.random.default_rng(0)
    length = rng.integers(1, 2**30 + 1, 100_000)
    dilation = rng.integers(1, length + 1)
    arguments = np.concatenate(
        [small, np.stack([length, dilation, rng.integers(0, dilation)], axis=1)]
    )
    got = on_rows(geometry.group_lengths, 1, arguments)[:, 0]
    np.testing.assert_array_equal(got, group_length(*arguments.T))


def test_keys_of_every_small_rule(geometry):
    axes, lengths, queries, want = [], [], [], []
    for rule, length, group in every_group():
        places = np.arange(group)
        axes += [axis_row(rule, length)] * group
        lengths += [group] * group
        queries.append(places)
        want.append(np.stack([*rule.keys(places, group), rule.leader(places, group)], axis=1))
    got = on_rows(geometry.axis_keys, 3, axes, lengths, np.concatenate(queries))
    assert len(got) > 10_000
    np.testing.assert_array_equal(got, np.concatenate(want))


def test_keys_of_random_rules(geometry):
    """To the longest axis that there may be."""
    rng = random.Random(1)
    axes, lengths, queries, want = [], [], [], []
    for _ in range(100_000):
        rule, length = random_axis(rng, 2 ** rng.randrange(5, 31))
        group = group_length(length, rule.dilation, rng.randrange(rule.dilation))
        query = rng.choice((0, group - 1, *(rng.randrange(group) for _ in range(2))))
        axes.append(axis_row(rule, length))
        lengths.append(group)
        queries.append(query)
        want.append((*rule.keys(query, group), rule.leader(query, group)))
    np.testing.assert_array_equal(on_rows(geometry.axis_keys, 3, axes, lengths, queries), want)


def walk_ints(walk):
    """A walk as the harness writes it, each entry broadcast."""
    values = (*walk.outer, *walk.inner, walk.length, walk.tile, walk.start, walk.num_visits)
    return np.broadcast_arrays(*values, *walk.full, *clean_visits(walk))


def test_walks_of_every_small_rule(geometry):
    """Every Q tile, with every pair of tile sizes."""
    axes, lengths, starts, want = [], [], [], []
    for rule, length, group in every_group():
        q_tile, kv_tile, place = np.meshgrid(TILES, TILES, np.arange(group), indexing="ij")
        # Own tiles start at multiples of their size.
        q_tile, kv_tile, place = (x[place % q_tile == 0] for x in (q_tile, kv_tile, place))
        walk = key_walk(rule, group, place, q_tile=q_tile, kv_tile=kv_tile, dynamic=True)
        want.append(np.stack(walk_ints(walk), axis=1))
        rows = np.tile(axis_row(rule, length), (len(place), 1))
        rows[:, 5], rows[:, 6] = q_tile, kv_tile
        axes.append(rows)
        lengths.append(np.full(len(place), group))
        starts.append(place)
    arguments = map(np.concatenate, (axes, lengths, starts))
    got = on_rows(geometry.axis_walks, WALK_INTS, *arguments)
    assert len(got) > 100_000
    np.testing.assert_array_equal(got, np.concatenate(want))


def tile_walk_ints(walk):
    """A `TileWalk` as the harness writes it; axes past the rank hold one token that sees itself."""
    rank = len(walk.axes)
    row = []
    for values, trivial in ((walk.residues, 0), (walk.lengths, 1), (walk.own_start, 0)):
        row += [*values, *[trivial] * (MAX_RANK - rank)]
    for axis in walk.axes:
        row += [*axis.outer, *axis.inner, axis.length, axis.tile, axis.start, axis.num_visits]
        row += [*axis.full, *clean_visits(axis)]
    row += [0, 1, 0, 1, 1, 1, 0, 1, 0, 1, 0, 1] * (MAX_RANK - rank)
    return [*row, walk.num_clean, walk.num_visits]


def start_of(walk, visit):
    """First token of a visit, with the axes past the rank."""
    clean = visit < walk.num_clean
    start = walk.clean_tile(visit) if clean else walk.shell_tile(visit - walk.num_clean)
    return [*start, *[0] * (MAX_RANK - len(start))]


def test_walks_and_visits_of_random_problems(geometry):
    """10^5 problems, up to large ones: of each a tile, and of that a visit."""
    rng = random.Random(2)
    problems, tiles, walks, visits = [], [], [], []
    for number in range(100_000):
        rank = (1, 2, 3, 1)[number % 4]
        longest = 2 ** rng.randrange(3, (20, 14, 9)[rank - 1])
        neighborhood, layout = random_neighborhood(rng, rank, longest)
        boxes = [random_tile(rng, rank, 4) for _ in range(2)]
        plan = plan_of(neighborhood, layout, *boxes)
        problems.append(problem_row(neighborhood, layout, *boxes))
        tiles.append(rng.randrange(plan.num_tiles))
        walk = tile_walk(plan, tiles[-1])
        walks.append(tile_walk_ints(walk))
        if walk.num_visits:
            last = walk.num_visits - 1
            end = rng.choice((0, min(walk.num_clean, last), last))
            visit = rng.choice((end, rng.randint(0, last)))
            visits.append((number, visit, *start_of(walk, visit)))
    got = on_rows(geometry.tile_walks, TILE_WALK_INTS, problems, tiles)
    np.testing.assert_array_equal(got, walks)
    visits = np.array(visits)
    assert len(visits) > 80_000
    rows = visits[:, 0]
    got = on_rows(geometry.visits, MAX_RANK, ints(problems)[rows], ints(tiles)[rows], visits[:, 1])
    np.testing.assert_array_equal(got, visits[:, 2:])


def cases(seed, count, most_tokens, longest=(60, 16, 9)):
    """Random small problems of every rank, with tiles."""
    rng = random.Random(seed)
    while count:
        rank = 1 + count % MAX_RANK
        neighborhood, layout = random_neighborhood(rng, rank, longest[rank - 1])
        if math.prod(layout) <= most_tokens:
            yield neighborhood, layout, random_tile(rng, rank, 4), random_tile(rng, rank, 4)
            count -= 1


def test_the_order_of_visits(geometry):
    """All visits of all tiles: every KV tile of the plan once, those without a mask first, in the order of the Pallas kernels."""
    mixed = 0
    for neighborhood, layout, q_tile, kv_tile in cases(0, 150, 2000):
        plan = plan_of(neighborhood, layout, q_tile, kv_tile)
        row = problem_row(neighborhood, layout, q_tile, kv_tile)
        for tile in range(0, plan.num_tiles, 1 + plan.num_tiles // 12):
            walk = tile_walk(plan, tile)
            count = walk.num_visits
            arguments = [row] * count, [tile] * count, range(count)
            got = on_rows(geometry.visits, MAX_RANK, *map(list, arguments)) if count else []
            np.testing.assert_array_equal(got, [start_of(walk, visit) for visit in range(count)])
            if count:
                enumerated = QueryTilePlan(
                    neighborhood,
                    layout,
                    q_start=walk.own_start,
                    q_tile=q_tile,
                    kv_tile=kv_tile,
                    dynamic=True,
                    group=walk.residues,
                ).visits()
                check_once(got[:, : len(layout)], enumerated, walk, kv_tile)
                mixed += 0 < walk.num_clean < count
    assert mixed > 50


def check_once(got, enumerated, walk, kv_tile):
    """Visits are the enumerated ones, and the clean ones are those that are full and hold no padding."""
    starts = [tuple(map(int, start)) for start in got]
    assert sorted(starts) == sorted(visit.start for visit in enumerated)
    clean = {
        visit.start
        for visit in enumerated
        if visit.is_full and (np.add(visit.start, kv_tile) <= walk.lengths).all()
    }
    assert set(starts[: walk.num_clean]) == clean


@pytest.mark.parametrize("is_causal", [False, True])
def test_jobs(geometry, is_causal):
    """Every tile of every head once, in the order of the Pallas kernels' grid."""
    neighborhood = Neighborhood((3, 4), (1, 1), (2, 1), (False, is_causal))
    batch, heads, layout = 3, 4, (9, 20)
    plan = plan_of(neighborhood, layout, (4, 4), (4, 4))
    row = problem_row(neighborhood, layout, (4, 4), (4, 4), batch=batch, query_heads=heads)
    sizes = np.zeros(3, np.int64)
    call(geometry.counts, ints(row), sizes)
    num_jobs = plan.num_tiles * batch * heads
    assert list(sizes) == [plan.num_tiles, num_jobs, is_causal] and plan.is_uneven == is_causal
    got = jobs(geometry, row, np.arange(num_jobs))
    ranges = {"batch": range(batch), "head": range(heads), "tile": range(plan.num_tiles)}
    names = ("tile", "batch", "head") if is_causal else ("batch", "head", "tile")
    grid = [dict(zip(names, at, strict=True)) for at in itertools.product(*map(ranges.get, names))]
    np.testing.assert_array_equal(got, [[job["batch"], job["head"], job["tile"]] for job in grid])


def jobs(geometry, row, numbers):
    out = np.zeros((len(numbers), 3), np.int32)
    numbers = np.ascontiguousarray(numbers, np.int64)
    call(geometry.jobs, ctypes.c_int64(len(numbers)), ints(row), numbers, out)
    return out


@pytest.mark.parametrize("is_causal", [False, True])
def test_jobs_past_32_bits(geometry, is_causal):
    neighborhood = Neighborhood((3,), (1,), (1,), (is_causal,))
    tiles, batch, heads = 2**20, 2**10, 2**5
    row = problem_row(neighborhood, (tiles,), (1,), (1,), batch=batch, query_heads=heads)
    sizes = np.zeros(3, np.int64)
    call(geometry.counts, ints(row), sizes)
    assert sizes[1] == tiles * batch * heads
    numbers = np.random.default_rng(4).integers(0, sizes[1], 1000)
    numbers[:2] = 0, sizes[1] - 1
    shape = (tiles, batch, heads) if is_causal else (batch, heads, tiles)
    place = dict(zip("tbh" if is_causal else "bht", np.unravel_index(numbers, shape), strict=True))
    want = np.stack([place["b"], place["h"], place["t"]], axis=1)
    np.testing.assert_array_equal(jobs(geometry, row, numbers), want)


def check_meetings(geometry, neighborhood, layout, q_tile, kv_tile):
    """Every tile, visit and row of one head: queries meet the keys that the mask says, once. The number of clean visits."""
    row = ints(problem_row(neighborhood, layout, q_tile, kv_tile))
    memory = stored(layout, neighborhood.dilation)
    tokens = math.prod(memory)
    counts, strays = np.zeros((*memory, *memory), np.uint8), np.zeros(1, np.int64)
    clean = call(geometry.meetings, row, ctypes.c_int64(tokens), counts, strays)
    what = f"{neighborhood} {layout} q={q_tile} kv={kv_tile}"
    assert strays[0] == 0, what
    real = tuple(slice(length) for length in (*layout, *layout))
    np.testing.assert_array_equal(counts[real], neighborhood.mask(layout), err_msg=what)
    assert counts.sum() == counts[real].sum(), what
    return clean


def test_masks_of_every_small_rule(geometry):
    """Each with tiles of its own, so that over all rules every pair of sizes occurs."""
    pairs = itertools.cycle(itertools.product((1, 2, 4, 8, 16, 64), (1, 2, 4, 8, 32, 64, 128)))
    clean = 0
    for length in range(1, LONGEST + 1):
        for rule in every_rule(length):
            q_tile, kv_tile = next(pairs)
            one = ((rule.window,), (rule.stride,), (rule.dilation,), (rule.is_causal,))
            clean += check_meetings(geometry, Neighborhood(*one), (length,), (q_tile,), (kv_tile,))
    assert clean > 1000


def test_masks_of_random_problems(geometry):
    clean = sum(check_meetings(geometry, *case) for case in cases(1, 600, 500))
    assert clean > 1000


@pytest.mark.parametrize(
    ("layout", "q_tile", "kv_tile"),
    [
        ((300,), (128,), (128,)),
        ((18, 21), (8, 16), (8, 16)),
        ((18, 21), (2, 128), (128, 1)),
        ((5, 9, 12), (4, 4, 16), (4, 4, 8)),
        ((5, 9, 12), (2, 8, 8), (2, 2, 32)),
        ((4, 5, 23), (1, 1, 128), (1, 64, 2)),
    ],
)
@pytest.mark.parametrize("seed", range(5))
def test_masks_with_tiles_of_kernels(geometry, layout, q_tile, kv_tile, seed):
    """KV tiles of 128 keys: several words of bits to a row."""
    rng = np.random.default_rng([5, seed])
    rules = []
    for length in layout:
        dilation = int(rng.integers(1, min(length, 3) + 1))
        window = int(rng.integers(1, length // dilation + 1))
        rules.append((window, int(rng.integers(1, window + 1)), dilation, bool(rng.integers(2))))
    check_meetings(geometry, Neighborhood(*zip(*rules, strict=True)), layout, q_tile, kv_tile)


def box_offsets(geometry, row, heads, place, box, columns):
    """Of a box's entries `[*box, columns]` in the order of shared memory; -1 where the copy reads zero."""
    first, count = columns
    box = [*box, *[1] * (MAX_RANK - len(box))]
    out = np.full((*box, count), -7, np.int64)
    numbers = [ctypes.c_int32(n) for n in (heads, first, count)]
    call(geometry.box_offsets, ints(row), numbers[0], ints(place), ints(box), *numbers[1:], out)
    return out


def padded(values, fill=0):
    return [*values, *[fill] * (MAX_RANK - len(values))]


def test_boxes(geometry):
    """Against indexing: tokens of a dilation group from any start, zero past the end of what memory holds of the group."""
    rng = np.random.default_rng(6)
    outside = 0
    for neighborhood, layout, q_tile, kv_tile in cases(2, 600, 1500):
        batch, kv_heads, group, head_dim = (int(n) for n in rng.integers(1, 4, 4))
        heads = {"query_heads": kv_heads * group, "kv_heads": kv_heads}
        row = problem_row(
            neighborhood, layout, q_tile, kv_tile, batch=batch, head_dim=head_dim, **heads
        )
        memory = stored(layout, neighborhood.dilation)
        of_array = int(rng.choice(list(heads.values())))
        shape = (batch, *memory, of_array, head_dim)
        array = np.arange(math.prod(shape)).reshape(shape)
        entry, head = int(rng.integers(batch)), int(rng.integers(of_array))
        residues = [int(rng.integers(d)) for d in neighborhood.dilation]
        groups = [n // d for n, d in zip(memory, neighborhood.dilation, strict=True)]
        start = [int(rng.integers(n)) for n in groups]
        first = int(rng.integers(head_dim))
        columns = first, int(rng.integers(1, head_dim - first + 1))
        place = [entry, head, *padded(residues), *padded(start)]
        got = box_offsets(geometry, row, of_array, place, kv_tile, columns)

        tokens = array[entry, ..., head, first : sum(columns)]
        for axis, (residue, d) in enumerate(zip(residues, neighborhood.dilation, strict=True)):
            tokens = np.moveaxis(np.moveaxis(tokens, axis, 0)[residue::d], 0, axis)
        excess = [(0, size) for size in kv_tile]
        tokens = np.pad(tokens, [*excess, (0, 0)], constant_values=-1)
        box = tuple(slice(a, a + n) for a, n in zip(start, kv_tile, strict=True))
        want = tokens[box]
        np.testing.assert_array_equal(got.reshape(want.shape), want, err_msg=f"{layout} {place}")
        outside += (want < 0).any() and (want >= 0).any()
    assert outside > 100


def test_rows_go_where_they_came_from(geometry):
    """The row that the box of out writes and the lse's place are those of the row's token: every query of memory once."""
    rng = np.random.default_rng(7)
    for neighborhood, layout, q_tile, kv_tile in cases(3, 90, 600):
        batch, heads = (int(n) for n in rng.integers(1, 4, 2))
        head_dim = 8
        row = ints(
            problem_row(
                neighborhood,
                layout,
                q_tile,
                kv_tile,
                batch=batch,
                query_heads=heads,
                head_dim=head_dim,
            )
        )
        plan = plan_of(neighborhood, layout, q_tile, kv_tile, batch=batch, query_heads=heads)
        memory = stored(layout, neighborhood.dilation)
        numbers = np.arange(batch * math.prod(memory) * heads).reshape(batch, *memory, heads)
        real = numbers[(slice(None), *(slice(length) for length in layout))]
        parts = int(rng.choice([n for n in (1, 2, 4) if n <= math.prod(q_tile)]))
        seen = []
        for job in range(plan.num_tiles * batch * heads):
            out = np.full((math.prod(q_tile), 3), -7, np.int64)
            call(geometry.row_offsets, row, ctypes.c_int64(job), ctypes.c_int32(parts), out)
            lse, first, is_real = out.T
            np.testing.assert_array_equal(first[is_real == 1], head_dim * lse[is_real == 1])
            seen += lse[is_real == 1].tolist()
        assert sorted(seen) == sorted(real.ravel().tolist())


def test_offsets_past_32_bits(geometry):
    """Arrays of more than 2^31 elements, at their last entries."""
    layout, heads, head_dim, batch = (40, 720, 1280), 24, 128, 2
    neighborhood = Neighborhood((5, 9, 9), (1, 1, 1), (2, 3, 4), (False, False, False))
    box = (2, 2, 2)
    row = problem_row(
        neighborhood, layout, box, box, batch=batch, query_heads=heads, head_dim=head_dim
    )
    residues, start = (1, 2, 3), (19, 239, 319)
    got = box_offsets(geometry, row, heads, [1, 23, *residues, *start], box, (64, 64))
    token = 1
    places = [r + d * n for r, d, n in zip(residues, (2, 3, 4), start, strict=True)]
    for length, place in zip(layout, places, strict=True):
        token = token * length + place
    first = (token * heads + 23) * head_dim + 64
    assert first > 2**31
    want = np.full((*box, 64), -1)
    want[0, 0, 0] = first + np.arange(64)
    np.testing.assert_array_equal(got, want)
    job = batch * heads * math.prod(plan_of(neighborhood, layout, box, box).tiles) * 24 - 1
    out = np.full((8, 3), -7, np.int64)
    call(geometry.row_offsets, ints(row), ctypes.c_int64(job), ctypes.c_int32(1), out)
    assert out[-1].tolist() == [(math.prod(layout) * 2) * heads - 1, (out[-1, 0]) * head_dim, 1]
