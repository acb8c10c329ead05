"""The walk in Triton's own source, in its interpreter, against `gna_jax.tiling` and `gna_jax.neighborhood`."""

import itertools
from typing import NamedTuple

import numpy as np
import pytest
from attention_suite import case_of, pairs_of, places, random_case
from triton_suite import problem_of, quick_interpreter, run, tile_count, visits_at_most

from gna_jax.backends.triton.plan import KernelPlan
from gna_jax.neighborhood import Neighborhood
from gna_jax.tiling import KeyTilePlan, QueryTilePlan

pytestmark = pytest.mark.triton


def rules(length):
    """Every rule of an axis of this length, few enough to try all."""
    for dilation in (1, 2, 3):
        longest = length // dilation
        for window in (-1, *range(1, longest + 1)):
            widest = longest if window == -1 else window
            for stride in sorted({1, 2, widest} & set(range(1, widest + 1))):
                for is_causal in (False, True):
                    yield dict(
                        window_size=window, stride=stride, dilation=dilation, is_causal=is_causal
                    )


def walks(problem, q_tile, kv_tile, is_inverse, origins=(None, None)):
    """Per own tile: where it lies and its box, and every visit, in order, after a 0; -1 past the last."""
    from walk_kernel import walk_kernel, walk_kernel_inverse

    plan = KernelPlan.of(problem, q_tile, kv_tile)
    tiles = tile_count(plan, is_inverse)
    most = visits_at_most(problem.global_layout, q_tile if is_inverse else kv_tile)
    heads = np.zeros((tiles, 20), np.int32)
    visits = np.full((tiles, most, 4), -1, np.int32)
    kernel = walk_kernel_inverse if is_inverse else walk_kernel
    heads, visits = run(kernel, plan, [*origins, heads, visits], tiles, MOST=most)[-2:]
    return [
        (Head.of(head, problem.rank), steps)
        for head, steps in zip(heads.tolist(), visits.tolist(), strict=True)
    ]


class Head(NamedTuple):
    """One own tile, per axis; and its visits."""

    offset: tuple[int, ...]
    start: tuple[int, ...]
    end: tuple[int, ...]
    visited_offset: tuple[int, ...]
    box: tuple[tuple[int, int], ...]
    clean: int
    total: int

    @classmethod
    def of(cls, row, rank):
        axes = [tuple(row[first - rank : first]) for first in range(3, 21, 3)]
        return cls(*axes[:4], tuple(zip(*axes[4:], strict=True)), *row[18:])


def check(layout, rule, q_tile, kv_tile, is_inverse):
    rank, neighborhood = len(layout), Neighborhood.of(len(layout), **rule)
    problem = problem_of(layout, rule, 16, np.float32)
    own = kv_tile if is_inverse else q_tile
    seen = set()
    for head, steps in walks(problem, q_tile, kv_tile, is_inverse):
        residues, start, clean, total = head.offset, head.start, head.clean, head.total
        group = [
            (n - r + d - 1) // d
            for n, r, d in zip(layout, residues, neighborhood.dilation, strict=True)
        ]
        if any(first >= length for first, length in zip(start, group, strict=True)):
            assert total == 0
            continue
        seen.add((residues, start))
        kind, place = (KeyTilePlan, "kv_start") if is_inverse else (QueryTilePlan, "q_start")
        plan = kind(
            neighborhood,
            layout,
            q_tile=q_tile,
            kv_tile=kv_tile,
            dynamic=True,
            group=residues,
            **{place: start},
        )
        assert head.box == plan.outer_box
        assert all(end <= n for (_, end), n in zip(head.box, group, strict=True))
        wanted = plan.visits()
        got = [tuple(step[4 - rank :]) for step in steps[:total]]
        assert all(step[0] == -1 for step in steps[total:]), "more visits than counted"
        assert len(got) == len(set(got)) and set(got) == {visit.start for visit in wanted}
        visited = q_tile if is_inverse else kv_tile
        full = [
            visit.start
            for visit in wanted
            if visit.is_full
            and all(a + t <= n for a, t, n in zip(visit.start, visited, group, strict=True))
        ]
        assert got[:clean] == full, "what needs no mask comes first, row-major"
    counts = [range(d) for d in neighborhood.dilation]
    every = set()
    for residues in itertools.product(*counts):
        lengths = [
            (n - r + d - 1) // d
            for n, r, d in zip(layout, residues, neighborhood.dilation, strict=True)
        ]
        starts = (range(0, n, t) for n, t in zip(lengths, own, strict=True))
        every |= {(residues, start) for start in itertools.product(*starts)}
    assert seen == every, "every token is owned once"


@pytest.mark.parametrize("is_inverse", [False, True], ids=["queries", "keys"])
def test_every_rule_of_a_short_axis(is_inverse):
    with quick_interpreter():
        for rule in rules(7):
            check((7,), rule, (4,), (2,), is_inverse)


@pytest.mark.parametrize("is_inverse", [False, True], ids=["queries", "keys"])
def test_shells_of_planes_and_volumes(is_inverse):
    with quick_interpreter():
        check((9, 7), {"window_size": (7, 5), "stride": (1, 2)}, (2, 2), (2, 1), is_inverse)
        check((6, 5, 7), {"window_size": (5, 4, 6)}, (2, 2, 4), (2, 1, 2), is_inverse)
        check(
            (6, 5, 7),
            {"window_size": (3, 2, -1), "dilation": (1, 2, 2), "is_causal": (True, False, False)},
            (4, 2, 2),
            (2, 2, 2),
            is_inverse,
        )


def tokens_of(axes, dilation, layout):
    """Numbers in an array of the tokens at places `[first, end)` of a group, with its offset, per axis; none lies outside the array."""
    numbers = [o + d * np.arange(a, b) for (o, a, b), d in zip(axes, dilation, strict=True)]
    for number, length in zip(numbers, layout, strict=True):
        assert ((number >= 0) & (number < length)).all()
    return np.ravel_multi_index(np.meshgrid(*numbers, indexing="ij"), layout).ravel()


def check_slabs(case, layouts, origins, q_tile, kv_tile, is_inverse):
    """Every pair that sees each other is visited once, in boxes that hold no token outside the slab or the volume."""
    rule = {name: value for name, value in case.geometry.items() if name != "scale"}
    problem = problem_of(case.layout, rule, 16, np.float32, slabs=layouts)
    slabs = [places(n, o) for n, o in zip(layouts, origins, strict=True)]
    sees, _ = pairs_of(case, *slabs)
    sees = sees.T if is_inverse else sees
    own, visited = (1, 0) if is_inverse else (0, 1)
    inside = ((slabs[visited] >= 0) & (slabs[visited] < np.asarray(case.layout)[:, None])).all(0)
    tile, visited_tile = (kv_tile, q_tile) if is_inverse else (q_tile, kv_tile)
    owned, counts, clean = np.zeros(len(sees), int), np.zeros(sees.shape, int), 0
    for head, steps in walks(problem, q_tile, kv_tile, is_inverse, np.asarray(origins, np.int32)):
        ends = np.minimum(np.add(head.start, tile), head.end)
        if (ends <= head.start).any():
            assert head.total == 0
            continue
        mine = tokens_of(
            zip(head.offset, head.start, ends, strict=True), case.dilation, layouts[own]
        )
        owned[mine] += 1
        clean += head.clean
        assert all(step[0] == -1 for step in steps[head.total :]), "more visits than counted"
        for number, (_, *start) in enumerate(steps[: head.total]):
            start = start[3 - len(tile) :]
            whole = np.add(start, visited_tile)
            last = np.minimum(whole, [end for _, end in head.box])
            theirs = tokens_of(
                zip(head.visited_offset, start, last, strict=True), case.dilation, layouts[visited]
            )
            assert inside[theirs].all(), "a token outside the volume is read"
            pairs = np.ix_(mine, theirs)
            if number < head.clean:
                assert (last == whole).all() and sees[pairs].all()
            counts[pairs] += 1
    assert (owned == 1).all() and (counts[sees] == 1).all() and (counts <= 1).all()
    return clean


@pytest.mark.parametrize("is_inverse", [False, True], ids=["queries", "keys"])
@pytest.mark.parametrize("seed", range(6))
def test_random_slabs(seed, is_inverse):
    """Inside the volume, across its edges, outside, longer than it; key slabs that hold a part of a window, or none."""
    case, rng = random_case(seed, max_tokens=80, max_loops=100), np.random.default_rng(seed)
    rank = len(case.layout)
    tiles = [tuple(int(n) for n in 2 ** rng.integers(0, 4, rank)) for _ in range(2)]
    layouts = [tuple(int(rng.integers(1, n + 2 + seed % 3)) for n in case.layout) for _ in range(2)]
    with quick_interpreter():
        for _ in range(2):
            origins = [[int(rng.integers(-4, n + 3)) for n in case.layout] for _ in range(2)]
            check_slabs(case, layouts, origins, *tiles, is_inverse)


@pytest.mark.parametrize("is_inverse", [False, True], ids=["queries", "keys"])
def test_slabs_have_clean_visits(is_inverse):
    """Amid the volume, and across its edge: there not the tiles that hold tokens outside. Origins are no multiples of the dilation."""
    case = case_of((30, 9), (11, 9), dilation=(2, 1), stride=(2, 1))
    with quick_interpreter():
        assert check_slabs(case, [(9, 9), (25, 9)], [(9, 0), (3, 0)], (2, 4), (4, 2), is_inverse)
        edge = [(-3, 0), (-1, 0)]
        assert check_slabs(case, [(19, 9), (25, 9)], edge, (2, 4), (2, 2), is_inverse)
