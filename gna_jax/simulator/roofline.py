"""How long one kernel takes on a GPU: the time of a tile on an SM, the schedule of all tiles, and the traffic with memory.

Rates are those of `devices`; which kernels a call is made of is `cost`'s business.
"""

import dataclasses
import math
from typing import Literal

import numpy as np

from gna_jax.problem import DTYPES
from gna_jax.simulator.devices import DeviceRates

Direction = Literal["forward", "backward"]
Masks = Literal["shell", "all"]

HBM_SHARE = 0.875
"""Share of the memory's nominal bandwidth that kernels sustain. Assumed."""
LAUNCH_SECONDS = 3e-6
"""Starting and draining one kernel. Order of magnitude."""
TILE_CYCLES = 1000.0
"""Prologue and epilogue of a tile: two trips to memory that nothing of the same tile hides, about 480 cycles each
(arXiv 2402.13499, table 4, Hopper and Ampere)."""
MAX_RESIDENT_TILES = 4
"""Tiles that fit on an SM side by side, at most: 64 Ki registers over 128 threads with 128 each."""
SHELL_SELECTS = 1.0
"""Selects per score of a mask made of one bit per row, plane and column of a tile: SASS of a Blackwell kernel with such masks
holds 130 selects for 128 scores. Compares are not counted."""
ELEMENT_SELECTS = 5.0
"""The same of NATTEN 0.21.6's masks, which test the window of every element: 641 selects for 128 scores of its 3-D Blackwell kernel."""
STATISTIC_BYTES = 4
"""One float32 per query: lse, or delta of the backward."""
MAX_KINDS = 256
"""Kinds of tiles that are scheduled; more are merged, neighbors in weight, at their mean weight."""


@dataclasses.dataclass(frozen=True)
class Call:
    """Shapes of a call besides its layout. `of` checks them."""

    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    direction: Direction

    @classmethod
    def of(
        cls, batch: int, heads: int, kv_heads: int | None, head_dim: int, dtype: str, direction: str
    ) -> "Call":
        """The call; `kv_heads` of None equals `heads`.

        Raises:
          ValueError: for sizes below 1, heads that do not divide, or an unknown dtype or direction.
        """
        kv_heads = heads if kv_heads is None else kv_heads
        sizes = {"batch": batch, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1; got {name}={size}")
        if heads % kv_heads:
            raise ValueError(
                f"kv_heads must divide heads; got heads={heads}, kv_heads={kv_heads};"
                " equal numbers share nothing"
            )
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got dtype={dtype!r}")
        check_choice("direction", direction, ("forward", "backward"))
        return cls(batch, heads, kv_heads, head_dim, dtype, direction)  # type: ignore[arg-type]

    @property
    def itemsize(self) -> int:
        """Bytes of an operand of the matrix units."""
        return 2 if self.dtype in ("bfloat16", "float16") else 4


def check_choice(name: str, value: str, legal: tuple[str, ...]) -> None:
    """ValueError unless `value` is one of `legal`."""
    if value not in legal:
        raise ValueError(f"{name} must be one of {', '.join(legal)}; got {name}={value!r}")


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel of one batch entry and head.

    Attributes:
      kinds: `[kinds, 3]`: visits, masked visits, and how many tiles have so many.
      rows, columns: elements of a tile that walks, and of one that is visited.
      products: matrix products per visit.
      efficiency: share of the matrix units' peak.
      queries, keys: tokens, additional ones included.
      query_tensors, key_tensors: arrays of queries' and of keys' shape that it reads or writes.
      reused: visited tokens that must stay in the L2 cache for every one to be read from memory once.
      visits_queries: whether key tiles visit query tiles.
    """

    kinds: np.ndarray
    rows: int
    columns: int
    products: int
    efficiency: float
    queries: int
    keys: int
    query_tensors: int
    key_tensors: int
    reused: int
    visits_queries: bool = False


def kernel_parts(
    kernel: Kernel, call: Call, on: DeviceRates, masks: Masks
) -> tuple[dict[str, float], np.ndarray]:
    """Seconds of each resource alone over the whole device, and seconds on an SM of each kind of tile."""
    if call.dtype == "float64":
        raise ValueError(
            "GPU kernels take bfloat16, float16 and float32 (as tf32); got dtype='float64'; device='cpu' has it"
        )
    visits, masked, tiles = kernel.kinds.T
    scores = kernel.rows * kernel.columns
    rate = on.mma_16bit if call.itemsize == 2 else on.mma_tf32
    rows = -(-kernel.rows // on.mma_rows) * on.mma_rows
    flops = 2 * kernel.products * rows * kernel.columns * call.head_dim
    mma = flops / rate / kernel.efficiency / on.clock
    exp = scores / on.exponentials / on.clock
    selects = SHELL_SELECTS
    if masks == "all" and masked.any():
        masked, selects = visits, ELEMENT_SELECTS
    mask = selects * scores / on.selects / on.clock
    size = call.head_dim * call.itemsize
    resident = on.spec.smem_bytes // ((kernel.rows + 4 * kernel.columns) * size)  # two stages
    fixed = TILE_CYCLES / min(max(resident, 1), MAX_RESIDENT_TILES) / on.clock
    per_tile = visits * max(mma, exp) + masked * mask + fixed
    sms, copies = on.spec.num_sms, call.batch * call.heads
    total = copies * float(visits @ tiles) / sms
    parts = {
        "mma": total * mma,
        "exp": total * exp,
        "mask": copies * float(masked @ tiles) / sms * mask,
        "l2": total * sms * 2 * kernel.columns * size / on.l2_bandwidth,
        "hbm": _hbm_bytes(kernel, call, on) / (on.hbm_bandwidth * HBM_SHARE),
        "launch": LAUNCH_SECONDS + copies * float(tiles.sum()) / sms * fixed,
    }
    return parts, per_tile


def _hbm_bytes(kernel: Kernel, call: Call, on: DeviceRates) -> float:
    """Every array once; where the tokens that tiles share outgrow the L2 cache, every wave of tiles reads them anew."""
    size = call.head_dim * call.itemsize
    queries = call.batch * call.heads * kernel.queries
    keys = call.batch * call.kv_heads * kernel.keys
    once = (kernel.query_tensors * queries + kernel.key_tensors * keys) * size
    once += STATISTIC_BYTES * queries
    shared = 2 * kernel.reused * size  # of one head
    if shared <= on.l2_bytes:
        return once
    visits, _, tiles = kernel.kinds.T
    copies = call.batch * call.heads
    waves = math.ceil(copies * int(tiles.sum()) / on.spec.num_sms)
    every_visit = copies * float(visits @ tiles) * 2 * kernel.columns * size
    first = 2 * (queries if kernel.visits_queries else keys) * size
    return once + max(0.0, min(waves * shared, every_visit) - first)


def merged_kinds(weight: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights and numbers of at most `MAX_KINDS` kinds of tiles, heavy first, with the same number of tiles and the same total weight."""
    order = np.argsort(-weight, kind="stable")
    weight, count = weight[order], count[order]
    if len(weight) <= MAX_KINDS:
        return weight, count
    first = np.arange(MAX_KINDS) * len(weight) // MAX_KINDS
    merged = np.add.reduceat(count, first)
    return np.add.reduceat(weight * count, first) / merged, merged


def busiest_sm(weight: np.ndarray, count: np.ndarray, sms: int) -> float:
    """Time at which the last SM ends, if tiles, in the given order, go to whichever SM is free first.

    Args:
      weight: `[kinds]` time of a tile of each kind, descending.
      count: `[kinds]` number of tiles.
      sms: number of SMs.
    """
    ends = np.zeros(sms)
    for tile, number in zip(weight.tolist(), count.tolist(), strict=True):
        # A tile starts at one of the times ends + k * tile, the earliest first. Tiles that fit in before the latest end come before
        # all others; from there on every round gives one tile to every SM.
        early = np.floor((ends.max() - ends) / tile).astype(int)
        if number >= early.sum():
            rounds, left = divmod(number - int(early.sum()), sms)
            ends += (early + rounds) * tile
            ends[np.argsort(ends, kind="stable")[:left]] += tile
            continue
        sm = np.repeat(np.arange(sms), early)
        turn = np.arange(len(sm)) - np.repeat(np.cumsum(early) - early, early)
        chosen = np.argsort(ends[sm] + turn * tile, kind="stable")[:number]
        ends += np.bincount(sm[chosen], minlength=sms) * tile
    return float(ends.max())
