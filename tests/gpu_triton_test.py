"""On a real GPU what triton alone offers: float32 and TF32, a relative position bias and its gradient, head dims from 16 to 256.

`make gpu` runs it. Triton's interpreter, in which the other tests run, has no matrix unit: neither its order of sums nor TF32.
"""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from attention_suite import case_1d, case_of, check_close, compiled, oracle, random_case
from gpu_kernels_test import IMPLEMENTATIONS, differentiated, of_preset
from gpu_kernels_test import gpu as gpu
from gpu_kernels_test import optimised as optimised

from gna_jax.trials import TOLERANCE, Trial
from gna_jax.verification import attempt

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif("triton" not in IMPLEMENTATIONS, reason="triton was not asked for"),
]

LINE, PLANE, VOLUME = ((150,), (9,)), ((20, 24), (7, 5)), ((6, 9, 12), (3, 5, 4))
FLOAT32 = 5e-6
"""Sums of exact products of float32, a few hundred of them."""


@pytest.mark.parametrize(
    ("sizes", "dim"),
    [
        (LINE, 16),
        (PLANE, 16),
        (VOLUME, 24),
        (PLANE, 32),
        (VOLUME, 32),
        (LINE, 64),
        (VOLUME, 128),
        (PLANE, 256),
    ],
    ids=lambda x: f"{len(x[0])}d" if isinstance(x, tuple) else str(x),
)
def test_bfloat16_with_a_bias(sizes, dim):
    """Small windows at every width of a tile, against float64 attention of the same rounded arrays. Every call compiles four kernels,
    seconds each, and `gna-jax selfcheck` has more of them."""
    dilation = tuple(1 + (axis == 0) for axis in range(len(sizes[0])))
    case = case_of(*sizes, dilation=dilation, head_dim=dim, value_dim=dim, kv_heads=2, has_bias=True)  # fmt: skip
    compare(dataclasses.replace(case, batch=1, seed=dim), ml_dtypes.bfloat16)


@pytest.mark.parametrize(
    "case",
    [
        case_1d(300, 40, stride=8, dilation=3, is_causal=True, num_additional=5, lengths=(0, 3)),
        case_of((20, 24), (7, 5), has_bias=True, head_dim=64, value_dim=64),
        case_of((6, 9, 12), (3, 5, 4), stride=(1, 2, 4), head_dim=128, value_dim=128),
    ],
    ids=str,
)
def test_float32_is_exact_and_tf32_is_not(case):
    """`precision` None and "highest" give products of float32 as they are; "default" rounds to 11 bits, and is near."""
    exact = compare(case, np.float32)
    again = compare(case, np.float32, precision="highest")
    np.testing.assert_array_equal(exact.out, again.out)
    rounded = compare(case, np.float32, TOLERANCE["tf32"], precision="default")
    assert np.abs(np.asarray(rounded.out) - np.asarray(exact.out)).max() > 10 * FLOAT32
    compare(case, np.float32, 10 * FLOAT32, precision="high")


@pytest.mark.parametrize("seed", range(9100, 9108))
def test_random_calls_with_all_options(seed):
    dtype = (ml_dtypes.bfloat16, np.float32)[seed % 2]
    dim = (None, 48, 128)[seed // 2 % 3]
    case = dataclasses.replace(random_case(seed), tiles=None, has_bias=seed % 4 < 3)
    if dim is not None:
        case = dataclasses.replace(case, head_dim=dim, value_dim=dim)
    compare(case, dtype)


SIZES = (
    dataclasses.replace(of_preset("nat-1", 0), has_bias=True),
    dataclasses.replace(of_preset("nat-1", 1), has_bias=True),
    dataclasses.replace(of_preset("nat-1", 0), has_bias=True, dtype="bfloat16"),
    dataclasses.replace(of_preset("nat-1", 0), has_bias=True, dtype="float32"),
)


@pytest.mark.parametrize("trial", SIZES, ids=lambda trial: f"{trial} {trial.arithmetic}")
def test_sizes_against_float32(trial):
    """NAT's first level as it is trained."""
    outcome = attempt(trial, "triton", 17)
    assert outcome.is_right, outcome


@pytest.mark.parametrize(
    "trial",
    [
        Trial((56, 56), 7, batch=4, heads=4, kv_heads=2, head_dim=32, value_dim=32, has_bias=True),
        Trial((9, 20, 22), (3, 5, 7), heads=4, dtype="float32", has_bias=True, num_additional=5),
    ],
    ids=str,
)
def test_a_hundred_runs_of_a_bias_gradient_are_bit_equal(trial):
    """Its sums have one order: no atomics."""
    operands = trial.operands(11)
    run = jax.jit(differentiated(trial, "triton"))
    first = run(operands)
    assert "relative_position_bias" in first[1][0]
    equal = jax.jit(lambda a, b: jax.tree.map(lambda x, y: jnp.array_equal(x, y), a, b))
    for _ in range(99):
        assert all(jax.tree.leaves(equal(run(operands), first)))


def compare(case, dtype, tolerance=None, precision=None):
    """Values and all gradients against float64; returns them."""
    arrays, cotangents = case.inputs(dtype), case.cotangents(dtype)
    run = compiled(case, dtype, implementation="triton", precision=precision)
    got = run(arrays, cotangents)
    if tolerance is None:
        tolerance = FLOAT32 if dtype is np.float32 else TOLERANCE[np.dtype(dtype).name]
    check_close(got, oracle(case, arrays, cotangents), tolerance, repr(case))
    return got
