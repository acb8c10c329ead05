"""The kernels on a mesh: every device runs them on its own samples and heads, and nothing is gathered.

XLA's partitioner knows nothing about a custom call's axes, and would gather all of an operand on every device. Here it learns
that batch and key/value heads split every array (query heads with their key/value head), and that no other axis does. What the
partitioner does not see, it need not be told: one device, and `shard_map`, where shapes are a device's own already.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from gna_jax.mesh_types import vary_as
from gna_jax.problem import Operands, Problem

BATCH, QUERY_HEADS, HEADS = "batch", "query_heads", "heads"
"""The axes that may be split; any other axis of an array is whole on every device."""

Axes = tuple[str | None, ...]


def token_axes(rank: int, heads: str) -> Axes:
    """Of `[B, *space, heads, H]`."""
    return (BATCH, *(None,) * rank, heads, None)


def row_axes(rank: int) -> Axes:
    """Of `[B, *space, N]`."""
    return (BATCH, *(None,) * rank, QUERY_HEADS)


def operand_axes(problem: Problem, operands: Operands) -> Operands:
    """Of every operand that the call has."""
    keys, additional = token_axes(problem.rank, HEADS), token_axes(1, HEADS)
    axes = Operands(
        query=token_axes(problem.rank, QUERY_HEADS),
        key=keys,
        value=keys,
        query_origin=(None,),
        key_origin=(None,),
        additional_keys=additional,
        additional_values=additional,
        additional_lengths=(BATCH,),
    )
    pairs = zip(axes, operands, strict=True)
    return Operands(*(None if array is None else names for names, array in pairs))


def local_problem(problem: Problem, batch: int, kv_heads: int) -> Problem:
    """A device's share of the problem."""
    query_heads = kv_heads * problem.heads_per_kv
    return dataclasses.replace(problem, batch=batch, query_heads=query_heads, kv_heads=kv_heads)


def partitioned(
    problem: Problem,
    run: Callable[[Problem, Any], Any],
    arguments: Any,
    argument_axes: Any,
    result_axes: Any,
) -> Any:
    """`run(problem, arguments)`, on a mesh with each device's share of both.

    Args:
      problem: the whole call.
      run: computes a (share of a) problem.
      arguments: a tree of arrays.
      argument_axes, result_axes: for every array of arguments and of the result, the name of each axis; trees alike.
    """
    if problem.device.is_interpreted or _is_in_shard_map():
        return vary_as(run(problem, arguments), jax.tree.leaves(arguments)[0])
    arrays, tree = jax.tree.flatten(arguments)
    names = _leaves(argument_axes)
    result_names, result_tree = jax.tree.flatten(result_axes, is_leaf=_is_axes)

    def whole(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        share = local_problem(problem, arrays[0].shape[0], arrays[1].shape[-2])
        return tuple(result_tree.flatten_up_to(run(share, jax.tree.unflatten(tree, arrays))))

    def partition(mesh: Any, shapes: Sequence[Any], results: Any) -> Any:
        del results  # the query decides
        mapping = _mapping(problem, mesh, shapes[0].sharding.spec)
        shardings = lambda axes: tuple(_sharding(mesh, mapping, names) for names in axes)
        return mesh, whole, shardings(result_names), shardings(names)

    function = custom_partitioning(whole)
    rule, replicated = _rule(names, result_names, problem)
    sizes: dict[str, Any] = {"r": problem.heads_per_kv} if "r" in replicated else {}
    function.def_partition(
        partition=partition,
        sharding_rule=rule,
        need_replication_factors=replicated,
        **sizes,
    )
    return jax.tree.unflatten(result_tree, function(*arrays))


def _is_in_shard_map() -> bool:
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and set(mesh.manual_axes) == set(mesh.axis_names)


def _is_axes(names: Any) -> bool:
    return type(names) is tuple and all(name is None or isinstance(name, str) for name in names)


def _leaves(axes: Any) -> list[Axes]:
    return jax.tree.leaves(axes, is_leaf=_is_axes)


def _mapping(problem: Problem, mesh: Any, spec: PartitionSpec) -> dict[str | None, Any]:
    """Mesh axes of batch and heads, from the query's sharding; heads stay whole where key/value heads cannot be split so."""
    parts = (*spec, *(None,) * (problem.rank + 3 - len(spec)))
    batch, heads = parts[0], parts[-2]
    names = heads if isinstance(heads, tuple) else () if heads is None else (heads,)
    split = 1
    for name in names:
        split *= mesh.shape[name]
    heads = heads if problem.kv_heads % split == 0 else None
    return {BATCH: batch, QUERY_HEADS: heads, HEADS: heads, None: None}


def _sharding(mesh: Any, mapping: dict[str | None, Any], names: Axes) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(*(mapping[name] for name in names)))


def _rule(
    names: Sequence[Axes], result_names: Sequence[Axes], problem: Problem
) -> tuple[str, tuple[str, ...]]:
    """Shardy's rule in its own language: letters of split axes are shared, every other axis has a letter of its own."""
    query_heads = "(k r)" if problem.heads_per_kv > 1 else "k"
    shared = {BATCH: "b", QUERY_HEADS: query_heads, HEADS: "k"}
    replicated: list[str] = []  # in the order of their first place in the rule

    def write(axes: Axes) -> str:
        letters = []
        for name in axes:
            if name is None:
                replicated.append(f"w{len(replicated)}")
                letters.append(replicated[-1])
                continue
            letters.append(shared[name])
            if letters[-1] == "(k r)" and "r" not in replicated:
                replicated.append("r")
        return " ".join(letters)

    arguments, results = (", ".join(map(write, some)) for some in (names, result_names))
    return f"{arguments} -> {results}", tuple(replicated)
