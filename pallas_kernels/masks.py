"""The mask of one tile of scores, from per-axis intervals: one compare per axis and element, nothing else per element.

The ends of a row's interval are computed once per Q tile by the axis's rule. All rules are `gna_jax.neighborhood`'s.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from gna_jax.neighborhood import AxisNeighborhood

Intervals = tuple[tuple[Any, Any], ...]
"""Per axis, `[first, end)` of the keys that each row sees: two vectors of one entry per row."""


def digits(numbers: Any, box: Sequence[int]) -> tuple[Any, ...]:
    """Places per axis inside a box of the tokens with these row-major numbers. Sizes are powers of two."""
    places = []
    for axis, size in enumerate(box):
        shift = math.prod(box[axis + 1 :]).bit_length() - 1
        places.append((numbers >> shift) & (size - 1) if axis else numbers >> shift)
    return tuple(places)


def key_intervals(
    rules: Sequence[AxisNeighborhood], queries: Sequence[Any], lengths: Sequence[Any]
) -> Intervals:
    """What rows of queries at these positions see, per axis."""
    axes = zip(rules, queries, lengths, strict=True)
    return tuple(rule.keys(position, length) for rule, position, length in axes)


def seen(
    intervals: Intervals, start: Sequence[Any], places: Sequence[Any], shape: tuple[int, int]
) -> jax.Array:
    """`[rows, columns]` bool: does the row see the key on every axis? Hides padding too: intervals end before it.

    The keys are those at `start + places`. The start is taken from the intervals, once per row: places are then constants
    of the tile, or nearly, and most compares of one axis fall together.
    """
    rows: Callable[[Any], jax.Array] = lambda x: lax.broadcast_in_dim(x, shape, (0,))
    unsigned: Callable[[Any], jax.Array] = lambda x: lax.convert_element_type(x, jnp.uint32)
    mask = None
    for (first, end), origin, place in zip(intervals, start, places, strict=True):
        key = lax.broadcast_in_dim(place, shape, (1,))
        # `first <= key < end` in one compare: before `first` the difference wraps around to a large number.
        inside = unsigned(key - rows(first - origin)) < rows(unsigned(end - first))
        mask = inside if mask is None else mask & inside
    if mask is None:
        raise ValueError("a mask needs at least one axis; got none")
    return mask
