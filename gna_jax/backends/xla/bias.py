"""Relative position bias on one tile: from the table to scores, and from score gradients back to the table.

The entry of query `i` and key `j` is `bias[head, .., (j - i) + window - 1, ..]` in positions of the dilation group, so
on each axis a tile of `rows` x `columns` needs `rows + columns - 1` consecutive entries: its diagonals. They are one
slice of the table, and spread over the tile by reshapes alone; neither a gather nor a scatter is needed.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from gna_jax.backends.xla.tile import Tile
from gna_jax.backends.xla.tile_classes import TileClass
from gna_jax.backends.xla.tile_group import TileGroup
from gna_jax.problem import Problem


@dataclasses.dataclass(frozen=True)
class BiasDiagonals:
    """Reads and sums a bias table padded by `pad` entries on either side of each axis.

    Padding lets every tile's slice lie inside; only pairs that do not attend to each other ever fall on it.
    """

    problem: Problem
    pad: tuple[int, ...]

    @classmethod
    def of(cls, problem: Problem, axes: Sequence[Sequence[TileClass]]) -> "BiasDiagonals":
        """Padding that suffices for all tile classes."""
        return cls(
            problem, tuple(max(c.query_length + c.box_length for c in classes) for classes in axes)
        )

    def padded(self, bias: jax.Array) -> jax.Array:
        """The table `[N, ..]` with its padding, in the accumulator's dtype."""
        widths = [(0, 0), *((p, p) for p in self.pad)]
        return jnp.pad(bias.astype(self.problem.accumulator), widths)

    def cropped(self, table: jax.Array) -> jax.Array:
        """A padded table `[.., 2w-1 + 2 pad per axis]` without its padding."""
        extents = zip(self.problem.window_extent, self.pad, strict=True)
        return table[(..., *(slice(p, p + 2 * w - 1) for w, p in extents))]

    def gradient_shape(self) -> tuple[int, ...]:
        """`[B, N, ..]`: a padded table per sample, so that nothing is summed over the batch inside a loop."""
        extents = zip(self.problem.window_extent, self.pad, strict=True)
        sizes = (2 * w - 1 + 2 * p for w, p in extents)
        return (self.problem.batch, self.problem.query_heads, *sizes)

    def of_group(self, table: jax.Array, group: TileGroup) -> jax.Array:
        """Bias of tiles as their scores lie, `[G, 1, K, M, S]` or `[G, 1, K, S, M]`, from the padded table."""
        return group.map(lambda tile: self._of_tile(table, tile, group.rows_first))

    def add_gradient(self, target: jax.Array, group: TileGroup, gradient: jax.Array) -> jax.Array:
        """`target` (of `gradient_shape`) plus score gradients `[G, B, K, S, M]`: the transpose of `of_group` there."""

        def add(n: Any, tile: Tile, target: jax.Array) -> jax.Array:
            return self._add_tile(target, tile, gradient[n])

        return group.in_order(add, target)

    def _of_tile(self, table: jax.Array, tile: Tile, rows_first: bool) -> jax.Array:
        """`[1, K, M, S]` or `[1, K, S, M]`."""
        rank = len(tile.classes)
        starts, sizes = self._diagonals(tile)
        bias = jax.lax.dynamic_slice(table, [jnp.int32(0), *starts], (table.shape[0], *sizes))
        for n, c in enumerate(tile.classes):
            bias = _spread(bias, 1 + 2 * n, c.query_length, c.box_length)
        rows = (1 + 2 * n for n in range(rank))
        columns = (2 + 2 * n for n in range(rank))
        kv_heads, per_kv = self.problem.kv_heads, self.problem.heads_per_kv
        if rows_first:
            return bias.transpose(0, *rows, *columns).reshape(1, kv_heads, -1, tile.num_keys)
        bias = bias.transpose(0, *columns, *rows)
        bias = bias.reshape(kv_heads, per_kv, tile.num_keys, tile.num_queries)
        return bias.transpose(0, 2, 1, 3).reshape(1, kv_heads, tile.num_keys, -1)

    def _add_tile(self, target: jax.Array, tile: Tile, gradient: jax.Array) -> jax.Array:
        """`gradient` is `[B, K, S, M]`."""
        rank, batch = len(tile.classes), gradient.shape[0]
        rows = [c.query_length for c in tile.classes]
        columns = [c.box_length for c in tile.classes]
        heads = (self.problem.kv_heads, self.problem.heads_per_kv)
        total = gradient.reshape(batch, heads[0], tile.num_keys, heads[1], tile.num_queries)
        total = total.transpose(0, 1, 3, 2, 4)
        total = total.reshape(batch, self.problem.query_heads, *columns, *rows)
        pairs = itertools.chain(*((2 + rank + n, 2 + n) for n in range(rank)))
        total = total.transpose(0, 1, *pairs)
        for n in reversed(range(rank)):
            total = _sum_diagonals(total, 2 + 2 * n)
        starts, sizes = self._diagonals(tile)
        starts, sizes = [jnp.int32(0), jnp.int32(0), *starts], (*target.shape[:2], *sizes)
        old = jax.lax.dynamic_slice(target, starts, sizes)
        return jax.lax.dynamic_update_slice(target, old + total, starts)

    def _diagonals(self, tile: Tile) -> tuple[list[Any], tuple[int, ...]]:
        """Start and size per axis of the tile's diagonals in the padded table; the first is (last row, column 0)."""
        extents = zip(
            tile.classes, tile.bias_offset(), self.problem.window_extent, self.pad, strict=True
        )
        starts = [
            jnp.asarray(offset - (c.query_length - 1) + window - 1 + pad, jnp.int32)
            for c, offset, window, pad in extents
        ]
        return starts, tuple(c.query_length + c.box_length - 1 for c in tile.classes)


def _spread(x: jax.Array, axis: int, rows: int, columns: int) -> jax.Array:
    """An axis of diagonals -> two axes `[rows, columns]` whose entry `[r, c]` is diagonal `c - r + rows - 1`.

    Repeated `rows` times, cut free of the first `rows - 1` and read back in rows one shorter, the diagonals move one
    place per row.
    """
    if rows == 1:
        return jnp.expand_dims(x, axis)
    width = rows + columns - 1
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    x = jnp.broadcast_to(jnp.expand_dims(x, axis), (*before, rows, width, *after))
    x = x.reshape(*before, rows * width, *after)
    x = jax.lax.slice_in_dim(x, rows - 1, rows * width - 1, axis=axis)
    x = x.reshape(*before, rows, width - 1, *after)
    return jax.lax.slice_in_dim(x, 0, columns, axis=axis + 1)


def _sum_diagonals(x: jax.Array, axis: int) -> jax.Array:
    """Two axes `[rows, columns]` -> the sum of each diagonal: the transpose of `_spread`, by the same reshapes."""
    rows, columns = x.shape[axis : axis + 2]
    if rows == 1:
        return x.reshape(*x.shape[:axis], columns, *x.shape[axis + 2 :])
    width = rows + columns - 1
    before, after = x.shape[:axis], x.shape[axis + 2 :]

    def pad(x: jax.Array, axis: int, low: int, high: int) -> jax.Array:
        widths = [(0, 0)] * x.ndim
        widths[axis] = (low, high)
        return jnp.pad(x, widths)

    x = pad(x, axis + 1, 0, width - 1 - columns).reshape(*before, rows * (width - 1), *after)
    x = pad(x, axis, rows - 1, 1)
    return jnp.sum(x.reshape(*before, rows, width, *after), axis=axis)
