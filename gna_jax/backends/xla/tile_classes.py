"""Which query tiles the XLA backend visits on one axis, and which box of keys each of them reads.

Tiles are sorted into classes of one static shape (`gna_jax.simulator.query_boxes` says how an axis is cut, and why); the backend
runs one loop per combination of classes over the axes.

Nothing is read or computed here (`gna_jax.backends.xla.tile`), and no size chosen (`gna_jax.simulator.query_box_cost`).
All positions lie in dilation groups (see `gna_jax.neighborhood`).
"""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gna_jax.neighborhood import AxisNeighborhood, group_length
from gna_jax.problem import Problem
from gna_jax.simulator.query_box_cost import Axes
from gna_jax.simulator.query_boxes import MAX_CLASSES, Region, regions


@dataclasses.dataclass(frozen=True, eq=False)
class TileClass:
    """Query tiles of one axis with `query_length` rows and boxes of `box_length` columns; n tiles, arrays int32.

    Attributes:
      query_residue, query_start: [n] where the tile's rows lie in query: residue and position in that group.
      key_residue, key_start: [n] likewise its key box.
      first, end: [n, query_length] columns `[first, end)` of the box that a row sees; empty where first >= end.
      owned: [n, query_length] rows that this tile answers for; tiles at the end of a region overlap the one before.
      column_first, column_end: [n] columns that some row sees; outside them memory may hold anything.
      bias_offset: [n] key position of column 0 minus query position of row 0.
      is_full: every row sees every column. has_owned_all: `owned` is all true. is_exact: every column is seen by some row.
    """

    query_length: int
    box_length: int
    query_residue: Any
    query_start: Any
    key_residue: Any
    key_start: Any
    first: Any
    end: Any
    owned: Any
    column_first: Any
    column_end: Any
    bias_offset: Any
    is_full: bool
    is_exact: bool
    has_owned_all: bool

    @property
    def num_tiles(self) -> int:
        """Number of tiles in the class."""
        return self.query_start.shape[0]


@dataclasses.dataclass(frozen=True)
class _Tile:
    """One tile of an axis; `first` and `end` are columns of its own box, per row."""

    start: int
    owned_from: int
    residue: int
    group: int
    box_start: int
    first: np.ndarray
    end: np.ndarray

    @property
    def box_length(self) -> int:
        return int(self.end.max())

    @property
    def signature(self) -> tuple[int, bytes, bytes]:
        """Tiles that agree in it can share a loop and a mask."""
        return self.box_length, self.first.tobytes(), self.end.tobytes()


def build_classes(problem: Problem, tiles: Axes) -> tuple[tuple[TileClass, ...], ...]:
    """The tile classes of a whole volume, per axis."""
    axes = zip(problem.neighborhood.axes, problem.global_layout, tiles, strict=True)
    return tuple(axis_classes(axis, length, *tile) for axis, length, tile in axes)


def axis_classes(
    axis: AxisNeighborhood, length: int, tile: int, split_edges: bool
) -> tuple[TileClass, ...]:
    """The tile classes of an axis of a whole volume, with at most `tile` queries per tile.

    Args:
      axis: rule of the axis.
      length: tokens on the axis, all dilation groups together.
      tile: queries per tile.
      split_edges: cut the axis where its windows stop being clamped, and keep tiles of unlike boxes apart;
        False: one class per tile length (one in all, or two where the dilation does not divide the length).
    """
    classes: dict[tuple, list[_Tile]] = {}
    for region in regions(axis, length, tile, split_edges):
        for one in _tiles(axis, region):
            classes.setdefault(one.signature, []).append(one)
    pools = list(classes.values())
    if split_edges:
        return tuple(_merge(tiles) for tiles in _pooled(pools))
    by_length: dict[int, list[_Tile]] = {}
    for one in itertools.chain(*pools):
        by_length.setdefault(len(one.first), []).append(one)
    return tuple(_merge(tiles) for tiles in by_length.values())


def _tiles(axis: AxisNeighborhood, region: Region) -> Iterator[_Tile]:
    query = region.start[:, None] + np.arange(region.length)  # [n, length]
    first, end = axis.keys(query, region.group)
    box_start = first.min(axis=1)
    first = (first - box_start[:, None]).astype(np.int32)
    end = (end - box_start[:, None]).astype(np.int32)
    for residue in region.residues:
        for n in range(len(region.start)):
            yield _Tile(
                start=int(region.start[n]),
                owned_from=int(region.owned_from[n]),
                residue=residue,
                group=region.group,
                box_start=int(box_start[n]),
                first=first[n],
                end=end[n],
            )


def _pooled(classes: list[list[_Tile]]) -> list[list[_Tile]]:
    """Few classes: those with most work stay, the rest are pooled by box length."""
    work = [sum(len(one.first) * one.box_length for one in tiles) for tiles in classes]
    order = sorted(range(len(classes)), key=lambda n: -work[n])
    kept = [classes[n] for n in order[:2] if 4 * work[n] > sum(work)]
    rest = [one for n in order[len(kept) :] for one in classes[n]]
    if not rest:
        return kept
    longest = max(one.box_length for one in rest)
    lengths = {len(one.first) for one in rest}
    parts = max(1, MAX_CLASSES - len(kept) - len(lengths) + 1)
    pools: dict[tuple[int, int], list[_Tile]] = {}
    for one in rest:
        part = -(-one.box_length * parts // longest)
        pools.setdefault((len(one.first), part), []).append(one)
    return kept + list(pools.values())


def _merge(tiles: list[_Tile]) -> TileClass:
    """A class from tiles of one length; shorter boxes are widened inside their group.

    A box longer than its group ends in the padding that gives all groups the longest one's length.
    """
    rows = len(tiles[0].first)
    box = max(one.box_length for one in tiles)
    key_start = np.asarray([max(0, min(one.box_start, one.group - box)) for one in tiles], np.int32)
    shift = np.asarray([one.box_start for one in tiles], np.int32) - key_start
    first = np.stack([one.first for one in tiles]) + shift[:, None]
    end = np.stack([one.end for one in tiles]) + shift[:, None]
    owned = np.stack([np.arange(rows) >= one.owned_from for one in tiles])
    column_end = shift + np.asarray([one.box_length for one in tiles], np.int32)
    query_start = np.asarray([one.start for one in tiles], np.int32)
    residue = np.asarray([one.residue for one in tiles], np.int32)
    return TileClass(
        query_length=rows,
        box_length=box,
        query_residue=residue,
        query_start=query_start,
        key_residue=residue,
        key_start=key_start,
        first=first,
        end=end,
        owned=owned,
        column_first=shift,
        column_end=column_end,
        bias_offset=key_start - query_start,
        is_full=bool(np.all(first == 0) and np.all(end == box)),
        is_exact=bool(np.all(shift == 0) and np.all(column_end == box)),
        has_owned_all=bool(np.all(owned)),
    )


def slab_class(
    axis: AxisNeighborhood,
    *,
    length: int,
    query_length: int,
    key_length: int,
    query_origin: jax.Array,
    key_origin: jax.Array,
    tile: int,
) -> TileClass:
    """The one tile class of an axis of a slab whose origins are traced: worst-case shapes, traced bounds.

    Row `a` of local residue `r` is token `query_origin + r + dilation * a` of the volume; its keys have the same
    residue in the volume, another one in the key slab. Tokens outside the volume see nothing and are seen by nobody.

    Args:
      axis: rule of the axis.
      length: tokens of the whole volume on this axis.
      query_length, key_length: tokens of the slabs on this axis.
      query_origin, key_origin: traced int32 scalars, the slabs' first tokens in the volume.
      tile: queries per tile.
    """
    dilation = axis.dilation
    rows, columns = -(-query_length // dilation), -(-key_length // dilation)
    tile = min(tile, rows)
    box = min(columns, axis.longest_outer(tile, -(-length // dilation)))
    count = -(-rows // tile)
    start = np.minimum(tile * np.arange(count), rows - tile).astype(np.int32)
    owned_from = tile * np.arange(count) - start
    residue = np.repeat(np.arange(dilation, dtype=np.int32), count)
    query_start = np.tile(start, dilation)
    owned = np.arange(tile) >= np.tile(owned_from, dilation)[:, None]

    token = query_origin + residue  # [n] first token of the tile's local group, in the volume
    group_residue = token % dilation
    group = group_length(length, dilation, group_residue)[:, None]
    place = query_start[:, None] + np.arange(tile, dtype=np.int32)  # [n, tile] in the slab's group
    query = (token // dilation)[:, None] + place
    key_residue = (group_residue - key_origin) % dilation
    key_zero = (key_origin + key_residue) // dilation  # [n] group position of the local key 0
    available = group_length(
        key_length, dilation, key_residue
    )  # [n] keys of that residue in the slab
    first, end = axis.keys(jnp.clip(query, 0, group - 1), group)
    # Where the dilation does not divide the slab, some rows are padding: no token of the slab.
    is_token = residue[:, None] + dilation * place < query_length
    seen_by_row = is_token & (query >= 0) & (query < group)
    low = jnp.clip(first - key_zero[:, None], 0, available[:, None])
    high = jnp.where(seen_by_row, jnp.clip(end - key_zero[:, None], 0, available[:, None]), 0)
    has_keys = low < high
    column_first = jnp.min(jnp.where(has_keys, low, columns), axis=1)
    column_end = jnp.max(jnp.where(has_keys, high, 0), axis=1)
    key_start = jnp.clip(column_first, 0, columns - box)
    return TileClass(
        query_length=tile,
        box_length=box,
        query_residue=residue,
        query_start=query_start,
        key_residue=key_residue,
        key_start=key_start,
        first=low - key_start[:, None],
        end=high - key_start[:, None],
        owned=owned,
        column_first=column_first - key_start,
        column_end=column_end - key_start,
        bias_offset=key_zero + key_start - query[:, 0],
        is_full=False,
        is_exact=False,
        has_owned_all=bool(np.all(owned)),
    )
