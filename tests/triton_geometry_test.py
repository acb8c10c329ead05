"""The walk in Triton's own source, in its interpreter, against `gna_jax.tiling` and `gna_jax.neighborhood`."""

import itertools

import numpy as np
import pytest
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


def walks(layout, rule, q_tile, kv_tile, is_inverse):
    """Per own tile: residues and first token, or None where it is past its group; then every visit, in order."""
    from walk_kernel import walk_kernel, walk_kernel_inverse

    plan = KernelPlan.of(problem_of(layout, rule, 16, np.float32), q_tile, kv_tile)
    tiles = tile_count(plan, is_inverse)
    visited = q_tile if is_inverse else kv_tile
    most = visits_at_most(layout, visited)
    heads = np.zeros((tiles, 8), np.int32)
    visits = np.full((tiles, most, 4), -1, np.int32)
    kernel = walk_kernel_inverse if is_inverse else walk_kernel
    heads, visits = run(kernel, plan, [heads, visits], tiles, MOST=most)
    return heads, visits, len(layout)


def check(layout, rule, q_tile, kv_tile, is_inverse):
    heads, visits, rank = walks(layout, rule, q_tile, kv_tile, is_inverse)
    neighborhood = Neighborhood.of(rank, **rule)
    own = kv_tile if is_inverse else q_tile
    seen = set()
    for head, steps in zip(heads.tolist(), visits.tolist(), strict=True):
        residues, start = tuple(head[3 - rank : 3]), tuple(head[6 - rank : 6])
        clean, total = head[6], head[7]
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
