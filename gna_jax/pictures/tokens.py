"""Which tokens of a layout a query sees, and with which it shares its window: arrays for the pictures.

Rules come from `gna_jax.neighborhood`. Arrays are of the size of the layout, never tokens x tokens.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from gna_jax.neighborhood import (
    AxisNeighborhood,
    Flags,
    Neighborhood,
    Sizes,
    by,
    group_length,
    per_axis,
)

MAX_SIDE = 512
"""Cells of a picture's side that an eye and a screen can tell apart."""
MAX_CELLS = 2**22


def read_rule(
    layout: Any, window_size: Sizes, stride: Sizes, dilation: Sizes, is_causal: Flags
) -> tuple[tuple[int, ...], Neighborhood]:
    """Layout and rule of a picture from what its caller gave; an int layout has one axis.

    Raises:
      TypeError: for a traced or non-integer value.
      ValueError: for more than three axes, a rule that is not one, or a layout too small for it.
    """
    rank = len(layout) if isinstance(layout, Sequence) else max(np.size(layout), 1)
    if not 1 <= rank <= 3:
        raise ValueError(
            f"layout must have one to three axes; got layout={layout}; write tokens per axis, as in (16, 16)"
        )
    sizes = per_axis("layout", layout, rank)
    rule = Neighborhood.of(
        rank, window_size=window_size, stride=stride, dilation=dilation, is_causal=is_causal
    )
    rule.check_layout(sizes)
    return sizes, rule


def leaders(axis: AxisNeighborhood, length: int) -> np.ndarray:
    """`[length]`: the position of the leader of every token's stride group. Tokens with one leader are one group."""
    position = np.arange(length)
    residue = position % axis.dilation
    group = group_length(length, axis.dilation, residue)
    return axis.leader(position // axis.dilation, group) * axis.dilation + residue


def seen(rule: Neighborhood, layout: Sequence[int], query: Sequence[int]) -> np.ndarray:
    """`[*layout]` bool: the keys that a query sees."""
    axes = zip(rule.axes, layout, query, strict=True)
    return product([axis.sees(i, np.arange(length), length) for axis, length, i in axes])


def stride_group(
    rule: Neighborhood, layout: Sequence[int], query: Sequence[int]
) -> tuple[np.ndarray, tuple[int, ...]]:
    """`[*layout]` bool: the queries of a query's stride group; and the position of their leader."""
    axes = [leaders(axis, length) for axis, length in zip(rule.axes, layout, strict=True)]
    leader = tuple(int(axis[i]) for axis, i in zip(axes, query, strict=True))
    return product([axis == i for axis, i in zip(axes, leader, strict=True)]), leader


def product(axes: Sequence[np.ndarray]) -> np.ndarray:
    """`[*layout]` bool: the tokens that every axis's `[length]` bool holds."""
    return functools.reduce(np.logical_and.outer, axes)


def check_position(name: str, value: Sizes, layout: Sequence[int]) -> tuple[int, ...]:
    """A token's position, one int per axis; ValueError unless it lies in the layout."""
    position = per_axis(name, value, len(layout))
    if not all(0 <= i < length for i, length in zip(position, layout, strict=True)):
        raise ValueError(
            f"{name} must lie inside the layout; got {name}={position}, layout {tuple(layout)}; positions count from 0"
        )
    return position


def check_drawable(layout: Sequence[int], what: str = "tokens") -> None:
    """ValueError for a layout of too many cells to draw."""
    if max(layout[-2:]) > MAX_SIDE or math.prod(layout) > MAX_CELLS:
        raise ValueError(
            f"a picture shows at most {MAX_SIDE} {what} along a side and {MAX_CELLS} in all;"
            f" got {by(layout)} {what}; divide layout, window_size, stride and tiles by a common factor,"
            " or leave out an axis"
        )


def describe(rule: Neighborhood, layout: Sequence[int]) -> str:
    """The rule in words, as in `"16x16 tokens, window 7x7, stride 2x2"`; what is not used is not said."""
    words = [f"{by(layout)} tokens", f"window {by(rule.window_size)}"]
    if any(stride > 1 for stride in rule.stride):
        words.append(f"stride {by(rule.stride)}")
    if any(dilation > 1 for dilation in rule.dilation):
        words.append(f"dilation {by(rule.dilation)}")
    if rule.is_causal == (True,) * rule.rank:
        words.append("causal")
    elif any(rule.is_causal):
        words.append(f"causal axis {', '.join(str(n) for n, c in enumerate(rule.is_causal) if c)}")
    return ", ".join(words)
