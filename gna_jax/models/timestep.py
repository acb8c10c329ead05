"""Timesteps as features: sinusoids of a scalar, and the two-layer perceptron that diffusion transformers put on them."""

import math

import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float


def sinusoidal_features(
    timesteps: Float[Array, " B"],
    dim: int,
    *,
    factor: float = 1.0,
    max_period: float = 10000.0,
    frequency_shift: float = 0.0,
    cos_first: bool = True,
) -> Float[Array, "B dim"]:
    """Cosines and sines of `factor * t * max_period ** (-i / (dim / 2 - frequency_shift))`, float32.

    Args:
      timesteps: one scalar per sample; integers are fine.
      dim: number of features, even: one cosine and one sine per frequency.
      factor: on the timesteps, 1000 for those who count time from 0 to 1.
      max_period: longest period over 2 pi.
      frequency_shift: 1 lets the lowest frequency reach `1 / max_period`, 0 stops one step before.
      cos_first: cosines before sines.

    Raises:
      ValueError: for timesteps that are not one per sample, or an odd `dim`.
    """
    if jnp.ndim(timesteps) != 1:
        raise ValueError(
            f"timesteps must be [batch]; got shape {jnp.shape(timesteps)};"
            " repeat a scalar with jnp.full((batch,), t)"
        )
    if dim < 2 or dim % 2:
        raise ValueError(f"dim must be even, a cosine and a sine per frequency; got dim={dim}")
    half = dim // 2
    # Angles reach thousands, so the last bits of the rates show: exponents are rounded as in the published models, and
    # only once, which numpy's float32 exponential does not.
    exponents = np.float32(-math.log(max_period)) * np.arange(half, dtype=np.float32)
    exponents = (exponents / np.float32(half - frequency_shift)).astype(np.float64)
    rates = jnp.asarray(np.exp(exponents), jnp.float32)
    angles = factor * (jnp.asarray(timesteps, jnp.float32)[:, None] * rates[None])
    parts = (jnp.cos(angles), jnp.sin(angles))
    return jnp.concatenate(parts if cos_first else parts[::-1], axis=-1)


class VectorEmbedder(nnx.Module):
    """`linear2(silu(linear1(x)))`, from `in_features` to `features`: what turns timesteps and pooled text into one vector."""

    def __init__(
        self,
        in_features: int,
        features: int,
        *,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.linear1 = nnx.Linear(
            in_features, features, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.linear2 = nnx.Linear(
            features, features, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )

    def __call__(self, x: Float[Array, "*batch in_features"]) -> Float[Array, "*batch features"]:
        """Embed each vector."""
        return self.linear2(nnx.silu(self.linear1(x)))
