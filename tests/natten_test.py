"""`na1d`, `na2d`, `na3d`: NATTEN's order and defaults, and its knobs refused by name."""

import inspect

import jax
import jax.numpy as jnp
import pytest

import gna_jax
from gna_jax.natten import KNOBS

ALIASES = {1: gna_jax.na1d, 2: gna_jax.na2d, 3: gna_jax.na3d}


def _x(rank: int) -> jax.Array:
    return jax.random.normal(jax.random.key(rank), (2, *(6, 5, 3)[:rank], 2, 8))


@pytest.mark.parametrize("rank", ALIASES)
def test_equals_gna(rank):
    x = _x(rank)
    extra = jax.random.normal(jax.random.key(9), (2, 3, 2, 8))
    got, got_lse = ALIASES[rank](x, x, x, 3, 2, 1, True, 0.3, extra, extra, return_lse=True)
    want, want_lse = gna_jax.gna(
        x,
        x,
        x,
        window_size=3,
        stride=2,
        is_causal=True,
        scale=0.3,
        additional_keys=extra,
        additional_values=extra,
        return_lse=True,
    )
    assert jnp.array_equal(got, want) and jnp.array_equal(got_lse, want_lse)


def test_none_means_the_default():
    x = _x(2)
    got = gna_jax.na2d(x, x, x, (3, 5), None, None, None)
    assert jnp.array_equal(got, gna_jax.gna(x, x, x, window_size=(3, 5)))


def test_positional_order_is_nattens():
    names = list(inspect.signature(gna_jax.na3d).parameters)
    assert names[:10] == [
        "query",
        "key",
        "value",
        "kernel_size",
        "stride",
        "dilation",
        "is_causal",
        "scale",
        "additional_keys",
        "additional_values",
    ]


@pytest.mark.parametrize("knob", KNOBS)
def test_knobs_are_refused_by_name(knob):
    x = _x(1)
    with pytest.raises(TypeError, match=f"na1d does not take NATTEN's {knob}: "):
        gna_jax.na1d(x, x, x, 3, **{knob: 1})
    assert gna_jax.na1d(x, x, x, 3, **{knob: None}).shape == x.shape


def test_wrong_rank_names_the_right_alias():
    x = _x(2)
    with pytest.raises(ValueError, match=r"na3d takes query .* use na2d or gna"):
        gna_jax.na3d(x, x, x, 3)


def test_scale_zero_means_zero():
    x = _x(1)
    out = gna_jax.na1d(x, x, x, 6, scale=0.0)
    mean = jnp.broadcast_to(jnp.mean(x, axis=1, keepdims=True), x.shape)
    assert jnp.abs(out - mean).max() < 1e-6
