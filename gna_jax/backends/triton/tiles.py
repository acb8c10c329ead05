"""Tile sizes and launch settings of the Triton kernels, and which tiles a caller may name."""

import dataclasses
import math
from typing import Literal

from gna_jax.backends import slab_tiles
from gna_jax.backends.triton.dots import input_precision
from gna_jax.backends.triton.plan import power_of_two
from gna_jax.neighborhood import by
from gna_jax.problem import Problem
from gna_jax.simulator import Simulation
from gna_jax.simulator.tile_shapes import best_tiles
from gna_jax.tiling import Tiles

Job = Literal["forward", "query_gradient", "key_gradient", "bias_gradient"]
LEAST, MOST = 16, 128
"""Tokens of a tile: what a matrix product takes, and what registers hold."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of one kernel: tokens per tile where the caller names none, warps of a program, and loads in flight.

    Attributes:
      q, kv: tokens of a Q and of a KV tile.
      num_warps: warps that share a program's tile.
      num_stages: visits whose tiles are in shared memory or on their way there.
    """

    q: int
    kv: int
    num_warps: int
    num_stages: int


# By columns of the wider of head dim and value dim. `tests/triton_resources_test.py` compiles them: no register is spilled, and 99 KiB of
# shared memory suffice, what compute capability 8.6, 8.9 and 12.0 have. None was timed on a GPU.
_NARROW: dict[Job, dict[int, Settings]] = {
    "forward": {
        32: Settings(64, 32, 4, 2),
        64: Settings(64, 32, 4, 2),
        128: Settings(64, 32, 4, 2),
        256: Settings(64, 32, 8, 2),
    },
    "query_gradient": {
        32: Settings(64, 32, 4, 2),
        64: Settings(64, 32, 4, 2),
        128: Settings(64, 32, 4, 2),
        256: Settings(32, 16, 8, 1),
    },
    "key_gradient": {
        32: Settings(32, 64, 4, 2),
        64: Settings(32, 64, 4, 2),
        128: Settings(32, 64, 8, 2),
        256: Settings(32, 32, 8, 1),
    },
    "bias_gradient": {
        32: Settings(64, 32, 4, 1),
        64: Settings(64, 32, 8, 1),
        128: Settings(32, 32, 8, 1),
        256: Settings(32, 16, 8, 1),
    },
}
"""For windows of few keys, where less of a tile is masked, and for a bias, whose entries take registers."""
_WIDE: dict[Job, dict[int, Settings]] = {
    "forward": {
        32: Settings(64, 64, 4, 2),
        64: Settings(64, 64, 4, 2),
        128: Settings(64, 64, 8, 2),
        256: Settings(64, 32, 8, 2),
    },
    "query_gradient": {
        32: Settings(64, 64, 4, 2),
        64: Settings(64, 64, 4, 2),
        128: Settings(64, 32, 4, 2),
        256: Settings(32, 32, 8, 1),
    },
    "key_gradient": {
        32: Settings(64, 64, 4, 2),
        64: Settings(32, 64, 4, 2),
        128: Settings(32, 64, 8, 2),
        256: Settings(32, 32, 8, 1),
    },
}
_EXACT: dict[Job, dict[int, Settings]] = {
    "forward": {
        32: Settings(32, 32, 4, 1),
        64: Settings(32, 32, 8, 1),
        128: Settings(32, 16, 8, 1),
        256: Settings(16, 16, 4, 1),
    },
    "query_gradient": {
        32: Settings(32, 32, 4, 1),
        64: Settings(32, 16, 8, 1),
        128: Settings(16, 16, 4, 1),
        256: Settings(16, 16, 8, 1),
    },
    "key_gradient": {
        32: Settings(32, 32, 8, 1),
        64: Settings(32, 16, 8, 1),
        128: Settings(16, 32, 8, 1),
        256: Settings(16, 16, 8, 1),
    },
    "bias_gradient": {
        32: Settings(32, 32, 4, 1),
        64: Settings(32, 16, 8, 1),
        128: Settings(16, 16, 8, 1),
        256: Settings(16, 16, 8, 1),
    },
}
"""For float32, twice the bytes; exact products are computed without the matrix unit."""
_TF32: dict[Job, dict[int, Settings]] = {
    "forward": {
        32: Settings(64, 32, 4, 2),
        64: Settings(64, 32, 4, 2),
        128: Settings(64, 32, 8, 2),
        256: Settings(32, 32, 8, 1),
    },
    "query_gradient": {
        32: Settings(64, 32, 4, 2),
        64: Settings(64, 32, 4, 2),
        128: Settings(32, 32, 8, 1),
        256: Settings(16, 16, 8, 1),
    },
    "key_gradient": {
        32: Settings(32, 64, 4, 2),
        64: Settings(32, 32, 4, 1),
        128: Settings(16, 32, 8, 1),
        256: Settings(16, 16, 8, 1),
    },
    "bias_gradient": {
        32: Settings(64, 32, 4, 1),
        64: Settings(64, 32, 8, 1),
        128: Settings(32, 32, 8, 1),
        256: Settings(16, 16, 8, 1),
    },
}
"""For float32 rounded to TF32, on the matrix unit."""
FEW_KEYS = 256


def settings(problem: Problem, job: Job) -> Settings:
    """The settings of a kernel of this problem."""
    columns = max(32, power_of_two(max(problem.head_dim, problem.value_dim)))
    if problem.is_slab:
        table = _slab_table(problem)
    elif problem.dtype.itemsize == 4:
        table = _TF32 if input_precision(problem) == "tf32" else _EXACT
    elif problem.has_bias or math.prod(problem.window_extent) <= FEW_KEYS:
        table = _NARROW
    else:
        table = _WIDE
    return table[job][columns]


def _slab_table(problem: Problem) -> dict[Job, dict[int, Settings]]:
    """For slabs: what follows from origins, known at run time, takes registers. Fewer keys per tile, or more warps, leave enough."""
    table: dict[Job, dict[int, Settings]]
    table = {job: {**rows, 256: _WIDE.get(job, rows)[256]} for job, rows in _NARROW.items()}
    if problem.dtype.itemsize == 4:
        table = _EXACT
    elif problem.has_bias:
        table["key_gradient"] = {**table["key_gradient"], 128: Settings(32, 32, 8, 2)}
    else:
        return table
    return {
        job: {columns: dataclasses.replace(one, num_warps=8) for columns, one in rows.items()}
        for job, rows in table.items()
    }


def complete(problem: Problem, tiles: Tiles | None, job: Job = "forward") -> Tiles:
    """All four shapes: what the caller left out is counted. `refused` has accepted the rest.

    Args:
      problem: the call.
      tiles: what the caller named.
      job: whose sizes `q` and `kv` have where the caller named none: of the forward, or of dQ with or without a bias.
    """
    if tiles is None:
        tiles = Tiles(*_best_shapes(problem, settings(problem, job), False), dynamic=True)
    if tiles.backward_q is None or tiles.backward_kv is None:
        q, kv = _best_shapes(problem, settings(problem, "key_gradient"), True)
        tiles = dataclasses.replace(tiles, backward_q=q, backward_kv=kv)
    return tiles


def _best_shapes(
    problem: Problem, sizes: Settings, backward: bool
) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """Shapes of a Q and a KV tile: they fill the slab where it is one, else the volume."""
    if problem.is_slab:
        own, visited = (sizes.kv, sizes.q) if backward else (sizes.q, sizes.kv)
        shapes = slab_tiles.best_shapes(problem, own, visited, is_inverse=backward)
        return (shapes[1], shapes[0]) if backward else shapes
    tiles = best_tiles(
        problem.neighborhood,
        problem.global_layout,
        sizes.q,
        sizes.kv,
        dynamic=True,
        backward=backward,
    )
    return tiles.q, tiles.kv


def forward_pairs(problem: Problem, tiles: Tiles) -> tuple[int, int]:
    """Pairs that the forward computes for a batch entry and head, and those of them that pass a mask; of a slab, amid the volume."""
    if not problem.is_slab:
        tiles = dataclasses.replace(tiles, dynamic=True)
        counts = Simulation.of(problem.neighborhood, problem.global_layout, tiles).forward
        pairs = counts.tile_elements * counts.visited_elements
        return counts.computed_pairs, counts.partial * pairs
    return slab_tiles.pairs(problem, tiles.q, tiles.kv or ())


def refused(problem: Problem, tiles: Tiles | None) -> str | None:
    """None, or why the kernels do not take these tiles."""
    if tiles is None:
        return None
    if tiles.dynamic is False:
        return "the Triton kernels start KV tiles where the window starts: use tiles with dynamic=True, or leave it out"
    shapes = {"q": tiles.q, "kv": tiles.kv}
    if tiles.backward_q is not None or tiles.backward_kv is not None:
        shapes |= {"backward_q": tiles.backward_q, "backward_kv": tiles.backward_kv}
    for name, shape in shapes.items():
        if shape is None:
            return f"the Triton kernels take Q tiles and KV tiles together; got {name}=None: name its shape too"
        if len(shape) != problem.rank:
            return f"tiles need one size per spatial axis; got {name}={shape} for a layout of {problem.rank}"
        if any(size & (size - 1) for size in shape) or not LEAST <= math.prod(shape) <= MOST:
            return (
                f"the Triton kernels take tiles of {LEAST} to {MOST} tokens, a power of two on every axis;"
                f" got {name} {by(shape)}: use such a shape, or leave tiles out"
            )
    return None
