"""The loop over tiles: several tiles of one shape per step, their products batched.

One step starts a dozen XLA operations whatever its size; small tiles are cheap only in company. Tiles of a group are read
together and computed together; they are written one after the other, because boxes of keys overlap.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gna_jax.backends.xla.tile import Tile, is_uniform
from gna_jax.backends.xla.tile_classes import TileClass
from gna_jax.problem import Problem
from gna_jax.simulator import query_box_cost


@dataclasses.dataclass(frozen=True, eq=False)
class TileGroup:
    """G tiles of one combination of classes. `index` holds their numbers per axis, `[G]` each.

    `is_real` `[G]` is False for tiles that repeat another to fill the last group; None: all are real. `rows_first` says how
    scores lie: `[.., rows, columns]` or `[.., columns, rows]`; `shared_seen` is the mask `[1, ..]` of all tiles if they share one.
    """

    classes: tuple[TileClass, ...]
    index: tuple[jax.Array, ...]
    is_real: jax.Array | None
    rows_first: bool
    shared_seen: jax.Array | None

    @property
    def size(self) -> int:
        """Tiles in the group, G."""
        return self.index[0].shape[0]

    @property
    def num_queries(self) -> int:
        """Rows of a tile."""
        return math.prod(c.query_length for c in self.classes)

    @property
    def num_keys(self) -> int:
        """Columns of a tile's box."""
        return math.prod(c.box_length for c in self.classes)

    @property
    def is_full(self) -> bool:
        """Every row sees every column."""
        return all(c.is_full for c in self.classes)

    def read_queries(self, tokens: jax.Array) -> jax.Array:
        """Rows of a grouped array: `[G, B, rows, heads, dim]`."""
        return self.map(lambda tile: tile.read_queries(tokens))

    def read_keys(self, tokens: jax.Array) -> jax.Array:
        """Boxes of a grouped array, zero where no row sees them: `[G, B, columns, heads, dim]`."""
        return self.map(lambda tile: tile.read_keys(tokens))

    def seen(self) -> jax.Array:
        """`[G or 1, ..]` bool, as scores lie: is the column seen by the row? Written out: see `_seen`."""
        if self.shared_seen is not None:
            return self.shared_seen
        return _seen(self.map(lambda tile: tile.mask()), self.rows_first)

    def owned_rows(self) -> jax.Array | None:
        """`[G, rows]` bool: rows that each tile answers for; None where that is all of them."""
        if self.is_real is None and all(c.has_owned_all for c in self.classes):
            return None
        owned = self.map(lambda tile: tile.owned_rows())
        return owned if self.is_real is None else owned & self.is_real[:, None]

    def write_queries(self, target: jax.Array, rows: jax.Array) -> jax.Array:
        """`target` (grouped) with the owned rows replaced by `rows` `[G, B, rows, heads, dim]`."""
        owned = self.owned_rows()

        def write(n: Any, tile: Tile, target: jax.Array) -> jax.Array:
            return tile.write_queries(target, rows[n], None if owned is None else owned[n])

        return self.in_order(write, target)

    def add_keys(self, target: jax.Array, columns: jax.Array) -> jax.Array:
        """`target` (grouped) with `columns` `[G, B, columns, heads, dim]` added at the boxes."""
        return self.in_order(lambda n, tile, target: tile.add_keys(target, columns[n]), target)

    def map(self, function: Callable[[Tile], jax.Array]) -> jax.Array:
        """`function` of every tile, stacked."""
        if self.size == 1:
            return function(self._tile(0))[None]
        return jax.vmap(lambda *index: function(Tile(self.classes, index)))(*self.index)

    def in_order(self, function: Callable[[Any, Tile, Any], Any], carry: Any) -> Any:
        """`carry = function(n, tile n, carry)` for n = 0 .. G-1."""
        if self.size == 1:
            return function(0, self._tile(0), carry)
        return jax.lax.fori_loop(
            np.int32(0),
            np.int32(self.size),
            lambda n, carry: function(n, self._tile(n), carry),
            carry,
        )

    def _tile(self, n: Any) -> Tile:
        return Tile(self.classes, tuple(index[n] for index in self.index))


def _seen(masks: jax.Array, rows_first: bool) -> jax.Array:
    """Masks `[.., rows, columns]` as scores lie, in memory.

    Without the barrier XLA recomputes an entry from the axes' intervals wherever scores are touched, and that index
    arithmetic keeps the whole pass over the scores from being vectorised.
    """
    return jax.lax.optimization_barrier(masks if rows_first else jnp.swapaxes(masks, -1, -2))


def _shared_seen(classes: tuple[TileClass, ...], rows_first: bool) -> jax.Array | None:
    """The mask that all tiles of the classes share, built once before their loop; None if they differ or are full."""
    if all(c.is_full for c in classes):
        return None
    if not all(is_uniform(c.first) and is_uniform(c.end) for c in classes):
        return None
    return _seen(Tile(classes, (0,) * len(classes)).mask()[None], rows_first)


def tiles_per_step(problem: Problem, classes: tuple[TileClass, ...]) -> int:
    """How many tiles of these classes one loop step takes: as many as the scores' share of the cache holds."""
    rows = math.prod(c.query_length for c in classes) * problem.heads_per_kv
    columns = math.prod(c.box_length for c in classes)
    heads = problem.batch * problem.kv_heads
    bytes_of_scores = rows * columns * heads * problem.accumulator.itemsize
    return max(1, query_box_cost.rates(problem).scratch_bytes // bytes_of_scores)


def loops(axes: Sequence[Sequence[TileClass]]) -> Iterator[tuple[TileClass, ...]]:
    """Combinations of one class per axis: each is one loop over tiles of one static shape."""
    return itertools.product(*axes)


def for_each_group(
    classes: tuple[TileClass, ...],
    size: int,
    rows_first: bool,
    body: Callable[[TileGroup, Any], Any],
    carry: Any,
) -> Any:
    """`carry = body(group, carry)` over all tiles of a combination of classes, about `size` at a time, row-major."""
    total = math.prod(c.num_tiles for c in classes)
    steps = -(-total // min(size, total))
    size = -(-total // steps)
    shared_seen = _shared_seen(classes, rows_first)

    def step(number: Any, carry: Any) -> Any:
        tiles = number * np.int32(size) + np.arange(size, dtype=np.int32)
        is_real = None if steps * size == total else jnp.asarray(tiles < total)
        rest, index = jnp.minimum(tiles, total - 1), []
        for c in reversed(classes):
            index.insert(0, rest % c.num_tiles)
            rest = rest // c.num_tiles
        group = TileGroup(classes, tuple(index), is_real, rows_first, shared_seen)
        return body(group, carry)

    if steps == 1:
        return step(np.int32(0), carry)
    return jax.lax.fori_loop(np.int32(0), np.int32(steps), step, carry)
