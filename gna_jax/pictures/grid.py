"""Pictures of tokens: every cell is of a kind, and may have a mark. One content, drawn and written.

Which cell is of which kind is said by the modules that make the pictures.
"""

import dataclasses
import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.text import Text

from gna_jax.pictures import palette
from gna_jax.pictures.palette import Kind, Mark
from gna_jax.pictures.panels import (
    Panel,
    block_width,
    cell_width,
    has_room_beside,
    heading,
    show_cells,
    subplots,
    write_legend,
    write_row,
)
from gna_jax.pictures.picture import TERMINAL_WIDTH, Picture, drawing

if TYPE_CHECKING:
    import matplotlib.figure

FINEST_GRID = 64
"""Cells per side up to which lines between them and signs in them can be seen."""


@dataclasses.dataclass(frozen=True)
class GridPicture(Picture):
    """Rows of panels with one legend.

    Args:
      title: of the whole picture, one line.
      rows: the panels.
      kinds: what the numbers of `Panel.cells` mean.
      marks: what the numbers of `Panel.marks` mean, counted from 1.
    """

    title: str
    rows: tuple[tuple[Panel, ...], ...]
    kinds: tuple[Kind, ...]
    marks: tuple[Mark, ...]

    @property
    def panels(self) -> tuple[Panel, ...]:
        """All panels, row by row."""
        return tuple(itertools.chain.from_iterable(self.rows))

    def legend(self) -> list[Kind | Mark]:
        """What occurs in the picture and has a label."""
        kinds = set().union(*(np.unique(panel.cells).tolist() for panel in self.panels))
        marks = set().union(*(np.unique(panel.marks).tolist() for panel in self.panels))
        entries: list[Kind | Mark] = [self.marks[n - 1] for n in sorted(marks) if n]
        entries += [self.kinds[n] for n in sorted(kinds)]
        return [entry for entry in entries if entry.label]

    def figure(self) -> "matplotlib.figure.Figure":
        """As `Picture.figure`. Each axes holds one image: the panel's `cells`."""
        with drawing():
            figure, places = subplots(self.title, self.rows)
            for panel, ax in places:
                self._draw_cells(panel, ax)
                self._draw_marks(panel, ax)
            self._draw_legend(figure)
            return figure

    def _draw_cells(self, panel: Panel, ax: Any) -> None:
        from matplotlib.colors import ListedColormap
        from matplotlib.patches import Rectangle

        colours = ListedColormap([kind.colour for kind in self.kinds])
        show_cells(ax, panel, cmap=colours, vmin=-0.5, vmax=len(self.kinds) - 0.5)
        rows, columns = panel.cells.shape
        if max(rows, columns) <= FINEST_GRID:
            lines = {"color": palette.PAPER, "linewidth": min(0.6, 14 / max(rows, columns))}
            ax.hlines(range(rows + 1), 0, columns, **lines)
            ax.vlines(range(columns + 1), 0, rows, **lines)
        for box in panel.outlines:
            frame = Rectangle(
                (box.left + box.inset, box.top + box.inset),
                box.right - box.left - 2 * box.inset,
                box.bottom - box.top - 2 * box.inset,
                fill=False,
                edgecolor=box.colour,
                linewidth=box.linewidth,
                joinstyle="miter",
                zorder=2.5,
            )
            ax.add_patch(frame)

    def _draw_marks(self, panel: Panel, ax: Any) -> None:
        from matplotlib.collections import EllipseCollection

        columns = panel.cells.shape[1]
        is_fine = max(panel.cells.shape) > FINEST_GRID
        for number, mark in enumerate(self.marks, start=1):
            places = np.argwhere(panel.marks == number)[:, ::-1] + 0.5
            # On a large layout a single token would be lost, and many rings would be a blur.
            smallest = columns / (60 if len(places) <= 4 else 250)
            if is_fine and mark.is_ring:
                smallest = max(smallest, 1.0)
            is_ring = mark.is_ring and not is_fine
            colour = palette.tint(mark.colour, 0.5) if mark.is_ring and is_fine else mark.colour
            diameters = np.full(len(places), max(mark.diameter, smallest))
            discs = EllipseCollection(
                diameters,
                diameters,
                np.zeros(len(places)),
                units="x",
                offsets=places,
                offset_transform=ax.transData,
                facecolor="none" if is_ring else colour,
                edgecolor=colour,
                linewidth=min(1.2, 64 / columns) if is_ring else 0.0,
                zorder=3 + number / 10,
            )
            ax.add_collection(discs, autolim=False)

    def _draw_legend(self, figure: Any) -> None:
        from matplotlib.lines import Line2D
        from matplotlib.patches import Patch

        # Marks that differ in their character alone look the same here: the first of them stands for all.
        looks = {(mark.colour, mark.is_ring): mark for mark in reversed(self.marks)}
        entries = dict.fromkeys(
            looks[entry.colour, entry.is_ring] if isinstance(entry, Mark) else entry
            for entry in self.legend()
        )
        handles = [
            Patch(facecolor=entry.colour, edgecolor="0.8", linewidth=0.5, label=entry.label)
            if isinstance(entry, Kind)
            else Line2D(
                [],
                [],
                linestyle="none",
                marker="o",
                markersize=11 * entry.diameter,
                color=entry.colour,
                markerfacecolor="none" if entry.is_ring else entry.colour,
                label=entry.label,
            )
            for entry in entries
        ]
        beside = has_room_beside(self.rows)
        # matplotlib fills columns first: as few columns as give as few lines as four would.
        columns = 1 if beside else -(-len(handles) // -(-len(handles) // 4))
        figure.legend(
            handles=handles,
            loc="outside center right" if beside else "outside lower center",
            ncols=columns,
            handlelength=1.2,
            columnspacing=1.6,
        )

    def text(self, width: int = TERMINAL_WIDTH) -> Text:
        """As `Picture.text`. A cell is two characters wide where that fits, of which the second shows its mark."""
        text = heading(self.title, width)
        for row in self.rows:
            characters = cell_width(row, width, choices=(2, 1))
            write_row(text, [self._block(panel, characters) for panel in row], width)
        entries = [
            Text.assemble((entry.text, entry.style), f" {entry.label}")
            if isinstance(entry, Kind)
            else Text.assemble((entry.character, f"bold {entry.colour}"), f" {entry.label}")
            for entry in self.legend()
        ]
        write_legend(text, entries, width)
        return text

    def _block(self, panel: Panel, characters: int) -> list[Text]:
        """The lines of one panel, all of one length."""
        lines = [Text(line, style="bold") for line in panel.title.splitlines()]
        for cells, marks in zip(panel.cells.tolist(), panel.marks.tolist(), strict=True):
            line = Text()
            for cell, mark in zip(cells, marks, strict=True):
                kind, sign = self.kinds[cell], self.marks[mark - 1] if mark else None
                if characters == 2 or sign is None:
                    line.append(kind.text[:1], kind.style)
                if sign is not None:
                    line.append(sign.character, f"bold {sign.colour}")
                elif characters == 2:
                    line.append(kind.text[1:], kind.style)
            lines.append(line)
        for line in lines:
            line.pad_right(block_width(panel, characters) - len(line))
        return lines
