"""Tile shapes of a call: the caller's, else measured ones (`tuned`), else those that the simulator counts the least work for."""

import dataclasses
import itertools
import pathlib

from gna_jax.backends import slab_tiles
from gna_jax.backends.mosaic import tuned
from gna_jax.backends.mosaic.head_dims import pad_problem
from gna_jax.problem import Problem
from gna_jax.simulator.roofline import Direction
from gna_jax.simulator.tile_shapes import best_tiles, power_of_two_shapes
from gna_jax.tiling import Tiles
from pallas_kernels import limits


def complete(problem: Problem, tiles: Tiles | None) -> Tiles:
    """All four shapes: what the caller left out is chosen. `supports` has accepted the rest.

    Raises:
      RuntimeError: where a table of tuned tiles cannot be read, or has tiles for this call that the kernels refuse.
    """
    found = _measured(problem, tiles)
    if found is None:
        return counted(problem, tiles)
    entry, path = found
    chosen = entry.tiles
    if tiles is not None:
        chosen = with_backward(tiles, entry.backward.q, entry.backward.kv)
    # The caller's part is legal, so what is refused is the table's.
    reason = limits.supports(pad_problem(problem), chosen)
    if reason is not None:
        raise RuntimeError(
            f"{path}: the kernels refuse the tuned tiles of {tuned.key(problem)!r}: {reason}."
            " Run `gna-jax tune` again for this call, remove the entry, or pass tiles= yourself"
        )
    return chosen


def origin(problem: Problem, tiles: Tiles | None) -> str:
    """For people: which of the tiles of `complete` were measured, and when; empty where none were."""
    found = _measured(problem, tiles)
    if found is None:
        return ""
    return f"{'' if tiles is None else 'backward '}tuned on {found[0].date}"


def _measured(problem: Problem, tiles: Tiles | None) -> tuple[tuned.Entry, pathlib.Path] | None:
    """The table's entry where tiles are left out, and its file. Tables hold whole volumes: a slab has other sides."""
    is_complete = tiles is not None and tiles.backward_q is not None
    return None if is_complete or problem.is_slab else tuned.lookup(problem)


def counted(problem: Problem, tiles: Tiles | None = None) -> Tiles:
    """`complete` without tables: the simulator's count decides."""
    rows = (limits.generation_of(problem) or limits.HOPPER).rows
    capacity = limits.capacity_of(problem)
    rule, layout = problem.neighborhood, problem.global_layout
    if problem.is_slab:
        return _counted_for_slab(problem, tiles, capacity, rows)
    if tiles is None:
        tiles = best_tiles(
            rule,
            layout,
            capacity.forward.workers * rows,
            capacity.columns,
            dynamic=True,
        )
    if tiles.backward_q is None:
        backward = best_tiles(
            rule,
            layout,
            capacity.backward_columns,
            capacity.key_gradient.workers * rows,
            dynamic=True,
            backward=True,
            least_q_run=limits.ALIGNED_FLOATS,
        )
        tiles = with_backward(tiles, backward.q, backward.kv)
    return tiles


def _counted_for_slab(
    problem: Problem, tiles: Tiles | None, capacity: limits.Capacity, rows: int
) -> Tiles:
    """`counted` of a slab: its own sides are filled with tiles, not the volume's."""
    if tiles is None:
        own = capacity.forward.workers * rows
        q, kv = slab_tiles.best_shapes(problem, own, capacity.columns, is_inverse=False)
        tiles = Tiles(q, kv, dynamic=True)
    if tiles.backward_q is not None:
        return tiles
    kv, q = slab_tiles.best_shapes(
        problem,
        capacity.key_gradient.workers * rows,
        capacity.backward_columns,
        is_inverse=True,
        least_run=limits.ALIGNED_FLOATS,
    )
    return with_backward(tiles, q, kv)


def with_backward(tiles: Tiles, q: tuple[int, ...], kv: tuple[int, ...] | None) -> Tiles:
    """`tiles` with these shapes for dK and dV."""
    return dataclasses.replace(tiles, backward_q=q, backward_kv=kv)


def legal_tiles(problem: Problem, direction: Direction) -> tuple[Tiles, ...]:
    """All four shapes of every choice of a direction's pair of power-of-two shapes; the other direction's are `counted`.

    The backward's are those of dK and dV: dQ takes the forward's. Two choices that make the same kernel count once.
    """
    padded, default = pad_problem(problem), counted(problem)
    generation = limits.generation_of(problem) or limits.HOPPER
    is_forward = direction == "forward"
    own = [generation.rows * workers for workers in range(1, limits.MAX_WORKERS + 1)]
    capacity = limits.capacity_of(padded)
    most = capacity.columns if is_forward else capacity.backward_columns
    visited = [1 << power for power in range(most.bit_length())]
    own_shapes, visited_shapes = (
        [shape for number in numbers for shape in power_of_two_shapes(number, problem.rank)]
        for numbers in (own, visited)
    )
    legal = []
    for mine, theirs in itertools.product(own_shapes, visited_shapes):
        if is_forward:
            tiles = dataclasses.replace(default, q=mine, kv=theirs)
        else:
            tiles = with_backward(default, theirs, mine)
        plan = limits.forward_plan if is_forward else limits.key_gradient_plan
        if limits.supports(padded, tiles) is None and plan(padded, tiles).own == mine:
            legal.append(tiles)
    return tuple(legal)
