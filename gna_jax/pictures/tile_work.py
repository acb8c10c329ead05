"""How many KV tiles every Q tile visits, over the layout: `work_map`."""

import dataclasses
import functools
import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.text import Text

from gna_jax.neighborhood import Flags, Sizes, by, per_axis
from gna_jax.pictures import palette
from gna_jax.pictures.panels import (
    Panel,
    block_width,
    cell_width,
    has_room_beside,
    heading,
    plane_title,
    planes,
    rows_of,
    show_cells,
    subplots,
    write_legend,
    write_row,
)
from gna_jax.pictures.picture import TERMINAL_WIDTH, WIDTH, Picture, drawing
from gna_jax.pictures.tokens import check_drawable, describe, read_rule
from gna_jax.tiling import QueryTilePlan, key_walk

if TYPE_CHECKING:
    import matplotlib.figure

SHADES = "·░▒▓█"
"""From the fewest tiles to the most, where a terminal has no room for numbers."""
SMALLEST_FONT = 5.0
"""Points of a number that can still be read in a cell."""


@dataclasses.dataclass(frozen=True)
class WorkMap(Picture):
    """What `work_map` returns. `Panel.cells` are numbers of KV tiles, one per Q tile."""

    title: str
    rows: tuple[tuple[Panel, ...], ...]

    @property
    def panels(self) -> tuple[Panel, ...]:
        """All panels, row by row."""
        return tuple(itertools.chain.from_iterable(self.rows))

    @property
    def range(self) -> tuple[int, int]:
        """The fewest and the most KV tiles of a Q tile."""
        fewest = min(int(panel.cells.min()) for panel in self.panels)
        return fewest, max(int(panel.cells.max()) for panel in self.panels)

    def figure(self) -> "matplotlib.figure.Figure":
        """As `Picture.figure`. Each axes holds one image: the panel's `cells`."""
        with drawing():
            from matplotlib.colors import LinearSegmentedColormap, Normalize

            colours = LinearSegmentedColormap.from_list("work", palette.RAMP)
            fewest, most = self.range
            scale = Normalize(fewest, max(most, fewest + 1))
            figure, places = subplots(self.title, self.rows)
            for panel, ax in places:
                show_cells(ax, panel, cmap=colours, norm=scale)
            columns = max(panel.cells.shape[1] for panel in self.panels)
            width = 72 * WIDTH / (2 if has_room_beside(self.rows) else max(map(len, self.rows)))
            font = min(9.0, 0.8 * width / columns / len(str(most)))
            if font >= SMALLEST_FONT:
                for panel, ax in places:
                    _write_numbers(ax, panel, font, dark_from=(fewest + most) / 2)
            else:
                figure.colorbar(
                    places[0][1].images[0],
                    ax=[ax for _, ax in places],
                    location="right" if has_room_beside(self.rows) else "bottom",
                    label="KV tiles that a Q tile visits",
                    shrink=0.6,
                )
            return figure

    def text(self, width: int = TERMINAL_WIDTH) -> Text:
        """As `Picture.text`: a number per Q tile where that fits, else a shade."""
        text = heading(self.title, width)
        number = len(str(self.range[1])) + 1
        is_shaded = max(block_width(panel, number) for panel in self.panels) > width
        for row in self.rows:
            characters = cell_width(row, width, choices=(1, 1)) if is_shaded else number
            write_row(text, [self._block(panel, characters) for panel in row], width)
        if is_shaded:
            visits = np.unique(np.concatenate([panel.cells.ravel() for panel in self.panels]))
            entries = []
            for level, shade in enumerate(SHADES):
                of_shade = visits[self.levels(visits) == level]
                if of_shade.size:
                    ends = sorted({int(of_shade[0]), int(of_shade[-1])})
                    entries.append(Text(f"{shade} {'–'.join(map(str, ends))}"))
            write_legend(text, [*entries, Text("KV tiles that a Q tile visits")], width)
        else:
            text.append("numbers: KV tiles that a Q tile visits\n")
        return text

    def levels(self, visits: np.ndarray) -> np.ndarray:
        """Numbers of the shades: the first for the fewest KV tiles of the picture, the last for the most."""
        fewest, most = self.range
        return np.rint((visits - fewest) * (len(SHADES) - 1) / max(most - fewest, 1)).astype(int)

    def _block(self, panel: Panel, characters: int) -> list[Text]:
        """The lines of one panel, all of one length."""
        lines = [Text(line, style="bold") for line in panel.title.splitlines()]
        levels = self.levels(panel.cells).tolist()
        for row, row_levels in zip(panel.cells.tolist(), levels, strict=True):
            line = Text()
            for visits, level in zip(row, row_levels, strict=True):
                shown = SHADES[level] if characters == 1 else f"{visits:>{characters}}"
                line.append(shown, palette.RAMP[2])
            lines.append(line)
        for line in lines:
            line.pad_right(block_width(panel, characters) - len(line))
        return lines


def work_map(
    layout: Sizes,
    *,
    window_size: Sizes,
    stride: Sizes = 1,
    dilation: Sizes = 1,
    is_causal: Flags = False,
    q_tile: Sizes,
    kv_tile: Sizes,
    group: Sizes = 0,
) -> WorkMap:
    """The KV tiles that each Q tile visits, over the layout: of static KV tiles, and of dynamic ones.

    Cells are the Q tiles of one dilation group, three axes drawn plane by plane along the first. Uneven work is what
    makes the worst Q tile a poor guide to the sum.

    Args:
      layout: tokens per axis.
      window_size: as `gna`, like `stride`, `dilation` and `is_causal`.
      q_tile: queries per tile.
      kv_tile: keys per tile.
      group: the dilation group, by its residues.

    Raises:
      TypeError: for a traced or non-integer value.
      ValueError: for a rule that does not fit the layout, a tile size below 1, or too many Q tiles to draw.
    """
    sizes, rule = read_rule(layout, window_size, stride, dilation, is_causal)
    shapes = {
        name: per_axis(name, value, rule.rank)
        for name, value in (("q_tile", q_tile), ("kv_tile", kv_tile), ("group", group))
    }
    first = QueryTilePlan(rule, sizes, q_start=(0,) * rule.rank, dynamic=False, **shapes)
    axes = zip(first.group_layout, first.q_tile, strict=True)
    check_drawable([-(-length // tile) for length, tile in axes], what="Q tiles")
    rows = [_panels(first, dynamic) for dynamic in (False, True)]
    if rule.rank == 2:
        rows = [list(itertools.chain.from_iterable(rows))]
    laid_out = itertools.chain.from_iterable(map(rows_of, rows))
    title = (
        f"{describe(rule, sizes)}: KV tiles of {by(first.kv_tile)}"
        f" that each Q tile of {by(first.q_tile)} visits"
    )
    return WorkMap(title, tuple(laid_out))


def _panels(plan: QueryTilePlan, dynamic: bool) -> list[Panel]:
    """The panels of one way of walking, for all Q tiles of the plan's dilation group."""
    axes = zip(plan.neighborhood.axes, plan.group_layout, plan.q_tile, plan.kv_tile, strict=True)
    visits = functools.reduce(
        np.multiply.outer,
        [
            key_walk(
                axis, length, np.arange(0, length, q), q_tile=q, kv_tile=kv, dynamic=dynamic
            ).num_visits
            for axis, length, q, kv in axes
        ],
    )
    walk = "dynamic" if dynamic else "static"
    heading = f"{walk}: mean {visits.mean():.1f}, most {visits.max()} tiles"
    cell = plan.q_tile[-2] if visits.ndim > 1 else 1, plan.q_tile[-1]
    panels = []
    for numbers, plane, marks in planes(visits, np.zeros_like(visits), few=1):
        where = plane_title(numbers).replace("plane", "Q tile plane")
        title = where if panels else f"{heading}\n{where}".rstrip()
        panels.append(Panel(title, plane, marks, cell=cell, numbered=True))
    return panels


def _write_numbers(ax: Any, panel: Panel, font: float, dark_from: float) -> None:
    for (row, column), visits in np.ndenumerate(panel.cells):
        ax.text(
            (column + 0.5) * panel.cell[1],
            (row + 0.5) * panel.cell[0],
            str(visits),
            ha="center",
            va="center",
            fontsize=font,
            color=palette.PAPER if visits > dark_from else palette.INK,
        )
