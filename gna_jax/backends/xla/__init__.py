"""Backend "xla": tiles of queries times boxes of keys in plain XLA, forward and backward, on every platform.

Reading order: `gna_jax.simulator.query_box_cost` (how large tiles are), `tile_classes` (which tiles, which boxes), `tile` (reading and writing one),
`scores` and `bias` (arithmetic on one), `forward`, `backward`.
"""

import math
from typing import Any

import jax

from gna_jax.backends.xla import backward as _backward
from gna_jax.backends.xla import forward as _forward
from gna_jax.backends.xla.tile_classes import TileClass, build_classes, slab_class
from gna_jax.problem import Operands, Problem, Workload, check_gradients, without_float8
from gna_jax.simulator.query_box_cost import Axes, choose_tiles, predicted_time
from gna_jax.tiling import Tiles

PLATFORMS = None  # every one


def supports(problem: Problem, tiles: Tiles | None) -> str | None:
    """None, or why this backend cannot run the problem with these tiles."""
    if tiles is not None and (tiles.kv is not None or tiles.backward_kv is not None):
        return (
            "xla reads the key box of a query tile whole, it has no KV tile;"
            f" got kv={tiles.kv}, backward_kv={tiles.backward_kv}: pass Tiles(q=..., kv=None)"
        )
    if tiles is not None and tiles.dynamic is False:
        return (
            "xla starts every key box where the window starts; got dynamic=False: pass dynamic=None"
        )
    return None


def query_tile(problem: Problem, tiles: Tiles | None, backward: bool) -> Axes:
    """Queries per tile and axis, and whether an axis is cut at its edges: the caller's tiles, or the cheapest."""
    if tiles is None:
        return choose_tiles(problem, backward)
    wanted = tiles.backward_q if backward and tiles.backward_q is not None else tiles.q
    return tuple((size, not problem.is_slab) for size in wanted)


def forward(
    problem: Problem, operands: Operands, tiles: Tiles | None
) -> tuple[jax.Array, jax.Array]:
    """`out [B, *space, N, V]`, `lse [B, *space, N]`."""
    problem, operands = without_float8(problem, operands)
    classes = _classes(problem, operands, query_tile(problem, tiles, backward=False))
    return _forward.forward(problem, operands, classes)


def backward(
    problem: Problem,
    operands: Operands,
    tiles: Tiles | None,
    saved: tuple[jax.Array, jax.Array],
    cotangents: tuple[jax.Array, jax.Array],
) -> Operands:
    """Gradients of the floating operands; the bias's has a leading batch axis."""
    check_gradients(problem)
    classes = _classes(problem, operands, query_tile(problem, tiles, backward=True))
    return _backward.backward(problem, operands, classes, saved, cotangents)


def workload(problem: Problem, tiles: Tiles | None) -> Workload:
    """The tiles this backend uses for the whole volume, and the pairs its forward computes."""
    tile = query_tile(problem, tiles, backward=False)
    back = query_tile(problem, tiles, backward=True)
    classes = build_classes(problem, tile)
    pairs = [[c.num_tiles * c.query_length * c.box_length for c in axis] for axis in classes]
    full = [
        sum(size for size, c in zip(sizes, axis, strict=True) if c.is_full)
        for sizes, axis in zip(pairs, classes, strict=True)
    ]
    computed = math.prod(sum(sizes) for sizes in pairs)
    return Workload(
        tiles=Tiles(
            q=tuple(size for size, _ in tile), kv=None, backward_q=tuple(size for size, _ in back)
        ),
        computed_pairs=computed,
        masked_pairs=computed - math.prod(full),
        # Elsewhere the rates are orders of magnitude, good enough to rank tiles.
        seconds=predicted_time(problem, tile, backward=False).total * 1e-9
        if problem.device.platform == "cpu"
        else None,
    )


def _classes(problem: Problem, operands: Operands, tile: Any) -> tuple[tuple[TileClass, ...], ...]:
    if not problem.is_slab:
        return build_classes(problem, tile)
    return tuple(
        (
            slab_class(
                axis,
                length=problem.global_layout[n],
                query_length=problem.query_layout[n],
                key_length=problem.key_layout[n],
                query_origin=operands.query_origin[n],
                key_origin=operands.key_origin[n],
                tile=tile[n][0],
            ),
        )
        for n, axis in enumerate(problem.neighborhood.axes)
    )
