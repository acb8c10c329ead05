"""The best tile shapes for a rule: power-of-two factorisations of a kernel's tile, tried all at once.

How many elements a tile has is the kernel's business (`budgets`); how they lie over the axes is free. Visits of a layout are
products over its axes, so every pair of shapes is judged from small tables, one per axis.
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from gna_jax.neighborhood import AxisNeighborhood, Neighborhood, per_axis
from gna_jax.tiling import Tiles, group_lengths, key_walk, query_walk

Shape = tuple[int, ...]


@functools.lru_cache(maxsize=256)
def power_of_two_shapes(elements: int, rank: int) -> tuple[Shape, ...]:
    """Every shape of `rank` powers of two that holds `elements`, the most compact first.

    >>> power_of_two_shapes(8, 2)
    ((2, 4), (4, 2), (1, 8), (8, 1))

    Raises:
      ValueError: unless `elements` is a power of two.
    """
    if elements < 1 or elements & (elements - 1):
        raise ValueError(
            f"a tile must have a power of two of elements; got {elements}; kernels multiply 16, 32, 64, 128 or 256 rows"
        )
    shapes = _factorisations(elements, rank)
    return tuple(sorted(shapes, key=lambda shape: (sum(shape), shape)))


def _factorisations(elements: int, rank: int) -> list[Shape]:
    if rank == 1:
        return [(elements,)]
    sizes = [1 << exponent for exponent in range(elements.bit_length())]
    return [(size, *rest) for size in sizes for rest in _factorisations(elements // size, rank - 1)]


def best_tiles(
    neighborhood: Neighborhood,
    layout: Sequence[int],
    q_elements: int,
    kv_elements: int,
    dynamic: bool = False,
    *,
    backward: bool = False,
    additional_keys: int = 0,
    least_q_run: int = 1,
) -> Tiles:
    """The power-of-two tile shapes with the least total work.

    Least visits, padding and additional keys counted; among equals fewest partial visits, then the most compact tiles.

    Args:
      neighborhood: rule of every axis.
      layout: tokens per axis.
      q_elements, kv_elements: elements of a Q and of a KV tile: powers of two.
      dynamic: whether visited tiles start where the outer box starts, or at multiples of their size.
      backward: tiles of the dK and dV walk instead of the forward and dQ walk.
      additional_keys: keys outside the layout that every query sees.
      least_q_run: tokens that a Q tile has at least on the last axis.

    >>> best_tiles(Neighborhood.of(2, window_size=80), (256, 256), 128, 128)
    Tiles(q=(8, 16), kv=(16, 8), backward_q=None, backward_kv=None, dynamic=False)

    Raises:
      ValueError: for a layout too small for its windows, or elements that are not a power of two.
    """
    layout = per_axis("layout", layout, neighborhood.rank)
    neighborhood.check_layout(layout)
    elements = q_elements, kv_elements
    ((tiles, _),) = best_tiles_of_each(
        (neighborhood,), layout, elements, dynamic, backward, additional_keys, least_q_run
    )
    return tiles


def best_tiles_of_each(
    neighborhoods: Sequence[Neighborhood],
    layout: Sequence[int],
    elements: tuple[int, int],
    dynamic: bool,
    backward: bool = False,
    additional_keys: int = 0,
    least_q_run: int = 1,
) -> list[tuple[Tiles, int]]:
    """`best_tiles` of many checked rules on one layout, and their visits, additional tiles counted.

    The rules share the tables of the axes they have in common. `elements` are those of a Q and of a KV tile.
    """
    q_shapes, kv_shapes = (power_of_two_shapes(n, len(layout)) for n in elements)
    q_shapes = tuple(shape for shape in q_shapes if shape[-1] >= least_q_run)
    additional_tiles = -(-additional_keys // elements[1])
    shape = len(neighborhoods), len(q_shapes), len(kv_shapes)
    # 64 bits hold the visits of a billion tokens, even for tiles of one.
    visits, full, q_tiles = (np.ones(shape, np.int64) for _ in range(3))
    axes = list(zip(*(neighborhood.axes for neighborhood in neighborhoods), strict=True))
    for number, length in enumerate(layout):
        distinct = {rule: place for place, rule in enumerate(dict.fromkeys(axes[number]))}
        row = [distinct[rule] for rule in axes[number]]
        q_sizes, kv_sizes = (
            tuple(shape[number] for shape in shapes) for shapes in (q_shapes, kv_shapes)
        )
        tables = (_axis_table(r, length, q_sizes, kv_sizes, dynamic, backward) for r in distinct)
        of_rules = np.stack(list(tables), axis=1)  # [3, distinct rules, Q shapes, KV shapes]
        for product, table in zip((visits, full, q_tiles), of_rules, strict=True):
            product *= table[row]
    work = (visits + q_tiles * additional_tiles).reshape(len(neighborhoods), -1)
    partial = (visits - full).reshape(len(neighborhoods), -1)
    is_least = work == work.min(axis=1, keepdims=True)
    chosen = np.where(is_least, partial, np.iinfo(np.int64).max).argmin(axis=1)
    pairs = (divmod(int(place), len(kv_shapes)) for place in chosen)
    return [
        (_tiles(q_shapes[q], kv_shapes[kv], dynamic), int(least))
        for (q, kv), least in zip(pairs, work.min(axis=1), strict=True)
    ]


@functools.lru_cache(maxsize=1 << 14)
def _tiles(q: Shape, kv: Shape, dynamic: bool) -> Tiles:
    return Tiles(q=q, kv=kv, dynamic=dynamic)


@functools.lru_cache(maxsize=1 << 10)
def _axis_table(
    axis: AxisNeighborhood,
    length: int,
    q_sizes: tuple[int, ...],
    kv_sizes: tuple[int, ...],
    dynamic: bool,
    backward: bool,
) -> np.ndarray:
    """`[3, Q sizes, KV sizes]`: visits, full visits and Q tiles of one axis, for every pair of sizes."""
    walking, visited = (kv_sizes, q_sizes) if backward else (q_sizes, kv_sizes)
    distinct, place = np.unique(visited, return_inverse=True)
    of_size = {
        size: _axis_visits(axis, length, size, tuple(distinct.tolist()), dynamic, backward)
        for size in dict.fromkeys(walking)
    }
    visits_and_full = np.stack([of_size[size][:, place] for size in walking], axis=1)
    if backward:
        visits_and_full = visits_and_full.swapaxes(1, 2)
    q_tiles = sum(
        groups * -(-tokens // np.asarray(q_sizes))
        for tokens, groups in group_lengths(length, axis.dilation)
    )
    columns = np.broadcast_to(np.reshape(q_tiles, (1, -1, 1)), (1, *visits_and_full.shape[1:]))
    return np.concatenate([visits_and_full, columns])


@functools.lru_cache(maxsize=1 << 14)
def _axis_visits(
    axis: AxisNeighborhood,
    length: int,
    size: int,
    visited_sizes: tuple[int, ...],
    dynamic: bool,
    backward: bool,
) -> np.ndarray:
    """`[2, visited sizes]`: visits and full visits of all tiles of `size` on one axis, for every size of visited tiles.

    The totals of `counts.axis_counts`, for many sizes in one pass: tile sizes are a column that the walk broadcasts.
    """
    sizes: Any = np.asarray(visited_sizes)[:, None]
    total = np.zeros((2, len(visited_sizes)), np.int64)
    for tokens, groups in group_lengths(length, axis.dilation):
        start = np.arange(0, tokens, size)
        if backward:
            walk = query_walk(axis, tokens, start, q_tile=sizes, kv_tile=size, dynamic=dynamic)
        else:
            walk = key_walk(axis, tokens, start, q_tile=size, kv_tile=sizes, dynamic=dynamic)
        total[0] += groups * walk.num_visits.sum(axis=1)
        total[1] += groups * walk.num_full.sum(axis=1)
    return total
