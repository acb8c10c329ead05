"""The walks that kernels compute from a tile's number, against `QueryTilePlan` and `KeyTilePlan`, which enumerate them."""

import itertools
import math

import numpy as np
import pytest
from attention_suite import Case, case_1d, case_of, random_case

from gna_jax.tiling import KeyTilePlan, QueryTilePlan, dilation_groups
from pallas_kernels.plan import TilePlan, part_number, tile_walk


def plan_of(case: Case, q_tile: tuple[int, ...], kv_tile: tuple[int, ...], inverse=False):
    own = kv_tile if inverse else q_tile
    split_axis = next((axis for axis, size in enumerate(own) if size % 2 == 0), None)
    workers = 1 if split_axis is None else 2
    return TilePlan(case.problem(), q_tile, kv_tile, workers, split_axis or 0, 2, 2, inverse)


def check_walks(case: Case, plan: TilePlan) -> None:
    tile, seen = 0, set()
    for group, lengths in dilation_groups(case.layout, case.dilation):
        order = [
            reversed(range(count)) if is_causal and not plan.is_inverse else range(count)
            for count, is_causal in zip(plan.tiles, case.is_causal, strict=True)
        ]
        for place in itertools.product(*order):
            start = tuple(n * size for n, size in zip(place, plan.own, strict=True))
            walk = tile_walk(plan, tile)
            assert (walk.residues, walk.own_start, walk.lengths) == (group, start, lengths)
            check_visits(case, plan, walk)
            seen |= set(parts_of(plan, walk))
            tile += 1
    assert tile == plan.num_tiles
    assert seen == set(range(plan.num_parts))


def check_visits(case: Case, plan: TilePlan, walk) -> None:
    clean = [walk.clean_tile(step) for step in range(walk.num_clean)]
    shell = [walk.shell_tile(step) for step in range(walk.num_visits - walk.num_clean)]
    if any(q >= length for q, length in zip(walk.own_start, walk.lengths, strict=True)):
        assert not clean and not shell
        return
    tiles = {"q_tile": plan.q_tile, "kv_tile": plan.kv_tile, "dynamic": True}
    geometry = case.neighborhood, case.layout
    if plan.is_inverse:
        enumerated = KeyTilePlan(*geometry, kv_start=walk.own_start, group=walk.residues, **tiles)
    else:
        enumerated = QueryTilePlan(*geometry, q_start=walk.own_start, group=walk.residues, **tiles)
    visits = enumerated.visits()
    ends = [(v.start, np.add(v.start, plan.visited)) for v in visits if v.is_full]
    assert sorted(clean + shell) == sorted(visit.start for visit in visits)
    assert clean == [start for start, end in ends if (end <= np.asarray(walk.lengths)).all()]


def parts_of(plan: TilePlan, walk) -> list[int]:
    numbers = []
    for worker in range(plan.num_workers):
        start = list(walk.own_start)
        start[plan.split_axis] += worker * plan.part[plan.split_axis]
        numbers.append(part_number(plan, walk.residues, start))
    return numbers


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("seed", range(60))
def test_random_walks(seed, inverse):
    case, rng = random_case(seed, max_tokens=400, max_loops=100), np.random.default_rng(seed)
    sizes = [tuple(int(n) for n in 2 ** rng.integers(0, 4, len(case.layout))) for _ in range(2)]
    check_walks(case, plan_of(case, *sizes, inverse))


def test_causal_tiles_get_lighter():
    case = case_1d(300, -1, is_causal=True)
    for inverse in (False, True):
        plan = plan_of(case, (16,), (16,), inverse)
        visits = [tile_walk(plan, tile).num_visits for tile in range(plan.num_tiles)]
        assert plan.is_uneven and visits[0] > visits[-1] and visits == sorted(visits, reverse=True)


def test_a_walk_with_clean_tiles_on_every_side_of_the_shell():
    case = case_of((24, 26, 28), (9, 10, 11))
    plan = plan_of(case, (2, 2, 2), (2, 2, 2))
    walk = tile_walk(plan, math.prod(plan.tiles) // 2 + plan.tiles[2] // 2)
    assert 0 < walk.num_clean < walk.num_visits
    check_visits(case, plan, walk)
