"""Neighborhood attention over a mesh of devices: any of batch, heads and spatial axes sharded together.

A window needs the keys around it, not all keys. So where a spatial axis is sharded, devices exchange halos (`gna_jax.halo` says
which rows) by collective permutes, and each runs `slab_attention` on its queries. Gradients of halos go back the same way, by
the transposes of the permutes. Queries, keys and values are never gathered.

`gna_sharded` takes global arrays, `shard_attention` a device's shards inside one's own `jax.shard_map`, `merge_over_mesh` is for
queries that see keys on all devices. Batch and heads alone need none of this: `gna` keeps their sharding by itself.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, ArrayLike, Float, Int

from gna_jax.attention import as_operands, gna, problem_of, slab_attention
from gna_jax.device import DeviceSpec, resolve_device
from gna_jax.halo import Box, halos, interior_share
from gna_jax.halo_exchange import (
    MeshAxes,
    Outputs,
    as_names,
    box_of,
    in_parts,
    shard_origin,
    shards_of,
    with_halos,
)
from gna_jax.neighborhood import Flags, Neighborhood, Sizes
from gna_jax.problem import Operands, check_rank
from gna_jax.tiling import Tiles


@dataclasses.dataclass(frozen=True)
class _Options:
    """The static arguments of `gna`, as it takes them."""

    window_size: Sizes
    stride: Sizes
    dilation: Sizes
    is_causal: Flags
    scale: float | None
    precision: jax.lax.PrecisionLike
    implementation: str | Sequence[str] | None
    tiles: Tiles | None
    device: str | DeviceSpec | None

    def neighborhood(self, rank: int) -> Neighborhood:
        """The windows alone."""
        return Neighborhood.of(
            rank,
            window_size=self.window_size,
            stride=self.stride,
            dilation=self.dilation,
            is_causal=self.is_causal,
        )

    def arguments(self) -> dict[str, Any]:
        """By name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def gna_sharded(
    query: Float[ArrayLike, "B *space N H"],
    key: Float[ArrayLike, "B *space K H"],
    value: Float[ArrayLike, "B *space K V"],
    *,
    spec: PartitionSpec,
    mesh: Mesh | AbstractMesh | None = None,
    additional_spec: PartitionSpec | None = None,
    overlap: bool | None = None,
    window_size: Sizes,
    stride: Sizes = 1,
    dilation: Sizes = 1,
    is_causal: Flags = False,
    scale: float | None = None,
    additional_keys: Float[ArrayLike, "B S K H"] | None = None,
    additional_values: Float[ArrayLike, "B S K V"] | None = None,
    additional_lengths: Int[ArrayLike, " B"] | None = None,
    relative_position_bias: Float[ArrayLike, "N ..."] | None = None,
    return_lse: bool = False,
    precision: jax.lax.PrecisionLike = None,
    implementation: str | Sequence[str] | None = None,
    tiles: Tiles | None = None,
    device: str | DeviceSpec | None = None,
) -> Any:
    """`gna` of arrays that are sharded over a mesh: same values, sharded as `spec`.

    Args:
      query, key, value: global arrays. Fewer key/value heads than shards of the head axis are used by several shards each.
      spec: sharding of `[B, *space, N, H]` for query, key, value and out, e.g. `P("data", "time", None, None, "heads")`; the
        last entry, head dim, is None. A spatial axis must be cut into equal shards of any size, smaller than a window too.
      mesh: the devices. Default: the current mesh (`jax.set_mesh`), else that of the query.
      additional_spec: sharding of additional keys' tokens, e.g. `P("data", "time")`; their batch and heads are sharded as
        the spec says. Tokens that are sharded are gathered: each query sees all of them. Default: not sharded.
      overlap: whether queries that see their own shard alone are a call of their own, which a GPU can run while halos are on
        their way. None: on a GPU, if they are at least half of the queries.

    Other arguments as in `gna`.

    Raises:
      ValueError: what `gna` raises; a spec that does not fit the arrays or the mesh, or cuts a spatial axis into unequal shards.
    """
    options = _Options(
        window_size, stride, dilation, is_causal, scale, precision, implementation, tiles, device
    )
    operands = as_operands(
        query,
        key,
        value,
        additional=(additional_keys, additional_values, additional_lengths),
        bias=relative_position_bias,
    )
    layout = _MeshLayout.of(
        operands, options, _mesh_of(mesh, operands.query), spec, additional_spec
    )

    def attend(operands: Operands) -> Outputs:
        return _attend(
            layout.with_own_heads(operands), layout.space, layout.tokens, options, overlap
        )

    mapped = jax.shard_map(
        attend, mesh=layout.mesh, in_specs=(layout.specs(operands),), out_specs=layout.out_specs
    )
    out, lse = mapped(layout.placed(operands))
    return (out, lse) if return_lse else out


def shard_attention(
    query: Float[Array, "B *space N H"],
    key: Float[Array, "B *space K H"],
    value: Float[Array, "B *space K V"],
    *,
    spatial_axes: Sequence[MeshAxes],
    additional_axes: MeshAxes = None,
    overlap: bool | None = None,
    window_size: Sizes,
    stride: Sizes = 1,
    dilation: Sizes = 1,
    is_causal: Flags = False,
    scale: float | None = None,
    additional_keys: Float[Array, "B S K H"] | None = None,
    additional_values: Float[Array, "B S K V"] | None = None,
    additional_lengths: Int[Array, " B"] | None = None,
    relative_position_bias: Float[Array, "N ..."] | None = None,
    return_lse: bool = False,
    precision: jax.lax.PrecisionLike = None,
    implementation: str | Sequence[str] | None = None,
    tiles: Tiles | None = None,
    device: str | DeviceSpec | None = None,
) -> Any:
    """`gna` inside one's own `jax.shard_map`: arrays are a device's shards, windows are those of the whole volume.

    Args:
      query, key, value: the shards; batch and heads may be shards too, with the key/value heads of their query heads.
      spatial_axes: the mesh axes over which each spatial axis is sharded, one entry per axis: None, a name, or names.
      additional_axes: mesh axes over which the additional tokens are sharded; they are gathered over them.
      overlap: as in `gna_sharded`.

    Other arguments as in `gna`, for the shard's batch and heads.

    Raises:
      ValueError: what `gna` raises, for the whole volume; a mesh axis that the surrounding shard_map does not map.
    """
    options = _Options(
        window_size, stride, dilation, is_causal, scale, precision, implementation, tiles, device
    )
    if len(spatial_axes) != check_rank(query):
        raise ValueError(
            "spatial_axes must have one entry per spatial axis, None where it is not sharded;"
            f" got spatial_axes={tuple(spatial_axes)} for query of shape {jnp.shape(query)}"
        )
    operands = as_operands(
        query,
        key,
        value,
        additional=(additional_keys, additional_values, additional_lengths),
        bias=relative_position_bias,
    )
    out, lse = _attend(operands, tuple(spatial_axes), additional_axes, options, overlap)
    return (out, lse) if return_lse else out


def merge_over_mesh(
    out: Float[Array, "*rows V"], lse: Float[Array, "*rows"], axis_names: MeshAxes
) -> tuple[Float[Array, "*rows V"], Float[Array, "*rows"]]:
    """`merge_attentions` of parts that lie on different devices, inside a `jax.shard_map`: each holds other keys, all the same queries.

    Moves as much as one all-reduce of out in its accumulator's dtype. Rows that no device's keys are seen by get out 0, lse -inf.

    Args:
      out, lse: of this device's keys.
      axis_names: the mesh axes over which keys are spread. None: they are not, and the arguments come back.
    """
    if axis_names is None:
        return out, lse
    peak = lax.pmax(lax.stop_gradient(lse), axis_names)
    seen, is_part = peak != -jnp.inf, lse != -jnp.inf
    # Selects keep -inf - -inf, and its gradient, out.
    shifted = jnp.where(is_part, lse, 0) - jnp.where(seen, peak, 0)
    weight = jnp.where(is_part, jnp.exp(jnp.where(is_part, shifted, 0)), 0)
    total = jnp.where(seen, lax.psum(weight, axis_names), 1)
    wide = jnp.where(is_part[..., None], out.astype(lse.dtype), 0)
    merged = lax.psum(weight[..., None] * wide, axis_names) / total[..., None]
    whole = jnp.where(seen, jnp.where(seen, peak, 0) + jnp.log(total), -jnp.inf)
    return merged.astype(out.dtype), whole


def _attend(
    operands: Operands,
    space: tuple[MeshAxes, ...],
    tokens: MeshAxes,
    options: _Options,
    overlap: bool | None,
) -> Outputs:
    """One device's out and lse; `space` and `tokens`: what spatial axes and additional tokens are sharded over."""
    query, key, value = operands[:3]
    extras = _gathered(operands, tokens) | options.arguments()
    shards = tuple(map(shards_of, space))
    if all(n == 1 for n in shards):
        return gna(query, key, value, return_lse=True, **extras)
    layout = tuple(rows * n for rows, n in zip(query.shape[1:-2], shards, strict=True))
    axes = halos(options.neighborhood(len(space)), layout, shards)
    if key.shape[1:-2] != query.shape[1:-2]:
        raise ValueError(
            "shards of query and key must agree in layout (their spatial axes);"
            f" got query {query.shape}, key {key.shape}"
        )
    slabs = with_halos(key, axes, space), with_halos(value, axes, space)
    origin = shard_origin(axes, space)
    slab_origin = origin - jnp.asarray([axis.before for axis in axes], jnp.int32)

    def attend(box: Box, is_interior: bool) -> Outputs:
        first = jnp.asarray([bounds[0] for bounds in box], jnp.int32)
        return slab_attention(
            box_of(query, box),
            *((key, value) if is_interior else slabs),
            origin + first,
            origin if is_interior else slab_origin,
            global_layout=layout,
            **extras,
        )

    if _overlaps(interior_share(axes), overlap, options):
        return in_parts(axes, attend)
    return attend(tuple((0, axis.rows) for axis in axes), False)


def _overlaps(share: float, overlap: bool | None, options: _Options) -> bool:
    """Whether the interior is a call of its own. Parts are smaller calls, which cost more than they hide if they are many."""
    if overlap is None:
        return share >= 0.5 and resolve_device(options.device).platform == "cuda"
    return overlap and share > 0


def _gathered(operands: Operands, tokens: MeshAxes) -> dict[str, Any]:
    """What every query of the device sees or uses besides keys of the volume, by the names of `gna`'s arguments."""
    arrays = operands.additional_keys, operands.additional_values
    if tokens is not None and operands.additional_keys is not None:
        arrays = (lax.all_gather(x, as_names(tokens), axis=1, tiled=True) for x in arrays)
    keys, values = arrays
    return {
        "additional_keys": keys,
        "additional_values": values,
        "additional_lengths": operands.additional_lengths,
        "relative_position_bias": operands.bias,
    }


@dataclasses.dataclass(frozen=True)
class _MeshLayout:
    """How the arrays of a call lie on a mesh: the mesh axes of batch, spatial axes, heads and additional tokens.

    `shared_heads` is how many shards of the head axis use one key/value head, 0 if those are sharded as query heads are.
    """

    mesh: Mesh | AbstractMesh
    batch: MeshAxes
    space: tuple[MeshAxes, ...]
    heads: MeshAxes
    tokens: MeshAxes
    shared_heads: int

    @classmethod
    def of(
        cls,
        operands: Operands,
        options: _Options,
        mesh: Mesh | AbstractMesh,
        spec: PartitionSpec,
        additional_spec: PartitionSpec | None,
    ) -> "_MeshLayout":
        """Checks a call. Raises what `gna_sharded` raises."""
        names = options.arguments()
        problem = problem_of(
            operands,
            **{name: names[name] for name in names if name not in ("implementation", "tiles")},
        )
        batch, *space, heads, head_dim = _entries("spec", spec, problem.rank + 3, mesh)
        if head_dim is not None:
            raise ValueError(f"the head dim (last axis) must not be sharded; got spec={spec}")
        tokens = _entries("additional_spec", additional_spec or PartitionSpec(), 4, mesh)[1]
        count = lambda names: math.prod(mesh.shape[name] for name in as_names(names))
        halos(problem.neighborhood, problem.global_layout, tuple(map(count, space)))
        for name, length, entry in (
            ("batch", problem.batch, batch),
            ("query heads", problem.query_heads, heads),
            ("additional tokens", problem.num_additional, tokens),
        ):
            if length % count(entry):
                raise ValueError(
                    f"shards must be equal; got {length} {name} in {count(entry)} shards, over mesh axes {entry!r}"
                )
        shards, kv_heads = count(heads), problem.kv_heads
        if kv_heads % shards and shards % kv_heads:
            raise ValueError(
                "shards of the head axis must divide the key/value heads, or be a multiple of them;"
                f" got {kv_heads} key/value heads in {shards} shards, over mesh axes {heads!r}"
            )
        shared = shards // kv_heads if kv_heads % shards else 0
        return cls(mesh, batch, tuple(space), heads, tokens, shared)

    def specs(self, operands: Operands) -> Operands:
        """Of every array of a call."""
        query = PartitionSpec(self.batch, *self.space, self.heads, None)
        kv_heads = None if self.shared_heads else self.heads
        key = PartitionSpec(self.batch, *self.space, kv_heads, None)
        more = PartitionSpec(self.batch, self.tokens, kv_heads, None)
        lengths, bias = PartitionSpec(self.batch), PartitionSpec(self.heads)
        every = Operands(query, key, key, None, None, more, more, lengths, bias)
        pairs = zip(operands, every, strict=True)
        return Operands(*(None if x is None else spec for x, spec in pairs))

    @property
    def out_specs(self) -> tuple[PartitionSpec, PartitionSpec]:
        """Of out and lse."""
        rows = self.batch, *self.space, self.heads
        return PartitionSpec(*rows, None), PartitionSpec(*rows)

    def placed(self, operands: Operands) -> Operands:
        """The arrays sharded as `shard_map` wants them; only meshes with Explicit axes do not bring them there by themselves."""
        if AxisType.Explicit not in self.mesh.axis_types:
            return operands
        pairs = zip(operands, self.specs(operands), strict=True)
        shard = lambda x, spec: jax.reshard(x, NamedSharding(self.mesh, spec))
        return Operands(*(None if x is None else shard(x, spec) for x, spec in pairs))

    def with_own_heads(self, operands: Operands) -> Operands:
        """The operands with the one key/value head of this device's query heads, where devices share them."""
        if not self.shared_heads:
            return operands
        head = lax.axis_index(as_names(self.heads)) // self.shared_heads

        def own(x: Any) -> Any:
            return None if x is None else lax.dynamic_slice_in_dim(x, head, 1, axis=-2)

        names = "key", "value", "additional_keys", "additional_values"
        return operands._replace(**{name: own(getattr(operands, name)) for name in names})


def _entries(
    name: str, spec: PartitionSpec, ndim: int, mesh: Mesh | AbstractMesh
) -> tuple[MeshAxes, ...]:
    """One entry per axis of an array."""
    entries = (*spec, *(None,) * (ndim - len(spec)))
    used = [axis for entry in entries for axis in as_names(entry)]
    if len(entries) > ndim or not set(used) <= set(mesh.axis_names):
        raise ValueError(
            f"{name} must have at most {ndim} entries, each None or axes of the mesh {mesh.axis_names}; got {name}={spec}"
        )
    return entries


def _mesh_of(mesh: Mesh | AbstractMesh | None, query: Any) -> Mesh | AbstractMesh:
    """The given mesh, the current one, or the one that the query lies on."""
    current = jax.sharding.get_abstract_mesh()
    if mesh is None and not current.empty:
        return current
    sharding = getattr(query, "sharding", None) or jax.typeof(query).sharding
    if mesh is None and isinstance(sharding, NamedSharding):
        mesh = sharding.mesh
    if mesh is None or mesh.empty:
        raise ValueError(
            "gna_sharded needs a mesh; got mesh=None, and none is current: pass mesh=.., or call it under jax.set_mesh(..)"
        )
    return mesh
