"""`GNAttention` for flax.linen: the twin of `gna_jax.flax.nnx.GNAttention`.

Same parameter names and shapes, and the same result from the same parameters, bit for bit. What the two share stands in
`gna_jax.flax.attention_fn`.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype, Initializer, PrecisionLike
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from gna_jax.flax.attention_fn import (
    NeighborhoodAttentionFn,
    Rotary,
    attention_fn,
    check_dropout_rate,
    split_features,
)
from gna_jax.flax.partition import sharding_of_sum
from gna_jax.neighborhood import Flags, Sizes


class GNAttention(nn.Module):
    """Multi-head neighborhood self-attention: `inputs [B, *space, C]` to `[B, *space, out_features]`.

    Fields as in `gna_jax.flax.nnx.GNAttention`, less `in_features` (taken from the inputs) and the metadata (in linen
    an initializer carries it: `nn.with_partitioning`). `deterministic` must be given here or in the call if
    `out_dropout_rate` is above 0.
    """

    num_heads: int
    window_size: Sizes
    stride: Sizes = 1
    dilation: Sizes = 1
    is_causal: Flags = False
    num_kv_heads: int | None = None
    qkv_features: int | None = None
    out_features: int | None = None
    use_bias: bool = True
    normalize_qk: bool = False
    relative_position_bias: bool = False
    out_dropout_rate: float = 0.0
    deterministic: bool | None = None
    scale: float | None = None
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    precision: PrecisionLike = None
    kernel_init: Initializer = nn.initializers.lecun_normal()
    out_kernel_init: Initializer | None = None
    bias_init: Initializer = nn.initializers.zeros_init()
    out_bias_init: Initializer | None = None
    rotary: Rotary | None = None
    implementation: str | Sequence[str] | None = None
    tiles: Any = None
    device: Any = None
    spec: PartitionSpec | None = None

    @nn.compact
    def __call__(
        self,
        inputs: Float[Array, "B *space C"],
        *,
        additional_keys: Float[Array, "B S K H"] | None = None,
        additional_values: Float[Array, "B S K V"] | None = None,
        additional_lengths: Int[Array, " B"] | None = None,
        deterministic: bool | None = None,
        dropout_rng: jax.Array | None = None,
    ) -> Float[Array, "B *space features"]:
        """Attend every token to its window.

        Args:
          inputs: `[B, *space, C]`, exactly one batch axis.
          additional_keys, additional_values, additional_lengths: as in `gna`: heads that every token also sees, taken
            as they are (neither normalized nor rotated) and cast to the dtype of the computation.
          deterministic: no dropout if True.
          dropout_rng: key of the dropout. Default: the `dropout` stream given to `apply`.

        Raises:
          ValueError: for heads that do not divide, a dropout rate outside [0, 1), inputs of another rank, an illegal
            geometry, or a call that `gna` rejects.
        """
        features = inputs.shape[-1]
        check_dropout_rate(self.out_dropout_rate)
        window = self._attention_fn()
        window.check_inputs(inputs, features)
        query, key, value = self._project(inputs)
        bias = None
        if self.relative_position_bias:
            shape = window.position_bias_shape(self.num_heads)
            zeros = nn.initializers.zeros_init()
            bias = self.param("relative_position_bias", zeros, shape, self.param_dtype)
        heads = window.attend(
            query,
            key,
            value,
            rotary=self.rotary,
            relative_position_bias=bias,
            additional_keys=additional_keys,
            additional_values=additional_values,
            additional_lengths=additional_lengths,
            precision=self.precision,
        )
        out = self._linear(
            name="out",
            dot_general=functools.partial(
                jax.lax.dot_general, out_sharding=sharding_of_sum(heads, 2)
            ),
            features=features if self.out_features is None else self.out_features,
            axis=(-2, -1),
            kernel_init=self.kernel_init if self.out_kernel_init is None else self.out_kernel_init,
            bias_init=self.bias_init if self.out_bias_init is None else self.out_bias_init,
        )(heads)
        if self.out_dropout_rate == 0.0:
            return out
        dropout = nn.Dropout(self.out_dropout_rate, deterministic=self.deterministic)
        return dropout(out, deterministic=deterministic, rng=dropout_rng)

    def _project(self, inputs: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Query, key and value heads, normalized if asked for."""
        kv_heads = self.num_heads if self.num_kv_heads is None else self.num_kv_heads
        features = inputs.shape[-1] if self.qkv_features is None else self.qkv_features
        head_dim = split_features(features, self.num_heads, kv_heads)
        init = {"kernel_init": self.kernel_init, "bias_init": self.bias_init}
        query = self._linear(name="query", features=(self.num_heads, head_dim), **init)(inputs)
        key = self._linear(name="key", features=(kv_heads, head_dim), **init)(inputs)
        value = self._linear(name="value", features=(kv_heads, head_dim), **init)(inputs)
        if self.normalize_qk:
            norm = functools.partial(
                nn.LayerNorm, use_bias=False, dtype=self.dtype, param_dtype=self.param_dtype
            )
            query, key = norm(name="query_ln")(query), norm(name="key_ln")(key)
        return query, key, value

    @nn.nowrap
    def _linear(self, **options: Any) -> nn.DenseGeneral:
        return nn.DenseGeneral(
            use_bias=self.use_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            precision=self.precision,
            **options,
        )

    @nn.nowrap
    def _attention_fn(self) -> NeighborhoodAttentionFn:
        return attention_fn(
            window_size=self.window_size,
            stride=self.stride,
            dilation=self.dilation,
            is_causal=self.is_causal,
            scale=self.scale,
            implementation=self.implementation,
            tiles=self.tiles,
            device=self.device,
            spec=self.spec,
        )
