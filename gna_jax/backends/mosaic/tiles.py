"""Tile shapes of a call: the caller's, or those that the simulator counts the least work for."""

import dataclasses

from gna_jax.problem import Problem
from gna_jax.simulator.tile_shapes import best_tiles
from gna_jax.tiling import Tiles
from pallas_kernels import limits


def complete(problem: Problem, tiles: Tiles | None) -> Tiles:
    """All four shapes: what the caller left out is chosen. `supports` has accepted the rest."""
    generation = limits.generation_of(problem) or limits.HOPPER
    rule, layout = problem.neighborhood, problem.global_layout
    if tiles is None:
        tiles = best_tiles(
            rule,
            layout,
            limits.MAX_WORKERS * generation.rows,
            generation.most_columns,
            dynamic=True,
        )
    if tiles.backward_q is None:
        backward = best_tiles(
            rule,
            layout,
            generation.most_backward_columns,
            generation.backward_workers * generation.rows,
            dynamic=True,
            backward=True,
            least_q_run=limits.ALIGNED_FLOATS,
        )
        tiles = dataclasses.replace(tiles, backward_q=backward.q, backward_kv=backward.kv)
    return tiles
