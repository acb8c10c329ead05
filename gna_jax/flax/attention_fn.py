"""Neighborhood attention as the function flax's attention modules call, and the rules both `GNAttention` share.

`attention_fn` goes into `nnx.MultiHeadAttention` or linen's `MultiHeadDotProductAttention`. Nothing here imports flax,
holds parameters or computes attention: `gna_jax.attention` does that.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from gna_jax.flax.partition import attention_over, check_spec
from gna_jax.neighborhood import WHOLE_GROUP, Flags, Neighborhood, Sizes

Rotary = Callable[[Array, Array], tuple[Array, Array]]
"""Rotates query and key, each `[B, *space, heads, head_dim]`, and keeps their shapes."""


@dataclasses.dataclass(frozen=True)
class NeighborhoodAttentionFn:
    """`gna` with its static arguments chosen, callable as flax calls an `attention_fn`; made by `attention_fn(...)`.

    Equal choices compare and hash equal: jit caches by them, because flax modules keep this as a static attribute.
    """

    window_size: int | tuple[int, ...]
    stride: int | tuple[int, ...]
    dilation: int | tuple[int, ...]
    is_causal: bool | tuple[bool, ...]
    scale: float | None
    implementation: Any
    tiles: Any
    device: Any
    spec: PartitionSpec | None = None

    @property
    def rank(self) -> int | None:
        """Number of spatial axes; None while every geometric argument is one value for all axes."""
        return len(self.window_size) if isinstance(self.window_size, tuple) else None

    def __call__(
        self,
        query: Float[Array, "*batch_space N H"],
        key: Float[Array, "*batch_space K H"],
        value: Float[Array, "*batch_space K V"],
        bias: Any = None,
        mask: Any = None,
        broadcast_dropout: bool = True,
        dropout_rng: Any = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: Any = None,
        precision: Any = None,
        module: Any = None,
        is_causal: bool = False,
        input_positions: Any = None,
        qk_attn_weights_einsum: Any = None,
        attn_weights_value_einsum: Any = None,
    ) -> Float[Array, "*batch_space N V"]:
        """Neighborhood attention over `[batch..., *space, heads, head_dim]`.

        With a `window_size` per axis the number of spatial axes is known, and any number of batch axes may lead,
        none included. With one value for all axes the first axis is the batch and all others up to the heads are space.

        Args:
          query, key, value: as in `gna`; cast to `dtype`, or to their common dtype if that is None.
          dtype, precision: as in flax's `dot_product_attention`.
          broadcast_dropout, dropout_rng: of no effect, because active dropout is refused.
          bias, mask, module, is_causal, input_positions, qk_attn_weights_einsum, attn_weights_value_einsum: flax's
            modules pass them; anything but their default is refused.

        Raises:
          ValueError: for an argument that neighborhood attention cannot honour, or a wrong number of axes.
        """
        _refuse_foreign(bias=bias, mask=mask, is_causal=is_causal, input_positions=input_positions)
        _refuse_weights(dropout_rate if not deterministic else 0.0, module)
        if qk_attn_weights_einsum is not None or attn_weights_value_einsum is not None:
            raise ValueError(
                "gna computes both products inside its kernel, so it takes no einsum of yours;"
                " got qk_attn_weights_einsum or attn_weights_value_einsum; leave them at None"
            )
        batch_axes = 1 if self.rank is None else query.ndim - 2 - self.rank
        if batch_axes < 0:
            raise ValueError(
                f"query must be [batch..., {self.rank} spatial axes, heads, head_dim], one axis per entry of"
                f" window_size; got query of shape {tuple(query.shape)}, window_size={self.window_size}"
            )
        dtype = jnp.result_type(query, key, value) if dtype is None else dtype
        query, key, value = (jnp.asarray(array, dtype) for array in (query, key, value))
        batch = query.shape[:batch_axes]
        if batch_axes != 1 and self.spec is not None:
            raise ValueError(
                "spec says how one batch axis, space and heads are sharded, so exactly one batch axis may lead;"
                f" got {batch_axes} in query of shape {tuple(query.shape)}, spec={self.spec};"
                " reshape them into one"
            )
        if batch_axes != 1:
            query, key, value = (
                array.reshape(math.prod(array.shape[:batch_axes]), *array.shape[batch_axes:])
                for array in (query, key, value)
            )
        out = self.attend(query, key, value, precision=precision)
        return out if batch_axes == 1 else out.reshape(*batch, *out.shape[1:])

    def attend(
        self,
        query: Float[Array, "B *space N H"],
        key: Float[Array, "B *space K H"],
        value: Float[Array, "B *space K V"],
        *,
        rotary: Rotary | None = None,
        relative_position_bias: Float[Array, " N *offsets"] | None = None,
        additional_keys: Float[Array, "B S K H"] | None = None,
        additional_values: Float[Array, "B S K V"] | None = None,
        additional_lengths: Int[Array, " B"] | None = None,
        precision: Any = None,
    ) -> Float[Array, "B *space N V"]:
        """What lies between the projections of a `GNAttention`: rotate query and key, then `gna`.

        Everything follows value's dtype, so a rotation may compute in float32.
        """
        if rotary is not None:
            query, key = _rotate(rotary, query, key)
        dtype = value.dtype
        query, key = jnp.asarray(query, dtype), jnp.asarray(key, dtype)
        if additional_keys is not None:
            additional_keys = jnp.asarray(additional_keys, dtype)
        if additional_values is not None:
            additional_values = jnp.asarray(additional_values, dtype)
        static = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del static["spec"]
        check_spec(self.spec, query.ndim - 3)
        return attention_over(self.spec)(
            query,
            key,
            value,
            **static,
            relative_position_bias=relative_position_bias,
            additional_keys=additional_keys,
            additional_values=additional_values,
            additional_lengths=additional_lengths,
            precision=precision,
        )

    def check_inputs(self, inputs: Any, in_features: int) -> None:
        """Raise ValueError unless `inputs` is `[B, *space, in_features]` with as many axes as `window_size` names."""
        rank = inputs.ndim - 2
        if not 1 <= rank <= 3 or self.rank not in (None, rank):
            axes = "1 to 3 spatial axes" if self.rank is None else f"{self.rank} spatial axes"
            raise ValueError(
                f"inputs must be [batch, *space, features] with {axes}, one per entry of window_size;"
                f" got inputs of shape {tuple(inputs.shape)}, window_size={self.window_size};"
                " reshape several batch axes into one"
            )
        if inputs.shape[-1] != in_features:
            raise ValueError(
                f"the last axis of inputs must hold in_features={in_features} features;"
                f" got inputs of shape {tuple(inputs.shape)}"
            )

    def position_bias_shape(self, num_heads: int) -> tuple[int, ...]:
        """`(num_heads, 2 * window - 1 per axis)`. Raises ValueError where the windows are not known as numbers."""
        if not isinstance(self.window_size, tuple) or WHOLE_GROUP in self.window_size:
            raise ValueError(
                "relative_position_bias=True makes a parameter of 2 * window - 1 entries per axis, so window_size must"
                f" name every axis and may not be -1; got window_size={self.window_size};"
                " write e.g. window_size=(7, 7) for a 2-D layout"
            )
        return (num_heads, *(2 * window - 1 for window in self.window_size))


def attention_fn(
    *,
    window_size: Sizes,
    stride: Sizes = 1,
    dilation: Sizes = 1,
    is_causal: Flags = False,
    scale: float | None = None,
    implementation: str | Sequence[str] | None = None,
    tiles: Any = None,
    device: Any = None,
    spec: PartitionSpec | None = None,
) -> NeighborhoodAttentionFn:
    """Neighborhood attention for `nnx.MultiHeadAttention(attention_fn=...)` and its linen counterpart.

    The module then takes `[batch, *space, features]`, every token attends to its window, and parameters stay those of
    the flax module. Masks, biases, a causal flag of the caller, sown weights and active dropout are refused.

    Args:
      window_size, stride, dilation, is_causal, scale, implementation, tiles, device: as in `gna`. If any of the first
        four names every axis, the number of spatial axes is fixed and further batch axes may lead; else the first axis
        alone is the batch.
      spec: sharding of `[B, *space, heads, head_dim]` over the mesh of `jax.set_mesh`, as in `gna_sharded`; then one batch
        axis leads. None: space is not sharded; batch and heads may be.

    Raises:
      ValueError, TypeError: for a geometry that is never legal (`Neighborhood.of`), or a spec that does not name every axis.
    """
    geometry = {
        "window_size": window_size,
        "stride": stride,
        "dilation": dilation,
        "is_causal": is_causal,
    }
    rank = next((len(value) for value in geometry.values() if np.ndim(value)), None)
    check_spec(spec, rank)
    neighborhood = Neighborhood.of(1 if rank is None else rank, **geometry)
    static = {name: getattr(neighborhood, name) for name in geometry}
    if rank is None:
        static = {name: values[0] for name, values in static.items()}
    if implementation is not None and not isinstance(implementation, str):
        implementation = tuple(implementation)
    return NeighborhoodAttentionFn(
        **static,
        scale=scale,
        implementation=implementation,
        tiles=tiles,
        device=device,
        spec=spec,
    )


def split_features(features: int, num_heads: int, num_kv_heads: int) -> int:
    """Features per head. Raises ValueError unless heads divide features and key/value heads divide heads."""
    if num_heads < 1 or features % num_heads:
        raise ValueError(
            f"qkv_features (by default in_features) must be a multiple of num_heads;"
            f" got {features} features, num_heads={num_heads}"
        )
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(
            "num_kv_heads must divide num_heads: each key/value head serves num_heads / num_kv_heads query heads;"
            f" got num_heads={num_heads}, num_kv_heads={num_kv_heads}"
        )
    return features // num_heads


def check_dropout_rate(rate: float) -> None:
    """Raise ValueError unless `rate` is in [0, 1)."""
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"out_dropout_rate must be in [0, 1); got out_dropout_rate={rate}")


def _rotate(rotary: Rotary, query: Array, key: Array) -> tuple[Array, Array]:
    shapes = (query.shape, key.shape)
    query, key = rotary(query, key)
    if (query.shape, key.shape) != shapes:
        raise ValueError(
            "rotary must return (query, key) in the shapes it was given, [batch, *space, heads, head_dim];"
            f" got {query.shape} and {key.shape} for {shapes[0]} and {shapes[1]}"
        )
    return query, key


def _refuse_foreign(*, bias: Any, mask: Any, is_causal: bool, input_positions: Any) -> None:
    """Refuse what flax would add to the scores or to the geometry."""
    if mask is not None:
        raise ValueError(
            "gna takes no mask: the window is the mask (flax's decode=True makes one, too); got mask of shape"
            f" {tuple(np.shape(mask))}; to hide padding, crop the layout, or give tokens that everyone may see as"
            " additional_keys with additional_lengths"
        )
    if bias is not None:
        raise ValueError(
            "gna takes no bias over all pairs of tokens, which is an array of tokens squared;"
            f" got bias of shape {tuple(np.shape(bias))}; use relative_position_bias of gna or GNAttention"
        )
    if is_causal:
        raise ValueError(
            "causality belongs to the window, per axis; got is_causal=True from the caller;"
            " pass it once as attention_fn(is_causal=...)"
        )
    if input_positions is not None:
        raise ValueError(
            "gna rotates nothing by itself; got input_positions; use GNAttention(rotary=...),"
            " which is given query and key"
        )


def _refuse_weights(active_dropout_rate: float, module: Any) -> None:
    """Refuse what needs the attention weights, which no backend keeps."""
    if active_dropout_rate > 0.0:
        raise ValueError(
            "gna has no attention-probability dropout: it never holds the probabilities;"
            f" got dropout_rate={active_dropout_rate}, deterministic=False;"
            " use out_dropout_rate of GNAttention, or dropout after the module"
        )
    if module is not None:
        raise ValueError(
            "gna never holds the attention weights, so it cannot sow them; got sow_weights=True;"
            " gna(..., return_lse=True) gives each query's log-sum-exp"
        )
