"""The mask of one tile of scores, from per-axis intervals: one compare per axis and element, nothing else per element.

The ends of a row's interval are computed once per Q tile by the axis's rule. All rules are `gna_jax.neighborhood`'s.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from gna_jax.tiling import AxisRule

Intervals = tuple[tuple[Any, Any], ...]
"""Per axis, `[first, end)` of the keys that each row sees, or of the queries that see it: vectors of one entry per row."""

WORD = 32
"""Keys per word of `words`."""


def digits(numbers: Any, box: Sequence[int]) -> tuple[Any, ...]:
    """Places per axis inside a box of the tokens with these row-major numbers. Sizes are powers of two."""
    places = []
    for axis, size in enumerate(box):
        shift = math.prod(box[axis + 1 :]).bit_length() - 1
        places.append((numbers >> shift) & (size - 1) if axis else numbers >> shift)
    return tuple(places)


def key_intervals(
    rules: Sequence[AxisRule], queries: Sequence[Any], lengths: Sequence[Any]
) -> Intervals:
    """What rows of queries at these positions see, per axis."""
    axes = zip(rules, queries, lengths, strict=True)
    return tuple(rule.keys(position, length) for rule, position, length in axes)


def query_intervals(
    rules: Sequence[AxisRule], keys: Sequence[Any], lengths: Sequence[Any]
) -> Intervals:
    """Who sees rows of keys at these positions, per axis."""
    axes = zip(rules, keys, lengths, strict=True)
    return tuple(rule.queries(position, length) for rule, position, length in axes)


def seen(
    intervals: Intervals, start: Sequence[Any], places: Sequence[Any], shape: tuple[int, int]
) -> jax.Array:
    """`[rows, columns]` bool: do row and column meet on every axis? Hides padding too: intervals end before it.

    The columns are the tokens at `start + places`: keys where rows are queries, queries where rows are keys. The start is
    taken from the intervals, once per row: places are then constants of the tile, or nearly, and most compares of one axis
    fall together.
    """
    rows: Callable[[Any], jax.Array] = lambda x: lax.broadcast_in_dim(x, shape, (0,))
    unsigned: Callable[[Any], jax.Array] = lambda x: lax.convert_element_type(x, jnp.uint32)
    mask = None
    for (first, end), origin, place in zip(intervals, start, places, strict=True):
        token = lax.broadcast_in_dim(place, shape, (1,))
        # `first <= token < end` in one compare: before `first` the difference wraps around to a large number.
        inside = unsigned(token - rows(first - origin)) < rows(unsigned(end - first))
        mask = inside if mask is None else mask & inside
    if mask is None:
        raise ValueError("a mask needs at least one axis; got none")
    return mask


def words(intervals: Intervals, start: Sequence[Any], box: Sequence[int]) -> tuple[jax.Array, ...]:
    """`seen` of a whole tile as bits, `WORD` keys per word: one uint32 per row and word.

    For threads that hold whole rows: one instruction per key looks it up, whatever the number of axes, and no predicate lives
    longer. Keys are numbered row-major; bits past a tile of fewer keys mean nothing.
    """
    patterns = []
    for number in range(0, math.prod(box), WORD):
        word, run = None, math.prod(box)
        for (first, end), origin, size in zip(intervals, start, box, strict=True):
            period, run = run, run // size
            # Places on this axis of the word's first key; a run of keys shares one.
            place, span = number % period // run, min(WORD, period)
            ends = ((x - origin - place) * run for x in (first, end))
            low, high = (jnp.clip(x, 0, span) for x in ends)
            bits = _low_bits(high) ^ _low_bits(low)
            if span < WORD:
                bits = bits * jnp.uint32(sum(1 << bit for bit in range(0, WORD, span)))
            word = bits if word is None else word & bits
        patterns.append(word)
    return tuple(patterns)


def _low_bits(count: Any) -> Any:
    """The lowest `count` bits set, 0 to `WORD`. In two shifts: one by all of a word's bits is undefined."""
    half = (count >> 1).astype(jnp.uint32)
    return ((jnp.uint32(1) << half) << (count.astype(jnp.uint32) - half)) - jnp.uint32(1)


def bits_of(word: jax.Array, numbers: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """`[rows, columns]` bool: the bits with these numbers, one word per row."""
    bit = jnp.uint32(1) << numbers.astype(jnp.uint32)
    of_row = lax.broadcast_in_dim(word, shape, (0,))
    return (of_row & lax.broadcast_in_dim(bit, shape, (1,))) != 0
