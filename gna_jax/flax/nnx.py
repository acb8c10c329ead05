"""`GNAttention` for flax.nnx: projections, qk-norm, rotary hook, neighborhood attention, output projection, dropout.

Parameters are named and shaped as in `nnx.MultiHeadAttention`. What it shares with `gna_jax.flax.linen` stands in
`gna_jax.flax.attention_fn`.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer, PrecisionLike
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from gna_jax.flax.attention_fn import (
    Rotary,
    attention_fn,
    check_dropout_rate,
    split_features,
)
from gna_jax.flax.partition import into_heads, out_of_heads, over_heads, sharding_of_sum
from gna_jax.neighborhood import Flags, Sizes

_LECUN_NORMAL = nnx.initializers.lecun_normal()
_ZEROS = nnx.initializers.zeros_init()


class GNAttention(nnx.Module):
    """Multi-head neighborhood self-attention: `inputs [B, *space, C]` to `[B, *space, out_features]`.

    `out(gna(rotary(query_ln(query(x)), key_ln(key(x))), value(x)))`, then dropout. There is exactly one batch axis and
    1 to 3 spatial ones. A checkpoint of `nnx.MultiHeadAttention` loads: parameters have its names and shapes,
    `query`/`key`/`value` kernel [C, heads, head_dim] and bias [heads, head_dim] (`num_kv_heads` for key and value),
    `query_ln`/`key_ln` scale [head_dim], `out` kernel [heads, head_dim, out_features] and bias [out_features].

    Args:
      num_heads: query heads; must divide `qkv_features`.
      in_features: features of the inputs.
      window_size, stride, dilation, is_causal, scale, implementation, tiles, device: as in `gna_jax.gna`.
      num_kv_heads: key and value heads, a divisor of `num_heads` (grouped-query attention). Default `num_heads`.
      qkv_features: features of all query heads together. Default `in_features`.
      out_features: features of the output. Default `in_features`.
      use_bias: whether the four projections add a bias.
      normalize_qk: layer norm over head_dim of query and key (arXiv 2302.05442).
      relative_position_bias: learn a bias [num_heads, 2w-1 per axis], zero at first; needs `window_size` per axis.
      out_dropout_rate: dropout after the output projection. Attention probabilities are never dropped.
      deterministic: no dropout if True. Default: what `train()` or `eval()` set, or the call says.
      dtype: dtype of the computation. Default: the common one of inputs and parameters.
      param_dtype: dtype of the parameters.
      precision: of all matrix products.
      kernel_init, bias_init: initializers; `out_kernel_init`, `out_bias_init` default to them.
      rotary: callable `(query, key) -> (query, key)` on [B, *space, heads, head_dim], after the norm; an nnx.Module
        with parameters is fine.
      kernel_metadata, bias_metadata: metadata of the parameters, e.g. `{"out_sharding": (None, "model", None)}`;
        `out_kernel_metadata`, `out_bias_metadata` default to them or to the spec's.
      spec: sharding of `[B, *space, heads, head_dim]` over the mesh of `jax.set_mesh`, as in `gna_jax.gna_sharded`, one entry
        per axis; inputs and outputs are sharded as its batch and space. Where it shards heads, so does the default
        metadata of the projections and the position bias. None: space is not sharded.
      rngs: `params`, and `dropout` if `out_dropout_rate` is above 0.

    Raises:
      ValueError: for heads that do not divide, a dropout rate outside [0, 1), or an illegal geometry.
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        window_size: Sizes,
        stride: Sizes = 1,
        dilation: Sizes = 1,
        is_causal: Flags = False,
        num_kv_heads: int | None = None,
        qkv_features: int | None = None,
        out_features: int | None = None,
        use_bias: bool = True,
        normalize_qk: bool = False,
        relative_position_bias: bool = False,
        out_dropout_rate: float = 0.0,
        deterministic: bool | None = None,
        scale: float | None = None,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        precision: PrecisionLike = None,
        kernel_init: Initializer = _LECUN_NORMAL,
        out_kernel_init: Initializer | None = None,
        bias_init: Initializer = _ZEROS,
        out_bias_init: Initializer | None = None,
        rotary: Rotary | None = None,
        implementation: str | Sequence[str] | None = None,
        tiles: Any = None,
        device: Any = None,
        spec: PartitionSpec | None = None,
        kernel_metadata: Mapping[str, Any] | None = None,
        out_kernel_metadata: Mapping[str, Any] | None = None,
        bias_metadata: Mapping[str, Any] | None = None,
        out_bias_metadata: Mapping[str, Any] | None = None,
        rngs: nnx.Rngs,
    ):
        check_dropout_rate(out_dropout_rate)
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        qkv_features = in_features if qkv_features is None else qkv_features
        head_dim = split_features(qkv_features, num_heads, kv_heads)
        self.in_features = in_features
        self.precision = precision
        self.rotary = rotary
        self.attention_fn = attention_fn(
            window_size=window_size,
            stride=stride,
            dilation=dilation,
            is_causal=is_causal,
            scale=scale,
            implementation=implementation,
            tiles=tiles,
            device=device,
            spec=spec,
        )
        linear = functools.partial(
            nnx.LinearGeneral,
            use_bias=use_bias,
            dtype=dtype,
            param_dtype=param_dtype,
            precision=precision,
            rngs=rngs,
        )
        into = _made_by(kernel_init, bias_init, kernel_metadata, bias_metadata)
        out_of = into | out_of_heads(spec)
        into = into_heads(spec) | into
        out_of |= _made_by(out_kernel_init, out_bias_init, out_kernel_metadata, out_bias_metadata)
        # In the order of nnx.MultiHeadAttention, so that equal rngs give equal parameters.
        self.query = linear(in_features, (num_heads, head_dim), **into)
        self.key = linear(in_features, (kv_heads, head_dim), **into)
        self.value = linear(in_features, (kv_heads, head_dim), **into)
        norm = functools.partial(
            nnx.LayerNorm, head_dim, use_bias=False, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.query_ln = norm() if normalize_qk else None
        self.key_ln = norm() if normalize_qk else None
        out_features = in_features if out_features is None else out_features
        self.out = linear((num_heads, head_dim), out_features, axis=(-2, -1), **out_of)
        zeros = lambda shape: nnx.Param(
            jnp.zeros(shape, param_dtype), **over_heads(spec, 0, len(shape))
        )
        self.relative_position_bias = (
            zeros(self.attention_fn.position_bias_shape(num_heads))
            if relative_position_bias
            else None
        )
        self.dropout = (
            nnx.Dropout(out_dropout_rate, deterministic=deterministic, rngs=rngs)
            if out_dropout_rate > 0.0
            else None
        )

    def __call__(
        self,
        inputs: Float[Array, "B *space C"],
        *,
        additional_keys: Float[Array, "B S K H"] | None = None,
        additional_values: Float[Array, "B S K V"] | None = None,
        additional_lengths: Int[Array, " B"] | None = None,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | nnx.RngStream | jax.Array | None = None,
        out_sharding: Any = None,
    ) -> Float[Array, "B *space features"]:
        """Attend every token to its window.

        Args:
          inputs: `[B, *space, in_features]`, exactly one batch axis.
          additional_keys, additional_values, additional_lengths: as in `gna`: heads that every token also sees, taken
            as they are (neither normalized nor rotated) and cast to the dtype of the computation.
          deterministic: no dropout if True; takes precedence over the constructor's.
          rngs: source of the dropout key; takes precedence over the constructor's.
          out_sharding: sharding of the result on an Explicit mesh. Default: batch and space as the attention leaves them.

        Raises:
          ValueError: for inputs of another rank or width, or a call that `gna` rejects.
        """
        self.attention_fn.check_inputs(inputs, self.in_features)
        query, key, value = self.query(inputs), self.key(inputs), self.value(inputs)
        if self.query_ln is not None and self.key_ln is not None:
            query, key = self.query_ln(query), self.key_ln(key)
        bias = self.relative_position_bias
        heads = self.attention_fn.attend(
            query,
            key,
            value,
            rotary=self.rotary,
            relative_position_bias=None if bias is None else bias[...],
            additional_keys=additional_keys,
            additional_values=additional_values,
            additional_lengths=additional_lengths,
            precision=self.precision,
        )
        if out_sharding is None:
            out_sharding = sharding_of_sum(heads, 2)
        out = self.out(heads, out_sharding=out_sharding)
        if self.dropout is None:
            return out
        return self.dropout(out, deterministic=deterministic, rngs=rngs)


def _made_by(
    kernel_init: Initializer | None,
    bias_init: Initializer | None,
    kernel_metadata: Mapping[str, Any] | None,
    bias_metadata: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """How a projection's parameters are made; None leaves the choice to whoever was asked before."""
    making = {
        "kernel_init": kernel_init,
        "bias_init": bias_init,
        "kernel_metadata": kernel_metadata,
        "bias_metadata": bias_metadata,
    }
    return {name: value for name, value in making.items() if value is not None}
