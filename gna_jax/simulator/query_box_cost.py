"""How many queries a tile that reads its key box whole takes on each axis: the shape with the least predicted time.

This is the xla backend's choice of tiles, and its prediction of time.

A tile of T queries reads a box of about (T + window - 1) keys per axis: small tiles waste little of the box, large
tiles multiply bigger matrices and start fewer loop steps. Predicted time of a tile, per batch entry and key/value
head, with S keys in the box, M rows (queries x heads sharing a key), H and V the head dims:

    S * M * (flops per pair / rate(M) + softmax) + S * (H + V) * moving a float + its share of starting a step

The constants of a CPU are fitted to timings of `benchmarks/cpu.py`'s cases with several tile shapes on a 2-core AVX-512 machine
(docs/deep-dives/xla.md); elsewhere they are orders of magnitude that keep the number of steps low. Geometry comes from
`query_boxes`.
"""

import dataclasses
import functools
import itertools
import math

from gna_jax.neighborhood import AxisNeighborhood
from gna_jax.problem import Problem
from gna_jax.simulator.query_boxes import Outline, axis_outline, slab_outline


@dataclasses.dataclass(frozen=True)
class Rates:
    """What a device does per nanosecond, and what it costs to ask.

    Attributes:
      flops: sustained multiply-adds x 2 per ns in products with many rows.
      half_rows: rows at which a product reaches half that rate.
      vector: rows are computed in multiples of it.
      score_ns: exponential, mask and reductions of one score.
      mask_ns: more for a mask that differs from tile to tile and is built in the loop.
      move_ns: reading a float of the box (and adding one to dK or dV, in the backward).
      step_ns: starting all operations of one step. loop_ns: a further loop in the program; mostly its compile time.
      scratch_bytes: scores of the tiles that share a step.
      cache_bytes: scores of one tile beyond which they leave the cache and `score_ns` doubles.
    """

    flops: float
    half_rows: float
    vector: int
    score_ns: float
    mask_ns: float
    move_ns: float
    step_ns: float
    loop_ns: float
    scratch_bytes: int
    cache_bytes: int


CPU = Rates(120.0, 48.0, 16, 1.0, 4.0, 0.4, 100e3, 2e6, 1 << 20, 24 << 20)
ACCELERATOR = Rates(20e3, 64.0, 64, 0.01, 0.01, 0.002, 200e3, 2e6, 64 << 20, 512 << 20)

Axes = tuple[tuple[int, bool], ...]
"""Per axis: queries per tile, and whether to keep edge tiles apart (`query_boxes`)."""


def choose_tiles(problem: Problem, backward: bool) -> Axes:
    """Tile shape of the forward or the backward pass."""
    return _search(_without_scale(problem), backward)


def rates(problem: Problem) -> Rates:
    """The rates of the problem's device."""
    return CPU if problem.device.platform == "cpu" else ACCELERATOR


@dataclasses.dataclass(frozen=True)
class BoxTime:
    """Predicted nanoseconds of one pass over all tiles, by what they are spent on.

    Attributes:
      products: matrix products. scores: exponentials and reductions. masks: those built in the loop.
      moves: reading boxes of keys and adding to them. steps: starting loop steps.
      loops: how many loops there are, each of which has to be compiled.
    """

    products: float
    scores: float
    masks: float
    moves: float
    steps: float
    loops: int

    @property
    def total(self) -> float:
        """Nanoseconds of the pass; compiling it is not in it."""
        return self.products + self.scores + self.masks + self.moves + self.steps


def predicted_time(problem: Problem, tiles: Axes, backward: bool) -> BoxTime:
    """Predicted time of one pass with these tiles."""
    axes = range(problem.rank)
    return _time(problem, [_outline(problem, n, *tiles[n]) for n in axes], backward)


def _penalised_ns(problem: Problem, tiles: Axes, backward: bool) -> float:
    """What the search makes least: time of the pass, and something for every loop that is compiled."""
    time = predicted_time(problem, tiles, backward)
    return time.total + rates(problem).loop_ns * time.loops


def _without_scale(problem: Problem) -> Problem:
    return dataclasses.replace(problem, scale=0.0, precision=None)


@functools.lru_cache(maxsize=1024)
def _search(problem: Problem, backward: bool) -> Axes:
    """Coordinate descent from several starts; each step tries every candidate of one axis."""
    candidates = [_candidates(problem, n) for n in range(problem.rank)]
    splits = (False,) if problem.is_slab else (False, True)
    found = []
    for rows, split_edges in itertools.product((16, 64, 256), splits):
        side = rows ** (1 / problem.rank)
        tiles = [(min(sizes, key=lambda t: abs(t - side)), split_edges) for sizes in candidates]
        found.append(_descend(problem, tiles, candidates, backward))
    return min(found)[1]


def _descend(
    problem: Problem, tiles: list[tuple[int, bool]], candidates: list[list[int]], backward: bool
) -> tuple[float, Axes]:
    """Predicted time and tiles once no change of a single axis is cheaper. Axes are cut all or none."""
    best = math.inf
    while True:
        for n, sizes in enumerate(candidates):

            def time(size: int, n: int = n) -> float:
                changed = (*tiles[:n], (size, tiles[n][1]), *tiles[n + 1 :])
                return _penalised_ns(problem, changed, backward)

            tiles[n] = (min(sizes, key=time), tiles[n][1])
        improved = _penalised_ns(problem, tuple(tiles), backward)
        if improved >= best:
            return best, tuple(tiles)
        best = improved


SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 48, 64, 96, 128, 192, 256, 512)
MAX_STEPS_PER_AXIS = 512
"""Tiles per axis that a search still considers when they are smaller than 64 queries."""


def _candidates(problem: Problem, axis: int) -> list[int]:
    """Tile sizes of one axis."""
    rule = problem.neighborhood.axes[axis]
    rows = -(-problem.query_layout[axis] // rule.dilation)
    sizes = {min(size, rows) for size in (*SIZES, rule.stride, 2 * rule.stride) if size <= 512}
    smallest = min(64, rows / MAX_STEPS_PER_AXIS)
    return sorted(size for size in sizes if size >= smallest)


def _outline(problem: Problem, axis: int, tile: int, split_edges: bool) -> Outline:
    rule = problem.neighborhood.axes[axis]
    length = problem.global_layout[axis]
    if not problem.is_slab:
        return _cached_outline(rule, length, tile, split_edges)
    rows = -(-problem.query_layout[axis] // rule.dilation)
    columns = -(-problem.key_layout[axis] // rule.dilation)
    return slab_outline(rule, length, rows, columns, tile)


@functools.lru_cache(maxsize=4096)
def _cached_outline(rule: AxisNeighborhood, length: int, tile: int, split_edges: bool) -> Outline:
    return axis_outline(rule, length, tile, split_edges)


def _time(problem: Problem, outlines: list[Outline], backward: bool) -> BoxTime:
    device = rates(problem)
    heads = problem.batch * problem.kv_heads
    dims = problem.head_dim + problem.value_dim
    flops = 2 * (dims if not backward else 2 * dims + problem.head_dim)
    passes = 2.0 if backward else 1.0
    is_uniform = all(outline.is_uniform for outline in outlines)
    products = scores = masks = moves = steps = 0.0
    combinations = itertools.product(
        *(list(zip(o.rows, o.count, o.box, strict=True)) for o in outlines)
    )
    for combination in combinations:
        rows = math.prod(rows for rows, _, _ in combination) * problem.heads_per_kv
        tiles = math.prod(count for _, count, _ in combination)
        columns = math.prod(box for _, _, box in combination) + problem.num_additional
        padded = -(-rows // device.vector) * device.vector
        scratch = heads * rows * columns * problem.accumulator.itemsize
        slower = 2 if scratch > device.cache_bytes else 1
        pairs = tiles * heads * rows * columns
        products += pairs * flops * (padded + device.half_rows) / (device.flops * rows)
        scores += pairs * passes * device.score_ns * slower
        masks += 0.0 if is_uniform else pairs * passes * device.mask_ns * slower
        moves += tiles * heads * columns * dims * device.move_ns * 2 * passes
        in_step = max(1, device.scratch_bytes // scratch)
        steps += math.ceil(tiles / in_step) * device.step_ns * passes
    loops = math.prod(outline.num_classes for outline in outlines)
    return BoxTime(products, scores, masks, moves, steps, loops)
