"""The kernels on the arrays of a call: shapes of results, number of programs, launch settings, and the sums that are left to XLA."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from gna_jax.backends.triton import tiles as tile_choice
from gna_jax.backends.triton.launch import launch
from gna_jax.backends.triton.plan import KernelPlan
from gna_jax.problem import Operands, Problem
from gna_jax.tiling import Tiles

PROGRAMS = 2048
"""Programs that a kernel is split into where one per head and sample would be few: some for every multiprocessor."""


@dataclasses.dataclass(frozen=True)
class Saved:
    """What a backward kernel reads beside the operands: the cotangent of out, lse, and delta."""

    out_cotangent: jax.Array
    lse: jax.Array
    delta: jax.Array


def forward_plan(problem: Problem, tiles: Tiles) -> KernelPlan:
    """The constants of the kernels that own Q tiles: forward, dQ and the bias' gradient."""
    return KernelPlan.of(problem, tiles.q, tiles.kv or ())


def key_gradient_plan(problem: Problem, tiles: Tiles) -> KernelPlan:
    """The constants of the kernel of dK and dV."""
    return KernelPlan.of(problem, tiles.backward_q or (), tiles.backward_kv or ())


def forward(problem: Problem, operands: Operands, tiles: Tiles) -> tuple[jax.Array, jax.Array]:
    """`out [B, *space, N, V]`, `lse [B, *space, N]`."""
    from gna_jax.backends.triton.kernels.forward import forward_kernel

    plan = forward_plan(problem, tiles)
    rows = operands.query.shape[:-1]
    results = (
        jax.ShapeDtypeStruct((*rows, problem.value_dim), problem.dtype),
        jax.ShapeDtypeStruct(rows, jnp.float32),
    )
    return _launch(
        problem,
        plan,
        forward_kernel,
        (*operands[:5], operands.bias, *_additional(operands)),
        results,
        programs=problem.batch * plan.q_tiles * plan.query_heads,
        settings=tile_choice.settings(problem, "forward"),
    )


def query_gradient(problem: Problem, operands: Operands, tiles: Tiles, saved: Saved) -> jax.Array:
    """dQ."""
    from gna_jax.backends.triton.kernels.query_gradient import query_gradient_kernel

    plan = forward_plan(problem, tiles)
    (change,) = _launch(
        problem,
        plan,
        query_gradient_kernel,
        (*operands[:5], operands.bias, *_additional(operands), *_statistics(saved)),
        (_like(operands.query),),
        programs=problem.batch * plan.q_tiles * plan.query_heads,
        settings=tile_choice.settings(problem, "query_gradient"),
    )
    return change


def key_gradients(
    problem: Problem, operands: Operands, tiles: Tiles, saved: Saved
) -> tuple[jax.Array, jax.Array]:
    """dK and dV of the window's keys."""
    from gna_jax.backends.triton.kernels.key_gradient import key_gradient_kernel

    plan = key_gradient_plan(problem, tiles)
    return _launch(
        problem,
        plan,
        key_gradient_kernel,
        (*operands[:5], operands.bias, *_statistics(saved)),
        (_like(operands.key), _like(operands.value)),
        programs=problem.batch * plan.kv_tiles * plan.kv_heads,
        settings=tile_choice.settings(problem, "key_gradient"),
    )


def additional_gradients(
    problem: Problem, operands: Operands, tiles: Tiles, saved: Saved
) -> tuple[jax.Array, jax.Array]:
    """dK and dV of the additional keys: programs sum over runs of tokens, XLA over the runs."""
    from gna_jax.backends.triton.kernels.key_gradient import additional_gradient_kernel

    plan = key_gradient_plan(problem, tiles)
    programs = problem.batch * plan.additional_tiles * plan.kv_heads
    plan = _with_runs(plan, programs, -(-plan.query_tokens // plan.q_rows))
    keys, values = operands.additional_keys, operands.additional_values
    results = tuple(
        jax.ShapeDtypeStruct((plan.runs, *array.shape), jnp.float32) for array in (keys, values)
    )
    parts = _launch(
        problem,
        plan,
        additional_gradient_kernel,
        (operands.query, *_additional(operands), *_statistics(saved)),
        results,
        programs=programs * plan.runs,
        settings=tile_choice.settings(problem, "key_gradient"),
    )
    key_change, value_change = (part.sum(axis=0) for part in parts)
    return key_change.astype(keys.dtype), value_change.astype(values.dtype)


def biased_query_gradient(
    problem: Problem, operands: Operands, tiles: Tiles, saved: Saved
) -> tuple[jax.Array, jax.Array]:
    """dQ, and every sample's share of the bias' gradient, `[B, N, *(2 * window - 1)]` float32.

    Programs sum over runs of tiles, XLA over the runs.
    """
    from gna_jax.backends.triton.kernels.bias_gradient import bias_gradient_kernel

    plan = forward_plan(problem, tiles)
    programs = problem.batch * plan.query_heads
    plan = _with_runs(plan, programs, plan.q_tiles)
    programs *= plan.runs
    scratch = jax.ShapeDtypeStruct((programs, plan.q_rows, plan.slots), jnp.float32)
    shape = (problem.batch, plan.runs, plan.query_heads, *operands.bias.shape[1:])
    change, _, parts = _launch(
        problem,
        plan,
        bias_gradient_kernel,
        (*operands[:5], operands.bias, *_additional(operands), *_statistics(saved)),
        (_like(operands.query), scratch, jax.ShapeDtypeStruct(shape, jnp.float32)),
        programs=programs,
        settings=tile_choice.settings(problem, "bias_gradient"),
    )
    return change, parts.sum(axis=1)


def _with_runs(plan: KernelPlan, programs: int, most: int) -> KernelPlan:
    """The plan with its sum split, so that there are about `PROGRAMS`; no run is empty."""
    wanted = max(1, min(most, PROGRAMS // programs))
    # Runs are of equal size, so fewer may do.
    size = -(-most // wanted)
    return dataclasses.replace(plan, runs=-(-most // size))


def _additional(operands: Operands) -> tuple[Any, Any, Any]:
    return operands.additional_keys, operands.additional_values, operands.additional_lengths


def _statistics(saved: Saved) -> tuple[jax.Array, jax.Array, jax.Array]:
    return saved.out_cotangent, saved.lse, saved.delta


def _like(array: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def _launch(
    problem: Problem,
    plan: KernelPlan,
    kernel: Any,
    arguments: tuple[Any, ...],
    results: tuple[jax.ShapeDtypeStruct, ...],
    *,
    programs: int,
    settings: tile_choice.Settings,
) -> Any:
    return launch(
        kernel,
        arguments,
        results,
        programs=programs,
        plan=plan,
        device=problem.device,
        num_warps=settings.num_warps,
        num_stages=settings.num_stages,
    )
