"""What one shard of a layout needs from the others: `shards`."""

from collections.abc import Sequence

import numpy as np

from gna_jax.halo import AxisHalo, halos
from gna_jax.neighborhood import Flags, Sizes, by, per_axis
from gna_jax.pictures import palette
from gna_jax.pictures.grid import GridPicture
from gna_jax.pictures.palette import Kind
from gna_jax.pictures.panels import Outline, Panel, plane_title, planes, rows_of
from gna_jax.pictures.tokens import check_drawable, check_position, describe, product, read_rule

KINDS = (
    Kind("other shards", palette.EMPTY, "· ", palette.FAINT_INK),
    Kind("halo: keys that arrive", palette.tint(palette.ORANGE, 0.75), "▒▒", palette.ORANGE),
    Kind("border queries: wait for them", palette.tint(palette.BLUE, 0.35), "░░", palette.BLUE),
    Kind(
        "interior queries: need no other shard", palette.tint(palette.BLUE, 0.9), "██", palette.BLUE
    ),
)
HALO, BORDER, INTERIOR = 1, 2, 3


def shards(
    layout: Sizes,
    *,
    window_size: Sizes,
    stride: Sizes = 1,
    dilation: Sizes = 1,
    is_causal: Flags = False,
    cuts: Sequence[Sizes],
    shard: Sizes | None = None,
) -> GridPicture:
    """One shard with the keys that its queries see in other shards: a panel, or row of planes, for every way to cut.

    Args:
      layout: tokens per axis, one to three.
      window_size: as `gna`, like `stride`, `dilation` and `is_causal`.
      cuts: for every panel, shards per axis, all of equal size.
      shard: its number on every axis; None for the middle one of each cut.

    Raises:
      TypeError: for a traced or non-integer value.
      ValueError: for a rule that does not fit the layout, shards that are not equal, a shard that is not there, no cut at
        all, or a layout too large to draw.
    """
    sizes, rule = read_rule(layout, window_size, stride, dilation, is_causal)
    check_drawable(sizes)
    if not cuts:
        raise ValueError("cuts must hold at least one number of shards per axis; got none")
    panels = []
    for cut in cuts:
        numbers = per_axis("cuts", cut, rule.rank)
        axes = halos(rule, sizes, numbers)
        middle = tuple(count // 2 for count in numbers)
        place = check_position("shard", middle if shard is None else shard, numbers)
        panels += _panels(axes, place, numbers)
    return GridPicture(describe(rule, sizes), rows_of(panels), KINDS, ())


def _panels(
    axes: Sequence[AxisHalo], place: tuple[int, ...], numbers: tuple[int, ...]
) -> list[Panel]:
    boxes = [_boxes(axis, number) for axis, number in zip(axes, place, strict=True)]
    needed, own, interior = (product(masks) for masks in zip(*boxes, strict=True))
    cells = needed * HALO
    cells[own] = BORDER
    cells[interior] = INTERIOR
    words = f"{by(numbers)} shards: {np.count_nonzero(needed & ~own)} keys for {np.count_nonzero(own)} queries"
    panels = []
    for plane, shown, marks in planes(cells, np.zeros_like(cells)):
        title = "\n".join(filter(None, (words, plane_title(plane))))
        panels.append(Panel(title, shown, marks, outlines=_outlines(axes), numbered=True))
    return panels


def _boxes(axis: AxisHalo, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`[length]` bool: the rows that a shard needs, its own, and its interior ones."""
    position = np.arange(axis.length)
    start = number * axis.rows
    first, end = axis.needed(number)
    inside = start + axis.interior[0], start + axis.interior[1]
    return (
        (first <= position) & (position < end),
        (start <= position) & (position < start + axis.rows),
        (inside[0] <= position) & (position < inside[1]),
    )


def _outlines(axes: Sequence[AxisHalo]) -> tuple[Outline, ...]:
    """The shards of the last two axes."""
    *_, (height, rows), (width, columns) = [(1, 1), *((axis.length, axis.rows) for axis in axes)]
    return tuple(
        Outline(top, top + rows, left, left + columns, colour=palette.FAINT_INK, linewidth=1.0)
        for top in range(0, height, rows)
        for left in range(0, width, columns)
    )
