"""Inside a `shard_map`: halos sent and received, and a shard's queries cut into those that need one and those that do not.

Which rows go where is `gna_jax.halo`'s; what is computed with them, `gna_jax.sharding`'s.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from gna_jax.halo import AxisHalo, Box, border, exchange_order

MeshAxes = None | str | tuple[str, ...]
"""What an axis of an array is sharded over, as in a `PartitionSpec`."""
Outputs = tuple[jax.Array, jax.Array]


def shards_of(names: MeshAxes) -> int:
    """Number of shards of an axis that is sharded over these mesh axes.

    Raises:
      ValueError: for a mesh axis that no surrounding `shard_map` maps.
    """
    if names is None:
        return 1
    try:
        return math.prod(lax.axis_size(name) for name in as_names(names))
    except NameError:
        raise ValueError(
            f"mesh axes must be those of a surrounding jax.shard_map; got {names!r};"
            " gna_jax.gna_sharded takes global arrays, outside of one"
        ) from None


def as_names(names: MeshAxes) -> tuple[str, ...]:
    """Mesh axes as a tuple."""
    if names is None:
        return ()
    return (names,) if isinstance(names, str) else tuple(names)


def shard_origin(axes: Sequence[AxisHalo], names: Sequence[MeshAxes]) -> jax.Array:
    """Where this device's shard begins in the whole volume, int32 [rank]."""
    number = [
        0 if n is None or axis.shards == 1 else lax.axis_index(n)
        for axis, n in zip(axes, names, strict=True)
    ]
    rows = jnp.asarray([axis.rows for axis in axes], jnp.int32)
    return jnp.stack([jnp.asarray(n, jnp.int32) for n in number]) * rows


def with_halos(x: jax.Array, axes: Sequence[AxisHalo], names: Sequence[MeshAxes]) -> jax.Array:
    """A shard `[B, *space, heads, head_dim]` with the rows around it that its queries see; zeros past the volume's ends.

    One collective permute per piece of a halo. Its slab begins `before` rows in front of the shard on every axis.
    """
    with jax.named_scope("gna_halo"):
        for number in exchange_order(axes):
            if axes[number].pieces:
                x = _with_halo(x, axes[number], names[number], 1 + number)
    return x


def _with_halo(x: jax.Array, axis: AxisHalo, names: MeshAxes, dimension: int) -> jax.Array:
    before, after = [], []
    for piece in axis.pieces:
        rows = lax.slice_in_dim(x, *piece.rows, axis=dimension)
        received = lax.ppermute(rows, as_names(names), piece.pairs)
        (before if piece.shift > 0 else after).append(received)
    return lax.concatenate([*before, x, *after], dimension)


def in_parts(axes: Sequence[AxisHalo], attend: Callable[[Box, bool], Outputs]) -> Outputs:
    """The outputs of a shard from those of its interior and of the boxes around it.

    `attend(box, is_interior)` computes those of a box of queries.
    """
    outputs = attend(tuple(axis.interior for axis in axes), True)
    for number, (front, behind) in reversed(list(enumerate(border(axes)))):
        parts = [outputs]
        if front is not None:
            parts.insert(0, attend(front, False))
        if behind is not None:
            parts.append(attend(behind, False))
        outputs = _joined(parts, 1 + number)
    return outputs


def _joined(parts: Sequence[Any], dimension: int) -> Outputs:
    return jax.tree.map(lambda *arrays: lax.concatenate(arrays, dimension), *parts)


def box_of(x: jax.Array, box: Box) -> jax.Array:
    """The rows of a shard in a box."""
    return x[(slice(None), *(slice(*bounds) for bounds in box))]
