"""The kernels of a call, one by one, as `gna-jax inspect` compiles them."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from gna_jax.backends.mosaic import head_dims
from gna_jax.problem import Operands, Problem
from gna_jax.tiling import Tiles
from pallas_kernels import calls, limits
from pallas_kernels.plan import TilePlan


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel of a call.

    Attributes:
      name: generation and job, e.g. `"hopper_forward"`.
      direction: `"forward"` or `"backward"`.
      call: runs it, on `arguments`.
      arguments: shapes and dtypes of its arrays.
      plan: its tiles and walk.
    """

    name: str
    direction: str
    call: Callable[..., Any]
    arguments: tuple[Any, ...]
    plan: TilePlan


def interpretation(problem: Problem) -> Any:
    """The `interpret=` of a kernel: None on a GPU. In `interpret_gpu`, JAX's own context overrides it."""
    return plgpu.InterpretGPUParams() if problem.device.is_interpreted else None


def kernels(problem: Problem, tiles: Tiles) -> tuple[Kernel, ...]:
    """The kernels of a call, forward and backward, for `tiles` that `supports` accepts and that name all four shapes."""
    problem = head_dims.pad_problem(problem)
    generation = limits.generation_of(problem)
    if generation is None:
        raise NotImplementedError(limits.supports(problem, None))
    width, dtype, interpret = problem.head_dim, problem.dtype, interpretation(problem)
    tokens = lambda layout, heads: jax.ShapeDtypeStruct(
        (problem.batch, *layout, heads, width), dtype
    )
    key = tokens(problem.key_layout, problem.kv_heads)
    operands = Operands(tokens(problem.query_layout, problem.query_heads), key, key)
    if problem.is_slab:
        origin = jax.ShapeDtypeStruct((problem.rank,), jnp.int32)
        operands = operands._replace(query_origin=origin, key_origin=origin)
    row = jax.ShapeDtypeStruct(operands.query.shape[:-1], jnp.float32)
    arguments = (operands, operands.query, row, row)

    def forward(operands: Operands) -> Any:
        return calls.forward(problem, operands, tiles, interpret)

    def backward(function: Callable[..., Any], operands: Operands, *rest: jax.Array) -> Any:
        return function(problem, operands, tiles, *rest, interpret)

    plan = limits.query_gradient_plan(problem, tiles)
    call = functools.partial(backward, calls.query_gradient)
    found = [
        Kernel("forward", "forward", forward, (operands,), limits.forward_plan(problem, tiles)),
        Kernel("query_gradient", "backward", call, arguments, plan),
    ]
    plan = limits.key_gradient_plan(problem, tiles)
    for names in limits.capacity_of(problem).key_gradient_passes:
        of_pass = functools.partial(calls.key_gradient_pass, names)
        call = functools.partial(backward, of_pass)
        found.append(Kernel(f"{names[0]}_gradient", "backward", call, arguments, plan))
    prefix = generation.name.lower()
    return tuple(dataclasses.replace(kernel, name=f"{prefix}_{kernel.name}") for kernel in found)
