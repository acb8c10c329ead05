"""Tile shapes and pairs of a slab, counted where it most often lies: amid the volume, key slab around query slab.

Origins are data, so a count needs some: windows amid a volume are whole. Only the plan of the kernels is asked; rules are
`gna_jax.neighborhood`'s.
"""

import dataclasses
import functools
import itertools
import math

import numpy as np

from gna_jax.problem import Problem
from gna_jax.simulator.tile_shapes import power_of_two_shapes
from gna_jax.tiling import Tiles
from pallas_kernels import limits
from pallas_kernels.plan import TilePlan, axis_walk, clean_visits
from pallas_kernels.slabs import Origin

Shape = tuple[int, ...]

MOST_GROUPS = 8
"""Dilation groups per axis that the choice of shapes looks at; they differ by a token or a shift of the tiles."""


def forward_pairs(problem: Problem, tiles: Tiles) -> tuple[int, int]:
    """Pairs that the forward computes for a batch entry and head, and those of them that pass a mask."""
    return _pairs(limits.forward_plan(problem, tiles))


def pairs(problem: Problem, q_tile: Shape, kv_tile: Shape) -> tuple[int, int]:
    """`forward_pairs` of any kernel whose Q tiles visit KV tiles from the first key of their box on."""
    return _pairs(TilePlan(problem, q_tile, kv_tile, 1, 0, 1, 1))


def _pairs(plan: TilePlan) -> tuple[int, int]:
    axes = [axis_visits(plan, number) for number in range(plan.problem.rank)]
    visits, clean = (math.prod(counts) for counts in zip(*axes, strict=True))
    pairs = math.prod(plan.own) * plan.columns
    return visits * pairs, (visits - clean) * pairs


def axis_visits(plan: TilePlan, number: int, groups: int | None = None) -> tuple[int, int]:
    """Visits of all tiles of one axis, and those without a mask; `groups`: of about so many dilation groups."""
    dilation, visits, clean = plan.dilation[number], 0, 0
    for residue in range(0, dilation, max(1, dilation // (groups or dilation))):
        residues = [0] * plan.problem.rank
        residues[number] = residue
        axis = plan.group_axes(residues, _amid(plan))[number]
        first = np.arange(0, axis.own_length, plan.own[number])
        walk = axis_walk(plan, number, axis, first)
        visits += int(walk.num_visits.sum())
        clean += int(clean_visits(walk)[1].sum())
    return visits, clean


def _amid(plan: TilePlan) -> tuple[Origin, ...]:
    """Origins of slabs in the middle of the volume."""
    origins = []
    layouts = plan.problem.global_layout, plan.own_layout, plan.visited_layout, plan.dilation
    for length, own, visited, d in zip(*layouts, strict=True):
        first = (length - own) // 2, (length - visited) // 2
        origins.append(Origin(*(number for origin in first for number in divmod(origin, d))))
    return tuple(origins)


def best_shapes(
    problem: Problem, own_tokens: int, visited_tokens: int, *, is_inverse: bool, least_run: int = 1
) -> tuple[Shape, Shape]:
    """The power-of-two shapes of own and visited tiles with the fewest visits; among equals the fewest with a mask, then the most compact.

    Args:
      problem: the slab's.
      own_tokens, visited_tokens: tokens of a tile that a block owns, and of one that it visits.
      is_inverse: whether blocks own KV tiles and visit Q tiles.
      least_run: tokens that a visited tile has at least on the last axis.
    """
    # What scale and precision a call has changes nothing here.
    same = dataclasses.replace(problem, scale=1.0, precision=None)
    return _search(same, own_tokens, visited_tokens, is_inverse, least_run)


@functools.lru_cache(maxsize=256)
def _search(
    problem: Problem, own_tokens: int, visited_tokens: int, is_inverse: bool, least_run: int
) -> tuple[Shape, Shape]:
    rank = problem.rank
    own_shapes, visited_shapes = (
        power_of_two_shapes(tokens, rank) for tokens in (own_tokens, visited_tokens)
    )
    visited_shapes = [shape for shape in visited_shapes if shape[-1] >= least_run]

    @functools.cache
    def visits(number: int, own: int, visited: int) -> tuple[int, int]:
        tiles = [(1,) * number + (size,) + (1,) * (rank - 1 - number) for size in (own, visited)]
        q_tile, kv_tile = reversed(tiles) if is_inverse else tiles
        plan = TilePlan(problem, q_tile, kv_tile, 1, number, 1, 1, is_inverse)
        return axis_visits(plan, number, MOST_GROUPS)

    def total(pair: tuple[Shape, Shape]) -> tuple[int, int]:
        axes = [visits(number, *sizes) for number, sizes in enumerate(zip(*pair, strict=True))]
        all_visits, clean = (math.prod(counts) for counts in zip(*axes, strict=True))
        return all_visits, -clean

    return min(itertools.product(own_shapes, visited_shapes), key=total)
