"""The parts of which the Pallas kernels are made, by themselves and without a kernel: online softmax, masks, and a rule of the source."""

import ast
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from pallas_suite import random_shape

from pallas_kernels import masks, online_softmax
from pallas_kernels.online_softmax import (
    LARGEST_WEIGHT_LOG2,
    LEAST,
    LOG2_E,
    Statistics,
    exponent_scale,
    move_largest,
    signed,
    weigh,
)


@pytest.mark.parametrize("seed", range(12))
def test_words_are_the_mask(seed):
    rng = np.random.default_rng([18, seed])
    rank = 1 + seed % 3
    box = random_shape(rng, int(2 ** rng.integers(4, 8)), rank)
    start = rng.integers(-5, 5, rank).tolist()
    intervals = []
    for origin, size in zip(start, box, strict=True):
        first = origin + rng.integers(-size, size, 64)
        end = first + rng.integers(0, 2 * size + 1, 64)
        intervals.append((jnp.asarray(first), jnp.asarray(end)))
    columns = int(np.prod(box))
    places = masks.digits(jnp.arange(columns), box)
    want = masks.seen(intervals, start, places, (64, columns))
    words = masks.words(intervals, start, box)
    size = min(columns, masks.WORD)
    got = [masks.bits_of(word, jnp.arange(size), (64, size)) for word in words]
    np.testing.assert_array_equal(np.concatenate(got, axis=1), want)
    assert want.any()


@pytest.mark.parametrize("scale", [0.3, 3.0, -1.0, 0.0])
def test_lazy_softmax(scale):
    """Tiles of scores, some hidden, against float64; the output is rescaled by whoever keeps it."""
    rng = np.random.default_rng([17, int(10 * scale) + 50])
    rows, columns, tiles = 32, 16, 6
    scores = rng.normal(0, np.linspace(1, 20, tiles)[:, None, None], (tiles, rows, columns))
    hidden = rng.random((tiles, rows, columns)) < 0.5
    hidden[:3, :8] = True  # rows without a key at first
    hidden[:, 0] = True  # and to the end
    values = rng.normal(size=(tiles, columns, 4))
    state = Statistics(jnp.full(rows, LEAST), jnp.zeros(rows))
    out = np.zeros((rows, 4))
    for tile in range(tiles):
        shown = jnp.asarray(np.where(hidden[tile], 0, scores[tile]), jnp.float32)
        block = jnp.where(hidden[tile], -jnp.inf, signed(shown, scale))
        state, decay, is_rescaled = move_largest(state, jnp.split(block, 2, axis=1), scale)
        blocks = []
        for half in jnp.split(block, 2, axis=1):
            state, weights = weigh(state, half, scale)
            blocks.append(weights)
        weights = jnp.concatenate(blocks, axis=1)
        assert bool(is_rescaled) == bool((decay < 1).any())
        assert float(weights.max()) <= 2**LARGEST_WEIGHT_LOG2
        out = out * np.asarray(decay)[:, None] + np.asarray(weights) @ values[tile]
    wide = np.where(hidden, -np.inf, scores * scale)
    peak = np.maximum(wide.max((0, 2)), -1e300)[None, :, None]
    exact = np.exp(wide - peak)
    total = exact.sum((0, 2))
    want = np.einsum("trc,tcv->rv", exact, values) / np.where(total, total, 1)[:, None]
    got = out / np.where(np.asarray(state.total), np.asarray(state.total), 1)[:, None]
    np.testing.assert_allclose(got, want, atol=2e-5)
    lse = exponent_scale(scale) * state.largest[1:] + jnp.log2(state.total[1:])
    want_lse = (peak[0, 1:, 0] + np.log(total[1:])) * LOG2_E
    np.testing.assert_allclose(lse, want_lse, rtol=2e-6, atol=2e-5)
    assert not got[0].any()


def test_rows_without_a_key_are_zero_and_free_of_nan():
    scores = jnp.zeros((2, 4), jnp.float32)
    mask = jnp.asarray([[False] * 4, [True, False, True, False]])
    start = online_softmax.Softmax(
        (jnp.zeros((2, 3)),), jnp.full((2,), online_softmax.LEAST), jnp.zeros((2,))
    )
    state, weights = online_softmax.update(start, scores, mask, 1.0)
    np.testing.assert_array_equal(weights, [[0, 0, 0, 0], [1, 0, 1, 0]])
    np.testing.assert_array_equal(state.total, [0, 2])
    state, weights = online_softmax.update(state, scores, mask, 1.0)
    np.testing.assert_array_equal(state.total, [0, 4])
    assert np.isfinite(state.largest).all()


def test_no_strided_slices():
    """Mosaic GPU drops the stride of `pl.ds` when it compiles, the interpreter honours it: nothing would notice."""
    sources = sorted((Path(__file__).parents[1] / "pallas_kernels").glob("**/*.py"))
    assert sources
    for path in sources:
        assert not list(strided_slices(path.read_text())), path


def strided_slices(source: str):
    """Lines of calls of `ds`, `dslice` or `Slice` with a stride."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", None))
            has_stride = len(node.args) > 2 or any(k.arg == "stride" for k in node.keywords)
            if name in ("ds", "dslice", "Slice") and has_stride:
                yield node.lineno


def test_strided_slices_are_found():
    assert list(strided_slices("a = pl.ds(0, 4)\nb = pl.ds(0, 4, stride=2)\nc = ds(0, 4, 2)")) == [
        2,
        3,
    ]
