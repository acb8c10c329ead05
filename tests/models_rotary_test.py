"""Rotary embeddings against complex numbers in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gna_jax.models.rotary import Rotation, axial_rotation, inverse_frequencies, rotate


def _complex_rotation(x, angles, interleaved):
    """`x [B, *space, N, H]` turned by `angles [*space, N, F]`, pairs as complex numbers."""
    x = np.asarray(x, np.float64)
    pairs = angles.shape[-1]
    if interleaved:
        z = x[..., 0 : 2 * pairs : 2] + 1j * x[..., 1 : 2 * pairs : 2]
    else:
        z = x[..., :pairs] + 1j * x[..., pairs : 2 * pairs]
    z = z * np.exp(1j * angles)[None]
    out = x.copy()
    if interleaved:
        out[..., 0 : 2 * pairs : 2], out[..., 1 : 2 * pairs : 2] = z.real, z.imag
    else:
        out[..., :pairs], out[..., pairs : 2 * pairs] = z.real, z.imag
    return out


def _angles(positions, frequencies):
    """`[*space, F]`, token by token."""
    layout = tuple(len(p) for p in positions)
    table = np.zeros((*layout, sum(len(f) for f in frequencies)))
    for token in np.ndindex(*layout):
        parts = [p[i] * f for p, f, i in zip(positions, frequencies, token, strict=True)]
        table[token] = np.concatenate(parts)
    return table


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("head_dim", [20, 26])
def test_rotates_pairs_by_the_angle_of_each_axis(interleaved, head_dim):
    positions = (np.arange(3), np.arange(4) * 0.5, np.arange(5) + 7)
    frequencies = (
        inverse_frequencies(4, 256.0),
        inverse_frequencies(10),
        inverse_frequencies(6, 100.0),
    )
    x = jax.random.normal(jax.random.key(0), (2, 3, 4, 5, 2, head_dim))
    angles = _angles(positions, frequencies)[..., None, :]
    out = rotate(x, axial_rotation(positions, frequencies), interleaved=interleaved)
    np.testing.assert_allclose(out, _complex_rotation(x, angles, interleaved), atol=2e-6)


def test_frequencies_per_head():
    positions = (np.linspace(-1, 1, 4), np.linspace(-1, 1, 6))
    frequencies = tuple(
        np.asarray(jax.random.uniform(jax.random.key(i), (3, 2)), np.float64) for i in range(2)
    )
    x = jax.random.normal(jax.random.key(2), (1, 4, 6, 3, 10))
    rotation = axial_rotation(positions, frequencies)
    assert rotation.cos.shape == (4, 6, 3, 4)
    heads = [_angles(positions, [f[n] for f in frequencies]) for n in range(3)]
    expected = _complex_rotation(x, np.stack(heads, axis=-2), False)
    np.testing.assert_allclose(rotate(x, rotation, interleaved=False), expected, atol=2e-6)


def test_scores_depend_on_the_distance_alone():
    rotation = axial_rotation((np.arange(9), np.arange(9)), (inverse_frequencies(4),) * 2)
    query, key = (jax.random.normal(jax.random.key(i), (1, 1, 1, 1, 8)) for i in range(2))

    def score(at, to):
        def cut(y, x):
            return Rotation(rotation.cos[y : y + 1, x : x + 1], rotation.sin[y : y + 1, x : x + 1])

        return float(
            jnp.sum(
                rotate(query, cut(*at), interleaved=True) * rotate(key, cut(*to), interleaved=True)
            )
        )

    assert score((1, 2), (3, 7)) == pytest.approx(score((4, 3), (6, 8)), abs=1e-5)
    assert score((1, 2), (3, 7)) != pytest.approx(score((1, 2), (3, 6)), abs=1e-3)


def test_traced_positions_give_the_same_table():
    frequencies = (inverse_frequencies(8),)
    positions = np.arange(5) * 1.5
    traced = jax.jit(lambda p: axial_rotation((p,), frequencies))(
        jnp.asarray(positions, jnp.float32)
    )
    for got, expected in zip(traced, axial_rotation((positions,), frequencies), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-6)


def test_keeps_the_dtype_and_turns_in_float32():
    x = jax.random.normal(jax.random.key(0), (1, 300, 1, 8)).astype(jnp.bfloat16)
    rotation = axial_rotation((np.arange(300),), (inverse_frequencies(8),))
    out = rotate(x, rotation, interleaved=True)
    assert out.dtype == jnp.bfloat16
    exact = rotate(x.astype(jnp.float32), rotation, interleaved=True)
    np.testing.assert_array_equal(out, exact.astype(jnp.bfloat16))


def test_wrong_tables_name_their_shapes():
    x = jnp.zeros((1, 4, 6, 2, 8))
    table = axial_rotation((np.arange(6), np.arange(4)), (inverse_frequencies(4),) * 2)
    with pytest.raises(
        ValueError, match=r"got x of shape \(1, 4, 6, 2, 8\), rotation of shape \(6, 4, 4\)"
    ):
        rotate(x, table, interleaved=True)
    wide = axial_rotation((np.arange(4), np.arange(6)), (inverse_frequencies(6),) * 2)
    with pytest.raises(ValueError, match="2 \\* pairs <= 8 features"):
        rotate(x, wide, interleaved=True)
    with pytest.raises(ValueError, match="got dim=5; use an even number"):
        inverse_frequencies(5)
    with pytest.raises(ValueError, match="got 2 positions, 1 frequencies"):
        axial_rotation((np.arange(4), np.arange(6)), (inverse_frequencies(4),))
    with pytest.raises(ValueError, match=r"got positions \[\(2, 2\)\]"):
        axial_rotation((np.zeros((2, 2)),), (inverse_frequencies(4),))
