"""The Triton kernels' values and gradients in Triton's interpreter (TRITON_INTERPRET=1), through `gna`, against the float64 oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_suite import attend, case_1d, case_of, check_close, differentiate, oracle
from triton_suite import quick_interpreter

from gna_jax import gna, interpret_gpu
from gna_jax.tiling import Tiles

pytestmark = pytest.mark.triton

FLOAT32 = 2e-6  # sums of exact products of float32, a few hundred of them
# Of the largest entry: weights and score gradients are rounded to 11 bits before their products. The interpreter of Triton 3.9 gets
# products of bfloat16 wrong (3.9e11 for a sum of squares that is 373), so 16 bits are tested in float16.
FLOAT16 = 2e-3
LINE = Tiles((16,), (16,), (16,), (16,))
PLANE = Tiles((4, 4), (2, 8), (2, 8), (4, 4))
VOLUME = Tiles((2, 2, 4), (2, 4, 2), (2, 4, 4), (2, 2, 4))

CASES = [
    case_1d(20, 5, tiles=LINE),
    case_1d(
        37, 4, stride=3, is_causal=True, tiles=LINE, head_dim=12, value_dim=20, scale=-0.3, batch=1
    ),
    case_1d(20, 5, dilation=2, has_bias=True, num_additional=3, lengths=(0, 3), tiles=LINE),
    case_1d(19, -1, dilation=2, num_additional=17, tiles=LINE, batch=1),
    case_of((6, 9), (3, 4), dilation=(2, 2), has_bias=True, tiles=PLANE, batch=1),
    case_of(
        (9, 8), (7, 5), stride=(2, 1), is_causal=(False, True), has_bias=True, tiles=PLANE, batch=1
    ),
    case_of(
        (5, 3, 6), (3, 2, 4), stride=(1, 2, 4), tiles=VOLUME, batch=1, kv_heads=2, heads_per_kv=1
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case):
    arrays, cotangents = case.inputs(np.float32), case.cotangents(np.float32)
    with quick_interpreter(), interpret_gpu("a100"):
        run = lambda arrays: attend(case, arrays, implementation="triton")
        got = differentiate(run, jax.tree.map(jnp.asarray, arrays), cotangents)
        got = jax.tree.map(np.asarray, got)
    check_close(got, oracle(case, arrays, cotangents), FLOAT32)


def test_float16_and_a_vmapped_jit():
    case = case_1d(20, 5, has_bias=True, tiles=LINE, head_dim=16, value_dim=16)
    arrays, cotangents = case.inputs(np.float16), case.cotangents(np.float16)
    twice = lambda x: jnp.stack([x, x])
    static = {name: arrays.pop(name) for name in ("relative_position_bias",)}
    with quick_interpreter(), interpret_gpu("a100"):

        @jax.jit
        @jax.vmap
        def run(arrays):
            function = lambda arrays: attend(case, {**arrays, **static}, implementation="triton")
            return differentiate(function, arrays, cotangents)

        got = jax.tree.map(np.asarray, run(jax.tree.map(twice, arrays)))
    want = oracle(case, {**arrays, **static}, cotangents)
    del want.gradients["relative_position_bias"]
    for entry in range(2):
        check_close(jax.tree.map(lambda x, n=entry: x[n], got), want, FLOAT16)


def test_memory_that_no_tile_may_read_never_shows():
    """NaN before and after a window, further than a tile reaches."""
    x = np.random.default_rng(0).standard_normal((1, 96, 1, 16)).astype(np.float32)
    poisoned = x.copy()
    poisoned[:, :40] = poisoned[:, 80:] = np.nan
    options = {"window_size": 5, "implementation": "triton", "tiles": LINE}
    with quick_interpreter(), interpret_gpu("a100"):
        out, want = (np.asarray(gna(y, y, y, **options))[:, 48:51] for y in (poisoned, x))
    np.testing.assert_array_equal(out, want)
