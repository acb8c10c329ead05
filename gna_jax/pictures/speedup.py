"""Speedup against stride: `speedup_curve`. It draws numbers; `simulated_speedups` gets them from the simulator."""

import dataclasses
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.text import Text

from gna_jax.neighborhood import Flags, Sizes, by
from gna_jax.pictures import palette
from gna_jax.pictures.panels import heading
from gna_jax.pictures.picture import DPI, TERMINAL_WIDTH, WIDTH, Picture, drawing
from gna_jax.pictures.tokens import read_rule
from gna_jax.simulator.simulation import simulate

if TYPE_CHECKING:
    import matplotlib.figure


@dataclasses.dataclass(frozen=True)
class SpeedupPoint:
    """Speedups over dense attention at one stride.

    Args:
      stride: one value per axis.
      flop: dense pairs over attended pairs: no tiles can do better.
      worst_tile: KV tiles of the layout over those of the busiest Q tile.
      total_work: dense pairs over the pairs of all visited tiles.
    """

    stride: tuple[int, ...]
    flop: float
    worst_tile: float
    total_work: float


LINES = (
    ("flop", "bound: attended pairs alone", palette.INK, "|"),
    ("total_work", "total work: all visited tiles", palette.BLUE, "▒"),
    ("worst_tile", "worst Q tile (the paper's figure)", palette.RED, "█"),
)
"""Field of a point, its words, its colour and its character."""


@dataclasses.dataclass(frozen=True)
class SpeedupCurve(Picture):
    """What `speedup_curve` returns: `points` in the order in which they are drawn."""

    title: str
    points: tuple[SpeedupPoint, ...]

    @property
    def highest(self) -> float:
        """The largest of all speedups."""
        return max(getattr(point, field) for point in self.points for field, *_ in LINES)

    def figure(self) -> "matplotlib.figure.Figure":
        """As `Picture.figure`."""
        with drawing():
            from matplotlib.figure import Figure

            size = (WIDTH, 4.0)
            figure = Figure(figsize=size, dpi=DPI, facecolor=palette.PAPER, layout="constrained")
            ax = figure.subplots()
            labels = [by(point.stride) for point in self.points]
            places = range(len(labels))
            for field, label, colour, _ in LINES:
                heights = [getattr(point, field) for point in self.points]
                # A line of one point has a length too: steps reach half a stride to both sides.
                line = ax.step(
                    [-0.5, *places, len(places) - 0.5],
                    [heights[0], *heights, heights[-1]],
                    where="mid",
                    color=colour,
                    linewidth=1.8,
                    label=label,
                )
                if field == "flop":
                    line[0].set(linestyle="--", linewidth=1.2)
            self._write_values(ax)
            ax.set(xlim=(-0.5, len(places) - 0.5), ylim=(0, 1.12 * self.highest))
            ax.set_xticks(places, labels=labels)
            if len(places) * max(map(len, labels)) > 90:  # they would run into each other
                ax.tick_params(axis="x", rotation=45)
            ax.set(xlabel="stride", ylabel="times faster than dense")
            ax.grid(axis="y", color="0.9", linewidth=0.6)
            ax.set_axisbelow(True)
            figure.suptitle(textwrap.fill(self.title, 100), fontsize=11)
            figure.legend(loc="outside lower center", ncols=len(LINES))
            return figure

    def _write_values(self, ax: Any) -> None:
        """The speedups in numbers: the higher of the two walks above its step, the lower below; the bound at the right."""
        behind = {"facecolor": palette.PAPER, "edgecolor": "none", "pad": 0.5}
        text = {"textcoords": "offset points", "ha": "center", "fontsize": 8.5, "bbox": behind}
        bound = self.points[-1].flop
        place = (len(self.points) - 0.5, bound)
        ax.annotate(f"{bound:.1f}", place, (14, -3), color=palette.INK, **text)
        if len(self.points) <= 16:
            for place, point in enumerate(self.points):
                lower, higher = sorted(
                    (getattr(point, field), colour) for field, _, colour, _ in LINES[1:]
                )
                for (height, colour), offset in ((lower, -11), (higher, 4)):
                    ax.annotate(f"{height:.1f}", (place, height), (0, offset), color=colour, **text)

    def text(self, width: int = TERMINAL_WIDTH) -> Text:
        """As `Picture.text`: two bars per stride, and the bound as the line that they run up to."""
        labels = [by(point.stride) for point in self.points]
        edge = max(map(len, labels)) + 2
        room = width - edge - len(f"| {self.highest:.2f}x")
        if room < 16:
            raise ValueError(
                f"the picture needs lines of {width - room + 16} characters; got width={width};"
                " use a wider terminal, or save the picture to a file"
            )
        text = heading(self.title, width)
        for label, point in zip(labels, self.points, strict=True):
            bound = round(point.flop / self.highest * room)
            for field, _, colour, character in LINES[1:]:
                speedup = getattr(point, field)
                filled = min(round(speedup / self.highest * room), room)
                bar = character * filled + " " * (bound - filled) + LINES[0][3]
                text.append(f"{label:<{edge}}")
                text.append(bar[: max(filled, bound + 1)], colour)
                text.append(f" {speedup:.2f}x\n")
                label = ""
        text.append("\n")
        signs = (Text.assemble((sign, colour), f" {label}") for _, label, colour, sign in LINES)
        text.append_text(Text("   ").join(signs))
        text.append("\n")
        return text


def speedup_curve(points: Sequence[SpeedupPoint], title: str = "") -> SpeedupCurve:
    """Speedup over dense attention against stride: the bound by the attended pairs, and what tiles leave of it.

    Args:
      points: one per stride, in the order of the picture; `simulated_speedups` makes them.
      title: over the picture; its caller knows the layout and the tiles.

    Raises:
      ValueError: for no point.
    """
    if not points:
        raise ValueError("points must hold at least one stride's speedups; got none")
    return SpeedupCurve(title, tuple(points))


def simulated_speedups(
    layout: Sizes,
    *,
    window_size: Sizes,
    strides: Sequence[Sizes],
    dilation: Sizes = 1,
    is_causal: Flags = False,
    q_tile: Sizes,
    kv_tile: Sizes,
    dynamic: bool = False,
) -> tuple[SpeedupPoint, ...]:
    """One point per stride, from `gna_jax.simulator.simulate`, whose arguments these are.

    Raises:
      TypeError: for a traced or non-integer value.
      ValueError: for a rule that does not fit the layout, or a tile size below 1.
    """
    points = []
    for stride in strides:
        sizes, rule = read_rule(layout, window_size, stride, dilation, is_causal)
        simulation = simulate(
            sizes,
            window_size=rule.window_size,
            stride=rule.stride,
            dilation=rule.dilation,
            is_causal=rule.is_causal,
            q_tile=q_tile,
            kv_tile=kv_tile,
            dynamic=dynamic,
        )
        points.append(
            SpeedupPoint(
                stride=rule.stride,
                flop=simulation.flop_speedup,
                worst_tile=simulation.worst_tile_speedup,
                total_work=simulation.total_work_speedup,
            )
        )
    return tuple(points)
