"""`Picture`: what all pictures can do. Figures need matplotlib (the extra [draw]); terminals do not.

matplotlib is imported when a figure is asked for, without pyplot and with its global settings left as they were.
"""

import abc
import contextlib
import io
import os
import pathlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions
from rich.text import Text

from gna_jax.pictures import palette

if TYPE_CHECKING:
    import matplotlib.figure

WIDTH = 9.0
"""Inches of a figure over the whole width of a page."""
DPI = 200
TERMINAL_WIDTH = 100
"""Characters per line where nothing else is said."""
WIDEST = 1200
"""Characters per line into which every picture fits."""
LONGEST_DESCRIPTION = 100_000
"""Characters that a picture's file may hold beside the picture: readers of PNG refuse a megabyte of text."""

METADATA = {".png": {"Software": None}, ".svg": {"Date": None, "Creator": None}}
"""Per file type, what matplotlib would add to a file and must not: files are the same whenever they are made."""

STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib
    "font.size": 10.0,
    "text.color": palette.INK,
    "axes.labelcolor": palette.INK,
    "axes.titlesize": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": palette.FAINT_INK,
    "xtick.color": palette.FAINT_INK,
    "ytick.color": palette.FAINT_INK,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "svg.hashsalt": "gna-jax",
}


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """matplotlib with the style of these pictures, whatever the user's settings; they are back afterwards.

    Raises:
      RuntimeError: without matplotlib.
    """
    try:
        import matplotlib.style
    except ModuleNotFoundError as error:
        raise RuntimeError(
            "a figure needs matplotlib, which is not installed: pip install gna-jax[draw]"
            " (rich.print(picture) shows it in a terminal without)"
        ) from error
    with matplotlib.style.context(["default", STYLE]):
        yield


def save(
    figure: "matplotlib.figure.Figure", path: str | os.PathLike[str], description: str = ""
) -> None:
    """Write a figure to a file, the same bytes every time; the name's ending, .png or .svg, decides the type.

    Args:
      figure: what to draw.
      path: the file.
      description: the picture in words or characters, for those who cannot see it; kept in the file.

    Raises:
      ValueError: for another ending.
      RuntimeError: without matplotlib.
    """
    path = pathlib.Path(path)
    suffix = path.suffix.lower()
    if suffix not in METADATA:
        raise ValueError(
            f"a picture's file must end in {' or '.join(METADATA)}; got path={str(path)!r}"
        )
    metadata = METADATA[suffix] | ({"Description": description} if suffix == ".svg" else {})
    options = {"format": suffix[1:], "metadata": metadata, "dpi": DPI}
    with drawing():
        rendered = io.BytesIO()
        figure.savefig(rendered, **options, bbox_inches="tight", pad_inches=0.08)
    is_svg = suffix == ".svg"
    path.write_bytes(rendered.getvalue() if is_svg else _smaller_png(rendered, description))


def _smaller_png(rendered: io.BytesIO, description: str) -> bytes:
    """A PNG of 256 colours instead of 32 bits per pixel: a third of the size, and no eye sees it."""
    from PIL import Image, PngImagePlugin  # come with matplotlib

    notes = PngImagePlugin.PngInfo()
    notes.add_itxt("Description", description, zip=True)
    smaller = io.BytesIO()
    image = Image.open(rendered).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    image.save(smaller, "PNG", optimize=True, pnginfo=notes)
    return smaller.getvalue()


class Picture(abc.ABC):
    """Something to look at: a matplotlib figure, and the same in the characters of a terminal (`rich.print(picture)`)."""

    @abc.abstractmethod
    def figure(self) -> "matplotlib.figure.Figure":
        """The picture as a new matplotlib figure, bound to no window and unknown to pyplot.

        Raises:
          RuntimeError: without matplotlib.
        """

    @abc.abstractmethod
    def text(self, width: int = TERMINAL_WIDTH) -> Text:
        """The picture in lines of at most `width` characters, readable without colours too.

        Raises:
          ValueError: if it does not fit.
        """

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the figure to a .png or .svg file, as `save`; its description is the picture in characters."""
        description = self.text(WIDEST).plain
        if len(description) > LONGEST_DESCRIPTION:
            description, *_ = description.split("\n")
        save(self.figure(), path, description)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        yield self.text(options.max_width)
