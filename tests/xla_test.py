"""The XLA backend's values, lse and gradients against float64 dense attention, over every feature."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_suite import (
    Case,
    attend,
    case_1d,
    case_of,
    check_close,
    check_equal,
    compiled,
    dense_peer,
    differentiate,
    max_error,
    oracle,
    random_case,
)

from gna_jax.simulator import query_box_cost
from gna_jax.tiling import Tiles

FLOAT32 = 1e-5
FLOAT64 = 1e-12


def check(case: Case, dtype, tolerance: float, **options) -> None:
    """Against the oracle, and a second run against the first, bit for bit."""
    arrays, cotangents = case.inputs(dtype), case.cotangents(dtype)
    run = compiled(case, dtype, **options)
    got = run(arrays, cotangents)
    check_close(got, oracle(case, arrays, cotangents), tolerance, repr(case))
    assert got.out.dtype == dtype
    assert got.lse.dtype == cotangents[1].dtype
    assert all(gradient.dtype == dtype for gradient in got.gradients.values())
    check_equal(run(arrays, cotangents), got, "second run")


@pytest.mark.parametrize(
    "seed", [*range(7), *(pytest.param(n, marks=pytest.mark.slow) for n in range(7, 12))]
)
def test_random_cases(seed):
    check(random_case(seed), np.float32, FLOAT32)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12, 400))
def test_many_random_cases(seed):
    check(random_case(seed, max_tokens=500, max_loops=12), np.float32, FLOAT32)


@pytest.mark.parametrize(
    "case",
    [
        case_1d(33, 8, head_dim=24, value_dim=80, is_causal=True),
        pytest.param(
            case_1d(40, 9, stride=4, head_dim=32, value_dim=32, kv_heads=2, heads_per_kv=1),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            case_1d(37, 6, stride=3, dilation=5, head_dim=64, value_dim=24, has_bias=True),
            marks=pytest.mark.slow,
        ),
        case_of((8, 11), (3, 4), head_dim=80, value_dim=128, heads_per_kv=4),
        case_of(
            (9, 10), (4, 5), stride=(2, 5), head_dim=128, value_dim=64, is_causal=(True, False)
        ),
    ],
    ids=lambda case: f"{case.head_dim}-{case.value_dim}",
)
def test_head_dims(case):
    check(case, np.float32, FLOAT32)


@pytest.mark.parametrize(
    "case",
    [
        # Every query sees only itself; every query sees everything.
        case_of((5, 4), (1, 1)),
        case_of((3, 4, 5), (-1, -1, -1), num_additional=2, lengths=(0, 2)),
        # The whole group of a dilation that does not divide, causal, with strides.
        case_1d(23, -1, stride=2, dilation=4, is_causal=True, has_bias=True),
        # Blocked attention whose last block is ragged.
        case_of((11, 13), (4, 5), stride=(4, 5), has_bias=True),
        # One token, one axis of one token.
        case_1d(1, 1),
        case_of((1, 7, 1), (1, 3, 1), num_additional=3, lengths=(3, 0)),
        # Window equal to the group: all windows coincide.
        case_of((9, 8), (4, 4), dilation=(2, 2), stride=(3, 4)),
        # Every axis of another kind.
        case_of((5, 6, 7), (3, -1, 2), stride=(2, 1, 2), dilation=(1, 2, 3), is_causal=(True, False, True)),
        # Multi-query attention.
        case_1d(30, 7, kv_heads=1, heads_per_kv=8, head_dim=4, num_additional=1, has_bias=True),
        # Head dims of one.
        case_1d(20, 5, head_dim=1, value_dim=1, scale=2.0),
    ],
    ids=str,
)  # fmt: skip
def test_chosen_cases(case):
    check(case, np.float32, FLOAT32)


@pytest.mark.parametrize(
    "case",
    [
        # The last tile overlaps the one before.
        case_1d(29, 6, tiles=Tiles(q=(8,), kv=None)),
        # The stride does not divide the tile, nor the tile the length; another tile backward.
        pytest.param(
            case_1d(31, 9, stride=4, tiles=Tiles(q=(6,), kv=None, backward_q=(11,)), has_bias=True),
            marks=pytest.mark.slow,
        ),
        # Tiles larger than a dilation group, groups of two lengths.
        case_1d(26, 4, stride=2, dilation=4, tiles=Tiles(q=(9,), kv=None, backward_q=(2,))),
        # One query per tile; ragged on both axes.
        case_of((7, 6), (4, 3), stride=(3, 1), tiles=Tiles(q=(1, 1), kv=None, backward_q=(5, 4))),
        pytest.param(
            case_of((10, 9), (5, 2), is_causal=(True, False), tiles=Tiles(q=(4, 7), kv=None)),
            marks=pytest.mark.slow,
        ),
        # The whole layout as one tile.
        case_of((4, 3, 5), (2, 3, 3), tiles=Tiles(q=(4, 3, 5), kv=None), num_additional=2),
    ],
    ids=lambda case: str(case.tiles),
)
def test_explicit_tiles(case):
    check(case, np.float32, FLOAT32)


@pytest.mark.parametrize(
    "scratch_bytes", [6_000, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 60_000))]
)
def test_several_steps_and_a_ragged_last_group(scratch_bytes, monkeypatch):
    """Tiles per loop step from one to some, so that the last step of a loop repeats a tile to be full."""
    rates = dataclasses.replace(query_box_cost.CPU, scratch_bytes=scratch_bytes)
    monkeypatch.setattr(query_box_cost, "CPU", rates)
    tiles = Tiles(q=(3, 2), kv=None)
    check(case_of((11, 13), (4, 5), stride=(1, 2), tiles=tiles, has_bias=True), np.float32, FLOAT32)


@pytest.mark.parametrize("seed", range(100, 102))
def test_float64(seed):
    with jax.enable_x64(True):
        check(random_case(seed), np.float64, FLOAT64)


@pytest.mark.parametrize(
    "seed", [111, *(pytest.param(n, marks=pytest.mark.slow) for n in (110, 112))]
)
def test_float32_under_x64(seed):
    with jax.enable_x64(True):
        check(random_case(seed), np.float32, FLOAT32)


@pytest.mark.parametrize("device", ["cpu", "h200"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("seed", [120, pytest.param(121, marks=pytest.mark.slow)])
def test_low_precision(seed, dtype, device):
    check_low_precision(random_case(seed), dtype, device)


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", "h200"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("seed", range(2000, 2050))
def test_low_precision_many(seed, dtype, device):
    check_low_precision(random_case(seed, max_tokens=500, max_loops=12), dtype, device)


def check_low_precision(case: Case, dtype, device: str) -> None:
    """At most twice the error of dense attention in that dtype, plus one unit in the last place of the largest entry."""
    arrays, cotangents = case.inputs(dtype), case.cotangents(dtype)
    run = compiled(case, dtype, device=device)
    got = run(arrays, cotangents)
    check_equal(run(arrays, cotangents), got, "second run")
    want = oracle(case, arrays, cotangents).named()
    peer = jax.jit(lambda a, c: differentiate(lambda a: dense_peer(case, a), a, c))(
        arrays, cotangents
    )
    assert got.out.dtype == dtype and got.lse.dtype == np.float32
    for name, array in got.named().items():
        error, largest = max_error(array, want[name])
        peer_error, _ = max_error(peer.named()[name], want[name])
        ulp = float(jnp.finfo(dtype).eps) * 2.0 ** np.floor(np.log2(max(largest, 1e-30)))
        assert np.isfinite(array.astype(np.float32)).all()
        assert error <= 2 * peer_error + ulp, (
            f"{name}: {error:.3g}, dense {peer_error:.3g}, {case!r}"
        )
        if name not in ("lse",):
            assert array.dtype == dtype


def test_bias_of_another_dtype():
    """A float32 table beside bfloat16 tokens keeps its dtype and its gradient's."""
    case = case_1d(20, 5, has_bias=True)
    arrays, cotangents = case.inputs(jnp.bfloat16), case.cotangents(jnp.bfloat16)
    arrays["relative_position_bias"] = case.inputs(np.float32)["relative_position_bias"]
    got = jax.jit(lambda a, c: differentiate(lambda a: attend(case, a), a, c))(arrays, cotangents)
    assert got.gradients["relative_position_bias"].dtype == np.float32
    want = oracle(case, arrays, cotangents)
    error, largest = max_error(
        got.gradients["relative_position_bias"], want.gradients["relative_position_bias"]
    )
    assert error <= 4e-3 * largest


@pytest.mark.slow
def test_large_repeat_runs_are_bit_equal():
    """Large enough that XLA spreads the work over threads."""
    case = case_of(
        (48, 48), (13, 13), batch=4, kv_heads=4, heads_per_kv=1, head_dim=32, has_bias=True
    )
    run, arguments = compiled(case), (case.inputs(np.float32), case.cotangents(np.float32))
    first = run(*arguments)
    for _ in range(3):
        check_equal(run(*arguments), first)
