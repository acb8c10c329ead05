"""Which boxes a kernel's thread block reads: the static sizes, and the walk in closed form from scalars.

Nothing is tabulated in memory: a block knows its tile by number, and computes from it the tile's place, the box of tokens it
walks and, for every step, the visited tile's place. Window rules and boxes come from `gna_jax.tiling`; what is added here is
the order of steps: first the tiles that need no mask, then the shell around them. Ints work as well as traced int32.
On slabs the places are those of the arrays, and rules translate them (`pallas_kernels.slabs`).

The forward and dQ own a Q tile and visit KV tiles; dK and dV own a KV tile and visit Q tiles (`TilePlan.is_inverse`).
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from gna_jax.neighborhood import group_length, maximum, minimum, where
from gna_jax.problem import Problem
from gna_jax.tiling import AxisRule, AxisWalk, key_walk, query_walk
from pallas_kernels.slabs import Origin, SlabAxis, volume_residues

EVERYWHERE = 1 << 30
"""An end of readable places that none reaches."""


@dataclasses.dataclass(frozen=True)
class TilePlan:
    """The static side of a kernel.

    One tile (`own`) is the job of a thread block; its `num_workers` warpgroups take a part of `part` tokens each, side by
    side on axis `split_axis`.

    Args:
      problem: the call.
      q_tile, kv_tile: tokens per axis.
      num_workers: warpgroups that share a block's own tile.
      split_axis: the axis on which they share it.
      stages: tiles of K in flight, or of Q in an inverse plan.
      value_stages: tiles of V in flight, or of dO in an inverse plan.
      is_inverse: whether a block owns a KV tile and visits Q tiles, for dK and dV, and not the other way round.
    """

    problem: Problem
    q_tile: tuple[int, ...]
    kv_tile: tuple[int, ...]
    num_workers: int
    split_axis: int
    stages: int
    value_stages: int
    is_inverse: bool = False

    @property
    def own(self) -> tuple[int, ...]:
        """Tokens per axis of a block's own tile."""
        return self.kv_tile if self.is_inverse else self.q_tile

    @property
    def visited(self) -> tuple[int, ...]:
        """Tokens per axis of a visited tile."""
        return self.q_tile if self.is_inverse else self.kv_tile

    @property
    def part(self) -> tuple[int, ...]:
        """Own tokens per axis of one warpgroup."""
        return tuple(
            size // self.num_workers if axis == self.split_axis else size
            for axis, size in enumerate(self.own)
        )

    @property
    def rows(self) -> int:
        """Own tokens of one warpgroup."""
        return math.prod(self.part)

    @property
    def columns(self) -> int:
        """Tokens of a visited tile."""
        return math.prod(self.visited)

    @property
    def dilation(self) -> tuple[int, ...]:
        """Dilation per axis."""
        return self.problem.neighborhood.dilation

    @property
    def tiles(self) -> tuple[int, ...]:
        """Own tiles per axis of the longest dilation group."""
        axes = zip(self.own_layout, self.dilation, self.own, strict=True)
        return tuple(-(-group_length(length, d, 0) // tile) for length, d, tile in axes)

    @property
    def own_layout(self) -> tuple[int, ...]:
        """Tokens per axis of the array that blocks own tiles of: the volume's, or a slab's."""
        return self.problem.key_layout if self.is_inverse else self.problem.query_layout

    @property
    def visited_layout(self) -> tuple[int, ...]:
        """Tokens per axis of the array that they visit."""
        return self.problem.query_layout if self.is_inverse else self.problem.key_layout

    @property
    def parts(self) -> tuple[int, ...]:
        """Warpgroup parts per axis of the longest dilation group."""
        return tuple(
            number * self.num_workers if axis == self.split_axis else number
            for axis, number in enumerate(self.tiles)
        )

    @property
    def num_tiles(self) -> int:
        """Own tiles of all dilation groups of one head."""
        return math.prod(self.tiles) * math.prod(self.dilation)

    @property
    def is_uneven(self) -> bool:
        """Whether tiles differ much in work: then those of all heads come before the next, lighter tile."""
        return any(self.problem.neighborhood.is_causal)

    @property
    def own_heads(self) -> int:
        """Heads of the array that blocks own tiles of."""
        return self.problem.kv_heads if self.is_inverse else self.problem.query_heads

    @property
    def visited_heads(self) -> int:
        """Heads that one block visits: those of all queries that share the own key."""
        return self.problem.heads_per_kv if self.is_inverse else 1

    @property
    def num_parts(self) -> int:
        """Warpgroup parts of all dilation groups of one head."""
        return self.num_tiles * self.num_workers

    def group_axes(
        self, residues: Sequence[Any], origins: Sequence[Origin] | None = None
    ) -> "tuple[GroupAxis, ...]":
        """Every axis of the dilation group whose own tokens have these residues in the own array.

        Args:
          residues: per axis.
          origins: of the slabs, per axis; None where the arrays are the whole volume.
        """
        rules, lengths = (
            self.problem.neighborhood.axes,
            _group_lengths(self.own_layout, self.dilation, residues),
        )
        if origins is None:
            axes = zip(rules, residues, lengths, strict=True)
            return tuple(GroupAxis(rule, r, length, r, length) for rule, r, length in axes)
        places = [
            volume_residues(*axis) for axis in zip(self.dilation, residues, origins, strict=True)
        ]
        in_volume, visited_residues, own, visited = zip(*places, strict=True)
        groups = _group_lengths(self.problem.global_layout, self.dilation, in_volume)
        slabs = zip(rules, groups, own, visited, strict=True)
        visited_lengths = _group_lengths(self.visited_layout, self.dilation, visited_residues)
        sides = zip(residues, lengths, visited_residues, visited_lengths, strict=True)
        return tuple(
            GroupAxis(SlabAxis(*slab), *side) for slab, side in zip(slabs, sides, strict=True)
        )


def _group_lengths(
    layout: Sequence[int], dilation: Sequence[int], residues: Sequence[Any]
) -> tuple[Any, ...]:
    """Tokens per axis of a dilation group: static ints on axes whose groups are all of one length."""
    return tuple(
        length // d if length % d == 0 else group_length(length, d, residue)
        for length, d, residue in zip(layout, dilation, residues, strict=True)
    )


class GroupAxis(NamedTuple):
    """One axis of a dilation group: who sees whom, and which tokens of the own and of the visited array are in the group."""

    rule: AxisRule
    own_residue: Any
    own_length: Any
    visited_residue: Any
    visited_length: Any

    def readable(self) -> Any:
        """End of the visited places that may be read: where the volume ends inside the array; None where it does not."""
        if not isinstance(self.rule, SlabAxis):
            return None
        end = self.rule.group - self.rule.visited
        return where(end < self.visited_length, end, EVERYWHERE + 0 * end)


@dataclasses.dataclass(frozen=True)
class TileWalk:
    """One block's tile: its dilation group, its first token and the tiles it visits, without masks first.

    Args:
      residues: the group, per axis.
      lengths: own tokens of the group, per axis.
      visited_residues: where the visited tokens of the group lie, per axis; other ones than `residues` on slabs alone.
      own_start: first own token, per axis; past the end of a group that is shorter than the longest, where there is no work.
      axes: the walk of every axis.
      num_clean: visits that need no mask: every visited token is real, and every own query sees it (or: it sees every own key).
      num_visits: all visits; 0 for a tile without tokens.
    """

    residues: tuple[Any, ...]
    lengths: tuple[Any, ...]
    visited_residues: tuple[Any, ...]
    own_start: tuple[Any, ...]
    axes: tuple[AxisWalk, ...]
    num_clean: Any
    num_visits: Any

    def clean_tile(self, step: Any) -> tuple[Any, ...]:
        """First tokens of clean visit number `step`, row-major."""
        firsts, counts = zip(*map(clean_visits, self.axes), strict=True)
        place = _digits(step, counts)
        return self._starts(tuple(f + n for f, n in zip(firsts, place, strict=True)))

    def shell_tile(self, step: Any) -> tuple[Any, ...]:
        """First tokens of shell visit number `step`."""
        return self._starts(_shell_digits(step, self.axes))

    def _starts(self, numbers: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(walk.start + n * walk.tile for walk, n in zip(self.axes, numbers, strict=True))


def tile_walk(
    plan: TilePlan,
    tile: Any,
    origins: Sequence[Origin] | None = None,
    *,
    moves_back: Sequence[bool] | None = None,
) -> TileWalk:
    """The walk of own tile number `tile`: dilation groups row-major, tiles of a group row-major.

    On a causal axis Q tiles are numbered from the last on: the later a query, the more keys it sees, and the GPU starts tiles in
    their order. KV tiles are not: the earlier a key, the more queries see it.

    Args:
      plan: the kernel's.
      tile: its number: an int or traced.
      origins: of the slabs, per axis; None where the arrays are the whole volume.
      moves_back: per axis, whether a walk stays before the volume's end at the cost of places below 0; None: it does.
    """
    group, number = quotient_and_digit(tile, math.prod(plan.tiles))
    residues, place = _digits(group, plan.dilation), _digits(number, plan.tiles)
    axes = zip(place, plan.tiles, plan.problem.neighborhood.is_causal, strict=True)
    place = tuple(
        count - 1 - digit if is_causal and not plan.is_inverse else digit
        for digit, count, is_causal in axes
    )
    groups = plan.group_axes(residues, origins)
    # A multiple of `tile`, so that starts are traced where the tile is: see `BoxPlace`.
    start = tuple(0 * tile + n * size for n, size in zip(place, plan.own, strict=True))
    moves_back = moves_back or (True,) * len(start)
    axes = tuple(
        axis_walk(plan, number, axis, first, moves_back=moves)
        for number, (axis, first, moves) in enumerate(zip(groups, start, moves_back, strict=True))
    )
    if origins is not None:
        axes = _without_void(plan, axes)
    is_empty = False
    lengths = tuple(axis.own_length for axis in groups)
    for first, length in zip(start, lengths, strict=True):
        is_empty = is_empty | (first >= length)
    visits = math.prod(walk.num_visits for walk in axes)
    clean = math.prod(count for _, count in map(clean_visits, axes))
    return TileWalk(
        residues=residues,
        lengths=lengths,
        visited_residues=tuple(axis.visited_residue for axis in groups),
        own_start=start,
        axes=axes,
        num_clean=where(is_empty, 0 * clean, clean),
        num_visits=where(is_empty, 0 * visits, visits),
    )


def axis_walk(
    plan: TilePlan, number: int, axis: GroupAxis, first: Any, *, moves_back: bool = True
) -> AxisWalk:
    """The visits on axis `number` of the own tiles whose first tokens are `first`: an int, an array, or traced."""
    walk_of = query_walk if plan.is_inverse else key_walk
    slab = {}
    if isinstance(axis.rule, SlabAxis):
        slab = {"own_length": axis.own_length, "readable": axis.readable() if moves_back else None}
    return walk_of(
        axis.rule,
        axis.visited_length,
        minimum(first, axis.own_length - 1),
        q_tile=plan.q_tile[number],
        kv_tile=plan.kv_tile[number],
        dynamic=True,
        **slab,
    )


def _without_void(plan: TilePlan, axes: Sequence[AxisWalk]) -> tuple[AxisWalk, ...]:
    """The walks of a slab's tile, at least one visit: rows that see nothing visit a tile past the array's end, all of it hidden.

    So every own tile is computed, and written, in the one way there is.
    """
    is_void = False
    for walk in axes:
        is_void = is_void | (walk.num_visits <= 0)
    ends = [-(-length // d) for length, d in zip(plan.visited_layout, plan.dilation, strict=True)]
    none = 0 * axes[0].start
    return tuple(
        dataclasses.replace(
            walk,
            start=where(is_void, end + none, walk.start),
            num_visits=where(is_void, 1 + none, walk.num_visits),
            full=tuple(where(is_void, none, number) for number in walk.full),
        )
        for walk, end in zip(axes, ends, strict=True)
    )


def clean_visits(walk: AxisWalk) -> tuple[Any, Any]:
    """First number and count of an axis's visits that need no mask: full, and without padding."""
    first, end = walk.full
    end = minimum(end, (walk.length - walk.start) // walk.tile)
    return first, maximum(end - first, 0 * first)


def part_number(plan: TilePlan, residues: Sequence[Any], start: Sequence[Any]) -> Any:
    """Row-major number, among all parts of one head, of the part of a dilation group whose first token is `start`."""
    number = 0
    for residue, d in zip(residues, plan.dilation, strict=True):
        number = number * d + residue
    for first, size, count in zip(start, plan.part, plan.parts, strict=True):
        number = number * count + quotient_and_digit(first, size)[0]
    return number


def quotient_and_digit(number: Any, size: Any) -> tuple[Any, Any]:
    """Quotient and remainder of a number that is not negative; of the static size 1 without arithmetic."""
    if isinstance(size, int) and size == 1:
        return number, 0
    if isinstance(number, jax.Array) or isinstance(size, jax.Array):
        quotient = lax.div(jnp.asarray(number, jnp.int32), jnp.asarray(size, jnp.int32))
    else:
        quotient = number // size
    return quotient, number - quotient * size


def _digits(number: Any, sizes: Sequence[Any]) -> tuple[Any, ...]:
    """Row-major index of a number in a box of these sizes."""
    digits = []
    for size in reversed(sizes):
        number, digit = quotient_and_digit(number, size)
        digits.append(digit)
    return tuple(reversed(digits))


def _shell_digits(step: Any, axes: Sequence[AxisWalk]) -> tuple[Any, ...]:
    """Visit numbers per axis of shell visit `step`: the box of all visits without the box of the clean ones.

    Slices of the leading axis outside the clean range come first, whole; then those inside it, each with the shell of the
    remaining axes.
    """
    walk, rest = axes[0], axes[1:]
    first, count = clean_visits(walk)
    if not rest:
        return (where(step < first, step, step + count),)
    in_slice = math.prod(other.num_visits for other in rest)
    in_shell = in_slice - math.prod(n for _, n in map(clean_visits, rest))
    outside = (walk.num_visits - count) * in_slice
    is_outside = step < outside
    whole, whole_rest = quotient_and_digit(step, in_slice)
    # Never reached where the shell of the remaining axes is empty, but computed: keep the division defined.
    inner, inner_rest = quotient_and_digit(step - outside, maximum(in_shell, 0 * in_shell + 1))
    place = where(is_outside, where(whole < first, whole, whole + count), first + inner)
    whole_digits = _digits(whole_rest, tuple(other.num_visits for other in rest))
    shell_digits = _shell_digits(maximum(inner_rest, 0 * inner_rest), rest)
    pairs = zip(whole_digits, shell_digits, strict=True)
    return (place, *(where(is_outside, a, b) for a, b in pairs))
