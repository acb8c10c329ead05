"""HunyuanVideo's token refiner: a small transformer over the text tokens, conditioned on time and on the text's mean.

Dense attention among each sample's own text. The video transformer that reads its result: `gna_jax.models.hunyuan_video_model`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from gna_jax.models.joint import hide_padding, text_mask
from gna_jax.models.mmdit import Modulation, per_sample, statistics_dtype
from gna_jax.models.timestep import VectorEmbedder, sinusoidal_features


class RefinerBlock(nnx.Module):
    """Self-attention and an MLP with SiLU, both gated by the condition; plain layer norms before them."""

    def __init__(self, features: int, num_heads: int, mlp_features: int, **linear: Any):
        heads = num_heads, features // num_heads
        self.gates = Modulation(features, 2, **linear)
        self.norm1 = nnx.LayerNorm(features, use_fast_variance=False, **linear)
        self.query = nnx.LinearGeneral(features, heads, **linear)
        self.key = nnx.LinearGeneral(features, heads, **linear)
        self.value = nnx.LinearGeneral(features, heads, **linear)
        self.out = nnx.LinearGeneral(heads, features, axis=(-2, -1), **linear)
        self.norm2 = nnx.LayerNorm(features, use_fast_variance=False, **linear)
        self.mlp_in = nnx.Linear(features, mlp_features, **linear)
        self.mlp_out = nnx.Linear(mlp_features, features, **linear)

    def __call__(
        self,
        text: Float[Array, "B S C"],
        vector: Float[Array, "B C"],
        text_lengths: Int[Array, " B"] | None = None,
    ) -> Float[Array, "B S C"]:
        """One block; a token sees its sample's text."""
        gates = self.gates(vector)
        x = self.norm1(text)
        lengths = None if text_lengths is None else text_lengths.astype(jnp.int32)
        attended = jax.nn.dot_product_attention(
            self.query(x), self.key(x), self.value(x), key_value_seq_lengths=lengths
        )
        text = text + self.out(attended) * per_sample(gates[0], text)
        mlp = self.mlp_out(nnx.silu(self.mlp_in(self.norm2(text))))
        return text + mlp * per_sample(gates[1], text)


class TextRefiner(nnx.Module):
    """Text embeddings `[B, S, text_features]` to tokens `[B, S, features]`."""

    def __init__(
        self,
        text_features: int,
        features: int,
        num_heads: int,
        num_blocks: int,
        time_features: int,
        **linear: Any,
    ):
        self.time_features = time_features
        self.time_embedder = VectorEmbedder(time_features, features, **linear)
        self.pooled_embedder = VectorEmbedder(text_features, features, **linear)
        self.embedder = nnx.Linear(text_features, features, **linear)
        self.blocks = nnx.List(
            [RefinerBlock(features, num_heads, 4 * features, **linear) for _ in range(num_blocks)]
        )

    def __call__(
        self,
        text: Float[Array, "B S text_features"],
        timestep: Float[Array, " B"],
        text_lengths: Int[Array, " B"] | None = None,
    ) -> Float[Array, "B S features"]:
        """Refine; what lies after a sample's length is finite and means nothing."""
        text = hide_padding(text, text_lengths)
        time = sinusoidal_features(timestep, self.time_features).astype(text.dtype)
        vector = self.time_embedder(time) + self.pooled_embedder(_mean(text, text_lengths))
        tokens = self.embedder(text)
        for block in self.blocks:
            tokens = block(tokens, vector, text_lengths)
        return tokens


def _mean(text: Float[Array, "B S C"], text_lengths: Array | None) -> Float[Array, "B C"]:
    """Mean over a sample's tokens, in float32; zero where it has none. Padding is zero already."""
    wide = text.astype(statistics_dtype(text.dtype))
    if text_lengths is None:
        return jnp.mean(wide, axis=1).astype(text.dtype)
    count = jnp.sum(text_mask(text_lengths, text.shape[1]), axis=1, dtype=wide.dtype)
    return (jnp.sum(wide, axis=1) / jnp.maximum(count, 1)[:, None]).astype(text.dtype)
