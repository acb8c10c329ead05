"""`explain` says what `gna` does, and its shares are exact counts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gna_jax
from gna_jax.simulator import best_tiles, predict, predict_dense, simulate


def _shape(layout, heads=2, dim=16, dtype=jnp.float32):
    return jax.ShapeDtypeStruct((1, *layout, heads, dim), dtype)


@pytest.mark.parametrize(
    ("layout", "rule"),
    [
        ((40,), {"window_size": 9}),
        ((23,), {"window_size": 5, "dilation": 3, "is_causal": True}),
        ((12, 14), {"window_size": (5, 4), "stride": (2, 1)}),
        ((6, 8, 10), {"window_size": (3, -1, 4), "dilation": (1, 2, 2)}),
    ],
)
def test_useful_share_counts_the_mask(layout, rule):
    x = _shape(layout)
    told = gna_jax.explain(x, x, x, **rule)
    mask = gna_jax.Neighborhood.of(len(layout), **rule).mask(layout)
    tokens = np.prod(layout)
    computed = told.dense_share * tokens**2
    assert round(told.useful_share * computed) == int(mask.sum())
    assert told.useful_share <= 1 and 0 <= told.masked_share <= 1


def test_blocked_attention_needs_no_mask():
    x = _shape((32, 32))
    told = gna_jax.explain(x, x, x, window_size=8, stride=8, tiles=gna_jax.Tiles((8, 8), None))
    assert told.masked_share == 0 and told.useful_share == 1
    assert told.dense_share == pytest.approx(64 / 1024)


def test_prints_what_a_person_asks_for():
    x = _shape((56, 56), heads=8, dim=32, dtype=jnp.bfloat16)
    text = str(gna_jax.explain(x, x, x, window_size=7, is_causal=(True, False), device="h200"))
    for part in (
        "xla on NVIDIA H200, bfloat16",
        "56x56 tokens",
        "window    7x7",
        "causal axes [0]",
    ):
        assert part in text
    assert "not triton: " in text and "%" in text
    assert "not cutlass: " in text
    assert "not mosaic: mosaic has not been verified on NVIDIA H200; pass implementation=" in text
    assert "no prediction for xla on this device; a GPU kernel" in text


def test_is_frozen_and_takes_arrays():
    x = jnp.ones((1, 9, 1, 4))
    told = gna_jax.explain(x, x, x, window_size=3, implementation="reference")
    assert told.implementation == "reference" and told.tiles is None and told.dense_share == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        told.implementation = "xla"


def test_raises_what_gna_raises():
    x = _shape((9,))
    with pytest.raises(ValueError, match="window_size must not exceed the layout"):
        gna_jax.explain(x, x, x, window_size=10)
    with pytest.raises(NotImplementedError, match="triton runs on cuda, the device is cpu"):
        gna_jax.explain(x, x, x, window_size=3, implementation="triton")
    with pytest.raises(NotImplementedError, match="take bfloat16 and float16; got float32"):
        gna_jax.explain(x, x, x, window_size=3, implementation="mosaic", device="h200")


def test_a_kernel_says_what_it_copies():
    x = _shape((9, 20), heads=2, dim=48, dtype=jnp.bfloat16)
    rule = {"window_size": (3, 5), "implementation": "mosaic", "device": "h200"}
    told = gna_jax.explain(x, x, x, dilation=(2, 3), **rule)
    assert told.copies == (
        "axis 0 padded from 9 to 10 for dilation 2",
        "axis 1 padded from 20 to 21 for dilation 3",
        "heads padded from 48 to 64 columns",
    )
    assert "  copy      heads padded from 48 to 64 columns" in str(told)
    x = _shape((9, 20), heads=2, dim=64, dtype=jnp.bfloat16)
    assert gna_jax.explain(x, x, x, **rule).copies == ()


def test_times_are_those_of_the_cost_model():
    x = _shape((30, 48, 80), heads=24, dim=128, dtype=jnp.bfloat16)
    rule = {"window_size": (18, 24, 24), "stride": (16, 8, 8)}
    told = gna_jax.explain(x, x, x, device="b200", **rule)
    tiles = best_tiles(told.problem.neighborhood, (30, 48, 80), 256, 128, dynamic=True)
    kernel = simulate((30, 48, 80), q_tile=tiles.q, kv_tile=tiles.kv, dynamic=True, **rule)
    call = {"heads": 24, "head_dim": 128, "device": "b200"}
    assert told.predicted is None
    assert told.predicted_kernel == predict(kernel, **call).seconds
    assert told.predicted_dense == predict_dense((30, 48, 80), **call).seconds
    on_cpu = gna_jax.explain(x, x, x, device="cpu", **rule)
    assert on_cpu.predicted_kernel is None and 0 < on_cpu.predicted < on_cpu.predicted_dense
    unknown = gna_jax.DeviceSpec("Abacus", "cuda")
    told = gna_jax.explain(x, x, x, device=unknown, **rule)
    assert (told.predicted, told.predicted_kernel, told.predicted_dense) == (None, None, None)
    assert "no prediction for xla" in str(told)
