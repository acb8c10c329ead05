"""Windows to propose for a wanted share of the pairs, where nobody has named any. Ranking them is `search`'s business."""

import itertools
import math
from collections.abc import Callable
from fractions import Fraction

from gna_jax.neighborhood import Neighborhood
from gna_jax.simulator.counts import axis_attended_pairs

STRETCH = 1.5
"""How many times longer or shorter than the even window a proposed window may be on an axis."""
COARSEST = 4
"""First tried: sizes in steps of the largest power of two in a quarter of the even window, which tiles divide well."""
BISECTIONS = 20


def even_windows(
    layout: tuple[int, ...],
    rule_of: Callable[..., Neighborhood],
    *,
    least: Fraction,
    most: Fraction,
) -> list[Neighborhood]:
    """Stride-1 rules that attend between `least` and `most` of the dense pairs, or as near below as can be.

    The even window takes the same share of every axis and attends at most `most`. Proposed are windows whose sizes lie within a factor
    of `STRETCH` around it: multiples of a power of two (or the whole axis), halved until some window fits.

    Args:
      layout: tokens per axis.
      rule_of: makes the rule of a `window_size`.
      least, most: shares of tokens^2.

    Returns:
      Rules, most attended pairs first; none where even a window of one key attends too much.
    """
    whole = rule_of(window_size=1)
    whole.check_layout(layout)
    longest = [length // d for length, d in zip(layout, whole.dilation, strict=True)]
    dense = math.prod(layout) ** 2
    fewest, most_pairs = math.ceil(least * dense), math.floor(most * dense)
    even = _even_window(layout, rule_of, longest, most_pairs)
    bounds = [
        (max(1, math.ceil(size / STRETCH)), min(n, int(size * STRETCH)))
        for size, n in zip(even, longest, strict=True)
    ]
    steps = [1 << max(0, (size // COARSEST).bit_length() - 1) for size in even]
    while True:
        options = []
        for number, ((low, high), step, n) in enumerate(zip(bounds, steps, longest, strict=True)):
            sizes = set(range(-(-low // step) * step, high + 1, step))
            if high == n:
                sizes.add(n)
            options.append(
                [(size, _attended(rule_of, layout, number, size)) for size in sorted(sizes)]
            )
        fitting = []
        for window in itertools.product(*options):
            attended = math.prod(pairs for _, pairs in window)
            if attended <= most_pairs:
                fitting.append((attended, tuple(size for size, _ in window)))
        fitting.sort(reverse=True)
        near = [window for attended, window in fitting if attended >= fewest]
        if near or set(steps) == {1}:
            chosen = near or [window for _, window in fitting[:1]]
            return [rule_of(window_size=window) for window in chosen]
        steps = [max(1, step // 2) for step in steps]


def _even_window(
    layout: tuple[int, ...],
    rule_of: Callable[..., Neighborhood],
    longest: list[int],
    most_pairs: int,
) -> list[int]:
    """The largest window with the same share of every axis that attends at most `most_pairs`; 1 where none does."""

    def window(share: float) -> list[int]:
        return [max(1, int(share * n)) for n in longest]

    def fits(share: float) -> bool:
        sizes = enumerate(window(share))
        return math.prod(_attended(rule_of, layout, *size) for size in sizes) <= most_pairs

    low, high = 0.0, 1.0
    if fits(high):
        return window(high)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return window(low)


def _attended(
    rule_of: Callable[..., Neighborhood], layout: tuple[int, ...], number: int, size: int
) -> int:
    """Attended pairs of axis `number` with a window of `size`."""
    axis = rule_of(window_size=size).axes[number]
    return axis_attended_pairs(axis, layout[number])
