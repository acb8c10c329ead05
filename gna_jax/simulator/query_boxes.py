"""Query tiles that read their box of keys whole, as the xla backend's do: how an axis is cut, and how long boxes get.

XLA programs have static shapes, so tiles are sorted into *classes* that share the number of queries and the length of the key box.
Cutting an axis where its windows stop being clamped pays twice: an edge tile's queries all share one window (box = window, no
mask), and the tiles of the interior all look alike (one mask, loop-invariant).

What tiles cost in time is `query_box_cost`'s business. All positions lie in dilation groups (see `gna_jax.neighborhood`).
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from gna_jax.neighborhood import AxisNeighborhood, equal_groups

MAX_CLASSES = 4
"""Classes per axis: each costs a loop, and loops multiply over axes."""


@dataclasses.dataclass(frozen=True)
class Outline:
    """What the tiles of an axis cost, without building them: tiles of `rows` queries, `count` of them, mean box length."""

    rows: tuple[int, ...]
    count: tuple[int, ...]
    box: tuple[float, ...]
    num_classes: int
    is_uniform: bool  # whether each class has one mask for all its tiles


@dataclasses.dataclass(frozen=True)
class Region:
    """Tiles of one length in one dilation group: the tile at `start` answers for its rows from `owned_from` on."""

    length: int
    start: np.ndarray  # [n]
    owned_from: np.ndarray  # [n]
    group: int
    residues: range


def regions(axis: AxisNeighborhood, length: int, tile: int, split_edges: bool) -> Iterator[Region]:
    """The queries of every dilation group, cut where windows stop being clamped, then into tiles."""
    for residues, group in equal_groups(length, axis.dilation):
        for begin, stop in _cuts(axis, group, split_edges):
            first, end = axis.keys(np.asarray([begin, stop - 1]), group)
            balance = axis.stride == 1 or (first[0] == first[1] and end[0] == end[1])
            yield _region(begin, stop, tile, bool(balance), group, residues)


def _cuts(axis: AxisNeighborhood, group: int, split_edges: bool) -> list[tuple[int, int]]:
    """Regions `[begin, stop)`: the edges, whose windows are clamped to the group's ends, and the interior."""
    if not split_edges:
        return [(0, group)]
    first, end = axis.keys(np.arange(group), group)
    low = int(np.count_nonzero(first == 0))
    high = group if axis.is_causal else max(low, group - int(np.count_nonzero(end == group)))
    if axis.stride == 1 and low < high < group:
        # Equal edges share one class; the one query more of an even window's left edge joins the interior.
        edge = min(low, group - high)
        low, high = edge, group - edge
    regions = [(0, low), (low, high), (high, group)]
    return [(begin, stop) for begin, stop in regions if begin < stop]


def _region(begin: int, stop: int, tile: int, balance: bool, group: int, residues: range) -> Region:
    """Tiles over `[begin, stop)`; the last one ends at `stop` and may overlap the one before.

    Balanced tiles are as equal as can be; else they keep their length, a multiple of the stride in the best case.
    """
    size = stop - begin
    tile = min(tile, size)
    count = -(-size // tile)
    if balance:
        tile = -(-size // count)
    wanted = begin + tile * np.arange(count)
    start = np.minimum(wanted, stop - tile)
    return Region(tile, start, wanted - start, group, residues)


def axis_outline(axis: AxisNeighborhood, length: int, tile: int, split_edges: bool) -> Outline:
    """The outline of `axis_classes` with the same arguments."""
    boxes: dict[int, list[np.ndarray]] = {}
    for region in regions(axis, length, tile, split_edges):
        first, _ = axis.keys(region.start, region.group)
        _, end = axis.keys(region.start + region.length - 1, region.group)
        boxes.setdefault(region.length, []).append(np.tile(end - first, len(region.residues)))
    joined = {rows: np.concatenate(parts) for rows, parts in boxes.items()}
    if not split_edges:
        joined = {rows: np.full_like(box, np.max(box)) for rows, box in joined.items()}
    return Outline(
        rows=tuple(joined),
        count=tuple(len(box) for box in joined.values()),
        box=tuple(float(np.mean(box)) for box in joined.values()),
        num_classes=min(MAX_CLASSES, sum(len(np.unique(box)) for box in joined.values())),
        is_uniform=split_edges or all(len(box) == 1 for box in joined.values()),
    )


def slab_outline(
    axis: AxisNeighborhood, length: int, rows: int, columns: int, tile: int
) -> Outline:
    """The outline of `slab_class`: `rows` and `columns` are the slabs' tokens per dilation group."""
    tile = min(tile, rows)
    box = min(columns, axis.longest_outer(tile, -(-length // axis.dilation)))
    return Outline((tile,), (-(-rows // tile) * axis.dilation,), (float(box),), 1, False)
