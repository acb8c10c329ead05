"""The page docs/tile-tables.md: best tiles of every preset's sliding windows, and NATTEN's beside them.

`python -m gna_jax.simulator.tables > docs/tile-tables.md` makes it anew; a test compares the two.
"""

import dataclasses
import functools

from gna_jax.neighborhood import WHOLE_GROUP, Neighborhood, by
from gna_jax.simulator.presets import PRESETS
from gna_jax.simulator.published import natten_tiles
from gna_jax.simulator.simulation import Simulation
from gna_jax.simulator.tile_shapes import best_tiles
from gna_jax.tiling import Tiles

BUDGETS = ((256, 128), (128, 128), (128, 64), (64, 64))
"""Elements of Q and KV tiles that the page goes through."""
ARCHITECTURES = {"blackwell": "Blackwell (B200)", "hopper": "Hopper (H100, H200)"}

INTRODUCTION = """\
# Best tiles for sliding windows

Every window of the [presets](../gna_jax/simulator/presets.py) at stride 1, where shapes matter most, as hardly any makes a
sliding window block-sparse. *Total work* is the speedup over dense attention if time were the number of query-key pairs that the tiles
compute, padding and masked pairs included; *limit* is the same for a tile of one token. *Static* KV tiles start at multiples
of their size, *dynamic* ones where the window box of the Q tile starts. Shapes are written Q / KV.

A shape may be any powers of two with the given number of elements; those with the least total work are shown
(`gna_jax.simulator.best_tiles`). Time is another matter: masks, memory and launches are the cost model's.

Made by `python -m gna_jax.simulator.tables`.
"""


@dataclasses.dataclass(frozen=True)
class _Problem:
    """A sliding window and the presets that use it."""

    names: tuple[str, ...]
    layout: tuple[int, ...]
    head_dim: int
    neighborhood: Neighborhood

    def simulate(self, tiles: Tiles) -> Simulation:
        return Simulation.of(self.neighborhood, self.layout, tiles)

    def best(self, elements: tuple[int, int], dynamic: bool) -> Simulation:
        """With the best shapes of these elements."""
        return self.simulate(best_tiles(self.neighborhood, self.layout, *elements, dynamic))

    def natten(self, architecture: str) -> Simulation:
        """With the shapes of NATTEN's table that have the least total work."""
        tiles = natten_tiles(architecture, len(self.layout), head_dim=self.head_dim)
        return max(map(self.simulate, tiles), key=lambda one: one.total_work_speedup)

    @property
    def columns(self) -> tuple[str, ...]:
        """What every row opens with."""
        rule = self.neighborhood
        sizes = zip(rule.window_size, self.layout, strict=True)
        window = by(n if w == WHOLE_GROUP else w for w, n in sizes)
        if set(rule.dilation) != {1}:
            window += f", dilation {by(rule.dilation)}"
        limit = self.simulate(Tiles(q=(1,) * rule.rank, kv=(1,) * rule.rank)).flop_speedup
        return ", ".join(self.names), by(self.layout), window, f"{limit:.2f}"


OPENING = ("preset", "layout", "window", "limit")


def tile_tables() -> str:
    """The whole page, as Markdown."""
    parts = [INTRODUCTION]
    for architecture, title in ARCHITECTURES.items():
        parts.append(f"## Against NATTEN on {title}\n")
        parts.append(
            "The best pair that NATTEN 0.21.6 compiles, and the best of all shapes with as many elements.\n"
        )
        parts.append(_comparison(architecture))
    parts.append("## By elements of the tiles\n")
    for elements in BUDGETS:
        parts.append("### {} queries, {} keys\n".format(*elements))
        parts.append(_of_budget(elements))
    return "\n".join(parts)


def _comparison(architecture: str) -> str:
    header = (
        *OPENING,
        "NATTEN's best",
        "total work",
        "static",
        "total work",
        "dynamic",
        "total work",
    )
    rows = []
    for problem in _problems():
        theirs = problem.natten(architecture)
        elements = theirs.forward.tile_elements, theirs.forward.visited_elements
        ours = (problem.best(elements, dynamic) for dynamic in (False, True))
        cells = (cell for one in (theirs, *ours) for cell in _tiles_and_work(one))
        rows.append((*problem.columns, *cells))
    return _markdown(header, rows)


def _of_budget(elements: tuple[int, int]) -> str:
    each = ("total work", "worst tile", "masked", "padding")
    rows = []
    for problem in _problems():
        cells: list[str] = []
        for dynamic in (False, True):
            best = problem.best(elements, dynamic)
            cells += _tiles_and_work(best)
            cells += [f"{best.worst_tile_speedup:.2f}"]
            cells += [f"{share:.0%}" for share in (best.masked_tile_share, best.padded_share)]
        rows.append((*problem.columns, *cells))
    text = "*Masked* is the share of visited KV tiles that need a mask, *padding* that of computed pairs.\n\n"
    return text + _markdown((*OPENING, "static", *each, "dynamic", *each), rows)


@functools.cache
def _problems() -> tuple[_Problem, ...]:
    """Every distinct sliding window of the presets, in their order."""
    names: dict[tuple[tuple[int, ...], int, Neighborhood], list[str]] = {}
    for preset in PRESETS.values():
        for rule in preset.stride_1_rules:
            names.setdefault((preset.layout, preset.head_dim, rule), []).append(preset.name)
    return tuple(_Problem(tuple(users), *problem) for problem, users in names.items())


def _tiles_and_work(simulation: Simulation) -> tuple[str, str]:
    tiles = simulation.tiles
    return f"{by(tiles.q)} / {by(tiles.kv or ())}", f"{simulation.total_work_speedup:.2f}"


def _markdown(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    print(tile_tables(), end="")
