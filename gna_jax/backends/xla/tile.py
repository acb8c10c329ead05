"""One query tile and its key box: where they lie, reading and writing them, who sees whom.

Arrays of tokens are seen here as `[B, A0, d0, A1, d1, .., heads, dim]`: a free reshape of `[B, *space, heads, dim]`
that makes a token of a dilation group one index `A` beside its residue `d` (`grouped`). A tile is a box of `A`s at
one residue per axis. Several tiles at a time: `gna_jax.backends.xla.tile_group`.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gna_jax.backends.xla.tile_classes import TileClass


def grouped(tokens: jax.Array, dilation: Sequence[int]) -> jax.Array:
    """`[B, *space, heads, dim]` as `[B, A0, d0, A1, d1, .., heads, dim]`; pads an axis its dilation does not divide."""
    space = tokens.shape[1:-2]
    pad = [(0, -length % d) for length, d in zip(space, dilation, strict=True)]
    if any(high for _, high in pad):
        tokens = jnp.pad(tokens, [(0, 0), *pad, (0, 0), (0, 0)])
    split = [(-(-length // d), d) for length, d in zip(space, dilation, strict=True)]
    return tokens.reshape(tokens.shape[0], *itertools.chain(*split), *tokens.shape[-2:])


def ungrouped(tokens: jax.Array, space: Sequence[int]) -> jax.Array:
    """The inverse of `grouped`: `[B, *space, heads, dim]`, padding cropped."""
    batch, *split = tokens.shape[:-2]
    padded = [a * d for a, d in itertools.batched(split, 2)]
    tokens = tokens.reshape(batch, *padded, *tokens.shape[-2:])
    return tokens[(slice(None), *(slice(0, length) for length in space))]


def is_uniform(table: Any) -> bool:
    """Whether all tiles share one entry of a table `[n, ..]`, known while tracing."""
    return isinstance(table, np.ndarray) and bool(np.all(table == table[:1]))


@dataclasses.dataclass(frozen=True, eq=False)
class Tile:
    """Where one query tile and its key box lie, and who sees whom. One entry per axis; scalars may be traced."""

    classes: tuple[TileClass, ...]
    index: tuple[Any, ...]  # number of the tile in its class, per axis

    @property
    def num_queries(self) -> int:
        """Rows: queries of the tile."""
        return math.prod(c.query_length for c in self.classes)

    @property
    def num_keys(self) -> int:
        """Columns: keys of the box."""
        return math.prod(c.box_length for c in self.classes)

    def read_queries(self, tokens: jax.Array) -> jax.Array:
        """The tile's rows of a grouped array: `[B, rows, heads, dim]`."""
        return self._read(tokens, *self._query_place())

    def read_keys(self, tokens: jax.Array) -> jax.Array:
        """The box's columns of a grouped array, zero where no row sees them: `[B, columns, heads, dim]`."""
        box = self._read(tokens, *self._key_place())
        if all(c.is_exact for c in self.classes):
            return box
        # Memory outside the outer box may hold NaN, and 0 * NaN would carry it into the sums.
        columns = [np.arange(c.box_length, dtype=np.int32) for c in self.classes]
        seen = self._product(
            [
                (column >= self._at(n, c.column_first)) & (column < self._at(n, c.column_end))
                for n, (c, column) in enumerate(zip(self.classes, columns, strict=True))
            ]
        ).reshape(1, self.num_keys, 1, 1)
        return jnp.where(seen, box, jnp.zeros((), box.dtype))

    def write_queries(
        self, target: jax.Array, rows: jax.Array, owned: jax.Array | None
    ) -> jax.Array:
        """`target` (grouped) with the tile's rows replaced by `rows` `[B, rows, heads, dim]`, where `owned` [rows]."""
        start, shape = self._box(target, *self._query_place())
        rows = rows.astype(target.dtype)
        if owned is not None:
            rows = jnp.where(owned.reshape(1, -1, 1, 1), rows, self.read_queries(target))
        return jax.lax.dynamic_update_slice(target, rows.reshape(shape), start)

    def add_keys(self, target: jax.Array, columns: jax.Array) -> jax.Array:
        """`target` (grouped) with `columns` `[B, columns, heads, dim]` added at the box."""
        start, shape = self._box(target, *self._key_place())
        box = jax.lax.dynamic_slice(target, start, shape)
        return jax.lax.dynamic_update_slice(target, box + columns.reshape(shape), start)

    def owned_rows(self) -> jax.Array:
        """`[rows]` bool: rows this tile answers for."""
        return self._product([self._at(n, c.owned) for n, c in enumerate(self.classes)])

    def mask(self) -> jax.Array:
        """`[rows, columns]` bool: does the row see the column?"""
        rank = len(self.classes)
        mask = np.ones((1,) * (2 * rank), bool)
        for n, c in enumerate(self.classes):
            if c.is_full:
                continue
            column = np.arange(c.box_length, dtype=np.int32)[None, :]
            first, end = self._at(n, c.first), self._at(n, c.end)
            seen = (first[:, None] <= column) & (column < end[:, None])
            shape = [1] * (2 * rank)
            shape[n], shape[rank + n] = seen.shape
            mask = mask & seen.reshape(shape)
        lengths = [c.query_length for c in self.classes] + [c.box_length for c in self.classes]
        return jnp.broadcast_to(mask, lengths).reshape(self.num_queries, self.num_keys)

    def bias_offset(self) -> tuple[Any, ...]:
        """Key position of column 0 minus query position of row 0, per axis."""
        return tuple(self._at(n, c.bias_offset) for n, c in enumerate(self.classes))

    def _at(self, axis: int, table: Any) -> Any:
        """This tile's entry of a table `[n, ..]` of one axis; stays numpy where all entries agree."""
        if is_uniform(table):
            return table[0]
        return jax.lax.dynamic_index_in_dim(
            jnp.asarray(table), self.index[axis], axis=0, keepdims=False
        )

    def _query_place(self) -> tuple[list, list, list]:
        start = [self._at(n, c.query_start) for n, c in enumerate(self.classes)]
        residue = [self._at(n, c.query_residue) for n, c in enumerate(self.classes)]
        return start, residue, [c.query_length for c in self.classes]

    def _key_place(self) -> tuple[list, list, list]:
        start = [self._at(n, c.key_start) for n, c in enumerate(self.classes)]
        residue = [self._at(n, c.key_residue) for n, c in enumerate(self.classes)]
        return start, residue, [c.box_length for c in self.classes]

    def _box(self, tokens: jax.Array, start: list, residue: list, length: list) -> tuple:
        """Start indices and sizes of a box of a grouped array."""
        zero = np.int32(0)
        place = itertools.chain(*zip(start, residue, strict=True))
        starts = [jnp.asarray(s, jnp.int32) for s in (zero, *place, zero, zero)]
        sizes = itertools.chain(*((n, 1) for n in length))
        return starts, (tokens.shape[0], *sizes, *tokens.shape[-2:])

    def _read(self, tokens: jax.Array, start: list, residue: list, length: list) -> jax.Array:
        starts, sizes = self._box(tokens, start, residue, length)
        box = jax.lax.dynamic_slice(tokens, starts, sizes)
        return box.reshape(tokens.shape[0], math.prod(length), *tokens.shape[-2:])

    @staticmethod
    def _product(vectors: Sequence[Any]) -> jax.Array:
        """The flat product (AND) of one bool vector per axis."""
        rank = len(vectors)
        product = np.ones((1,) * rank, bool)
        for n, vector in enumerate(vectors):
            shape = [1] * rank
            shape[n] = vector.shape[0]
            product = product & vector.reshape(shape)
        return jnp.asarray(product).reshape(-1)
