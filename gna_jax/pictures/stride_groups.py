"""What stride does, to be understood without words: `strides`."""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from gna_jax.neighborhood import Flags, Neighborhood, Sizes
from gna_jax.pictures import palette
from gna_jax.pictures.grid import GridPicture
from gna_jax.pictures.mask import mask_panel
from gna_jax.pictures.palette import Kind, Mark
from gna_jax.pictures.panels import Outline, Panel
from gna_jax.pictures.tokens import (
    by,
    check_drawable,
    describe,
    leaders,
    read_rule,
    seen,
    stride_group,
)

KINDS = (
    Kind("", palette.EMPTY, "· ", palette.FAINT_INK),
    Kind("what they see", palette.tint(palette.BLUE, 0.36), "▒▒", palette.BLUE),
    Kind("what the next group sees", palette.tint(palette.ORANGE, 0.42), "░░", palette.ORANGE),
    Kind("what both see", palette.tint(palette.PURPLE, 0.42), "▓▓", palette.PURPLE),
)
MARKS = (
    Mark("queries of one stride group", palette.BLUE, "o"),
    Mark("queries of the next group", palette.RED, "x"),
)
MAX_MASK = 64
"""Tokens of an axis whose mask fits under a panel."""


def strides(
    layout: Sizes,
    *,
    window_size: Sizes,
    strides: Sequence[Sizes],
    dilation: Sizes = 1,
    is_causal: Flags = False,
) -> GridPicture:
    """The same layout and window at several strides, side by side.

    Above (two axes): two neighbouring stride groups in the middle of the last axis, and what each of them sees. Below:
    every query of the last axis in a row of its own, and the keys that it sees on that axis. Windows slide at stride 1,
    move in steps at larger strides, and tile the layout at stride = window.

    Args:
      layout: tokens per axis, one or two axes; at most 64 along the last.
      window_size: as `gna`, like `dilation` and `is_causal`.
      strides: what to compare: a stride per panel, each as `gna` takes it.

    Raises:
      TypeError: for a traced or non-integer value.
      ValueError: for a rule that does not fit the layout, no stride, more than two axes, or a layout too large to draw.
    """
    if not strides:
        raise ValueError(
            "strides must name at least one stride; got none; for example (1, 2, 4, 8)"
        )
    read = [read_rule(layout, window_size, one, dilation, is_causal) for one in strides]
    sizes, rules = read[0][0], [rule for _, rule in read]
    *_, length = sizes
    if len(sizes) > 2 or length > MAX_MASK:
        raise ValueError(
            f"strides are compared on one or two axes, of at most {MAX_MASK} tokens along the last; got layout"
            f" {sizes}; draw the axes that differ, or pictures.window"
        )
    check_drawable(sizes)
    ends = _group_ends([leaders(rule.axes[-1], length) for rule in rules], rules[0].dilation[-1])
    above, below = [], []
    for rule, end in zip(rules, ends, strict=True):
        title = _title(rule)
        if len(sizes) == 2:
            above.append(_two_groups(rule, sizes, end, title))
            title = ""
        panel = mask_panel(rule.axes[-1], length, first=end)
        below.append(dataclasses.replace(panel, title=title, labels=("", ""), numbered=False))
    labels = (
        ("two neighbouring groups", "all queries of a row,\none per line")
        if above
        else ("", "queries, one per line")
    )
    for row, label in zip((above, below), labels, strict=True):
        row[:1] = [dataclasses.replace(panel, labels=(label, "")) for panel in row[:1]]
    rows = tuple(tuple(row) for row in (above, below) if row)
    sliding = dataclasses.replace(rules[0], stride=(1,) * len(sizes))
    return GridPicture(describe(sliding, sizes), rows, KINDS, MARKS)


def _group_ends(leaders: Sequence[np.ndarray], dilation: int) -> list[int]:
    """Per stride, the last token of a stride group near the middle of the axis: the same for all where that exists."""
    middle = (len(leaders[0]) - 1) // 2
    ends = [np.flatnonzero(of[:-dilation] != of[dilation:]) for of in leaders]
    common = functools.reduce(np.intersect1d, ends)
    found = [common if common.size else own for own in ends]
    # An axis that is a single group has no end inside; any of its tokens will do.
    return [int(of[np.abs(of - middle).argmin()]) if of.size else middle for of in found]


def _two_groups(rule: Neighborhood, layout: Sequence[int], end: int, title: str) -> Panel:
    """The stride group that ends at column `end`, the next one along the row, and what each of them sees.

    A causal query sees less than its group: there the groups' last queries are shown.
    """
    row = (layout[0] - 1) // 2
    cells, marks, outlines = np.zeros(layout, int), np.zeros(layout, int), []
    for number, column in enumerate((end, end + rule.dilation[-1]), start=1):
        if column >= layout[1] or marks[row, column]:  # the axis is one group
            break
        group, _ = stride_group(rule, layout, (row, column))
        marks[group] = number
        keys = seen(rule, layout, np.argwhere(group)[-1].tolist())
        cells += number * keys
        outlines += _outline(keys, MARKS[number - 1].colour, inset=0.14 * number)
    return Panel(title, cells, marks, outlines=tuple(outlines))


def _outline(keys: np.ndarray, colour: str, inset: float) -> list[Outline]:
    """A frame around the keys, if they are a box (undilated)."""
    places = np.argwhere(keys)
    (top, left), (bottom, right) = places.min(axis=0).tolist(), places.max(axis=0).tolist()
    if not keys[top : bottom + 1, left : right + 1].all():
        return []
    box = Outline(top, bottom + 1, left, right + 1, colour=colour, inset=inset, linewidth=2.0)
    return [box]


def _title(rule: Neighborhood) -> str:
    """The stride, and what it makes of the windows."""
    stride = rule.stride[0] if len(set(rule.stride)) == 1 else by(rule.stride)
    if rule.stride == rule.window_size:
        return f"stride {stride} = window\nblocks"
    if max(rule.stride) == 1:
        return f"stride {stride}\na window per query"
    return f"stride {stride}\n{by(rule.stride)} queries share one"
