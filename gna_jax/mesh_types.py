"""Keeping batch and head sharding on every kind of mesh: the types that JAX attaches to arrays on a mesh.

Backends loop over tiles of the spatial axes and treat batch and heads as batch axes of every product, so XLA's
partitioner keeps both sharded by itself. What is left, and lives here:

- Explicit meshes (the default of `jax.make_mesh`) carry the sharding in an array's type; a backend runs with all axes
  handed to the partitioner (`jax.sharding.auto_axes`), and its results get the operands' sharding back.
- `shard_map(check_vma=True)` types an array by the mesh axes over which it varies; operands that vary over fewer axes
  than the others are cast, and the cast's transpose sums their gradients over the rest.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

from gna_jax.problem import Operands


def vary_together(operands: Operands) -> Operands:
    """All operands varying over the union of the manual mesh axes that any of them varies over."""
    arrays = [x for x in operands if x is not None]
    union = frozenset().union(*(_varying(x) for x in arrays))
    return Operands(*(None if x is None else _cast(x, union) for x in operands))


def vary_as(tree: Any, like: Any) -> Any:
    """The arrays of a tree varying over the manual mesh axes that `like` varies over: a kernel's results come without."""
    return jax.tree.map(lambda array: _cast(array, _varying(like)), tree)


def traced_unvarying(function: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    """A function of arrays that is traced as outside of any `shard_map`; its results come without axes over which they vary.

    For kernels, whose bodies are programs of one device: jax refuses to trace some of what they use on references that vary
    over mesh axes (`mpmd_map` in jax 0.12).
    """

    def run(*arrays: Any) -> list[Any]:
        if not any(map(_varying, arrays)):
            return function(*arrays)
        from jax.extend.core import jaxpr_as_fun  # here: jax.extend takes long to import

        shapes = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays]
        return jaxpr_as_fun(jax.make_jaxpr(function)(*shapes))(*arrays)

    return run


def _cast(array: Any, axes: frozenset) -> Any:
    missing = tuple(sorted(axes - _varying(array)))
    return jax.lax.pcast(array, missing, to="varying") if missing else array


def _varying(array: Any) -> frozenset:
    manual = getattr(jax.typeof(array), "manual_axis_type", None)
    return frozenset(manual.varying) if manual is not None else frozenset()


def explicit_spec(array: Any) -> PartitionSpec | None:
    """The sharding in an array's type where its mesh has Explicit axes; None elsewhere."""
    sharding = jax.typeof(array).sharding
    if sharding.mesh.empty or not sharding.mesh.explicit_axes:
        return None
    return sharding.spec


def check_spatial_axes(operands: Operands) -> None:
    """Raise ValueError where the type of query, key or value says that a spatial axis is sharded."""
    for name in ("query", "key", "value"):
        array = getattr(operands, name)
        spec = explicit_spec(array)
        if spec is not None and any(part is not None for part in spec[1 : array.ndim - 2]):
            raise ValueError(
                f"the spatial axes of {name} must not be sharded, a window would reach into other devices; got {spec};"
                " shard batch or heads, or exchange halos and use gna_jax.attention.slab_attention"
            )


def like_query(query: Any, ndim: int) -> PartitionSpec | None:
    """Sharding of an array `[B, *space, N]` or `[B, *space, N, V]`: the query's, apart from its head dim."""
    spec = explicit_spec(query)
    if spec is None:
        return None
    parts = [*spec, *(None,) * (query.ndim - len(spec))]
    return PartitionSpec(*parts[:-1], *(None,) * (ndim - query.ndim + 1))


def on_auto_axes(
    function: Callable[..., Any], arguments: tuple[Operands, *tuple[Any, ...]], out_specs: Any
) -> Any:
    """`function(*arguments)` with every mesh axis left to the partitioner, results sharded as `out_specs`.

    `out_specs` is None off an Explicit mesh: then this is a plain call. The mesh is the one in the query's type, which
    is there without `jax.set_mesh` too.
    """
    if out_specs is None:
        return function(*arguments)
    with jax.sharding.use_abstract_mesh(jax.typeof(arguments[0].query).sharding.mesh):
        return jax.sharding.auto_axes(function, out_sharding=out_specs)(*arguments)
