"""The kernels as functions of arrays: the class for a GPU generation, arrays as it sees them, a thread block per own tile.

Arguments are checked by `gna_jax.problem` and `limits`, tiles chosen by `gna_jax.backends`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from gna_jax.mesh_types import traced_unvarying
from gna_jax.problem import Operands, Problem
from gna_jax.tiling import Tiles
from pallas_kernels import (
    blackwell_forward,
    blackwell_key_gradient,
    blackwell_query_gradient,
    hopper_forward,
    hopper_key_gradient,
    hopper_query_gradient,
    limits,
)
from pallas_kernels.online_softmax import LOG2_E
from pallas_kernels.plan import TilePlan
from pallas_kernels.row_statistics import from_parts, to_boxes, to_parts
from pallas_kernels.slabs import origin_table, without_outside
from pallas_kernels.tile_kernel import TileKernel

FORWARD, QUERY_GRADIENT, KEY_GRADIENT = "forward", "query_gradient", "key_gradient"
KERNELS = {
    ("Hopper", FORWARD): hopper_forward.ForwardKernel,
    ("Hopper", QUERY_GRADIENT): hopper_query_gradient.QueryGradientKernel,
    ("Hopper", KEY_GRADIENT): hopper_key_gradient.KeyGradientKernel,
    ("Blackwell", FORWARD): blackwell_forward.ForwardKernel,
    ("Blackwell", QUERY_GRADIENT): blackwell_query_gradient.QueryGradientKernel,
    ("Blackwell", KEY_GRADIENT): blackwell_key_gradient.KeyGradientKernel,
}


def forward(
    problem: Problem, operands: Operands, tiles: Tiles, interpret: Any = None
) -> tuple[jax.Array, jax.Array]:
    """`out [B, *space, N, H]` in the operands' dtype and `lse [B, *space, N]` float32, natural log.

    Args:
      problem, tiles: what `limits.supports` accepts.
      operands: query [B, *space, N, H], key and value [B, *space, K, H]; for slabs their origins, int32 [rank].
      interpret: `plgpu.InterpretGPUParams` to run in the interpreter on a CPU, None on a GPU.
    """
    plan = limits.forward_plan(problem, tiles)
    kernel = _kernel(problem, FORWARD)(plan, interpret is not None)
    # Lse by parts, since rows of an uneven layout cannot be clipped on the way out.
    parts = problem.batch, problem.query_heads, plan.num_parts, plan.rows
    out, lse = _launch(
        kernel,
        [_result(kernel), jax.ShapeDtypeStruct(parts, jnp.float32)],
        interpret,
    )(
        *_origins(kernel, operands),
        kernel.queries.split(operands.query),
        *(kernel.keys.split(_visited(plan, operands, x)) for x in (operands.key, operands.value)),
    )
    return kernel.queries.merge(out, problem.query_layout), from_parts(plan, lse / LOG2_E)


def query_gradient(
    problem: Problem,
    operands: Operands,
    tiles: Tiles,
    out_cotangent: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    interpret: Any = None,
) -> jax.Array:
    """`dQ = scale * (P * (dO V^T - delta)) K`, `[B, *space, N, H]` in the operands' dtype.

    Args:
      problem, operands, tiles, interpret: as in `forward`.
      out_cotangent: dO [B, *space, N, H], in the operands' dtype.
      lse: [B, *space, N] float32, natural log.
      delta: [B, *space, N] float32, see `row_statistics.delta`.
    """
    plan = limits.query_gradient_plan(problem, tiles)
    kernel = _kernel(problem, QUERY_GRADIENT)(plan, interpret is not None)
    (gradient,) = _launch(kernel, [_result(kernel)], interpret)(
        *_origins(kernel, operands),
        *_operands_and_cotangent(kernel, operands, out_cotangent),
        to_parts(plan, lse * LOG2_E),
        to_parts(plan, delta),
    )
    return kernel.queries.merge(gradient, problem.query_layout)


def key_gradients(
    problem: Problem,
    operands: Operands,
    tiles: Tiles,
    out_cotangent: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """`dK = scale * (P * (dO V^T - delta))^T Q` and `dV = P^T dO`, `[B, *space, K, H]` in the operands' dtype.

    Wide heads take a pass for each: see `limits.Capacity.key_gradient_passes`. Arguments as in `query_gradient`.
    """
    arguments = operands, tiles, out_cotangent, lse, delta
    of_key, of_value = (
        gradient
        for names in limits.capacity_of(problem).key_gradient_passes
        for gradient in key_gradient_pass(names, problem, *arguments, interpret)
    )
    return of_key, of_value


def key_gradient_pass(
    names: tuple[str, ...],
    problem: Problem,
    operands: Operands,
    tiles: Tiles,
    out_cotangent: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    interpret: Any = None,
) -> tuple[jax.Array, ...]:
    """Those of `key_gradients` that have these names, `"key"` or `"value"`, in one kernel."""
    plan = limits.key_gradient_plan(problem, tiles)
    kernel = _kernel(problem, KEY_GRADIENT)(plan, interpret is not None, names)
    gradients = _launch(kernel, [_result(kernel) for _ in names], interpret)(
        *_origins(kernel, operands),
        *_operands_and_cotangent(kernel, operands, out_cotangent),
        to_boxes(plan, _visited(plan, operands, lse * LOG2_E)),
        to_boxes(plan, _visited(plan, operands, delta)),
    )
    return tuple(kernel.keys.merge(gradient, problem.key_layout) for gradient in gradients)


def _kernel(problem: Problem, job: str) -> type[Any]:
    """The class that does a job on the problem's device."""
    generation = limits.generation_of(problem)
    if generation is None:
        raise NotImplementedError(limits.supports(problem, None))
    return KERNELS[generation.name, job]


def _result(kernel: TileKernel) -> jax.ShapeDtypeStruct:
    """An array of own tiles, as the kernel writes it."""
    problem, array = kernel.plan.problem, kernel.own.array
    return jax.ShapeDtypeStruct(array.shape(problem.batch, kernel.plan.own_layout), problem.dtype)


def _origins(kernel: TileKernel, operands: Operands) -> tuple[jax.Array, ...]:
    """Where slabs lie, the first array that their kernels read; nothing for a whole volume."""
    plan = kernel.plan
    if not plan.problem.is_slab:
        return ()
    return (origin_table(operands, plan.dilation, is_inverse=plan.is_inverse),)


def _visited(plan: TilePlan, operands: Operands, array: jax.Array) -> jax.Array:
    """An array of tokens that blocks visit: of a slab longer than its volume, without what lies outside."""
    if not plan.problem.is_slab:
        return array
    origin = operands.query_origin if plan.is_inverse else operands.key_origin
    return without_outside(array, origin, plan.problem.global_layout)


def _operands_and_cotangent(
    kernel: TileKernel, operands: Operands, out_cotangent: jax.Array
) -> tuple[jax.Array, ...]:
    """What both kernels of gradients read, as they see it."""
    plan, queries = kernel.plan, (operands.query, out_cotangent)
    keys = operands.key, operands.value
    if plan.is_inverse:
        queries = tuple(_visited(plan, operands, array) for array in queries)
    else:
        keys = tuple(_visited(plan, operands, array) for array in keys)
    return (*map(kernel.queries.split, queries), *map(kernel.keys.split, keys))


def _launch(kernel: TileKernel, outputs: list[jax.ShapeDtypeStruct], interpret: Any) -> Any:
    """The kernel with the axes "batch", "head", "tile" and "warpgroup".

    The GPU starts blocks in the order of the grid, its last axis fastest. Tiles of one head, which share keys, are neighbours in
    it; where tiles differ much in work, the heaviest of all heads come first (`python benchmarks/tile_order.py` says why).
    """
    plan = kernel.plan
    sizes = {"batch": plan.problem.batch, "head": plan.own_heads, "tile": plan.num_tiles}
    names = ("batch", "head", "tile")
    if plan.is_uneven and plan.num_tiles <= limits.LONGEST_GRID_AXIS:
        names = ("tile", "batch", "head")
    launch = plgpu.kernel(
        kernel.slab_body if plan.problem.is_slab else kernel.body,
        out_type=outputs,
        scratch_types=kernel.scratch(),
        grid=tuple(sizes[name] for name in names),
        grid_names=names,
        num_threads=kernel.num_warpgroups,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **({} if interpret is None else {"interpret": interpret}),
    )
    return traced_unvarying(launch)
