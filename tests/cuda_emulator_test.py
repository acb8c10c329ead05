"""The CUDA kernels' loop over tiles on the host: the index functions that the kernels call (`cuda_ffi/include/gna`) in `emulator.cc`.

What it returns is compared with the float64 oracle, and faults planted in the functions, each off by one, must show.
"""

import ctypes
import dataclasses
import functools
import math

import ml_dtypes
import numpy as np
import pytest
from attention_suite import Case, case_1d, case_of, check_array, oracle, random_case
from cuda_harness import call, compiled, problem_row, stored

from gna_jax.tiling import Tiles

TOLERANCE = 1e-5  # float32
FAULTS = ("VISIT", "BOX", "BITS", "STORE", "LSE")


def compile_emulator(tmp_path_factory, fault="NONE"):
    folder = tmp_path_factory.mktemp(f"emulator_{fault}")
    return compiled("emulator.cc", folder, f"-DFAULT={fault}")


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    return compile_emulator(tmp_path_factory)


def forward(emulator, case: Case, arrays, parts=1, is_float8=False):
    """Out and lse of a case, from arrays in memory as kernels get them; NaN where nothing was written."""
    assert case.tiles is not None and case.tiles.kv is not None
    row = problem_row(
        case.neighborhood,
        case.layout,
        case.tiles.q,
        case.tiles.kv,
        batch=case.batch,
        query_heads=case.query_heads,
        kv_heads=case.kv_heads,
        head_dim=case.head_dim,
    )
    memory = stored(case.layout, case.dilation)
    excess = [(0, n - length) for n, length in zip(memory, case.layout, strict=True)]
    operands = [
        np.ascontiguousarray(np.pad(arrays[name], [(0, 0), *excess, (0, 0), (0, 0)]), np.float32)
        for name in ("query", "key", "value")
    ]
    rows = (case.batch, *memory, case.query_heads)
    out = np.full((*rows, case.head_dim), np.nan, np.float32)
    # One entry more, for the fault that writes past the end.
    lse = np.full(math.prod(rows) + 1, np.nan, np.float32)
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    numbers = ctypes.c_float(scale), ctypes.c_int32(parts), ctypes.c_int32(is_float8)
    call(emulator.forward, np.asarray(row, np.int32), *numbers, *operands, out, lse)
    real = (slice(None), *(slice(length) for length in case.layout))
    return out[real], lse[:-1].reshape(rows)[real]


FLOAT8_RELATIVE, FLOAT8_ABSOLUTE = 2.0**-4, 2.0**-10
"""What rounding to float8_e4m3fn may change of a weight: half of a step of 4 bits, or half of its smallest number."""


@functools.cache
def expected(case: Case):
    """Operands, and the oracle's results."""
    arrays = case.inputs(np.float32)
    return arrays, oracle(case, arrays, case.cotangents(np.float32))


def check(emulator, case, parts=1):
    arrays, want = expected(dataclasses.replace(case, tiles=None))
    out, lse = forward(emulator, case, arrays, parts)
    check_array(out, want.out, TOLERANCE, f"out {case!r}")
    check_array(lse, want.lse, TOLERANCE, f"lse {case!r}")


def with_tiles(case, q, kv):
    return dataclasses.replace(case, tiles=Tiles(q=q, kv=kv))


KERNEL_TILES = {
    1: [((128,), (128,)), ((256,), (128,))],
    2: [((8, 16), (8, 16)), ((16, 16), (8, 16)), ((2, 64), (16, 8))],
    3: [((4, 4, 8), (4, 4, 8)), ((8, 4, 8), (2, 8, 8)), ((1, 8, 16), (1, 1, 128))],
}
CASES = [
    case_1d(300, 71, batch=1),
    case_1d(300, -1, is_causal=True, batch=1, heads_per_kv=1),
    case_1d(311, 40, stride=16, dilation=3, kv_heads=2),
    case_1d(290, 64, stride=64, heads_per_kv=3, batch=1),
    case_of((24, 26), (9, 10)),
    case_of((21, 37), (5, 8), stride=(2, 8), dilation=(2, 3), is_causal=(True, False)),
    case_of((17, 40), (-1, 16), stride=(1, 4), is_causal=(False, True), kv_heads=2),
    case_of((13, 40), (4, 7), dilation=(3, 5), heads_per_kv=4),
    case_of((7, 9, 21), (3, 5, 8), batch=1),
    case_of((5, 12, 16), (3, 4, 8), stride=(1, 4, 8), batch=1, kv_heads=2),
    case_of((6, 10, 19), (2, 3, 6), dilation=(2, 3, 3), is_causal=(True, False, False), batch=1),
    case_of((5, 8, 16), (-1, 8, 16), is_causal=(False, False, True), batch=1),
]
# Those of the faults. Of each rank, with clean and masked visits; and all masked, ragged and dilated.
FAULTY_CASES = [
    case_1d(300, 200, batch=1, heads_per_kv=1),
    case_of((20, 37), (14, 30), batch=1),
    case_of((4, 6, 19), (3, 5, 12), batch=1, heads_per_kv=1),
    case_of((31, 50), (4, 7), dilation=(2, 2), is_causal=(True, False), batch=1),
]


@pytest.mark.parametrize("case", [*CASES, *FAULTY_CASES], ids=str)
def test_tiles_of_kernels(emulator, case):
    """Q tiles of 128 queries whole, and of 256 in two parts."""
    for q, kv in KERNEL_TILES[len(case.layout)]:
        check(emulator, with_tiles(case, q, kv), parts=math.prod(q) // 128)


@pytest.mark.parametrize("case", [CASES[1], CASES[5], CASES[10]], ids=str)
def test_float8(emulator, case):
    """Operands and weights of 8 bits: out within what the weights' rounding can change, and lse as exact as in float.

    A weight w in [0, 1] changes by at most w / 16 + 2 ** -10, later rescaling makes that smaller, and the sum of weights is at
    least 1. So out changes by at most the largest value / 16, plus 2 ** -10 times the largest value for every key.
    """
    q, kv = KERNEL_TILES[len(case.layout)][0]
    arrays = {
        name: np.asarray(array.astype(ml_dtypes.float8_e4m3fn), np.float32)
        for name, array in case.inputs(np.float32).items()
    }
    want = oracle(case, arrays, case.cotangents(np.float32))
    out, lse = forward(emulator, with_tiles(case, q, kv), arrays, is_float8=True)
    check_array(lse, want.lse, TOLERANCE, f"lse {case!r}")
    error, largest = np.abs(out - want.out), np.abs(arrays["value"]).max()
    keys = math.prod(
        length if w == -1 else w for w, length in zip(case.window_size, case.layout, strict=True)
    )
    assert error.max() <= (FLOAT8_RELATIVE + FLOAT8_ABSOLUTE * keys) * largest
    # On average far less; and without any rounding it would be nothing.
    root_mean_square = np.sqrt((error**2).mean() / (want.out**2).mean())
    assert 0.005 < root_mean_square < 0.03


def forward_case(seed):
    """A random case of the shared suite without what these kernels leave to others, with tiles of its own."""
    case = random_case(seed)
    rng = np.random.default_rng([8, seed])
    q, kv = (tuple(int(n) for n in 2 ** rng.integers(0, 4, len(case.layout))) for _ in range(2))
    features = {"num_additional": 0, "lengths": None, "has_bias": False}
    case = dataclasses.replace(case, value_dim=case.head_dim, **features)
    return with_tiles(case, q, kv), math.prod(q)


@pytest.mark.parametrize(
    "first", [0, 20, 40, *(pytest.param(n, marks=pytest.mark.slow) for n in range(60, 200, 20))]
)
def test_random_cases(emulator, first):
    for seed in range(first, first + 20):
        case, queries = forward_case(seed)
        check(emulator, case, parts=min(queries, (1, 2, 4)[seed % 3]))


@pytest.fixture(scope="module", params=FAULTS)
def faulty_emulator(tmp_path_factory, request):
    return compile_emulator(tmp_path_factory, request.param)


@pytest.mark.parametrize("case", FAULTY_CASES, ids=str)
def test_planted_faults_show(faulty_emulator, case):
    """Visit, box, bits, and where out and lse go: off by one, each makes every case fail."""
    q, kv = KERNEL_TILES[len(case.layout)][0]
    with pytest.raises(AssertionError, match=r"out|lse"):
        check(faulty_emulator, with_tiles(case, q, kv))
