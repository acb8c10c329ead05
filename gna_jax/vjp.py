"""The one custom_vjp around every backend but the reference.

Forward returns `(out, lse)`, both real outputs: the cotangent of lse is honoured, so whatever is built from out and lse
(merging, for one) differentiates exactly. Residuals are the operands, out and lse; the last two carry the checkpoint
names `OUT_NAME` and `LSE_NAME` for `jax.checkpoint` policies. Inside, `jax.vmap` folds into the batch axis.

No argument is checked here (`gna_jax.problem`), no backend chosen (`gna_jax.backends`).
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_batching import custom_vmap
from jax.sharding import PartitionSpec

from gna_jax import backends
from gna_jax.mesh_types import explicit_spec, like_query, on_auto_axes
from gna_jax.problem import Operands, Problem
from gna_jax.tiling import Tiles

OUT_NAME = "gna_out"
LSE_NAME = "gna_lse"
"""Names of the residuals, for `jax.checkpoint_policies.save_only_these_names`."""

Outputs = tuple[jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static side of a call: what to compute and which implementation computes it."""

    problem: Problem
    implementation: str
    tiles: Tiles | None

    def folded(self, size: int) -> "Plan":
        """The plan of `size` calls whose batch axes are joined."""
        problem = dataclasses.replace(self.problem, batch=self.problem.batch * size)
        return dataclasses.replace(self, problem=problem)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(plan: Plan, operands: Operands) -> Outputs:
    """`out [B, *space, N, V]`, `lse [B, *space, N]` by the plan's backend, differentiable once, in reverse."""
    return _forward(plan, operands)


def _attend_forward(plan: Plan, operands: Operands) -> tuple[Outputs, Any]:
    out, lse = _forward(plan, operands)
    out, lse = checkpoint_name(out, OUT_NAME), checkpoint_name(lse, LSE_NAME)
    return (out, lse), (operands, out, lse)


def _attend_backward(plan: Plan, residuals: Any, cotangents: Outputs) -> tuple[Operands]:
    operands, out, lse = residuals
    gradients = _backward(plan, operands, (out, lse), cotangents)
    if operands.bias is not None:
        bias = jnp.sum(gradients.bias, axis=0).astype(operands.bias.dtype)
        gradients = gradients._replace(bias=bias)
    return (gradients,)


attend.defvjp(_attend_forward, _attend_backward)


def _forward(plan: Plan, operands: Operands) -> Outputs:
    with jax.named_scope("gna"):
        return _foldable(plan, _run_forward, operands)


def _backward(plan: Plan, operands: Operands, saved: Outputs, cotangents: Outputs) -> Operands:
    with jax.named_scope("gna_backward"):
        return _foldable(plan, _run_backward, operands, saved, cotangents)


def _run_forward(plan: Plan, operands: Operands) -> Outputs:
    def run(operands: Operands) -> Outputs:
        return _on_platform(plan, "forward", operands)

    out = like_query(operands.query, operands.query.ndim)
    lse = like_query(operands.query, operands.query.ndim - 1)
    return on_auto_axes(run, (operands,), None if out is None else (out, lse))


def _run_backward(plan: Plan, *arguments: Any) -> Operands:
    def run(operands: Operands, saved: Outputs, cotangents: Outputs) -> Operands:
        return _on_platform(plan, "backward", operands, saved, cotangents)

    operands = arguments[0]
    specs = Operands(*(None if x is None else explicit_spec(x) for x in operands))
    specs = specs._replace(query_origin=None, key_origin=None, additional_lengths=None)
    if specs.bias is not None:
        specs = specs._replace(bias=PartitionSpec(specs.query[0], *specs.bias))
    return on_auto_axes(run, arguments, None if specs.query is None else specs)


def _on_platform(plan: Plan, direction: str, *arguments: Any) -> Any:
    """The chosen backend where the program is lowered for one of its platforms, "xla" where it is not.

    A GPU that JAX's interpreter plays is lowered for the CPU, and runs its own backend.
    """
    chosen = backends.load(plan.implementation)

    def call(backend: Any, tiles: Tiles | None, *arguments: Any) -> Any:
        operands, *rest = arguments
        return getattr(backend, direction)(plan.problem, operands, tiles, *rest)

    if chosen.PLATFORMS is None or plan.problem.device.is_interpreted:
        return call(chosen, plan.tiles, *arguments)
    mine = functools.partial(call, chosen, plan.tiles)
    return jax.lax.platform_dependent(
        *arguments,
        default=functools.partial(call, backends.load("xla"), None),
        **dict.fromkeys(chosen.PLATFORMS, mine),
    )


def _foldable(plan: Plan, call: Callable[..., Any], *arguments: Any) -> Any:
    """`call(plan, *arguments)`, under which `jax.vmap` joins the mapped axis to the batch axis.

    Every result has a leading batch axis. Origins and bias have none to join: mapped over, they loop.
    """

    @custom_vmap
    def run(*arguments: Any) -> Any:
        return call(plan, *arguments)

    @run.def_vmap
    def fold(size: int, batched: list[Any], *arguments: Any) -> tuple[Any, Any]:
        flags = batched[0]
        if any(getattr(flags, name) for name in _WITHOUT_BATCH):
            results = _loop(batched, arguments, functools.partial(_foldable, plan, call))
        else:
            operands = arguments[0]
            kept = {name: getattr(operands, name) for name in _WITHOUT_BATCH}
            joined = jax.tree.map(functools.partial(_join, size), list(batched), list(arguments))
            joined[0] = joined[0]._replace(**kept)
            results = _foldable(plan.folded(size), call, *joined)
            results = jax.tree.map(functools.partial(_part, size), results)
        return results, jax.tree.map(lambda _: True, results)

    return run(*arguments)


_WITHOUT_BATCH = ("query_origin", "key_origin", "bias")


def _join(size: int, is_batched: bool, array: jax.Array) -> jax.Array:
    """`[size, B, ..]` (or `[B, ..]`, repeated) -> `[B * size, ..]`.

    The batch axis stays the major one, so that a sharded batch stays sharded.
    """
    array = array if is_batched else jnp.broadcast_to(array[None], (size, *array.shape))
    array = jnp.swapaxes(array, 0, 1)
    return array.reshape(array.shape[0] * size, *array.shape[2:])


def _part(size: int, array: jax.Array) -> jax.Array:
    """The inverse of `_join`: `[B * size, ..]` -> `[size, B, ..]`."""
    array = array.reshape(array.shape[0] // size, size, *array.shape[1:])
    return jnp.swapaxes(array, 0, 1)


def _loop(batched: list[Any], arguments: Sequence[Any], call: Callable[..., Any]) -> Any:
    """`call` once per entry of the mapped axis, one after the other."""
    flags, tree = jax.tree.flatten(list(batched))
    leaves = tree.flatten_up_to(list(arguments))
    mapped = [leaf for leaf, flag in zip(leaves, flags, strict=True) if flag]

    def one(mapped: list[jax.Array]) -> Any:
        entries = iter(mapped)
        mixed = [next(entries) if flag else leaf for leaf, flag in zip(leaves, flags, strict=True)]
        return call(*jax.tree.unflatten(tree, mixed))

    return jax.lax.map(one, mapped)
