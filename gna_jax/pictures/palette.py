"""The colours of all pictures, and what a cell or a mark of a picture means.

Colours are those of Okabe and Ito, told apart by colour-blind people too, and differ in lightness. Every one comes
with a character, so that a terminal without colours shows the same.
"""

import dataclasses

PAPER = "#ffffff"
INK = "#222222"
FAINT_INK = "#6b6b6b"
EMPTY = "#f1f1ee"
"""Tokens that a picture says nothing about."""
BLUE = "#0072b2"
ORANGE = "#e69f00"
GREEN = "#009e73"
RED = "#d55e00"
GREY = "#b5b5b5"
PURPLE = "#9d5a86"
RAMP = ("#eaf2f8", "#a9cfe8", "#4a98cc", "#0a4a7a")
"""From little to much: lighter to darker."""


def tint(colour: str, share: float) -> str:
    """`share` of a colour `"#rrggbb"` on white paper."""
    parts = (int(colour[n : n + 2], 16) for n in (1, 3, 5))
    return "#" + "".join(f"{round(255 - (255 - part) * share):02x}" for part in parts)


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a cell shows.

    Args:
      label: its words in the legend; empty for cells that need none.
      colour: its fill in a figure, `"#rrggbb"`.
      text: two characters that show it in a terminal; the first alone where cells are one character wide. The first
        differs from that of every other kind and mark of a picture.
      ink: its colour in a terminal, whose paper may be dark; `colour` where empty.
    """

    label: str
    colour: str
    text: str
    ink: str = ""

    @property
    def style(self) -> str:
        """Its style in a terminal."""
        return self.ink or self.colour


@dataclasses.dataclass(frozen=True)
class Mark:
    """A sign on top of a cell: a disc in a figure, the second character of the cell in a terminal.

    Args:
      label: its words in the legend.
      colour: of the disc.
      character: in a terminal.
      is_ring: whether the disc is hollow.
      diameter: of the disc, in cells.
    """

    label: str
    colour: str
    character: str
    is_ring: bool = False
    diameter: float = 0.62
