"""Compiled memory of the XLA backend: a bound at a real size, and growth with tokens, not tokens squared."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gna_jax import gna

MIB = 1 << 20


def compiled(layout, heads, dim, **options):
    """Forward and backward of every operand, compiled for these shapes."""
    tokens = jax.ShapeDtypeStruct((1, *layout, heads, dim), jnp.float32)

    def loss(query, key, value):
        return jnp.sum(gna(query, key, value, implementation="xla", **options) ** 2)

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(tokens, tokens, tokens).compile()


def test_video_layout_stays_under_100_mib():
    """Dense attention's probabilities alone would take 2 GiB a head and pass."""
    program = compiled((16, 32, 32), 2, 64, window_size=(8, 16, 16))
    temporary = program.memory_analysis().temp_size_in_bytes
    print(f"temporary memory, forward and backward: {temporary / MIB:.0f} MiB")
    assert temporary < 100 * MIB


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"stride": 8}, marks=pytest.mark.slow),
        {"dilation": 4, "is_causal": True},
    ],
)
def test_memory_grows_with_tokens(options):
    """Four times the tokens at one window: at most four times the memory, and no array of tokens squared."""
    small, large = (compiled((n,), 1, 16, window_size=64, **options) for n in (4096, 16384))
    bytes_small, bytes_large = (x.memory_analysis().temp_size_in_bytes for x in (small, large))
    assert bytes_large <= 4.5 * bytes_small
    shapes = re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", large.as_text())
    largest = max(math.prod(map(int, shape.split(","))) for shape in shapes)
    assert largest < 16384**2 / 16
    assert largest >= 16384 * 16  # the operands themselves: the text was read


@pytest.mark.slow
def test_bias_gradient_keeps_no_pairs():
    """The table's gradient is summed tile by tile."""
    tokens = jax.ShapeDtypeStruct((1, 64, 64, 2, 16), jnp.float32)
    table = jax.ShapeDtypeStruct((2, 25, 25), jnp.float32)

    def loss(query, bias):
        out = gna(query, query, query, window_size=13, relative_position_bias=bias)
        return jnp.sum(out**2)

    program = jax.jit(jax.grad(loss, (0, 1))).lower(tokens, table).compile()
    pairs = 2 * 64 * 64 * 13 * 13 * np.dtype(np.float32).itemsize
    assert program.memory_analysis().temp_size_in_bytes < 4 * pairs
