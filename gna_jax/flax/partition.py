"""How weights and activations lie on a mesh, all from the one `spec` of a module's attention; no flax is imported here.

The spec is of `[B, *space, heads, head_dim]` and names every axis. Activations follow its batch and space: JAX's partitioner
sees to that. Weights follow its heads, as in tensor parallelism: maps into heads and hidden features are cut by columns, maps
out of them by rows, whose results are summed. That stands in the parameters' metadata, which flax applies on making them.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from gna_jax.attention import gna
from gna_jax.mesh_types import explicit_spec
from gna_jax.sharding import gna_sharded


def attention_over(spec: PartitionSpec | None) -> Callable[..., Any]:
    """`gna`, or with a spec `gna_sharded` on the mesh of `jax.set_mesh`."""
    return gna if spec is None else functools.partial(gna_sharded, spec=spec)


def over_shards(function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """`jax.shard_map` of `function` on the mesh of `jax.set_mesh`, which brings its arguments to `in_specs`.

    Raises:
      ValueError: when called while no mesh is set.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        raise ValueError(
            "a spec needs a mesh, and none is set; call the model under jax.set_mesh(mesh)"
        )

    def run(*arrays: Any) -> Any:
        if AxisType.Explicit in mesh.axis_types:  # Auto ones are brought there by the partitioner
            shard = lambda x, spec: jax.reshard(x, NamedSharding(mesh, spec))
            arrays = jax.tree.map(shard, arrays, in_specs)
        return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs)(*arrays)

    return run


def check_spec(spec: PartitionSpec | None, rank: int | None = None) -> None:
    """Raise ValueError unless `spec` is None or has one entry per axis of `[B, *space, heads, head_dim]`, the last one None."""
    if spec is None:
        return
    lengths = (4, 5, 6) if rank is None else (rank + 3,)
    if len(spec) not in lengths or spec[-1] is not None:
        raise ValueError(
            "spec must have one entry per axis of [batch, *space, heads, head_dim], the last one None, that is"
            f" {' or '.join(map(str, lengths))} of them; got spec={spec};"
            ' write e.g. P("data", "rows", None, "heads", None) for a 2-D layout'
        )


def over_heads(spec: PartitionSpec | None, axis: int, ndim: int) -> dict[str, Any]:
    """Metadata of a parameter whose `axis` of `ndim` counts heads or what is sharded like them; none if heads are not."""
    heads = None if spec is None else spec[-2]
    if heads is None:
        return {}
    return {"out_sharding": (*(None,) * axis, heads, *(None,) * (ndim - axis - 1))}


def into_heads(spec: PartitionSpec | None) -> dict[str, Any]:
    """Metadata of a map `[C, heads, head_dim]`, as arguments of flax's linear layers."""
    return _metadata(over_heads(spec, 1, 3), over_heads(spec, 0, 2))


def out_of_heads(spec: PartitionSpec | None) -> dict[str, Any]:
    """Metadata of a map `[heads, head_dim, C]`."""
    return _metadata(over_heads(spec, 0, 3), {"out_sharding": (None,)})


def into_hidden(spec: PartitionSpec | None) -> dict[str, Any]:
    """Metadata of an MLP's first layer, `[C, hidden]`: hidden features are sharded as heads are."""
    return _metadata(over_heads(spec, 1, 2), over_heads(spec, 0, 1))


def out_of_hidden(spec: PartitionSpec | None) -> dict[str, Any]:
    """Metadata of an MLP's last layer, `[hidden, C]`."""
    return _metadata(over_heads(spec, 0, 2), {"out_sharding": (None,)})


def summed_over(
    layer: Callable[..., Array], x: Float[Array, "B ..."], axes: int = 1
) -> Float[Array, "B ..."]:
    """`layer(x)` of a linear layer over the last `axes` axes of `x`, sharded as the others of `x` are."""
    sharding = sharding_of_sum(x, axes)
    return layer(x) if sharding is None else layer(x, out_sharding=sharding)


def sharding_of_sum(x: Float[Array, "B ..."], axes: int) -> PartitionSpec | None:
    """Sharding of a product of matrices that sums over the last `axes` axes of `x`, where it has to be said; else None.

    If those axes are sharded there are partial sums to add up. The partitioner of an Auto mesh sees how; the types of an
    Explicit one want to be told.
    """
    spec = explicit_spec(x)
    if spec is None:
        return None
    return PartitionSpec(*(*spec, *(None,) * (x.ndim - len(spec)))[: x.ndim - axes])


def _metadata(kernel: dict[str, Any], bias: dict[str, Any]) -> dict[str, Any]:
    return {"kernel_metadata": kernel, "bias_metadata": bias} if kernel else {}
