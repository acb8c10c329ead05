"""Slabs of a volume: where their tokens lie in it, and who sees whom across two of them. Arithmetic on scalars alone.

A kernel counts tokens in the arrays that it reads and writes: positions of a local dilation group of the own slab, and of the
visited one. Only where a rule is asked are they positions of the volume: `SlabAxis` translates there and back. Window rules
come from `gna_jax.neighborhood`; a whole volume needs nothing of this.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gna_jax.neighborhood import AxisNeighborhood, maximum, minimum, where
from gna_jax.problem import Operands
from gna_jax.tiling import Interval


class Origin(NamedTuple):
    """Where the own and the visited slab begin on one axis: their first tokens' numbers and residues by the axis's dilation.

    Ints or traced int32; floored, so that residues are not negative where origins are.
    """

    own: Any
    own_residue: Any
    visited: Any
    visited_residue: Any


def origin_table(operands: Operands, dilation: tuple[int, ...], *, is_inverse: bool) -> jax.Array:
    """`[rank, 4]` int32: an `Origin` per axis. The kernels read it where they need it."""
    own, visited = operands.query_origin, operands.key_origin
    if is_inverse:
        own, visited = visited, own
    # Axis by axis: an array of dilations would be a constant, which `custom_partitioning` does not take.
    numbers = [
        number
        for axis, size in enumerate(dilation)
        for origin in (own, visited)
        for number in (origin[axis] // size, origin[axis] % size)
    ]
    return jnp.stack(numbers).reshape(len(dilation), 4)


def without_outside(array: jax.Array, origin: jax.Array, layout: Sequence[int]) -> jax.Array:
    """`[B, *space, ..]` with zeros outside the volume on axes where the slab is longer than the volume's `layout`.

    Memory there may hold NaN. On all other axes no visited tile reads it: a slab that is no longer than the volume ends outside at
    one end only, and walks move back into it (`tiling.key_walk`, "readable").
    """
    for axis, length in enumerate(layout):
        tokens = array.shape[1 + axis]
        if tokens <= length:
            continue
        place = origin[axis] + jnp.arange(tokens, dtype=jnp.int32)
        inside = ((place >= 0) & (place < length)).reshape(tokens, *(1,) * (array.ndim - axis - 2))
        array = jnp.where(inside[(None,) * (1 + axis)], array, jnp.zeros((), array.dtype))
    return array


@dataclasses.dataclass(frozen=True)
class SlabAxis:
    """The rule of one axis for a dilation group of two slabs: own positions in, visited ones out.

    Args:
      rule: of the volume.
      group: tokens of the volume's dilation group.
      own: number in that group of the own group's first token.
      visited: number of the visited group's first token.
    """

    rule: AxisNeighborhood
    group: Any
    own: Any
    visited: Any

    def keys(self, query: Any, length: Any) -> Interval:
        """Visited keys that an own query sees, of `length`; none outside the volume."""
        return self._seen(self.rule.keys, query, length)

    def queries(self, key: Any, length: Any) -> Interval:
        """Visited queries that see an own key, of `length`; none outside the volume."""
        return self._seen(self.rule.queries, key, length)

    def _seen(self, rule: Callable[..., Interval], position: Any, length: Any) -> Interval:
        place = position + self.own
        first, end = rule(minimum(maximum(place, 0 * place), self.group - 1), self.group)
        # Outside the volume an interval is empty, and lies where both ends still never decrease with the position.
        end = where(place < 0, first, end)
        first = where(place >= self.group, end, first)
        first, end = first - self.visited, end - self.visited
        return tuple(minimum(maximum(x, 0 * x), length) for x in (first, end))  # pyright: ignore[reportReturnType]


def volume_residues(dilation: int, residue: Any, origin: Origin) -> tuple[Any, Any, Any, Any]:
    """The volume's residue of an own group, the visited group of the same, and the first numbers of both: own, visited.

    Returns:
      residue in the volume, residue in the visited slab, number of the own group's first token, and of the visited one's.
    """
    if dilation == 1:
        return 0, 0, origin.own, origin.visited
    total = origin.own_residue + residue
    wraps = where(total >= dilation, 1 + 0 * total, 0 * total)
    in_volume = total - dilation * wraps
    distance = in_volume - origin.visited_residue
    goes_on = where(distance < 0, 1 + 0 * distance, 0 * distance)
    in_visited = distance + dilation * goes_on
    return in_volume, in_visited, origin.own + wraps, origin.visited + goes_on
