"""`simulate`: what a tiled kernel would compute for one rule and one pair of tile shapes, and the speedups that follow.

Arithmetic on the counts of `counts`; no device and no time here (cost model), no choice between rules or tiles (search).
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from gna_jax.neighborhood import Flags, Neighborhood, Sizes, by, per_axis
from gna_jax.simulator.counts import WalkCounts, attended_pairs, walk_counts
from gna_jax.tiling import Tiles, tile_shape


@dataclasses.dataclass(frozen=True)
class Simulation:
    """Counts and speedups of one rule, one layout and one pair of tile shapes. Made by `simulate`.

    Speedups compare with dense, never causal attention of the same layout, so a causal rule gains from its causality too. All
    figures are exact ratios of integers; figures of tiles are the forward pass's (`backward` holds the counts of the dK and dV walk).

    With additional keys, which every query sees, dense attention has them too: speedups, shares and `load_imbalance` count
    them, as `additional_tiles` more visits of every Q tile without a masked pair.

    Attributes:
      neighborhood: window rule of every axis.
      layout: tokens per axis.
      tiles: `tiles.q`, `tiles.kv` and `tiles.dynamic` of the kernel.
      additional_keys: keys outside the layout that every query sees.
    """

    neighborhood: Neighborhood
    layout: tuple[int, ...]
    tiles: Tiles
    additional_keys: int

    @classmethod
    def of(
        cls,
        neighborhood: Neighborhood,
        layout: Sequence[int],
        tiles: Tiles,
        additional_keys: int = 0,
    ) -> "Simulation":
        """Simulate a checked rule. `tiles` names Q and KV tiles; its `dynamic` of None means False.

        Raises as `simulate`.
        """
        layout = per_axis("layout", layout, neighborhood.rank)
        neighborhood.check_layout(layout)
        if tiles.kv is None or len(tiles.q) != len(layout):
            raise ValueError(
                "tiles must hold a Q and a KV tile with one size per axis of the layout;"
                f" got {tiles} for layout {layout}"
            )
        if tiles.dynamic is None:
            tiles = dataclasses.replace(tiles, dynamic=False)
        number = _count("additional_keys", additional_keys)
        return cls(neighborhood, layout, tiles, number)

    def with_additional_keys(self, additional_keys: int) -> "Simulation":
        """The same with so many keys outside the layout that every query sees.

        Raises:
          ValueError: for a negative number.
        """
        number = _count("additional_keys", additional_keys)
        return dataclasses.replace(self, additional_keys=number)

    @functools.cached_property
    def forward(self) -> WalkCounts:
        """Q tiles that visit KV tiles, of the layout alone."""
        return self._walk(backward=False)

    @functools.cached_property
    def backward(self) -> WalkCounts:
        """KV tiles that visit Q tiles, of the layout alone, with the same tile shapes."""
        return self._walk(backward=True)

    @property
    def tokens(self) -> int:
        """Tokens of the layout."""
        return math.prod(self.layout)

    @property
    def dense_pairs(self) -> int:
        """Query-key pairs of dense attention: `tokens * (tokens + additional_keys)`."""
        return self.tokens * (self.tokens + self.additional_keys)

    @functools.cached_property
    def attended_pairs(self) -> int:
        """Query-key pairs that attend, additional keys included."""
        in_layout = attended_pairs(self.neighborhood, self.layout)
        return in_layout + self.tokens * self.additional_keys

    @property
    def additional_tiles(self) -> int:
        """KV tiles that hold the additional keys."""
        return -(-self.additional_keys // self.forward.visited_elements)

    @property
    def kv_tiles(self) -> int:
        """KV tiles that a Q tile of dense attention visits: the undilated layout's, rounded up per axis, and `additional_tiles`."""
        axes = zip(self.layout, self.tiles.kv or (), strict=True)
        return math.prod(-(-length // tile) for length, tile in axes) + self.additional_tiles

    @property
    def visits(self) -> int:
        """KV tiles visited by all Q tiles, additional ones included."""
        return self.forward.visits + self.forward.tiles * self.additional_tiles

    @property
    def worst_visits(self) -> int:
        """KV tiles visited by the Q tile with most of them, additional ones included."""
        return self.forward.worst + self.additional_tiles

    @property
    def mean_visits(self) -> float:
        """KV tiles visited per Q tile, additional ones included."""
        return self.visits / self.forward.tiles

    @property
    def computed_pairs(self) -> int:
        """Query-key pairs whose score the forward pass computes: attended, masked and padding."""
        return self.forward.tile_elements * self.forward.visited_elements * self.visits

    @property
    def sparsity(self) -> float:
        """Share of the dense pairs that do not attend: `1 - attended_pairs / dense_pairs`."""
        return (self.dense_pairs - self.attended_pairs) / self.dense_pairs

    @property
    def flop_speedup(self) -> float:
        """`dense_pairs / attended_pairs`: the limit that no tiling can pass."""
        return self.dense_pairs / self.attended_pairs

    @property
    def worst_tile_speedup(self) -> float:
        """`kv_tiles / worst_visits`: the figure of the GNA paper's simulator, as if every Q tile took as long as the worst."""
        return self.kv_tiles / self.worst_visits

    @property
    def mean_tile_speedup(self) -> float:
        """`kv_tiles / mean_visits`. Dense attention is charged for its padding here, so do not rank by it: padding looks fast."""
        return self.kv_tiles * self.forward.tiles / self.visits

    @property
    def total_work_speedup(self) -> float:
        """`dense_pairs / computed_pairs`, padded rows and columns counted as work: the figure to rank by."""
        return self.dense_pairs / self.computed_pairs

    @property
    def backward_total_work_speedup(self) -> float:
        """`total_work_speedup` of the dK and dV walk; equal to the forward's unless tiles are dynamic."""
        visits = self.backward.visits + self.forward.tiles * self.additional_tiles
        return self.dense_pairs / (
            self.forward.tile_elements * self.forward.visited_elements * visits
        )

    @property
    def fully_block_sparse(self) -> bool:
        """Whether no visited KV tile holds a masked pair of real tokens. Padding does not count."""
        return self.forward.fully_block_sparse

    @property
    def masked_tile_share(self) -> float:
        """Share of the visited KV tiles that hold a masked pair of real tokens."""
        return self.forward.partial / self.visits

    @property
    def padded_share(self) -> float:
        """Share of the computed pairs that have a padding row or column."""
        real = self.forward.real_pairs + self.tokens * self.additional_keys
        return (self.computed_pairs - real) / self.computed_pairs

    @property
    def load_imbalance(self) -> float:
        """Visits of the worst Q tile over those of the mean one; 1.0 is perfect balance."""
        return self.worst_visits * self.forward.tiles / self.visits

    def __str__(self) -> str:
        """A few lines for people."""
        rule, tiles = self.neighborhood, self.tiles
        extra = f" + {self.additional_keys} keys" if self.additional_keys else ""
        dilation = f", dilation {by(rule.dilation)}" if set(rule.dilation) != {1} else ""
        causal = f", causal {by(rule.is_causal)}" if any(rule.is_causal) else ""
        kind = "dynamic" if tiles.dynamic else "static"
        return "\n".join(
            (
                f"{by(self.layout)} tokens{extra}, window {by(rule.window_size)}, stride {by(rule.stride)}{dilation}{causal}",
                f"  sparsity   {self.sparsity:.2%}, at most {self.flop_speedup:.2f}x",
                f"  tiles      {by(tiles.q)} queries, {by(tiles.kv or ())} keys, {kind}:"
                f" {self.total_work_speedup:.2f}x by total work, {self.worst_tile_speedup:.2f}x by the worst tile",
                f"  visits     {self.mean_visits:.1f} KV tiles per Q tile, most {self.worst_visits};"
                f" {self.masked_tile_share:.0%} masked, {self.padded_share:.0%} of the pairs padding",
            )
        )

    def _walk(self, backward: bool) -> WalkCounts:
        return walk_counts(
            self.neighborhood,
            self.layout,
            q_tile=self.tiles.q,
            kv_tile=self.tiles.kv or (),
            dynamic=bool(self.tiles.dynamic),
            backward=backward,
        )


def simulate(
    layout: Sizes,
    *,
    window_size: Sizes,
    stride: Sizes = 1,
    dilation: Sizes = 1,
    is_causal: Flags = False,
    q_tile: Sizes,
    kv_tile: Sizes,
    dynamic: bool = False,
    additional_keys: int = 0,
) -> Simulation:
    """What a kernel with these tiles would compute. Nothing is run; a million tokens take milliseconds.

    Args:
      layout: tokens per axis, `(30, 48, 80)`; an int is one axis.
      window_size, stride, dilation, is_causal: as in `gna_jax.gna`.
      q_tile: queries per Q tile, per axis; the tiles of each dilation group start at multiples of it.
      kv_tile: keys per KV tile, per axis.
      dynamic: whether a Q tile's KV tiles start where its window box starts, or at multiples of `kv_tile`. The
        backward's Q tiles are placed by the same rule.
      additional_keys: keys outside the layout that every query sees, in dense attention too.

    >>> hunyuan = simulate((30, 48, 80), window_size=(18, 24, 24), q_tile=(4, 8, 8), kv_tile=(2, 8, 8))
    >>> f"{hunyuan.flop_speedup:.2f} {hunyuan.worst_tile_speedup:.2f} {hunyuan.total_work_speedup:.2f}"
    '11.11 3.27 4.92'

    Raises:
      TypeError: for a traced or non-integer value.
      ValueError: for an illegal rule, a layout too small for it, a tile size below 1, or a negative `additional_keys`.
    """
    layout = layout_of(layout)
    rank = len(layout)
    neighborhood = Neighborhood.of(
        rank, window_size=window_size, stride=stride, dilation=dilation, is_causal=is_causal
    )
    tiles = Tiles(
        q=tile_shape("q_tile", q_tile, rank),
        kv=tile_shape("kv_tile", kv_tile, rank),
        dynamic=dynamic,
    )
    return Simulation.of(neighborhood, layout, tiles, additional_keys)


def layout_of(sizes: Any) -> tuple[int, ...]:
    """Tokens per axis as a tuple; an int is one axis.

    Raises:
      TypeError: for traced or non-integer sizes.
      ValueError: for no axis, or more than three.
    """
    rank = int(np.size(sizes))
    if not 1 <= rank <= 3:
        raise ValueError(
            f"layout must have 1 to 3 axes; got layout={sizes}; leave batch and heads out of it"
        )
    return per_axis("layout", sizes, rank)


def _count(name: str, value: int) -> int:
    (number,) = per_axis(name, value, 1)
    if number < 0:
        raise ValueError(f"{name} must not be negative; got {name}={number}; use 0 for none")
    return number
