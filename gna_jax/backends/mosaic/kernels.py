"""Which kernel module serves which GPU generation and direction, and the kernels of a call as `gna-jax inspect` compiles them."""

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from gna_jax.backends.mosaic import head_dims
from gna_jax.problem import Operands, Problem
from gna_jax.tiling import Tiles
from pallas_kernels import limits
from pallas_kernels.plan import TilePlan

FORWARD, QUERY_GRADIENT, KEY_GRADIENT = "forward", "query_gradient", "key_gradient"


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel of a call.

    Attributes:
      name: generation and job, e.g. `"hopper_forward"`: its module in `pallas_kernels`.
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


def kernel_module(problem: Problem, job: str) -> Any:
    """The module in `pallas_kernels` that does a job on the problem's device."""
    generation = limits.generation_of(problem)
    if generation is None:
        raise NotImplementedError(limits.supports(problem, None))
    return importlib.import_module(f"pallas_kernels.{generation.name.lower()}_{job}")


def interpretation(problem: Problem) -> Any:
    """The `interpret=` of a kernel: None on a GPU. In `interpret_gpu`, JAX's own context overrides it."""
    return plgpu.InterpretGPUParams() if problem.device.is_interpreted else None


def kernels(problem: Problem, tiles: Tiles) -> tuple[Kernel, ...]:
    """The kernels of a call, forward and backward, for `tiles` that `supports` accepts and that name all four shapes."""
    problem = head_dims.pad_problem(problem)
    modules = {job: kernel_module(problem, job) for job in (FORWARD, QUERY_GRADIENT, KEY_GRADIENT)}
    width, dtype = problem.head_dim, problem.dtype
    tokens = lambda heads: jax.ShapeDtypeStruct(
        (problem.batch, *problem.query_layout, heads, width), dtype
    )
    operands = Operands(*map(tokens, (problem.query_heads, problem.kv_heads, problem.kv_heads)))
    row = jax.ShapeDtypeStruct(operands.query.shape[:-1], jnp.float32)
    gradient_arguments = (operands, operands.query, row, row)

    def forward(operands: Operands) -> Any:
        return modules[FORWARD].forward(problem, operands, tiles, interpretation(problem))

    def query_gradient(operands: Operands, *rest: jax.Array) -> Any:
        arguments = problem, operands, tiles, *rest, interpretation(problem)
        return modules[QUERY_GRADIENT].query_gradient(*arguments)

    def key_gradients(operands: Operands, *rest: jax.Array) -> Any:
        arguments = problem, operands, tiles, *rest, interpretation(problem)
        return modules[KEY_GRADIENT].key_gradients(*arguments)

    return tuple(
        Kernel(modules[job].__name__.rpartition(".")[2], direction, call, arguments, plan)
        for job, direction, call, arguments, plan in (
            (FORWARD, "forward", forward, (operands,), limits.forward_plan(problem, tiles)),
            (
                QUERY_GRADIENT,
                "backward",
                query_gradient,
                gradient_arguments,
                limits.query_gradient_plan(problem, tiles),
            ),
            (
                KEY_GRADIENT,
                "backward",
                key_gradients,
                gradient_arguments,
                limits.key_gradient_plan(problem, tiles),
            ),
        )
    )
