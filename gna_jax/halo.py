"""Halos: the tokens of other shards that a shard's queries see, where spatial axes are cut into equal shards.

A shard holds `length / shards` consecutive rows of an axis. The keys its queries see are an interval of rows, hardly longer
than the shard itself; what lies in other shards is its halo. Every row of it comes from the shard that owns it, nearest first,
in pieces that are cut so that no shard is sent a row it does not need.

All of it is static: ints and numpy, from `gna_jax.neighborhood`. `gna_jax.sharding` moves arrays by it, the simulator counts by it.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence

import numpy as np

from gna_jax.neighborhood import AxisNeighborhood, Neighborhood, group_length

Box = tuple[tuple[int, int], ...]
"""Per spatial axis, `[first, end)` of a shard's own rows."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """Rows that some shards receive from the shard `shift` places before them: one collective permute.

    Args:
      shift: number of the receiver less the sender's; negative where rows come from a later shard.
      rows: `[first, end)` of the sender's own rows, counted from its first.
      receivers: the shards that need all of these rows.
    """

    shift: int
    rows: tuple[int, int]
    receivers: tuple[int, ...]

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """`(sender, receiver)` for every receiver."""
        return tuple((receiver - self.shift, receiver) for receiver in self.receivers)


@dataclasses.dataclass(frozen=True)
class AxisHalo:
    """One axis cut into equal shards. Make it with `axis_halo`, which checks.

    Args:
      rule: the axis's neighborhood.
      length: tokens of the whole axis, a multiple of `shards`.
      shards: number of shards; 1: the axis is not cut, and has no halo.
    """

    rule: AxisNeighborhood
    length: int
    shards: int

    @property
    def rows(self) -> int:
        """Rows of a shard."""
        return self.length // self.shards

    @property
    def slab(self) -> int:
        """Rows of a shard with its halo: the same for all, so some hold rows that they do not need, or none are there."""
        return self.before + self.rows + self.after

    @functools.cached_property
    def _seen(self) -> tuple[np.ndarray, np.ndarray]:
        """First and last row that each query of the axis sees."""
        query = np.arange(self.length)
        group, residue = query // self.rule.dilation, query % self.rule.dilation
        first, end = self.rule.keys(group, group_length(self.length, self.rule.dilation, residue))
        return tuple(place * self.rule.dilation + residue for place in (first, end - 1))

    @functools.cached_property
    def _needed(self) -> tuple[tuple[int, int], ...]:
        first, last = (rows.reshape(self.shards, self.rows) for rows in self._seen)
        return tuple(zip(first.min(axis=1).tolist(), (last.max(axis=1) + 1).tolist(), strict=True))

    def needed(self, shard: int) -> tuple[int, int]:
        """`[first, end)` of the rows of the whole axis that a shard's queries see, or lie between those."""
        return self._needed[shard]

    @functools.cached_property
    def before(self) -> int:
        """Rows in front of its own that a shard's slab has room for: as many as any shard needs."""
        return sum(_length(piece) for piece in self.pieces if piece.shift > 0)

    @functools.cached_property
    def after(self) -> int:
        """Rows behind its own that a shard's slab has room for."""
        return sum(_length(piece) for piece in self.pieces if piece.shift < 0)

    @functools.cached_property
    def pieces(self) -> tuple[Piece, ...]:
        """In the order in which a slab holds them: those in front of the own rows, then those behind."""
        pieces = []
        farthest = max(
            max(shard - first // self.rows, (end - 1) // self.rows - shard)
            for shard, (first, end) in enumerate(self._needed)
        )
        for shift in range(farthest, -farthest - 1, -1):
            if shift:
                pieces += self._pieces_from(shift)
        return tuple(pieces)

    def _pieces_from(self, shift: int) -> list[Piece]:
        """What shards need of the one `shift` before them: its last rows, or, behind them, its first ones.

        Shards need different numbers of rows (windows slide inside at the ends of the axis, stride groups do not fall together
        with shards). One piece has the rows that all of them need, the next what only the others need in addition, ..
        """
        counts = {}
        for receiver in range(max(0, shift), self.shards + min(0, shift)):
            first, end = self.needed(receiver)
            start = (receiver - shift) * self.rows
            count = start + self.rows - first if shift > 0 else end - start
            counts[receiver] = min(self.rows, max(0, count))
        pieces, less = [], 0
        for count in sorted({count for count in counts.values() if count}):
            rows = (self.rows - count, self.rows - less) if shift > 0 else (less, count)
            receivers = tuple(shard for shard, needed in counts.items() if needed >= count)
            pieces.append(Piece(shift, rows, receivers))
            less = count
        return pieces[::-1] if shift > 0 else pieces

    @property
    def rows_sent(self) -> int:
        """Rows that all shards together receive."""
        return sum(_length(piece) * len(piece.receivers) for piece in self.pieces)

    @functools.cached_property
    def interior(self) -> tuple[int, int]:
        """`[first, end)` of a shard's rows whose queries see rows of their own shard alone, whichever shard it is; maybe none."""
        start = np.arange(self.length) // self.rows * self.rows
        first, last = self._seen
        is_own = (first >= start) & (last < start + self.rows)
        inside = np.all(is_own.reshape(self.shards, self.rows), axis=0).tolist()
        runs, number = [(0, 0)], 0
        for is_inside, run in itertools.groupby(inside):
            end = number + len(list(run))
            runs += [(number, end)] if is_inside else []
            number = end
        return max(runs, key=lambda run: run[1] - run[0])


def _length(piece: Piece) -> int:
    return piece.rows[1] - piece.rows[0]


def axis_halo(rule: AxisNeighborhood, length: int, shards: int, *, axis: int = 0) -> AxisHalo:
    """The halo of an axis of `length` tokens in `shards` shards; `axis` is its number, for the error.

    Raises:
      ValueError: if the shards would not be equal.
    """
    if length % shards:
        legal = [n for n in range(1, length + 1) if length % n == 0]
        longer = -(-length // shards) * shards
        raise ValueError(
            f"shards of a spatial axis must be equal; got {shards} shards for {length} tokens on spatial axis {axis};"
            f" cut it into {', '.join(map(str, legal))}, shard another axis, or take a layout of {longer} tokens"
        )
    return AxisHalo(rule, length, shards)


def halos(
    neighborhood: Neighborhood, layout: Sequence[int], shards: Sequence[int]
) -> tuple[AxisHalo, ...]:
    """`axis_halo` of every axis of a layout.

    Raises:
      ValueError: for a layout too small for its windows, or shards that are not equal.
    """
    neighborhood.check_layout(layout)
    axes = zip(neighborhood.axes, layout, shards, strict=True)
    return tuple(axis_halo(*axis, axis=number) for number, axis in enumerate(axes))


def interior_share(axes: Sequence[AxisHalo]) -> float:
    """Share of a shard's queries that see rows of their own shard alone."""
    return math.prod((axis.interior[1] - axis.interior[0]) / axis.rows for axis in axes)


def border(axes: Sequence[AxisHalo]) -> tuple[tuple[Box | None, Box | None], ...]:
    """The other queries, where there is an interior: per axis the boxes in front of it and behind it, None where there is none.

    An axis's boxes are whole on the axes after it, and inside the interior on those before: no two overlap.
    """
    inside = tuple(axis.interior for axis in axes)
    whole = tuple((0, axis.rows) for axis in axes)

    def box(number: int, first: int, end: int) -> Box | None:
        return (*inside[:number], (first, end), *whole[number + 1 :]) if first < end else None

    return tuple(
        (box(number, 0, first), box(number, end, axes[number].rows))
        for number, (first, end) in enumerate(inside)
    )


def exchange_order(axes: Sequence[AxisHalo]) -> tuple[int, ...]:
    """In which order to exchange the halos of several axes: the one that sends the fewest tokens.

    Axes go one after the other, and a later axis's rows hold the earlier axes' halos, which is how corners arrive.
    """
    orders = itertools.permutations(range(len(axes)))
    return min(orders, key=lambda order: _tokens_in_order(axes, order))


def exchanged_tokens(axes: Sequence[AxisHalo]) -> int:
    """Tokens that all shards of a volume together receive, in `exchange_order`.

    Times the bytes of a token's keys and values (batch x key/value heads x (H + V) x itemsize): what a forward exchanges. The
    backward exchanges as much, gradients of halos on their way back.
    """
    return _tokens_in_order(axes, exchange_order(axes))


def _tokens_in_order(axes: Sequence[AxisHalo], order: Sequence[int]) -> int:
    # On the other axes, all shards together hold this many rows, with what they have received so far.
    held, tokens = [axis.length for axis in axes], 0
    for number in order:
        others = math.prod(rows for other, rows in enumerate(held) if other != number)
        tokens += axes[number].rows_sent * others
        held[number] = axes[number].slab * axes[number].shards
    return tokens
