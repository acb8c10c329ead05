"""The problems that `benchmarks/cpu.py` times: names, layouts, windows, heads. Nothing is run here."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Case:
    """One self-attention problem with batch 1; every window is undilated, stride 1, not causal.

    Attributes:
      name: what `--cases` takes.
      layout: tokens per axis.
      window: `window_size` per axis.
      heads, dim: query (and key/value) heads, and the size of each.
    """

    name: str
    layout: tuple[int, ...]
    window: tuple[int, ...]
    heads: int
    dim: int

    @property
    def tokens(self) -> int:
        """Tokens of the layout."""
        return math.prod(self.layout)

    @property
    def title(self) -> str:
        """As it stands in the tables: `2-D 56x56 w7x7 8x32`."""
        sizes = (
            "x".join(str(n) for n in sizes)
            for sizes in (self.layout, self.window, (self.heads, self.dim))
        )
        return "{}-D {} w{} {}".format(len(self.layout), *sizes)


CASES = {
    case.name: case
    for case in (
        Case("2d-56", layout=(56, 56), window=(7, 7), heads=8, dim=32),  # NAT's first stage
        Case("2d-128", layout=(128, 128), window=(13, 13), heads=2, dim=64),
        Case("3d-video", layout=(16, 32, 32), window=(8, 16, 16), heads=2, dim=64),
        Case("1d-16384", layout=(16384,), window=(512,), heads=2, dim=64),
    )
}
"""Every case by its name, smallest first."""
