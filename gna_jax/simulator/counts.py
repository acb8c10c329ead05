"""Exact counts of what a tiled kernel visits: tiles, full and partial visits, padding, attended pairs.

Counts only, as Python ints: numpy sums along an axis, products over axes would outgrow its 64 bits. Speedups are made of them
in `simulation`, times in the cost model. Which tiles a tile visits is `gna_jax.tiling`'s business.

Every count of a layout is a product over its axes, because windows, tiles and walks are products of intervals:

    sum over tiles of f(tile) = product over axes of (sum over the axis's tiles of f(tile on the axis))

and so for the maximum. So the work is one pass over the tiles of each axis, whatever the number of tokens.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence

import numpy as np

from gna_jax.neighborhood import AxisNeighborhood, Neighborhood
from gna_jax.tiling import group_lengths, key_walk, query_walk


@dataclasses.dataclass(frozen=True)
class AxisCounts:
    """The walks of all tiles of one axis, in all its dilation groups.

    Attributes:
      kinds: `(visits, full, tiles)`: so many tiles of the axis visit `visits` tiles each, `full` of them without a
        masked pair of real tokens. Distinct, in ascending order.
      real_pairs: pairs of real tokens among the computed ones, summed over the tiles.
    """

    kinds: tuple[tuple[int, int, int], ...]
    real_pairs: int

    @functools.cached_property
    def tiles(self) -> int:
        """Tiles that walk."""
        return sum(tiles for _, _, tiles in self.kinds)

    @functools.cached_property
    def visits(self) -> int:
        """Visits of all tiles."""
        return sum(visits * tiles for visits, _, tiles in self.kinds)

    @functools.cached_property
    def full(self) -> int:
        """Visits without a masked pair of real tokens, of all tiles."""
        return sum(full * tiles for _, full, tiles in self.kinds)

    @functools.cached_property
    def worst(self) -> int:
        """Visits of the tile with most of them."""
        return max(visits for visits, _, _ in self.kinds)


@dataclasses.dataclass(frozen=True)
class WalkCounts:
    """Counts of one walk over a whole layout: Q tiles that visit KV tiles, or (backward) KV tiles that visit Q tiles.

    A *pair* is a query place and a key place that meet in a visit. Places past the end of a dilation group are padding.

    Attributes:
      axes: counts per axis.
      tile_elements: places of a tile that walks.
      visited_elements: places of a tile that is visited.
    """

    axes: tuple[AxisCounts, ...] = dataclasses.field(repr=False)
    tile_elements: int
    visited_elements: int

    @functools.cached_property
    def tiles(self) -> int:
        """Tiles that walk, in all dilation groups."""
        return math.prod(axis.tiles for axis in self.axes)

    @functools.cached_property
    def visits(self) -> int:
        """Visits of all tiles."""
        return math.prod(axis.visits for axis in self.axes)

    @functools.cached_property
    def worst(self) -> int:
        """Visits of the tile with most of them."""
        return math.prod(axis.worst for axis in self.axes)

    @property
    def mean(self) -> float:
        """Visits per tile."""
        return self.visits / self.tiles

    @functools.cached_property
    def full(self) -> int:
        """Visits without a masked pair of real tokens. They may hold padding."""
        return math.prod(axis.full for axis in self.axes)

    @property
    def partial(self) -> int:
        """Visits with a masked pair of real tokens."""
        return self.visits - self.full

    @property
    def fully_block_sparse(self) -> bool:
        """Whether no visit holds a masked pair of real tokens."""
        return self.partial == 0

    @property
    def masked_tile_share(self) -> float:
        """Share of the visits that are partial."""
        return self.partial / self.visits

    @property
    def load_imbalance(self) -> float:
        """Visits of the worst tile over those of the mean one; 1.0 is perfect balance."""
        return self.worst * self.tiles / self.visits

    @property
    def computed_pairs(self) -> int:
        """Pairs of all visits: real, masked and padding."""
        return self.tile_elements * self.visited_elements * self.visits

    @functools.cached_property
    def real_pairs(self) -> int:
        """Computed pairs of two real tokens: attended or masked."""
        return math.prod(axis.real_pairs for axis in self.axes)

    @property
    def padded_pairs(self) -> int:
        """Computed pairs with padding on either side."""
        return self.computed_pairs - self.real_pairs

    @property
    def padded_share(self) -> float:
        """Share of the computed pairs that have padding on either side."""
        return self.padded_pairs / self.computed_pairs

    def histogram(self) -> dict[tuple[int, int], int]:
        """How many tiles have so many `(visits, full)`: the whole distribution of work, not only worst and mean."""
        tiles_of: dict[tuple[int, int], int] = {}
        for kinds in itertools.product(*(axis.kinds for axis in self.axes)):
            visits, full, tiles = (math.prod(numbers) for numbers in zip(*kinds, strict=True))
            tiles_of[visits, full] = tiles_of.get((visits, full), 0) + tiles
        return dict(sorted(tiles_of.items()))


def walk_counts(
    neighborhood: Neighborhood,
    layout: Sequence[int],
    *,
    q_tile: Sequence[int],
    kv_tile: Sequence[int],
    dynamic: bool,
    backward: bool = False,
) -> WalkCounts:
    """Counts of the walk over `layout`, which must fit the neighborhood; tiles have one size per axis.

    Args:
      neighborhood: window rule of every axis.
      layout: tokens per axis.
      q_tile: queries per tile; tiles start at multiples of it, or, visited dynamically, where the outer box starts.
      kv_tile: the same for keys.
      dynamic: whether visited tiles start where the outer box starts, or at multiples of their size.
      backward: count KV tiles that visit Q tiles (dK, dV), not Q tiles that visit KV tiles (forward, dQ).
    """
    axes = zip(neighborhood.axes, layout, q_tile, kv_tile, strict=True)
    walking, visited = (kv_tile, q_tile) if backward else (q_tile, kv_tile)
    return WalkCounts(
        axes=tuple(axis_counts(*axis, dynamic, backward) for axis in axes),
        tile_elements=math.prod(walking),
        visited_elements=math.prod(visited),
    )


@functools.lru_cache(maxsize=1 << 14)
def axis_counts(
    axis: AxisNeighborhood, length: int, q_tile: int, kv_tile: int, dynamic: bool, backward: bool
) -> AxisCounts:
    """Counts of one axis of `length` tokens. Arguments as `walk_counts`."""
    walk_of, walking, visited = (
        (query_walk, kv_tile, q_tile) if backward else (key_walk, q_tile, kv_tile)
    )
    kinds: dict[tuple[int, int], int] = {}
    real_pairs = 0
    for tokens, groups in group_lengths(length, axis.dilation):
        start = np.arange(0, tokens, walking)
        walk = walk_of(axis, tokens, start, q_tile=q_tile, kv_tile=kv_tile, dynamic=dynamic)
        real_rows = np.minimum(walking, tokens - start)
        real_columns = walk.num_visits * visited - walk.padding
        real_pairs += groups * int(np.sum(real_rows * real_columns))
        # One number per (visits, full), to find the distinct ones in one sort; full never exceeds visits.
        base = int(np.max(walk.num_visits)) + 1
        codes, tiles = np.unique(walk.num_visits * base + walk.num_full, return_counts=True)
        for code, count in zip(codes.tolist(), tiles.tolist(), strict=True):
            kind = divmod(code, base)
            kinds[kind] = kinds.get(kind, 0) + groups * count
    return AxisCounts(
        kinds=tuple((*kind, tiles) for kind, tiles in sorted(kinds.items())), real_pairs=real_pairs
    )


def attended_pairs(neighborhood: Neighborhood, layout: Sequence[int]) -> int:
    """Pairs of a query and a key that it sees, in a layout that fits the neighborhood."""
    axes = zip(neighborhood.axes, layout, strict=True)
    return math.prod(axis_attended_pairs(axis, length) for axis, length in axes)


@functools.lru_cache(maxsize=1 << 12)
def axis_attended_pairs(axis: AxisNeighborhood, length: int) -> int:
    """`attended_pairs` of one axis of `length` tokens."""
    attended = 0
    for tokens, groups in group_lengths(length, axis.dilation):
        first, end = axis.keys(np.arange(tokens), tokens)
        attended += groups * int(np.sum(end - first))
    return attended
