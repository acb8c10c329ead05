"""The blocks of a Cosmos-Predict transformer: self-attention by `gna`, cross attention to the text, an MLP.

The transformer around them: `gna_jax.models.cosmos_model`. Tokens are [B, T, Y, X, C].
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from gna_jax.flax.partition import (
    attention_over,
    check_spec,
    into_heads,
    into_hidden,
    out_of_heads,
    out_of_hidden,
    over_shards,
    summed_over,
)
from gna_jax.models.cosmos_presets import CosmosConfig
from gna_jax.models.joint import hide_padding
from gna_jax.models.rotary import Rotation, rotate
from gna_jax.models.schedule import Rule, window_arguments
from gna_jax.tiling import Tiles

NORM_EPSILON = 1e-6
ATTENTION_EPSILON = 1e-5
"""Of the norms on queries and keys."""


class TimeVectors(NamedTuple):
    """What the timestep gives to every block, with the video's axes: `[B, T or 1, 1, 1, ..]`."""

    embedding: Float[Array, "B t 1 1 C"]
    modulation: Float[Array, "B t 1 1 3*C"]


class CosmosSelfAttention(nnx.Module):
    """Self-attention of a Cosmos block: `out(gna(rotate(norm(query(x))), rotate(norm(key(x))), value(x)))`, no biases.

    Parameters: `query`, `key`, `value` kernel [C, heads, head_dim], `query_norm`, `key_norm` scale [head_dim], `out` kernel
    [heads, head_dim, C].

    Args:
      num_heads, head_dim: attention heads and their size; C is their product.
      implementation: as in `gna`.
      tiles: as in `gna`, for calls with a window; dense ones choose their own.
      spec: sharding of `[B, *space, heads, head_dim]`, one entry per axis, as in `gna_jax.gna_sharded`; where it shards heads,
        weights are sharded alike (`gna_jax.flax.partition`). None: space is not sharded.
      dtype, param_dtype: of the computation (default: the inputs') and of the parameters.
      rngs: `params`.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        *,
        implementation: str | Sequence[str] | None = None,
        tiles: Tiles | None = None,
        spec: PartitionSpec | None = None,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if implementation is not None and not isinstance(implementation, str):
            implementation = tuple(implementation)  # hashable, as static attributes must be
        check_spec(spec)
        self.implementation, self.tiles, self.spec = implementation, tiles, spec
        made: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        project = functools.partial(nnx.LinearGeneral, use_bias=False, **made)
        features, heads = num_heads * head_dim, (num_heads, head_dim)
        self.query, self.key, self.value = (
            project(features, heads, **into_heads(spec)) for _ in range(3)
        )
        self.query_norm = rms_norm(head_dim, ATTENTION_EPSILON, **made)
        self.key_norm = rms_norm(head_dim, ATTENTION_EPSILON, **made)
        self.out = project(heads, features, axis=(-2, -1), **out_of_heads(spec))

    def __call__(
        self,
        x: Float[Array, "B *space C"],
        rotation: Rotation | None = None,
        *,
        rule: Rule = None,
    ) -> Float[Array, "B *space C"]:
        """Attend every token to its window, or to all tokens.

        Args:
          x: tokens on a grid.
          rotation: rotary table of the grid, its pairs `(i, head_dim / 2 + i)`.
          rule: window, static; None: dense.

        Raises:
          ValueError: a window that does not fit the grid, and what else `gna` raises.
        """
        query, key = self.query_norm(self.query(x)), self.key_norm(self.key(x))
        if rotation is not None:
            query = rotate(query, rotation, interleaved=False)
            key = rotate(key, rotation, interleaved=False)
        window = window_arguments(rule, self.tiles)
        value = self.value(x)
        check_spec(self.spec, x.ndim - 2)
        attend = attention_over(self.spec)
        heads = attend(query, key, value, implementation=self.implementation, **window)
        return summed_over(self.out, heads, 2)


class CosmosCrossAttention(nnx.Module):
    """Attention of every token to the text, no biases, no positions. Parameters named as in `CosmosSelfAttention`."""

    def __init__(self, config: CosmosConfig, spec: PartitionSpec | None, **made: Any):
        self.spec = spec
        project = functools.partial(nnx.LinearGeneral, use_bias=False, **made)
        heads = (config.num_heads, config.head_dim)
        sources = config.features, config.text_features, config.text_features
        self.query, self.key, self.value = (
            project(features, heads, **into_heads(spec)) for features in sources
        )
        self.query_norm = rms_norm(config.head_dim, ATTENTION_EPSILON, **made)
        self.key_norm = rms_norm(config.head_dim, ATTENTION_EPSILON, **made)
        self.out = project(heads, config.features, axis=(-2, -1), **out_of_heads(spec))

    def __call__(
        self,
        x: Float[Array, "B *space C"],
        text: Float[Array, "B S text_features"],
        text_lengths: Int[Array, " B"] | None = None,
    ) -> Float[Array, "B *space C"]:
        """Attend to the first `text_lengths` text tokens of each sample, or to all."""
        text = hide_padding(text, text_lengths)
        query, key = self.query_norm(self.query(x)), self.key_norm(self.key(text))
        attend = _attend_text
        if self.spec is not None:
            # In flat tokens the partitioner could not express how a grid is sharded.
            batch, *_, heads, _ = self.spec
            rows, lengths = PartitionSpec(batch, None, heads), PartitionSpec(batch)
            specs = self.spec, rows, rows, None if text_lengths is None else lengths
            attend = over_shards(attend, specs, self.spec)
        return summed_over(self.out, attend(query, key, self.value(text), text_lengths), 2)


class AdaptiveNorm(nnx.Module):
    """Layer norm without parameters, then `x * (1 + scale) + shift`; shift, scale and gate come from the timestep.

    Their map is of low rank and shared in part: `up(down(silu(embedding)))` of this layer plus the model's `modulation`.
    """

    def __init__(self, features: int, rank: int, *, vectors: int = 3, **made: Any):
        self.norm = nnx.LayerNorm(
            features,
            epsilon=NORM_EPSILON,
            use_bias=False,
            use_scale=False,
            use_fast_variance=False,
            **made,
        )
        self.down = nnx.Linear(features, rank, use_bias=False, **made)
        self.up = nnx.Linear(rank, vectors * features, use_bias=False, **made)

    def __call__(
        self, x: Float[Array, "B T Y X C"], time: TimeVectors
    ) -> tuple[Float[Array, "B T Y X C"], tuple[Array, ...]]:
        """The normalized tokens, and the gate if there is one."""
        vectors = self.up(self.down(nnx.silu(time.embedding)))
        vectors = vectors + time.modulation[..., : vectors.shape[-1]].astype(vectors.dtype)
        shift, scale, *gate = jnp.split(vectors, vectors.shape[-1] // x.shape[-1], axis=-1)
        return self.norm(x) * (1 + scale) + shift, tuple(gate)


class CosmosBlock(nnx.Module):
    """Self-attention, cross attention, MLP: each `x + gate * f(adaptive_norm(x))`. Arguments as in `CosmosTransformer`."""

    def __init__(
        self,
        config: CosmosConfig,
        *,
        implementation: str | Sequence[str] | None = None,
        tiles: Tiles | None = None,
        spec: PartitionSpec | None = None,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        made: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        features, hidden = config.features, int(config.mlp_ratio * config.features)
        norm = functools.partial(AdaptiveNorm, features, config.modulation_rank, **made)
        self.norm_1 = norm()
        self.attention = CosmosSelfAttention(
            config.num_heads,
            config.head_dim,
            implementation=implementation,
            tiles=tiles,
            spec=spec,
            **made,
        )
        self.norm_2 = norm()
        self.cross_attention = CosmosCrossAttention(config, spec, **made)
        self.norm_3 = norm()
        linear = functools.partial(nnx.Linear, use_bias=False, **made)
        self.mlp_in = linear(features, hidden, **into_hidden(spec))
        self.mlp_out = linear(hidden, features, **out_of_hidden(spec))

    def __call__(
        self,
        x: Float[Array, "B T Y X C"],
        text: Float[Array, "B S text_features"],
        time: TimeVectors,
        rotation: Rotation,
        positions: Float[Array, "1 T Y X C"] | None = None,
        text_lengths: Int[Array, " B"] | None = None,
        *,
        rule: Rule = None,
    ) -> Float[Array, "B T Y X C"]:
        """One block.

        Args:
          x: tokens of the video.
          text, text_lengths: text tokens, and how many of them each sample has; None: all.
          time: what the timestep gives.
          rotation: of queries and keys of self-attention.
          positions: added to the tokens first.
          rule: window of self-attention, static; None: dense.
        """
        if positions is not None:
            x = x + positions.astype(x.dtype)
        y, (gate,) = self.norm_1(x, time)
        x = x + gate * self.attention(y, rotation, rule=rule)
        y, (gate,) = self.norm_2(x, time)
        x = x + gate * self.cross_attention(y, text, text_lengths)
        y, (gate,) = self.norm_3(x, time)
        hidden = nnx.gelu(self.mlp_in(y), approximate=False)
        return x + gate * summed_over(self.mlp_out, hidden)


def _attend_text(
    query: Float[Array, "B *space N H"],
    key: Float[Array, "B S N H"],
    value: Float[Array, "B S N H"],
    text_lengths: Int[Array, " B"] | None,
) -> Float[Array, "B *space N H"]:
    flat = query.reshape(query.shape[0], -1, *query.shape[-2:])
    out = jax.nn.dot_product_attention(flat, key, value, key_value_seq_lengths=text_lengths)
    return out.reshape(query.shape)


def rms_norm(features: int, epsilon: float, **made: Any) -> nnx.RMSNorm:
    """`x / sqrt(mean(x ** 2) + epsilon) * scale`, statistics in float32."""
    return nnx.RMSNorm(features, epsilon=epsilon, **made)
