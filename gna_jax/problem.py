"""A call to neighborhood attention as one static, hashable value, and every check of its arguments.

`Problem` is what backends receive: shapes, dtype, heads, geometry, device. It holds global lengths; where a slab of
a larger volume lies is an operand (`Operands.query_origin`, `Operands.key_origin`), so one compiled program serves
every slab of a size. Backends never check again. No arithmetic on tensors lives here.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from gna_jax.device import DeviceSpec
from gna_jax.neighborhood import Neighborhood
from gna_jax.tiling import Tiles

DTYPES = ("bfloat16", "float16", "float32", "float64")
FLOAT8 = "float8_e4m3fn"
"""A dtype of operands for the forward alone; out is bfloat16."""


class Operands(NamedTuple):
    """The arrays of a call. None where a call has none.

    query [B, *space, N, H], key [B, *space, K, H], value [B, *space, K, V]; origins int32 [rank] (None: the slab is
    the whole volume); additional_keys [B, S, K, H], additional_values [B, S, K, V], additional_lengths int32 [B];
    bias [N, *(2 * window - 1)].
    """

    query: Any
    key: Any
    value: Any
    query_origin: Any = None
    key_origin: Any = None
    additional_keys: Any = None
    additional_values: Any = None
    additional_lengths: Any = None
    bias: Any = None


@dataclasses.dataclass(frozen=True)
class Problem:
    """Everything about a call that shapes its program.

    `query_layout` and `key_layout` are the slabs' layouts; both equal `global_layout` where `is_slab` is False.
    """

    neighborhood: Neighborhood
    global_layout: tuple[int, ...]
    query_layout: tuple[int, ...]
    key_layout: tuple[int, ...]
    batch: int
    query_heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    dtype: np.dtype
    scale: float
    is_slab: bool
    num_additional: int
    has_additional_lengths: bool
    has_bias: bool
    precision: Any
    device: DeviceSpec

    @property
    def rank(self) -> int:
        """Number of spatial axes."""
        return len(self.global_layout)

    @property
    def heads_per_kv(self) -> int:
        """Query heads that share one key/value head."""
        return self.query_heads // self.kv_heads

    @property
    def accumulator(self) -> np.dtype:
        """Dtype of scores, softmax, sums and lse: float32, or float64 for float64 inputs."""
        return np.dtype("float64" if self.dtype == np.float64 else "float32")

    @property
    def is_float8(self) -> bool:
        """Whether the operands are float8: then the call has no gradients."""
        return self.dtype.name == FLOAT8

    @property
    def out_dtype(self) -> np.dtype:
        """Dtype of out: the operands', or bfloat16 for float8, whose 4 bits would round out away."""
        return np.dtype(jnp.bfloat16) if self.is_float8 else self.dtype

    @property
    def window_extent(self) -> tuple[int, ...]:
        """Largest number of keys a window holds, per axis."""
        return tuple(
            axis.window_extent(length)
            for axis, length in zip(self.neighborhood.axes, self.global_layout, strict=True)
        )


@dataclasses.dataclass(frozen=True)
class Workload:
    """What a backend computes for a whole volume, per batch entry and head, forward.

    Attributes:
      tiles: query (and key) tiles it uses, forward and backward; None where it has none.
      computed_pairs: query-key pairs whose score it computes.
      masked_pairs: those of them that pass through a mask.
      seconds: predicted time of the forward, for all samples and heads; None where nothing is known.
      copies: what it must copy before it can read it, for people.
      tiles_from: where the tiles come from, for people; empty where the call names them or a count chose them.
    """

    tiles: Tiles | None
    computed_pairs: int
    masked_pairs: int
    seconds: float | None
    copies: tuple[str, ...] = ()
    tiles_from: str = ""


def describe(
    operands: Operands,
    neighborhood: Neighborhood,
    *,
    scale: Any,
    precision: Any,
    device: DeviceSpec,
    global_layout: tuple[int, ...] | None = None,
) -> Problem:
    """Check a call and describe it. `operands` may be ShapeDtypeStructs.

    `global_layout` is given for a slab; None means that the arrays are the whole volume.

    Raises:
      ValueError: for shapes, heads, dtypes or a geometry that are never legal.
      TypeError: for a traced or non-numeric scale.
    """
    query, key, value = operands.query, operands.key, operands.value
    rank = query.ndim - 3
    query_layout, key_layout = tuple(query.shape[1:-2]), tuple(key.shape[1:-2])
    is_slab = global_layout is not None
    _check_dtypes(operands)
    _check_shapes(query, key, value, is_slab)
    _check_additional(operands)
    layout = query_layout if global_layout is None else global_layout
    neighborhood.check_layout(layout)
    problem = Problem(
        neighborhood=neighborhood,
        global_layout=layout,
        query_layout=query_layout,
        key_layout=key_layout,
        batch=query.shape[0],
        query_heads=query.shape[-2],
        kv_heads=key.shape[-2],
        head_dim=query.shape[-1],
        value_dim=value.shape[-1],
        dtype=np.dtype(query.dtype),
        scale=_static_scale(scale, query.shape[-1]),
        is_slab=is_slab,
        num_additional=0 if operands.additional_keys is None else operands.additional_keys.shape[1],
        has_additional_lengths=operands.additional_lengths is not None,
        has_bias=operands.bias is not None,
        precision=_static_precision(precision),
        device=device,
    )
    _check_bias(operands.bias, problem)
    _check_origins(operands, rank)
    return problem


def without_float8(problem: Problem, operands: Operands) -> tuple[Problem, Operands]:
    """A call in float8 as the same in bfloat16, which holds every value of float8; any other call as it is."""
    if not problem.is_float8:
        return problem, operands
    wide = problem.out_dtype
    cast = [x.astype(wide) if x is not None and x.dtype == problem.dtype else x for x in operands]
    return dataclasses.replace(problem, dtype=wide), Operands(*cast)


def check_gradients(problem: Problem) -> None:
    """Raise NotImplementedError for a call without gradients."""
    if problem.is_float8:
        raise NotImplementedError(
            f"gradients need query, key and value of more than 8 bits; got {problem.dtype.name}:"
            " differentiate the call in bfloat16, e.g. with query.astype(jnp.bfloat16)"
        )


def check_rank(query: Any) -> int:
    """Number of spatial axes of `query`, 1 to 3. Raises ValueError for any other."""
    rank = query.ndim - 3
    if not 1 <= rank <= 3:
        raise ValueError(
            "query must be [batch, *space, heads, head_dim] with 1 to 3 spatial axes;"
            f" got query of shape {tuple(query.shape)}"
            + ("; add a batch axis, or map over it with jax.vmap" if rank < 1 else "")
        )
    return rank


def _check_dtypes(operands: Operands) -> None:
    query = operands.query
    if jnp.dtype(query.dtype).name not in (*DTYPES, FLOAT8):
        raise ValueError(
            f"query, key and value must be one of {', '.join(DTYPES)}; got query of {query.dtype};"
            f" cast them, e.g. query.astype(jnp.bfloat16); {FLOAT8} is taken too, without gradients"
        )
    names = ("key", "value", "additional_keys", "additional_values")
    for name in names:
        array = getattr(operands, name)
        if array is not None and array.dtype != query.dtype:
            raise ValueError(
                f"{name} must have query's dtype; got query of {query.dtype}, {name} of {array.dtype};"
                f" cast with {name}.astype(query.dtype)"
            )
    if operands.bias is not None and not jnp.issubdtype(operands.bias.dtype, jnp.floating):
        raise ValueError(
            f"relative_position_bias must be floating; got relative_position_bias of {operands.bias.dtype}"
        )


def _check_shapes(query: Any, key: Any, value: Any, is_slab: bool) -> None:
    got = f"got query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if key.ndim != query.ndim or value.ndim != query.ndim:
        raise ValueError(f"query, key and value must have the same number of axes; {got}")
    if not query.shape[0] == key.shape[0] == value.shape[0]:
        raise ValueError(f"query, key and value must agree in batch; {got}")
    if key.shape[1:-2] != value.shape[1:-2]:
        raise ValueError(f"key and value must agree in layout (their spatial axes); {got}")
    if not is_slab and query.shape[1:-2] != key.shape[1:-2]:
        raise ValueError(
            f"query and key must agree in layout (their spatial axes); {got};"
            " queries of another layout are cross attention, which has no neighborhood:"
            " pass such tokens as additional_keys and additional_values"
        )
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(f"query and key must agree in head_dim (last axis); {got}")
    if key.shape[-2] != value.shape[-2]:
        raise ValueError(f"key and value must agree in heads (axis -2); {got}")
    if 0 in query.shape or 0 in key.shape or 0 in value.shape:
        raise ValueError(f"no axis of query, key or value may be empty; {got}")
    if query.shape[-2] % key.shape[-2]:
        raise ValueError(
            f"key/value heads must divide query heads; got {query.shape[-2]} query heads,"
            f" {key.shape[-2]} key/value heads"
        )


def _check_additional(operands: Operands) -> None:
    keys, values = operands.additional_keys, operands.additional_values
    lengths = operands.additional_lengths
    if (keys is None) != (values is None):
        missing = "additional_keys" if keys is None else "additional_values"
        raise ValueError(f"additional_keys and additional_values go together; got {missing}=None")
    if lengths is not None and keys is None:
        raise ValueError("additional_lengths needs additional_keys; got additional_keys=None")
    if keys is None:
        return
    query, key, value = operands.query, operands.key, operands.value
    for name, array, like in (
        ("additional_keys", keys, key),
        ("additional_values", values, value),
    ):
        if (
            array.ndim != 4
            or array.shape[0] != query.shape[0]
            or array.shape[2:] != like.shape[-2:]
            or array.shape[1] != keys.shape[1]
        ):
            expected = (query.shape[0], keys.shape[1] if keys.ndim > 1 else "S", *like.shape[-2:])
            raise ValueError(
                f"{name} must be [batch, tokens, key/value heads, head_dim] = {expected};"
                f" got {name} of shape {tuple(array.shape)}"
            )
    if keys.shape[1] == 0:
        raise ValueError(
            "additional_keys must hold at least one token; got 0; leave it out (None) instead"
        )
    if lengths is not None:
        _check_lengths(lengths, query.shape[0])


def _check_lengths(lengths: Any, batch: int) -> None:
    if tuple(lengths.shape) != (batch,) or not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise ValueError(
            f"additional_lengths must be integers of shape [batch] = ({batch},);"
            f" got {lengths.dtype} of shape {tuple(lengths.shape)}"
        )


def _check_bias(bias: Any, problem: Problem) -> None:
    if bias is None:
        return
    expected = (problem.query_heads, *(2 * extent - 1 for extent in problem.window_extent))
    if tuple(bias.shape) != expected:
        raise ValueError(
            "relative_position_bias must be [query heads, 2 * window - 1 per axis]"
            f" = {expected}; got shape {tuple(bias.shape)}"
        )


def _check_origins(operands: Operands, rank: int) -> None:
    for name in ("query_origin", "key_origin"):
        origin = getattr(operands, name)
        if origin is None:
            continue
        if tuple(origin.shape) != (rank,) or not jnp.issubdtype(origin.dtype, jnp.integer):
            raise ValueError(
                f"{name} must be integers of shape [rank] = ({rank},);"
                f" got {origin.dtype} of shape {tuple(origin.shape)}"
            )


def _static_scale(scale: Any, head_dim: int) -> float:
    if scale is None:
        return head_dim**-0.5
    if isinstance(scale, Tracer):
        raise TypeError(
            "scale must be static; got a traced value. Multiply the query by it instead and pass scale=1.0"
        )
    try:
        scale = float(scale)
    except (TypeError, ValueError):
        raise TypeError(f"scale must be a number or None; got scale={scale!r}") from None
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite; got scale={scale}")
    return scale


def _static_precision(precision: Any) -> Any:
    """`precision` as `jax.lax.Precision` where it is a name, hashable in any case."""
    if isinstance(precision, list | tuple):
        return tuple(_static_precision(one) for one in precision)
    if isinstance(precision, str):
        names = {one.name.lower(): one for one in jax.lax.Precision}
        if precision.lower() not in names:
            raise ValueError(
                f"precision must be one of {sorted(names)} or a jax.lax.Precision; got precision={precision!r}"
            )
        return names[precision.lower()]
    return precision
