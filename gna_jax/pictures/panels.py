"""Panels: grids of cells side by side, in a figure and in a terminal. What a cell looks like is said elsewhere.

Layouts of three axes become panels plane by plane (`planes`).
"""

import dataclasses
import itertools
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from rich.text import Text

from gna_jax.pictures import palette
from gna_jax.pictures.picture import DPI, WIDTH

MAX_PANELS = 24
"""Panels that one picture can hold and a person compare."""
FEW_PLANES = 8
"""Planes of a layout that are all drawn, so that a box is seen plane by plane."""
GAP = "   "
"""Between panels in a terminal."""


@dataclasses.dataclass(frozen=True)
class Outline:
    """A frame around the cells `[top, bottom) x [left, right)`, drawn `inset` cells inside their edge."""

    top: int
    bottom: int
    left: int
    right: int
    _: dataclasses.KW_ONLY
    colour: str
    inset: float = 0.0
    linewidth: float = 1.6


@dataclasses.dataclass(frozen=True)
class Panel:
    """A grid of cells.

    Args:
      title: lines above it.
      cells: `[rows, columns]` int: what each cell is; the picture says what the numbers mean.
      marks: `[rows, columns]` int: 0, or the number of the cell's mark.
      outlines: frames, in figures only.
      labels: names of the rows' axis and of the columns' axis, in figures only.
      cell: tokens per cell along the rows' axis and the columns' axis.
      numbered: whether figures count the tokens along the edges.
    """

    title: str
    cells: np.ndarray
    marks: np.ndarray
    _: dataclasses.KW_ONLY
    outlines: tuple[Outline, ...] = ()
    labels: tuple[str, str] = ("", "")
    cell: tuple[int, int] = (1, 1)
    numbered: bool = False

    @property
    def sides(self) -> tuple[int, int]:
        """Tokens along the rows' axis and the columns' axis; the last cells may reach past the layout's end."""
        rows, columns = self.cells.shape
        return rows * self.cell[0], columns * self.cell[1]


def planes(
    cells: np.ndarray,
    marks: np.ndarray,
    few: int = FEW_PLANES,
    blank: Sequence[int] = (0,),
) -> Iterator[tuple[tuple[int, ...], np.ndarray, np.ndarray]]:
    """A layout's cells and marks as planes: (numbers of the planes that look so, cells, marks), in order.

    One and two axes make one plane, without a number. Of more than `few` planes, equal ones come once, and those whose
    cells are all `blank` not at all.
    """
    if cells.ndim < 3:
        yield (), np.atleast_2d(cells), np.atleast_2d(marks)
        return
    all_apart = len(cells) <= few
    numbers: dict[bytes | int, list[int]] = {}
    for number, (plane, signs) in enumerate(zip(cells, marks, strict=True)):
        if all_apart or signs.any() or not np.isin(plane, blank).all():
            looks = number if all_apart else plane.tobytes() + signs.tobytes()
            numbers.setdefault(looks, []).append(number)
    for equal in numbers.values():
        yield tuple(equal), cells[equal[0]], marks[equal[0]]


def plane_title(numbers: Sequence[int]) -> str:
    """`"plane 3"`, `"planes 0–2, 7"`; nothing without numbers."""
    if not numbers:
        return ""
    runs = itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])
    ends = [[number for _, number in run] for _, run in runs]
    words = [f"{run[0]}" if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in ends]
    if len(words) > 4:
        words = [*words[:2], "…", words[-1]]
    return f"plane{'s' if len(numbers) > 1 else ''} {', '.join(words)}"


def rows_of(panels: Sequence[Panel], most: int = 4) -> tuple[tuple[Panel, ...], ...]:
    """Panels in rows of at most `most`, as even as can be.

    Raises:
      ValueError: for more panels than a person can compare.
    """
    if len(panels) > MAX_PANELS:
        raise ValueError(
            f"a picture holds at most {MAX_PANELS} panels; got {len(panels)} different planes;"
            " draw a layout with a shorter first axis, or without the first axis"
        )
    columns = -(-len(panels) // -(-len(panels) // most))
    return tuple(tuple(panels[n : n + columns]) for n in range(0, len(panels), columns))


def subplots(title: str, rows: Sequence[Sequence[Panel]]) -> tuple[Any, list[tuple[Panel, Any]]]:
    """A new figure of the panels' sizes, and the axes of every panel with its titles, labels and numbers.

    A single square panel leaves room for a legend beside it, others below.
    """
    from matplotlib.figure import Figure

    columns = max(map(len, rows))
    beside = has_room_beside(rows)
    numbers = 0.3 if any(panel.numbered for row in rows for panel in row) else 0.06
    width = WIDTH / 2 if beside else (WIDTH - 0.4) / columns - numbers
    heights = [max(_height(panel, width) for panel in row) for row in rows]
    lines = sum(max(len(panel.title.splitlines()) for panel in row) for row in rows)
    title = textwrap.fill(title, 75 if beside else 100)
    lines += len(title.splitlines()) - 1
    height = sum(heights) + 0.18 * lines + numbers * len(rows) + (0.5 if beside else 0.9)
    figure = Figure(
        figsize=(0.75 * WIDTH if beside else WIDTH, height),
        dpi=DPI,
        facecolor=palette.PAPER,
        layout="compressed",
    )
    figure.suptitle(title, fontsize=11)
    grid = figure.subplots(len(rows), columns, squeeze=False, height_ratios=heights)
    places = []
    for row, axes in zip(rows, grid, strict=True):
        for panel, ax in itertools.zip_longest(row, axes):
            if panel is None:
                ax.remove()
            else:
                _label(ax, panel)
                places.append((panel, ax))
    return figure, places


def has_room_beside(rows: Sequence[Sequence[Panel]]) -> bool:
    """Whether the figure is one column of panels, so that the legend stands beside it."""
    strips = all(panel.cells.shape[0] == 1 for row in rows for panel in row)
    return max(map(len, rows)) == 1 and not strips


def show_cells(ax: Any, panel: Panel, **colours: Any) -> None:
    """Draw the cells as one image, to the scale of tokens; a strip of one row is stretched to its axes."""
    height, width = panel.sides
    ax.imshow(
        panel.cells,
        extent=(0, width, height, 0),
        interpolation="nearest",
        aspect="auto" if len(panel.cells) == 1 else "equal",
        **colours,
    )
    # The lines at the edges are drawn whole.
    margins = 0.003 * width, 0.003 * height
    ax.set(xlim=(-margins[0], width + margins[0]), ylim=(height + margins[1], -margins[1]))


def _height(panel: Panel, width: float) -> float:
    """Inches of a panel `width` inches wide; a strip of one row is as high as a person can see."""
    rows, columns = panel.sides
    return 0.45 if len(panel.cells) == 1 else min(width * rows / columns, 1.6 * width)


def _label(ax: Any, panel: Panel) -> None:
    ax.set_title(panel.title, loc="left")
    ax.set(ylabel=panel.labels[0], xlabel=panel.labels[1])
    sides = panel.sides if panel.numbered else (0, 0)
    for axis, length, cells in zip((ax.yaxis, ax.xaxis), sides, panel.cells.shape, strict=True):
        step = 1 << max(0, (length - 1) // 5).bit_length()
        tokens = range(0, length, step) if cells > 1 else ()
        axis.set_ticks([token + 0.5 for token in tokens], labels=map(str, tokens))
        axis.set_tick_params(length=0, pad=2)
    for spine in ax.spines.values():
        spine.set_visible(False)


def cell_width(row: Sequence[Panel], width: int, choices: tuple[int, int]) -> int:
    """Characters per cell of a row of panels: the wider or the narrower of two choices.

    The wider one if all panels fit beside each other; or if so they do with neither, but two of them do.

    Raises:
      ValueError: if a panel does not fit with the narrower one.
    """

    def needed(characters: int, panels: int) -> int:
        blocks = sorted((block_width(panel, characters) for panel in row), reverse=True)[:panels]
        return sum(blocks) + len(GAP) * (len(blocks) - 1)

    wide, narrow = choices
    if needed(narrow, 1) > width:
        raise ValueError(
            f"the picture needs lines of {needed(narrow, 1)} characters; got width={width};"
            " use a wider terminal, or save the picture to a file"
        )
    if needed(wide, len(row)) <= width:
        return wide
    return wide if needed(narrow, len(row)) > width and needed(wide, 2) <= width else narrow


def block_width(panel: Panel, characters: int) -> int:
    """Characters of a panel's lines, with `characters` per cell."""
    return max(characters * panel.cells.shape[1], *map(len, panel.title.splitlines()), 1)


def heading(title: str, width: int) -> Text:
    """The first lines of a terminal's picture: its title, and an empty line."""
    return Text(f"{textwrap.fill(title, width)}\n\n", no_wrap=True)


def write_row(text: Text, blocks: Sequence[Sequence[Text]], width: int) -> None:
    """Add blocks of lines beside each other, as many as fit, the next ones below; they stand on one line."""
    line: list[Sequence[Text]] = []
    for block in [*blocks, None]:
        used = sum(len(other[0]) + len(GAP) for other in line)
        if line and (block is None or used + len(block[0]) > width):
            highest = max(map(len, line))
            filled = [[Text(" " * len(b[0]))] * (highest - len(b)) + [*b] for b in line]
            for parts in zip(*filled, strict=True):
                text.append_text(Text(GAP).join(parts))
                text.append("\n")
            text.append("\n")
            line = []
        if block is not None:
            line.append(block)


def write_legend(text: Text, entries: Sequence[Text], width: int) -> None:
    """Add the entries of a legend, as many per line as fit."""
    used = 0
    for entry in entries:
        if used and used + len(GAP) + len(entry) > width:
            text.append("\n")
            used = 0
        text.append(GAP if used else "")
        text.append_text(entry)
        used += len(entry) + (len(GAP) if used else 0)
    text.append("\n")
