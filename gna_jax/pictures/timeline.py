"""Who works when: `timeline`, lanes of spans over time. What runs in which kernel is said in `kernel_timelines`."""

import dataclasses
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.text import Text

from gna_jax.pictures import palette
from gna_jax.pictures.panels import heading
from gna_jax.pictures.picture import DPI, TERMINAL_WIDTH, WIDTH, Picture, drawing

if TYPE_CHECKING:
    import matplotlib.figure

KINDS = {
    "product": palette.Kind("matrix product", palette.BLUE, "█ "),
    "softmax": palette.Kind("softmax, or its derivative", palette.ORANGE, "▒ "),
    "rescaling": palette.Kind("rescaling of the output", palette.PURPLE, "▓ "),
    "copy": palette.Kind("copy (TMA)", palette.GREEN, "░ "),
}
"""What a span shows."""


@dataclasses.dataclass(frozen=True)
class Span:
    """Something that lasts: `kind` of `KINDS`, from `start` for `length` clocks; `label` fits inside."""

    start: float
    length: float
    label: str
    kind: str


@dataclasses.dataclass(frozen=True)
class Lane:
    """Who works: a warpgroup, a unit."""

    name: str
    spans: tuple[Span, ...]


@dataclasses.dataclass(frozen=True)
class Timeline(Picture):
    """What `timeline` returns."""

    title: str
    lanes: tuple[Lane, ...]

    @property
    def end(self) -> float:
        """When the last span ends, in clocks."""
        return max(span.start + span.length for lane in self.lanes for span in lane.spans)

    @property
    def kinds(self) -> tuple[palette.Kind, ...]:
        """The kinds of `KINDS` that occur."""
        used = {span.kind for lane in self.lanes for span in lane.spans}
        return tuple(kind for name, kind in KINDS.items() if name in used)

    def figure(self) -> "matplotlib.figure.Figure":
        """As `Picture.figure`."""
        with drawing():
            from matplotlib.figure import Figure
            from matplotlib.patches import Patch

            size = (WIDTH, 1.5 + 0.5 * len(self.lanes))
            figure = Figure(figsize=size, dpi=DPI, facecolor=palette.PAPER, layout="constrained")
            ax = figure.subplots()
            for row, lane in enumerate(self.lanes):
                for span in lane.spans:
                    colour = palette.tint(KINDS[span.kind].colour, 0.55)
                    bar = {"height": 0.8, "color": colour, "edgecolor": palette.PAPER}
                    ax.barh(row, span.length, left=span.start, linewidth=1.2, **bar)
                    middle = span.start + span.length / 2
                    text = {"ha": "center", "va": "center", "color": palette.INK, "fontsize": 8}
                    ax.text(middle, row, span.label, **text)
            ax.set_yticks(range(len(self.lanes)), labels=[lane.name for lane in self.lanes])
            ax.set(xlim=(0, self.end), ylim=(len(self.lanes) - 0.5, -0.5), xlabel="clocks")
            ax.tick_params(axis="y", length=0, labelsize=9, labelcolor=palette.INK)
            ax.spines["left"].set_visible(False)
            handles = [Patch(color=palette.tint(k.colour, 0.55), label=k.label) for k in self.kinds]
            figure.suptitle(textwrap.fill(self.title, 110), fontsize=11)
            figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
            return figure

    def text(self, width: int = TERMINAL_WIDTH) -> Text:
        """As `Picture.text`: a line of characters per lane, and what its spans are below it."""
        edge = max(len(lane.name) for lane in self.lanes) + 2
        room = width - edge
        if room < 20:
            raise ValueError(
                f"the picture needs lines of {edge + 20} characters; got width={width};"
                " use a wider terminal, or save the picture to a file"
            )
        text = heading(self.title, width)
        for lane in self.lanes:
            text.append(f"{lane.name:<{edge}}")
            place = 0
            for span in lane.spans:
                first, last = (
                    round(t / self.end * room) for t in (span.start, span.start + span.length)
                )
                text.append(" " * (first - place))
                kind = KINDS[span.kind]
                label = span.label if len(span.label) + 2 < last - first else ""
                bar = label.center(last - first - 1, kind.text[0]) + " "
                text.append(bar, kind.style)
                place = last
            text.append("\n")
        text.append(f"{'':<{edge}}0{f'{self.end:.0f} clocks':>{room - 1}}\n\n")
        signs = (Text.assemble((k.text[0], k.style), f" {k.label}") for k in self.kinds)
        text.append_text(Text("   ").join(signs))
        text.append("\n")
        return text


def timeline(lanes: Sequence[Lane], title: str = "") -> Timeline:
    """Lanes of spans over time.

    Raises:
      ValueError: for spans of one lane that overlap, or a kind that is not in `KINDS`.
    """
    for lane in lanes:
        end = 0.0
        for span in lane.spans:
            if span.kind not in KINDS or span.start < end or span.length <= 0:
                raise ValueError(
                    f"spans of a lane come one after the other, each of a kind of {tuple(KINDS)};"
                    f" got {span} in lane {lane.name!r} after {end:g}"
                )
            end = span.start + span.length
    return Timeline(title, tuple(lanes))
