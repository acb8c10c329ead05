"""Timestep features against their formula, number by number."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gna_jax.models.timestep import VectorEmbedder, sinusoidal_features


@pytest.mark.parametrize("cos_first", [True, False])
@pytest.mark.parametrize(("factor", "shift"), [(1.0, 0.0), (1000.0, 1.0)])
def test_features_are_cosines_and_sines(cos_first, factor, shift):
    timesteps = np.array([0.0, 0.25, 0.7], np.float32)
    out = sinusoidal_features(
        timesteps, 6, factor=factor, max_period=100.0, frequency_shift=shift, cos_first=cos_first
    )
    for row, t in zip(np.asarray(out), timesteps, strict=True):
        angles = [factor * float(t) * 100.0 ** (-i / (3 - shift)) for i in range(3)]
        cosines, sines = [math.cos(a) for a in angles], [math.sin(a) for a in angles]
        expected = cosines + sines if cos_first else sines + cosines
        np.testing.assert_allclose(row, expected, atol=1e-4)


def test_integers_are_timesteps_too():
    out = sinusoidal_features(jnp.array([3, 500]), 8)
    assert out.dtype == jnp.float32
    np.testing.assert_array_equal(out, sinusoidal_features(jnp.array([3.0, 500.0]), 8))


def test_wrong_arguments():
    with pytest.raises(ValueError, match=r"timesteps must be \[batch\]; got shape \(\)"):
        sinusoidal_features(jnp.float32(1.0), 8)
    with pytest.raises(ValueError, match="got dim=7"):
        sinusoidal_features(jnp.zeros(2), 7)


def test_embedder_is_two_layers_with_silu():
    embedder = VectorEmbedder(4, 6, rngs=nnx.Rngs(0))
    x = np.linspace(-1, 1, 8, dtype=np.float32).reshape(2, 4)
    hidden = x @ np.asarray(embedder.linear1.kernel[...]) + np.asarray(embedder.linear1.bias[...])
    hidden = hidden / (1 + np.exp(-hidden))
    expected = hidden @ np.asarray(embedder.linear2.kernel[...])
    np.testing.assert_allclose(embedder(jnp.asarray(x)), expected, atol=1e-5)
