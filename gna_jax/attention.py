"""`gna`: generalized neighborhood attention, and `slab_attention`, the same on a slab of a larger volume.

Arguments become a `Problem` (`gna_jax.problem`), the ladder chooses an implementation (`gna_jax.backends`), one custom_vjp runs
it (`gna_jax.vjp`). NATTEN's spelling lives in `gna_jax.natten`, merging in `gna_jax.merge`, reports in `gna_jax.explanation`.
"""

from collections.abc import Sequence
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int

from gna_jax import backends, vjp
from gna_jax.device import DeviceSpec, resolve_device
from gna_jax.mesh_types import check_spatial_axes, vary_together
from gna_jax.neighborhood import Flags, Neighborhood, Sizes, per_axis
from gna_jax.problem import Operands, Problem, check_rank, describe
from gna_jax.tiling import Tiles


def gna(
    query: Float[ArrayLike, "B *space N H"],
    key: Float[ArrayLike, "B *space K H"],
    value: Float[ArrayLike, "B *space K V"],
    *,
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
    """Attention of every token to a window of `window_size` keys around it.

    `out[i] = sum_j softmax_j(scale * query[i] . key[j] + bias) value[j]` over the keys `j` that
    `gna_jax.neighborhood` gives to `i`, and the additional keys. Softmax and sums in float32 (float64 for float64).
    Differentiable in reverse once; `implementation="reference"` to any order (arXiv 2504.16922).

    Args:
      query, key, value: arrays with 1 to 3 spatial axes; K divides N (query heads share key/value heads in order).
      window_size: keys per window and axis; -1: every key of the query's dilation group.
      stride: queries that share a window, at most the window. 1 slides, `stride == window_size` is blocked attention.
      dilation: step between keys of a window; `window_size * dilation` must fit the layout.
      is_causal: per axis, whether keys after the query are hidden.
      scale: factor on the scores, default `H ** -0.5`.
      additional_keys, additional_values: tokens that every query sees besides its window (text, registers).
      additional_lengths: how many of them each sample sees, 0 to S; what lies beyond is never used.
      relative_position_bias: `[N, 2 * w0 - 1, ...]`, added to the scores at `(j - i) / dilation + w - 1` per axis.
      return_lse: also return log(sum(exp(scores))) `[B, *space, N]`, float32, natural logarithm.
      precision: of the matrix products, as in `jax.lax.dot_general`.
      implementation: a name ("xla", "reference", ..) runs or raises; a sequence tries in order; None chooses.
      tiles: tile shapes; None chooses.
      device: device to choose for: a name, a `DeviceSpec`, or None for the default device.

    Returns:
      `out [B, *space, N, V]` in the query's dtype, bfloat16 for float8_e4m3fn (which has no gradients), or `(out, lse)`.

    Raises:
      ValueError: shapes, heads, dtypes or geometry that are never legal.
      TypeError: geometry, scale or tiles that are traced or no numbers.
      NotImplementedError: a named implementation cannot run this call.

    >>> import jax, gna_jax
    >>> x = jax.random.normal(jax.random.key(0), (1, 16, 16, 2, 32))
    >>> gna_jax.gna(x, x, x, window_size=(7, 7)).shape
    (1, 16, 16, 2, 32)
    """
    operands = as_operands(
        query,
        key,
        value,
        additional=(additional_keys, additional_values, additional_lengths),
        bias=relative_position_bias,
    )
    problem = problem_of(
        operands,
        window_size=window_size,
        stride=stride,
        dilation=dilation,
        is_causal=is_causal,
        scale=scale,
        precision=precision,
        device=device,
    )
    outputs = _run(problem, operands, implementation, tiles)
    return outputs if return_lse else outputs[0]


def slab_attention(
    query: Float[ArrayLike, "B *queries N H"],
    key: Float[ArrayLike, "B *keys K H"],
    value: Float[ArrayLike, "B *keys K V"],
    query_origin: Int[ArrayLike, " rank"] | Sequence[SupportsIndex],
    key_origin: Int[ArrayLike, " rank"] | Sequence[SupportsIndex],
    *,
    global_layout: Sequence[SupportsIndex],
    window_size: Sizes,
    stride: Sizes = 1,
    dilation: Sizes = 1,
    is_causal: Flags = False,
    scale: float | None = None,
    additional_keys: Float[ArrayLike, "B S K H"] | None = None,
    additional_values: Float[ArrayLike, "B S K V"] | None = None,
    additional_lengths: Int[ArrayLike, " B"] | None = None,
    relative_position_bias: Float[ArrayLike, "N ..."] | None = None,
    precision: jax.lax.PrecisionLike = None,
    implementation: str | Sequence[str] | None = None,
    tiles: Tiles | None = None,
    device: str | DeviceSpec | None = None,
) -> tuple[Float[Array, "B *queries N V"], Float[Array, "B *queries N"]]:
    """`gna` for a slab of queries against a slab of keys of one volume of `global_layout`.

    The origins say where the slabs' first tokens lie in the volume; they may be traced and differ per device. Queries see
    the keys of their window that the key slab holds; a query that finds none (or lies outside the volume) gets out 0,
    lse -inf and no gradient (unless additional keys are given, which every query sees). Slabs of keys merge exactly with `gna_jax.merge_attentions`. Always returns `(out, lse)`.
    Other arguments as in `gna`.
    """
    operands = as_operands(
        query,
        key,
        value,
        additional=(additional_keys, additional_values, additional_lengths),
        bias=relative_position_bias,
        origins=(query_origin, key_origin),
    )
    problem = problem_of(
        operands,
        window_size=window_size,
        stride=stride,
        dilation=dilation,
        is_causal=is_causal,
        scale=scale,
        precision=precision,
        device=device,
        global_layout=global_layout,
    )
    return _run(problem, operands, implementation, tiles)


def as_operands(
    query: Any,
    key: Any,
    value: Any,
    *,
    additional: tuple[Any, Any, Any] = (None, None, None),
    bias: Any = None,
    origins: tuple[Any, Any] = (None, None),
) -> Operands:
    """The arrays of a call, numpy input converted once; ShapeDtypeStructs stay."""
    operands = Operands(query, key, value, *origins, *additional, bias)
    return Operands(*(_as_array(x) for x in operands))


def problem_of(
    operands: Operands,
    *,
    window_size: Sizes,
    stride: Sizes,
    dilation: Sizes,
    is_causal: Flags,
    scale: float | None,
    precision: jax.lax.PrecisionLike,
    device: str | DeviceSpec | None,
    global_layout: Sequence[SupportsIndex] | None = None,
) -> Problem:
    """A call, checked. Arguments as in `gna` and `slab_attention`; raises what `gna` raises."""
    rank = check_rank(operands.query)
    return describe(
        operands,
        Neighborhood.of(
            rank, window_size=window_size, stride=stride, dilation=dilation, is_causal=is_causal
        ),
        scale=scale,
        precision=precision,
        device=resolve_device(device),
        global_layout=None
        if global_layout is None
        else per_axis("global_layout", global_layout, rank),
    )


def _as_array(x: Any) -> Any:
    return x if x is None or isinstance(x, jax.ShapeDtypeStruct) else jnp.asarray(x)


def _run(
    problem: Problem,
    operands: Operands,
    implementation: str | Sequence[str] | None,
    tiles: Tiles | None,
) -> tuple[jax.Array, jax.Array]:
    check_tiles(tiles, problem)
    check_spatial_axes(operands)
    choice = backends.choose(problem, implementation, tiles)
    if implementation is None:
        backends.warn_declined(problem, choice)
    operands = vary_together(_without_hidden_tokens(operands))
    plan = vjp.Plan(problem, choice.name, tiles)
    if choice.name == "reference":
        return backends.load("reference").attend(problem, operands)
    return vjp.attend(plan, operands)


def check_tiles(tiles: Any, problem: Problem) -> None:
    """Raise unless `tiles` is None or a `Tiles` of the problem's rank."""
    if tiles is None:
        return
    if not isinstance(tiles, Tiles):
        raise TypeError(f"tiles must be a gna_jax.Tiles or None; got tiles={tiles!r}")
    if len(tiles.q) != problem.rank:
        raise ValueError(
            f"tiles must have one size per spatial axis; got {tiles} for layout {problem.global_layout}"
        )


def _without_hidden_tokens(operands: Operands) -> Operands:
    """Additional tokens past each sample's length become zero, before any implementation reads them.

    Memory there may hold NaN, and the select's transpose makes their gradients exactly zero.
    """
    lengths = operands.additional_lengths
    operands = operands._replace(
        query_origin=_int32(operands.query_origin),
        key_origin=_int32(operands.key_origin),
        additional_lengths=_int32(lengths),
    )
    if lengths is None:
        return operands
    column = jnp.arange(operands.additional_keys.shape[1], dtype=jnp.int32)
    seen = column[None, :] < operands.additional_lengths[:, None]

    def visible(tokens: jax.Array) -> jax.Array:
        return jnp.where(seen[:, :, None, None], tokens, jnp.zeros((), tokens.dtype))

    return operands._replace(
        additional_keys=visible(operands.additional_keys),
        additional_values=visible(operands.additional_values),
    )


def _int32(x: Any) -> Any:
    return None if x is None else x.astype(jnp.int32)
