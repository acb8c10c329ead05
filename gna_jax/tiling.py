"""What a tile of tokens must read: boxes of keys for a tile of queries, and the reverse.

The whole theory, one axis at a time and inside one dilation group. Query `i` sees the keys `[first(i), end(i))`, and
neither end ever decreases with `i`. So for the queries `q0..q1` of a tile:

- outer keys `[first(q0), end(q1))`: seen by at least one of them. These must be read.
- inner keys `[first(q1), end(q0))`: seen by all of them; maybe none. These need no mask.

On several axes both are boxes. A kernel walks KV tiles over the outer box; a tile whose real keys lie in the inner
box is *full* and needs no mask, the others (the shell) are *partial*: they hold a masked pair of real tokens. Padding,
where a tile runs past the end of its group, is not a masked pair: it counts apart. The queries that see a key are such
an interval as well, and give the walk over Q tiles for dK and dV.

Window rules live in `gna_jax.neighborhood`, costs in the simulator. Functions of one axis also take traced positions.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import numpy as np

from gna_jax.neighborhood import (
    Neighborhood,
    equal_groups,
    group_length,
    maximum,
    minimum,
    per_axis,
    static_bool,
    where,
)

Interval = tuple[Any, Any]
"""`[first, end)` on one axis, in positions of a dilation group; empty where `end <= first`."""


@runtime_checkable  # by jaxtyping's import hook, with which users check calls
class AxisRule(Protocol):
    """Who sees whom on one axis: an `AxisNeighborhood`, or one whose queries and keys are numbered apart (slabs).

    Both ends of both intervals never decrease with the position.
    """

    def keys(self, query: Any, length: Any) -> Interval:
        """Keys that a query sees, of `length` keys."""
        ...

    def queries(self, key: Any, length: Any) -> Interval:
        """Queries that see a key, of `length` queries."""
        ...


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Tile shapes of a kernel, in tokens per spatial axis. Ints, lists and numpy ints become tuples of ints.

    Args:
      q: queries of a forward tile, e.g. `(8, 16)`; an int is a shape of one axis.
      kv: keys of a forward tile; None for a backend that reads the key box whole ("xla").
      backward_q, backward_kv: the same of a backward tile; None leaves it to the backend.
      dynamic: True: KV tiles start exactly where the window box starts. False: KV tiles start at multiples of the
        KV tile. None: the backend's choice.

    Raises:
      TypeError: for a traced or non-integer size, or a `dynamic` that is not a bool.
      ValueError: for a size below 1, or shapes of different ranks.
    """

    q: tuple[int, ...]
    kv: tuple[int, ...] | None
    backward_q: tuple[int, ...] | None = None
    backward_kv: tuple[int, ...] | None = None
    dynamic: bool | None = None

    def __post_init__(self):
        """Normalise and check the shapes."""
        shapes = {}
        for name in ("q", "kv", "backward_q", "backward_kv"):
            value = getattr(self, name)
            if value is not None or name == "q":
                shapes[name] = tile_shape(f"tiles.{name}", value, _rank_of(value))
                object.__setattr__(self, name, shapes[name])
        if len({len(shape) for shape in shapes.values()}) > 1 or not self.q:
            got = ", ".join(f"{name}={shape}" for name, shape in shapes.items())
            raise ValueError(
                f"tiles must all have one size per spatial axis; got {got};"
                " write the sizes in the order of the layout, for example Tiles(q=(8, 16), kv=(8, 8))"
            )
        if self.dynamic is not None:
            object.__setattr__(self, "dynamic", static_bool("tiles.dynamic", self.dynamic))


def _rank_of(value: Any) -> int:
    return len(value) if isinstance(value, Sequence) else np.size(value)


def tile_shape(name: str, value: Any, rank: int) -> tuple[int, ...]:
    """`value` as a tile's size per axis; ValueError for a size below 1, TypeError for one that is no integer."""
    shape = per_axis(name, value, rank)
    if any(size < 1 for size in shape):
        raise ValueError(
            f"{name} must be at least 1 on every axis; got {name}={shape};"
            " use 1 on an axis that is not tiled"
        )
    return shape


def outer_keys(axis: AxisRule, length: Any, q_first: Any, q_last: Any) -> Interval:
    """Keys that at least one of the queries `q_first..q_last` sees (both ends included).

    Every key of the interval is seen by one of them: stride never exceeds window, so windows leave no gaps.
    `length` is the dilation group's, here and below.
    """
    return axis.keys(q_first, length)[0], axis.keys(q_last, length)[1]


def inner_keys(axis: AxisRule, length: Any, q_first: Any, q_last: Any) -> Interval:
    """Keys that all of the queries `q_first..q_last` see; maybe none (`end <= first`)."""
    return axis.keys(q_last, length)[0], axis.keys(q_first, length)[1]


def outer_queries(axis: AxisRule, length: Any, k_first: Any, k_last: Any) -> Interval:
    """Queries that see at least one of the keys `k_first..k_last` (both ends included)."""
    return axis.queries(k_first, length)[0], axis.queries(k_last, length)[1]


def inner_queries(axis: AxisRule, length: Any, k_first: Any, k_last: Any) -> Interval:
    """Queries that see all of the keys `k_first..k_last`; maybe none (`end <= first`)."""
    return axis.queries(k_last, length)[0], axis.queries(k_first, length)[1]


@dataclasses.dataclass(frozen=True)
class AxisWalk:
    """The tiles that one tile visits on one axis: tile number `i` holds the places `start + i*tile + [0, tile)`.

    Fields are arrays where the walk was built from arrays: one walk per entry.

    Args:
      outer: places that must be read.
      inner: places that need no mask; maybe none.
      length: tokens of the dilation group.
      tile: places per visited tile.
      start: first place of the first visited tile, at or before the outer start.
      num_visits: tiles visited, at least 1; maybe none on a slab.
      full: numbers `[first, end)` of the visited tiles without a masked pair of real tokens; `first <= end`.
    """

    outer: Interval
    inner: Interval
    length: Any
    tile: Any
    start: Any
    num_visits: Any
    full: Interval

    @property
    def num_full(self) -> Any:
        """Visited tiles without a masked pair of real tokens."""
        return self.full[1] - self.full[0]

    @property
    def padding(self) -> Any:
        """Places of the last visited tile past the end of the group. A full tile may hold them: bound it still."""
        return maximum(self.start + self.num_visits * self.tile - self.length, 0 * self.start)


def key_walk(
    axis: AxisRule,
    length: Any,
    q_start: Any,
    *,
    q_tile: Any,
    kv_tile: Any,
    dynamic: bool,
    own_length: Any = None,
    readable: Any = None,
) -> AxisWalk:
    """The KV tiles that the Q tile `q_start + [0, q_tile)` visits on one axis.

    Args:
      axis: rule of the axis.
      length: tokens of the dilation group (may be traced); of its keys, where there are not as many queries.
      q_start: first query, `0 <= q_start < length`: int, numpy array or traced array.
      q_tile: queries per tile; the tile may run past the end of the group. Sizes may be arrays that broadcast, here and below.
      kv_tile: keys per visited tile.
      dynamic: whether the first KV tile starts at the outer start, or at the multiple of `kv_tile` before it.
      own_length: queries of the group; None for `length` of them.
      readable: end of the places that may be read: the walk moves back before it, below 0 if it must; None: all may be.
    """
    own_length = length if own_length is None else own_length
    queries = q_start, minimum(q_start + q_tile, own_length) - 1
    outer, inner = outer_keys(axis, length, *queries), inner_keys(axis, length, *queries)
    return _axis_walk(outer, inner, length=length, tile=kv_tile, dynamic=dynamic, readable=readable)


def query_walk(
    axis: AxisRule,
    length: Any,
    kv_start: Any,
    *,
    q_tile: Any,
    kv_tile: Any,
    dynamic: bool,
    own_length: Any = None,
    readable: Any = None,
) -> AxisWalk:
    """The Q tiles that the KV tile `kv_start + [0, kv_tile)` visits on one axis: `key_walk` with the roles exchanged."""
    own_length = length if own_length is None else own_length
    keys = kv_start, minimum(kv_start + kv_tile, own_length) - 1
    outer, inner = outer_queries(axis, length, *keys), inner_queries(axis, length, *keys)
    return _axis_walk(outer, inner, length=length, tile=q_tile, dynamic=dynamic, readable=readable)


def _axis_walk(
    outer: Interval, inner: Interval, *, length: Any, tile: Any, dynamic: bool, readable: Any
) -> AxisWalk:
    start = outer[0] if dynamic else (outer[0] // tile) * tile
    num_visits = _ceil_divide(outer[1] - start, tile)
    if readable is not None:
        excess = start + num_visits * tile - readable
        start = start - maximum(excess, 0 * excess)
    full_first = _ceil_divide(inner[0] - start, tile)
    # An inner interval up to the group's end fills the last tile too: what sticks out there is padding.
    full_end = where(inner[1] >= length, num_visits, (inner[1] - start) // tile)
    return AxisWalk(
        outer=outer,
        inner=inner,
        length=length,
        tile=tile,
        start=start,
        num_visits=num_visits,
        full=(full_first, maximum(full_first, full_end)),
    )


def _ceil_divide(dividend: Any, divisor: int) -> Any:
    return (dividend + divisor - 1) // divisor


class Visit(NamedTuple):
    """One visited tile: its first place on every axis, and whether it holds no masked pair of real tokens."""

    start: tuple[int, ...]
    is_full: bool


@dataclasses.dataclass(frozen=True)
class _TilePlan:
    """What `QueryTilePlan` and `KeyTilePlan` share: the product of one `AxisWalk` per axis."""

    neighborhood: Neighborhood
    layout: tuple[int, ...]
    _: dataclasses.KW_ONLY
    q_tile: tuple[int, ...]
    kv_tile: tuple[int, ...]
    dynamic: bool
    group: tuple[int, ...] = ()

    _start_name: ClassVar[str]
    _walk: ClassVar[Callable[..., AxisWalk]]

    def __post_init__(self):
        rank = self.neighborhood.rank
        if _rank_of(self.group) == 0:
            object.__setattr__(self, "group", (0,) * rank)
        for name in ("q_tile", "kv_tile"):
            object.__setattr__(self, name, tile_shape(name, getattr(self, name), rank))
        for name in ("layout", "group", self._start_name):
            object.__setattr__(self, name, per_axis(name, getattr(self, name), rank))
        self.neighborhood.check_layout(self.layout)
        dilation, start = self.neighborhood.dilation, getattr(self, self._start_name)
        if not all(0 <= r < d for r, d in zip(self.group, dilation, strict=True)):
            raise ValueError(
                "group must hold a residue 0 <= residue < dilation per axis;"
                f" got group={self.group}, dilation={dilation}"
            )
        if not all(0 <= i < n for i, n in zip(start, self.group_layout, strict=True)):
            raise ValueError(
                f"{self._start_name} must lie inside the dilation group; got {self._start_name}={start},"
                f" group layout {self.group_layout}; count tokens of the group, not of the layout"
            )

    @functools.cached_property
    def walks(self) -> tuple[AxisWalk, ...]:
        """The walk of every axis."""
        rules, starts = self.neighborhood.axes, getattr(self, self._start_name)
        axes = zip(rules, self.group_layout, starts, self.q_tile, self.kv_tile, strict=True)
        return tuple(
            self._walk(axis, length, start, q_tile=q, kv_tile=kv, dynamic=self.dynamic)
            for axis, length, start, q, kv in axes
        )

    @functools.cached_property
    def group_layout(self) -> tuple[int, ...]:
        """Tokens of the plan's dilation group on every axis."""
        axes = zip(self.layout, self.neighborhood.dilation, self.group, strict=True)
        return tuple(group_length(length, d, residue) for length, d, residue in axes)

    @property
    def outer_box(self) -> tuple[Interval, ...]:
        """Per axis, the places that must be read."""
        return tuple(walk.outer for walk in self.walks)

    @property
    def inner_box(self) -> tuple[Interval, ...]:
        """Per axis, the places that need no mask; the box is empty if any axis is."""
        return tuple(walk.inner for walk in self.walks)

    @property
    def num_visits(self) -> int:
        """Visited tiles, without enumerating them."""
        return math.prod(walk.num_visits for walk in self.walks)

    @property
    def num_full(self) -> int:
        """Visited tiles without a masked pair of real tokens, without enumerating them."""
        return math.prod(walk.num_full for walk in self.walks)

    def visits(self) -> tuple[Visit, ...]:
        """Every visited tile once: the full ones first, then the shell; row-major within both."""
        axes = [
            [(w.start + n * w.tile, w.full[0] <= n < w.full[1]) for n in range(w.num_visits)]
            for w in self.walks
        ]
        boxes = (zip(*box, strict=True) for box in itertools.product(*axes))
        visits = [Visit(start, all(is_full)) for start, is_full in boxes]
        return tuple(sorted(visits, key=lambda visit: not visit.is_full))


@dataclasses.dataclass(frozen=True)
class QueryTilePlan(_TilePlan):
    """The KV tiles that one Q tile visits, inside one dilation group: the walk of the forward pass and of dQ.

    All positions count tokens of the group; token `p` of the group lies at `group + dilation * p` of the layout.

    Args:
      neighborhood: window rule of every axis.
      layout: tokens per axis of the whole layout.
      q_start: first query of the tile, per axis.
      q_tile: queries per tile; the tile may run past the end of the group.
      kv_tile: keys per visited tile.
      dynamic: whether KV tiles start where the outer box starts, or at multiples of `kv_tile`.
      group: residue per axis; empty for residue 0 on every axis (the only group without dilation).

    Raises:
      TypeError: for traced or non-integer values.
      ValueError: for a layout too small for its windows, a tile size below 1, or a start or residue out of range.
    """

    q_start: tuple[int, ...]

    _start_name = "q_start"
    _walk = staticmethod(key_walk)


@dataclasses.dataclass(frozen=True)
class KeyTilePlan(_TilePlan):
    """The Q tiles that one KV tile visits, inside one dilation group: the walk of dK and dV.

    As `QueryTilePlan` with the roles exchanged: `kv_start` is the first key of the tile, boxes and visits are of
    queries, and `dynamic` says whether Q tiles start where the outer box starts, or at multiples of `q_tile`.
    """

    kv_start: tuple[int, ...]

    _start_name = "kv_start"
    _walk = staticmethod(query_walk)


def dilation_groups(
    layout: Sequence[int], dilation: Sequence[int]
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Every dilation group in row-major order: its residue per axis, and its layout (tokens per axis)."""
    for group in itertools.product(*map(range, dilation)):
        axes = zip(layout, dilation, group, strict=True)
        yield group, tuple(group_length(length, d, residue) for length, d, residue in axes)


def group_lengths(length: int, dilation: int) -> tuple[tuple[int, int], ...]:
    """The distinct lengths of the dilation groups of one axis, longest first: at most two `(length, groups)`."""
    return tuple((tokens, len(residues)) for residues, tokens in equal_groups(length, dilation))
