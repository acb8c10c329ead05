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
from jaxtyping import Array, Float, Int

from gna_jax.attention import gna
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
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if implementation is not None and not isinstance(implementation, str):
            implementation = tuple(implementation)  # hashable, as static attributes must be
        self.implementation, self.tiles = implementation, tiles
        made: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        project = functools.partial(nnx.LinearGeneral, use_bias=False, **made)
        features, heads = num_heads * head_dim, (num_heads, head_dim)
        self.query = project(features, heads)
        self.key = project(features, heads)
        self.value = project(features, heads)
        self.query_norm = rms_norm(head_dim, ATTENTION_EPSILON, **made)
        self.key_norm = rms_norm(head_dim, ATTENTION_EPSILON, **made)
        self.out = project(heads, features, axis=(-2, -1))

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
        return self.out(gna(query, key, value, implementation=self.implementation, **window))


class CosmosCrossAttention(nnx.Module):
    """Attention of every token to the text, no biases, no positions. Parameters named as in `CosmosSelfAttention`."""

    def __init__(self, config: CosmosConfig, **made: Any):
        project = functools.partial(nnx.LinearGeneral, use_bias=False, **made)
        heads = (config.num_heads, config.head_dim)
        self.query = project(config.features, heads)
        self.key = project(config.text_features, heads)
        self.value = project(config.text_features, heads)
        self.query_norm = rms_norm(config.head_dim, ATTENTION_EPSILON, **made)
        self.key_norm = rms_norm(config.head_dim, ATTENTION_EPSILON, **made)
        self.out = project(heads, config.features, axis=(-2, -1))

    def __call__(
        self,
        x: Float[Array, "B *space C"],
        text: Float[Array, "B S text_features"],
        text_lengths: Int[Array, " B"] | None = None,
    ) -> Float[Array, "B *space C"]:
        """Attend to the first `text_lengths` text tokens of each sample, or to all."""
        text = hide_padding(text, text_lengths)
        query = self.query_norm(self.query(x.reshape(x.shape[0], -1, x.shape[-1])))
        key, value = self.key_norm(self.key(text)), self.value(text)
        heads = jax.nn.dot_product_attention(query, key, value, key_value_seq_lengths=text_lengths)
        return self.out(heads).reshape(x.shape)


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
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        made: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        features, hidden = config.features, int(config.mlp_ratio * config.features)
        norm = functools.partial(AdaptiveNorm, features, config.modulation_rank, **made)
        self.norm_1 = norm()
        self.attention = CosmosSelfAttention(
            config.num_heads, config.head_dim, implementation=implementation, tiles=tiles, **made
        )
        self.norm_2 = norm()
        self.cross_attention = CosmosCrossAttention(config, **made)
        self.norm_3 = norm()
        self.mlp_in = nnx.Linear(features, hidden, use_bias=False, **made)
        self.mlp_out = nnx.Linear(hidden, features, use_bias=False, **made)

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
        return x + gate * self.mlp_out(nnx.gelu(self.mlp_in(y), approximate=False))


def rms_norm(features: int, epsilon: float, **made: Any) -> nnx.RMSNorm:
    """`x / sqrt(mean(x ** 2) + epsilon) * scale`, statistics in float32."""
    return nnx.RMSNorm(features, epsilon=epsilon, **made)
