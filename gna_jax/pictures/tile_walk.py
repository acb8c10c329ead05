"""The KV tiles that one Q tile visits, on the layout: `tile_map`."""

import itertools

import numpy as np

from gna_jax.neighborhood import Flags, Sizes, by, per_axis
from gna_jax.pictures import palette
from gna_jax.pictures.grid import GridPicture
from gna_jax.pictures.palette import Kind, Mark
from gna_jax.pictures.panels import Outline, Panel, plane_title, planes, rows_of
from gna_jax.pictures.tokens import check_drawable, describe, read_rule
from gna_jax.tiling import AxisWalk, QueryTilePlan

KINDS = (
    Kind("not visited", palette.EMPTY, "· ", palette.FAINT_INK),
    Kind("no mask: all queries see the tile", palette.GREEN, "██", palette.GREEN),
    Kind("masked: not all queries see it", palette.ORANGE, "▒▒", palette.ORANGE),
    Kind("wasted: read, seen by no query", palette.tint(palette.RED, 0.3), "░░", palette.RED),
    Kind("padding past the last token", palette.GREY, "xx", palette.FAINT_INK),
    Kind("", palette.PAPER, "  "),
)
UNVISITED, FULL, SHELL, WASTED, PADDING, OUTSIDE = range(len(KINDS))
VISITED = (FULL, SHELL, WASTED, PADDING)
MARKS = (
    Mark("the Q tile", palette.INK, "o", diameter=0.34),
    Mark("the Q tile, on keys without mask", palette.INK, "O", diameter=0.34),
)


def tile_map(
    layout: Sizes,
    *,
    window_size: Sizes,
    stride: Sizes = 1,
    dilation: Sizes = 1,
    is_causal: Flags = False,
    q_tile: Sizes,
    kv_tile: Sizes,
    q_start: Sizes | None = None,
    group: Sizes = 0,
) -> GridPicture:
    """The KV tiles that one Q tile visits: static ones (at multiples of `kv_tile`), and dynamic ones.

    Cells are tokens of one dilation group. A tile is drawn as the kernel treats it: without a mask, or masked, and
    then without the keys outside the window box, which are read for nothing.

    Args:
      layout: tokens per axis.
      window_size: as `gna`, like `stride`, `dilation` and `is_causal`.
      q_tile: queries per tile.
      kv_tile: keys per tile.
      q_start: first query of the Q tile, in tokens of the dilation group; None for a tile in the middle.
      group: the dilation group, by its residues.

    Raises:
      TypeError: for a traced or non-integer value.
      ValueError: for a rule that does not fit the layout, a tile outside it, or a layout too large to draw.
    """
    sizes, rule = read_rule(layout, window_size, stride, dilation, is_causal)
    shapes = {
        name: per_axis(name, value, rule.rank)
        for name, value in (("q_tile", q_tile), ("kv_tile", kv_tile), ("group", group))
    }
    first = QueryTilePlan(rule, sizes, q_start=(0,) * rule.rank, dynamic=False, **shapes)
    check_drawable(first.group_layout)
    if q_start is None:
        axes = zip(first.group_layout, first.q_tile, strict=True)
        q_start = tuple(length // 2 // tile * tile for length, tile in axes)
    starts = per_axis("q_start", q_start, rule.rank)
    plans = [
        QueryTilePlan(rule, sizes, q_start=starts, dynamic=dynamic, **shapes)
        for dynamic in (False, True)
    ]
    rows = [_panels(plan) for plan in plans]
    if rule.rank == 2:
        rows = [list(itertools.chain.from_iterable(rows))]
    laid_out = itertools.chain.from_iterable(map(rows_of, rows))
    title = f"{describe(rule, sizes)}: what a Q tile of {by(first.q_tile)} reads, in KV tiles of {by(first.kv_tile)}"
    return GridPicture(title, tuple(laid_out), KINDS, MARKS)


def _panels(plan: QueryTilePlan) -> list[Panel]:
    cells, marks = _cells(plan)
    read = np.count_nonzero(np.isin(cells, VISITED))
    idle = np.count_nonzero((cells == WASTED) | (cells == PADDING)) / read
    walk = "dynamic" if plan.dynamic else "static"
    heading = f"{walk}: {plan.num_visits} tiles, {plan.num_full} without mask, {idle:.0%} wasted"
    panels = []
    for numbers, plane, plane_marks in planes(cells, marks, blank=(UNVISITED, OUTSIDE)):
        title = plane_title(numbers) if panels else f"{heading}\n{plane_title(numbers)}".rstrip()
        outlines = _tile_frames(plan) if np.isin(plane, VISITED).any() else []
        panels.append(Panel(title, plane, plane_marks, outlines=tuple(outlines), numbered=True))
    return panels


def _cells(plan: QueryTilePlan) -> tuple[np.ndarray, np.ndarray]:
    """Kinds and marks `[*layout of the group, and the tiles that stick out]`."""
    ends = [walk.start + walk.num_visits * walk.tile for walk in plan.walks]
    shape = tuple(map(max, plan.group_layout, ends))
    check_drawable(shape)  # tiles may be far larger than the layout
    cells = np.full(shape, OUTSIDE)
    cells[tuple(slice(length) for length in plan.group_layout)] = UNVISITED
    for start, is_full in plan.visits():
        box = tuple(slice(i, i + tile) for i, tile in zip(start, plan.kv_tile, strict=True))
        cells[box] = FULL if is_full else SHELL
    needed = np.zeros(shape, bool)
    needed[tuple(slice(*interval) for interval in plan.outer_box)] = True
    tokens = np.zeros(shape, bool)
    tokens[tuple(slice(length) for length in plan.group_layout)] = True
    cells[(cells == SHELL) & ~needed] = WASTED
    cells[np.isin(cells, VISITED) & ~tokens] = PADDING
    marks = np.zeros(shape, int)
    tile = tuple(slice(i, i + size) for i, size in zip(plan.q_start, plan.q_tile, strict=True))
    marks[tile] = 1 + (cells[tile] == FULL)
    return cells, marks * tokens


def _tile_frames(plan: QueryTilePlan) -> list[Outline]:
    """A frame around every visited tile of a plane."""
    *_, columns = plan.walks
    rows = plan.walks[-2] if len(plan.walks) > 1 else None
    tops = [(0, 1)] if rows is None else _tile_ends(rows)
    return [
        Outline(top, bottom, left, right, colour=palette.INK, linewidth=0.8)
        for top, bottom in tops
        for left, right in _tile_ends(columns)
    ]


def _tile_ends(walk: AxisWalk) -> list[tuple[int, int]]:
    starts = (walk.start + n * walk.tile for n in range(walk.num_visits))
    return [(start, start + walk.tile) for start in starts]
