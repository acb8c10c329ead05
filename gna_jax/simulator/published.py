"""Tile shapes that others have published, as data to compare with. No choice of our own is taken from here.

NATTEN's tables are those of its release 0.21.6; all of them place tiles statically, on tokens permuted into tile order.
"""

import dataclasses

from gna_jax.tiling import Tiles


@dataclasses.dataclass(frozen=True)
class TileTable:
    """Tile shapes that one pass of a released kernel is compiled for.

    Attributes:
      architecture: `"blackwell"` (B200) or `"hopper"` (H100, H200).
      backward: whether it is the backward pass.
      head_dims: head dims the shapes hold for; empty for all.
      tiles: shapes of all ranks; the first of a rank is its default.
      source: file of the NATTEN repository.
    """

    architecture: str
    backward: bool
    head_dims: tuple[int, ...]
    tiles: tuple[Tiles, ...]
    source: str


def _tiles(*pairs: tuple[tuple[int, ...], tuple[int, ...]]) -> tuple[Tiles, ...]:
    return tuple(Tiles(q=q, kv=kv, dynamic=False) for q, kv in pairs)


_BLACKWELL = "NATTEN 0.21.6, src/natten/backends/configs/cutlass_blackwell/__init__.py"
_HOPPER = "NATTEN 0.21.6, src/natten/backends/configs/cutlass_hopper/__init__.py"

NATTEN_TILES = (
    TileTable(
        "blackwell",
        backward=False,
        head_dims=(),
        tiles=_tiles(
            ((256,), (128,)),
            ((16, 16), (16, 8)),
            ((16, 16), (8, 16)),
            ((8, 32), (8, 16)),
            ((8, 32), (4, 32)),
            ((8, 4, 8), (4, 4, 8)),
            ((8, 4, 8), (2, 8, 8)),
            ((2, 8, 16), (4, 4, 8)),
            ((2, 8, 16), (2, 8, 8)),
            ((4, 4, 16), (2, 4, 16)),
            ((2, 16, 8), (2, 8, 8)),
            ((4, 8, 8), (2, 8, 8)),
        ),
        source=_BLACKWELL,
    ),
    TileTable(
        "blackwell",
        backward=True,
        head_dims=(),
        tiles=_tiles(
            ((128,), (128,)),
            ((16, 8), (16, 8)),
            ((16, 8), (8, 16)),
            ((8, 16), (16, 8)),
            ((8, 16), (8, 16)),
            ((4, 4, 8), (4, 4, 8)),
            ((4, 4, 8), (2, 8, 8)),
            ((1, 8, 16), (4, 4, 8)),
            ((2, 8, 8), (4, 4, 8)),
            ((1, 8, 16), (2, 8, 8)),
            ((2, 4, 16), (2, 4, 16)),
            ((4, 2, 16), (2, 4, 16)),
            ((4, 4, 8), (2, 4, 16)),
            ((2, 8, 8), (2, 8, 8)),
        ),
        source=_BLACKWELL,
    ),
    TileTable(
        "hopper",
        backward=False,
        head_dims=(32, 64),
        tiles=_tiles(
            ((64,), (128,)),
            ((8, 8), (16, 8)),
            ((8, 8), (8, 16)),
            ((4, 4, 4), (4, 4, 8)),
            ((4, 4, 4), (2, 8, 8)),
        ),
        source=_HOPPER,
    ),
    TileTable(
        "hopper",
        backward=False,
        head_dims=(128,),
        tiles=_tiles(
            ((128,), (128,)),
            ((16, 8), (16, 8)),
            ((4, 4, 8), (4, 4, 8)),
            ((2, 8, 8), (2, 8, 8)),
        ),
        source=_HOPPER,
    ),
    TileTable(
        "hopper",
        backward=False,
        head_dims=(256,),
        tiles=_tiles(
            ((128,), (64,)),
            ((16, 8), (8, 8)),
            ((8, 16), (8, 8)),
            ((4, 4, 8), (4, 4, 4)),
            ((2, 8, 8), (4, 4, 4)),
        ),
        source=_HOPPER,
    ),
    TileTable(
        "hopper",
        backward=True,
        head_dims=(32, 64),
        tiles=_tiles(
            ((64,), (128,)),
            ((128,), (128,)),
            ((8, 8), (16, 8)),
            ((8, 8), (8, 16)),
            ((16, 8), (16, 8)),
            ((16, 8), (8, 16)),
            ((4, 4, 4), (4, 4, 8)),
            ((4, 4, 4), (2, 8, 8)),
            ((4, 4, 8), (4, 4, 8)),
            ((4, 4, 8), (2, 8, 8)),
        ),
        source=_HOPPER,
    ),
    TileTable(
        "hopper",
        backward=True,
        head_dims=(128,),
        tiles=_tiles(
            ((64,), (128,)),
            ((8, 8), (16, 8)),
            ((8, 8), (8, 16)),
            ((4, 4, 4), (4, 4, 8)),
            ((4, 4, 4), (2, 8, 8)),
            ((2, 4, 8), (2, 8, 8)),
            ((1, 8, 8), (2, 8, 8)),
        ),
        source=_HOPPER,
    ),
)
"""Every tile shape that NATTEN compiles for Blackwell and Hopper."""

PAPER_TILES = {
    "flux-4k": Tiles(q=(16, 16), kv=(16, 8), dynamic=False),
    "cosmos-89": Tiles(q=(8, 4, 8), kv=(4, 4, 8), dynamic=False),
    "cosmos-56": Tiles(q=(8, 4, 8), kv=(4, 4, 8), dynamic=False),
    "hunyuan-91": Tiles(q=(4, 8, 8), kv=(2, 8, 8), dynamic=False),
    "hunyuan-58": Tiles(q=(2, 16, 8), kv=(2, 8, 8), dynamic=False),
}
"""Tiles behind the analytical speedups of arXiv 2504.16922, by preset.

Figure 3 prints the pair of hunyuan-91. The paper names no others: these are the compiled pairs that give its numbers.
"""


def natten_tiles(
    architecture: str, rank: int, *, head_dim: int = 128, backward: bool = False
) -> tuple[Tiles, ...]:
    """NATTEN's tile shapes for layouts of `rank` axes, its default first; none where it has no kernel.

    Args:
      architecture: `"blackwell"` or `"hopper"`.
      rank: 1 to 3.
      head_dim: head dim of the call.
      backward: whether the backward pass is meant.

    Raises:
      ValueError: for another architecture.
    """
    known = sorted({table.architecture for table in NATTEN_TILES})
    if architecture not in known:
        raise ValueError(f"architecture must be one of {known}; got architecture={architecture!r}")
    return tuple(
        tiles
        for table in NATTEN_TILES
        if table.architecture == architecture and table.backward == backward
        if not table.head_dims or head_dim in table.head_dims
        for tiles in table.tiles
        if len(tiles.q) == rank
    )
