"""Which window, stride and tiles? Every combination is simulated, ranked by total work, and set against closeness.

`search` ranks, `SearchResult.pareto` shows what speed costs in closeness to a sliding window, `recommend` picks one. Nothing
is timed here; tiles of one rule are chosen in `tile_shapes`.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction

import numpy as np

from gna_jax.device import DeviceSpec
from gna_jax.neighborhood import (
    WHOLE_GROUP,
    AxisNeighborhood,
    Flags,
    Neighborhood,
    Sizes,
    per_axis,
)
from gna_jax.simulator.budgets import tile_budget
from gna_jax.simulator.counts import attended_pairs
from gna_jax.simulator.simulation import Simulation, layout_of
from gna_jax.simulator.tile_shapes import best_tiles_of_each
from gna_jax.simulator.windows import even_windows
from gna_jax.tiling import Tiles, group_lengths

TOLERANCE = Fraction(1, 10)
"""How far rules with windows that `search` proposes may go beyond the wish."""
NEAR_BEST = 0.02
"""What `recommend` takes for as fast as can be."""

Progress = Callable[[int, int], None]
"""Called with the windows done and the windows to do, after each."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A rule with the best tiles for it.

    Attributes:
      simulation: its counts and speedups.
      closeness: `closeness` of the rule: 1.0 is the sliding window itself.
    """

    simulation: Simulation
    closeness: float

    @property
    def window_size(self) -> tuple[int, ...]:
        """Keys per window and axis."""
        return self.simulation.neighborhood.window_size

    @property
    def stride(self) -> tuple[int, ...]:
        """Queries per stride group and axis."""
        return self.simulation.neighborhood.stride

    @property
    def tiles(self) -> Tiles:
        """The tiles with the least total work."""
        return self.simulation.tiles

    @property
    def total_work_speedup(self) -> float:
        """As in `Simulation`."""
        return self.simulation.total_work_speedup

    @property
    def sparsity(self) -> float:
        """As in `Simulation`."""
        return self.simulation.sparsity

    def __str__(self) -> str:
        """The simulation's lines, and the closeness."""
        return f"{self.simulation}\n  closeness  {self.closeness:.2f} of the sliding window's pairs are kept"


@dataclasses.dataclass(frozen=True)
class SearchResult:
    """What `search` found.

    Attributes:
      candidates: by total-work speedup, fastest first; among equals the closest to its sliding window first.
    """

    candidates: tuple[Candidate, ...]

    @functools.cached_property
    def pareto(self) -> tuple[Candidate, ...]:
        """Candidates that no other beats in speedup or closeness without losing in the other; fastest first."""
        front: list[Candidate] = []
        for candidate in self.candidates:
            if not front or candidate.closeness > front[-1].closeness:
                front.append(candidate)
        return tuple(front)


def closeness(neighborhood: Neighborhood, layout: Sequence[int]) -> float:
    """How much of the sliding window (the same rule with stride 1) a strided rule keeps, in (0, 1].

        pairs that attend under both rules / pairs that attend under the sliding window

    Exact: pairs of a layout are products over its axes. Not causal, every window holds as many keys as its sliding window, so
    this is the mean over the queries of the overlap of the two, and as much of what the rule sees would be seen sliding. Causal,
    a strided window is a part of the sliding one. It measures what stride alone does; how large a window is, and of which
    shape, is the model's business and is reported as sparsity. An overlap, and not a distance between centres, because a window
    one key off its centre costs much where windows are small and nothing where they are large.

    Raises:
      ValueError: for a layout too small for its windows.
    """
    neighborhood.check_layout(layout)
    axes = list(zip(neighborhood.axes, layout, strict=True))
    kept, sliding = (
        math.prod(counts) for counts in zip(*itertools.starmap(_kept, axes), strict=True)
    )
    return kept / sliding


@functools.lru_cache(maxsize=1 << 12)
def _kept(axis: AxisNeighborhood, length: int) -> tuple[int, int]:
    """Pairs of one axis that attend under both rules, and under the sliding window."""
    sliding_axis = dataclasses.replace(axis, stride=1)
    kept = sliding = 0
    for tokens, groups in group_lengths(length, axis.dilation):
        queries = np.arange(tokens)
        first, end = axis.keys(queries, tokens)
        sliding_first, sliding_end = sliding_axis.keys(queries, tokens)
        overlap = np.minimum(end, sliding_end) - np.maximum(first, sliding_first)
        kept += groups * int(np.maximum(overlap, 0).sum())
        sliding += groups * int((sliding_end - sliding_first).sum())
    return kept, sliding


def search(
    layout: Sizes,
    *,
    sparsity: float | None = None,
    speedup: float | None = None,
    windows: Sequence[Sizes] | None = None,
    strides: Sequence[Sizes] | None = None,
    dilation: Sizes = 1,
    is_causal: Flags = False,
    q_tile_elements: int = 128,
    kv_tile_elements: int = 128,
    dynamic: bool = False,
    additional_keys: int = 0,
    progress: Progress | None = None,
) -> SearchResult:
    """Rank windows, strides and tiles by total-work speedup.

    Every window is tried with every stride, each with its best tiles. A stride stays only if it is faster than every smaller
    stride (no larger on any axis) of its window: anything else gives closeness away for nothing.

    Args:
      layout: tokens per axis; an int is one axis.
      sparsity: keep rules at least this sparse (`Simulation.sparsity`, without additional keys).
      speedup: keep rules whose total-work speedup is at least this. Give one of the two, or windows.
      windows: windows to try, as a list: `[(18, 24, 24)]`. None proposes some that take about the same share of every axis (`windows.even_windows`): for a
        sparsity those that attend at most 10 % less than is wanted, for a speedup those that lead to at most 10 % more
        (where there are none, to more).
      strides: strides to try; those above a window are left out for it. None: per axis every power of two and the window.
      dilation, is_causal: as in `gna_jax.gna`.
      q_tile_elements, kv_tile_elements: elements of a Q and of a KV tile: powers of two.
      dynamic: whether KV tiles start where the window box starts, or at multiples of the KV tile.
      additional_keys: keys outside the layout that every query sees, in dense attention too.
      progress: called with the windows done and the windows to do, after each. A speedup may take several rounds.

    Raises:
      ValueError: for no wish or two, a wish out of range, windows that do not fit, or where nothing meets the wish.
    """
    _check_wish(sparsity, speedup, windows)
    sizes = layout_of(layout)
    rule_of = functools.partial(Neighborhood.of, len(sizes), dilation=dilation, is_causal=is_causal)
    proposals = (
        _proposals(sizes, rule_of, sparsity, speedup)
        if windows is None
        else [_given_windows(sizes, rule_of, windows, sparsity)]
    )
    kernel = _Kernel((q_tile_elements, kv_tile_elements), dynamic, additional_keys)
    found: list[Candidate] = []
    for rules in proposals:
        for done, rule in enumerate(rules, start=1):
            found += kernel.candidates(_with_strides(rule, sizes, strides), sizes)
            if progress is not None:
                progress(done, len(rules))
        fast = [one for one in found if one.total_work_speedup >= (speedup or 0)]
        if fast:
            break
    else:
        raise ValueError(
            f"no window and stride meets the wish; got sparsity={sparsity}, speedup={speedup}, layout {sizes};"
            " ask for less, or name other windows or strides, or smaller tiles"
        )
    if speedup is not None and windows is None:
        most = _as_written(speedup) * (1 + TOLERANCE)
        fast = [one for one in fast if one.total_work_speedup <= most] or fast
    return SearchResult(
        tuple(sorted(fast, key=lambda one: (-one.total_work_speedup, -one.closeness)))
    )


def recommend(
    layout: Sizes,
    sparsity: float = 0.9,
    device: str | DeviceSpec | None = "b200",
    *,
    dilation: Sizes = 1,
    is_causal: Flags = False,
    additional_keys: int = 0,
    progress: Progress | None = None,
) -> Candidate:
    """The rule to try first: even in its window, close to sliding in its stride, and as fast as the sparsity promises.

    Of the rules that `search` finds, those whose total-work speedup is within 2 % of `1 / (1 - sparsity)`, or of the fastest
    where none is; of these the windows that spread most evenly over the axes; of these the stride closest to sliding.

    Args:
      layout: tokens per axis; an int is one axis.
      sparsity: share of the dense pairs to do without, at least.
      device: chooses the elements of the tiles (`tile_budget`).
      dilation, is_causal, additional_keys, progress: as in `search`.

    >>> chosen = recommend((256, 256), sparsity=0.9, device="h100")
    >>> chosen.window_size, chosen.stride, round(chosen.total_work_speedup, 2)
    ((80, 80), (8, 16), 10.24)

    Raises as `search`, and:
      ValueError: for an unknown device.
    """
    budget = tile_budget(device)
    result = search(
        layout,
        sparsity=sparsity,
        dilation=dilation,
        is_causal=is_causal,
        q_tile_elements=budget.q_elements,
        kv_tile_elements=budget.kv_elements,
        dynamic=budget.dynamic,
        additional_keys=additional_keys,
        progress=progress,
    )
    promised = 1 / (1 - sparsity)
    enough = min(promised, result.candidates[0].total_work_speedup) * (1 - NEAR_BEST)
    near_best = [one for one in result.candidates if one.total_work_speedup >= enough]
    return max(
        near_best, key=lambda one: (-_unevenness(one), one.closeness, one.total_work_speedup)
    )


def _unevenness(candidate: Candidate) -> float:
    """Largest over smallest share of an axis that the window takes."""
    rule, layout = candidate.simulation.neighborhood, candidate.simulation.layout
    axes = zip(rule.window_size, rule.dilation, layout, strict=True)
    shares = [window * dilation / length for window, dilation, length in axes]
    return max(shares) / min(shares)


def _check_wish(
    sparsity: float | None, speedup: float | None, windows: Sequence[Sizes] | None
) -> None:
    if sparsity is not None and speedup is not None:
        raise ValueError(
            f"search takes a sparsity or a speedup, not both; got sparsity={sparsity}, speedup={speedup}"
        )
    if sparsity is None and speedup is None and windows is None:
        raise ValueError("search needs a sparsity, a speedup or windows; got none of them")
    if sparsity is not None and not 0 <= sparsity < 1:
        raise ValueError(
            f"sparsity must be at least 0 and below 1; got sparsity={sparsity}; 0.9 keeps a tenth of the pairs"
        )
    if speedup is not None and not 1 <= speedup < math.inf:
        raise ValueError(
            f"speedup must be at least 1; got speedup={speedup}; 1 is the speed of dense attention"
        )


def _proposals(
    layout: tuple[int, ...],
    rule_of: Callable[..., Neighborhood],
    sparsity: float | None,
    speedup: float | None,
) -> Iterator[list[Neighborhood]]:
    """Windows to try; a further list is wanted only where nothing of the one before meets the wish."""
    if speedup is None:
        share = _attended_share(sparsity)
        yield even_windows(layout, rule_of, least=share * (1 - TOLERANCE), most=share)
        return
    share = 1 / _as_written(speedup)
    while share * math.prod(layout) >= 1:
        # Tiles waste work, the more the smaller the windows.
        yield even_windows(layout, rule_of, least=share / 2, most=share)
        share /= 2


def _given_windows(
    layout: tuple[int, ...],
    rule_of: Callable[..., Neighborhood],
    windows: Sequence[Sizes],
    sparsity: float | None,
) -> list[Neighborhood]:
    rules = list(dict.fromkeys(rule_of(window_size=window) for window in windows))
    for rule in rules:
        rule.check_layout(layout)
    kept = math.prod(layout) ** 2 * _attended_share(sparsity)
    return [rule for rule in rules if attended_pairs(rule, layout) <= kept]


def _attended_share(sparsity: float | None) -> Fraction:
    """The share of the dense pairs that may attend."""
    return 1 - _as_written(sparsity or 0.0)


def _as_written(number: float) -> Fraction:
    """0.9 as nine tenths: the float nearest to it is a little more, and would shut out a window of exactly a tenth."""
    return Fraction(str(float(number)))


def _with_strides(
    rule: Neighborhood, layout: tuple[int, ...], strides: Sequence[Sizes] | None
) -> list[Neighborhood]:
    """The rule with every stride that fits it."""
    axes = list(zip(rule.axes, layout, strict=True))
    if strides is not None:
        longest = [n // a.dilation if a.window == WHOLE_GROUP else a.window for a, n in axes]
        tried = dict.fromkeys(per_axis("strides", stride, rule.rank) for stride in strides)
        fitting = [s for s in tried if all(s <= n for s, n in zip(s, longest, strict=True))]
        return [dataclasses.replace(rule, stride=stride) for stride in fitting]
    options = []
    for axis, length in axes:
        sees_all = axis.window == WHOLE_GROUP or axis.window * axis.dilation == length
        powers = {1 << exponent for exponent in range(axis.window.bit_length())}
        # Where every query sees its whole group, stride changes nothing.
        options.append([1] if sees_all else sorted(powers | {axis.window}))
    return [dataclasses.replace(rule, stride=stride) for stride in itertools.product(*options)]


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """What a search knows of the kernel: elements of its tiles, and the rest of a simulation."""

    elements: tuple[int, int]
    dynamic: bool
    additional_keys: int

    def candidates(self, rules: list[Neighborhood], layout: tuple[int, ...]) -> Iterator[Candidate]:
        """Every rule of one window that is faster than all with smaller strides, with its best tiles."""
        if not rules:
            return
        tiles = best_tiles_of_each(
            rules, layout, self.elements, self.dynamic, additional_keys=self.additional_keys
        )
        stride = np.asarray([rule.stride for rule in rules])
        visits = np.asarray([visits for _, visits in tiles])
        # [rules, rules]: is the second's stride smaller, and does the second visit no more tiles?
        smaller = (stride[None] <= stride[:, None]).all(axis=-1) & ~np.eye(len(rules), dtype=bool)
        gains_nothing = (smaller & (visits[None] <= visits[:, None])).any(axis=1)
        for rule, (best, _), drop in zip(rules, tiles, gains_nothing, strict=True):
            if not drop:
                simulation = Simulation.of(rule, layout, best, self.additional_keys)
                yield Candidate(simulation, closeness(rule, layout))
