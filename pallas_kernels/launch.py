"""The call of a kernel: a thread block per batch entry, head and own tile, in the order that keeps the GPU busy."""

from collections.abc import Callable
from typing import Any

from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.limits import LONGEST_GRID_AXIS
from pallas_kernels.plan import TilePlan


def launch(
    body: Callable[..., None],
    plan: TilePlan,
    *,
    heads: int,
    num_warpgroups: int,
    outputs: Any,
    scratch: Any,
    interpret: Any,
) -> Callable[..., Any]:
    """`plgpu.kernel` with the axes "batch", "head", "tile" and "warpgroup".

    The GPU starts blocks in the order of the grid, its last axis fastest. Tiles of one head, which share keys, are neighbours in
    it; where tiles differ much in work, the heaviest of all heads come first (`python benchmarks/tile_order.py` says why).
    """
    batch = plan.problem.batch
    sizes = {"batch": batch, "head": heads, "tile": plan.num_tiles}
    names = ("batch", "head", "tile")
    if plan.is_uneven and plan.num_tiles <= LONGEST_GRID_AXIS:
        names = ("tile", "batch", "head")
    return plgpu.kernel(
        body,
        out_type=outputs,
        scratch_types=scratch,
        grid=tuple(sizes[name] for name in names),
        grid_names=names,
        num_threads=num_warpgroups,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **({} if interpret is None else {"interpret": interpret}),
    )
