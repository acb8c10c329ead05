"""The kernels on a real GPU, behind `gna`: real sizes, poison, repeats, memory checks, random calls, more than 2**31 elements.

`make gpu` runs it, for the implementations that $GNA_JAX_TEST_IMPLEMENTATIONS names. What the interpreter cannot show is here: wgmma's waits,
TMA's bounds, the memory around an array, and for cutlass all that its kernels do. What triton alone offers: `gpu_triton_test.py`.
"""

import dataclasses
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from attention_suite import (
    case_1d,
    case_of,
    check_array,
    check_close,
    compiled,
    oracle,
    random_case,
)
from poison_test import loss_on, poisoned, tokens_first

import gna_jax
from gna_jax import gna
from gna_jax.neighborhood import Neighborhood
from gna_jax.selfcheck.timing import published
from gna_jax.trials import LSE_TOLERANCE, TOLERANCE, Trial
from gna_jax.verification import (
    attempt,
    relative_error,
    sampled_attention,
    sampled_cotangents,
    this_gpu,
)

pytestmark = pytest.mark.gpu

IMPLEMENTATIONS = os.environ.get("GNA_JAX_TEST_IMPLEMENTATIONS", "mosaic,cutlass,triton").split(",")
DTYPES = (ml_dtypes.bfloat16, np.float16)
MEMCHECK_SECONDS = 150


@pytest.fixture(scope="module", autouse=True)
def gpu():
    """Without a GPU these tests fail, they do not skip: who asks for them wants to know."""
    return this_gpu()


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    """One that is named and cannot run fails with its reason."""
    return request.param


@pytest.fixture(autouse=True)
def optimised(optimisation):
    """Kernels stand in programs as users compile them."""
    jax.config.update("jax_disable_most_optimizations", False)


def of_preset(name: str, rule: int) -> Trial:
    """A preset's call; the reference looks at every batch entry."""
    trial = published(name, rule)
    return dataclasses.replace(trial, batch=min(trial.batch, 8))


REAL = (
    of_preset("1d-32k", 0),
    of_preset("1d-32k", 1),
    of_preset("flux-4k", 0),
    of_preset("flux-4k", 2),
    of_preset("hunyuan-91", 0),
    of_preset("hunyuan-91", 5),
    of_preset("hunyuan-91", 6),
    of_preset("cosmos-89", 0),
    of_preset("cosmos-predict2-2b", 0),
    of_preset("nat-1", 0),
    of_preset("nat-1", 1),
    dataclasses.replace(of_preset("flux-4k", 2), heads=8, kv_heads=2, dtype="float16"),
)


@pytest.mark.parametrize("trial", REAL, ids=str)
def test_real_sizes_against_float32(trial, implementation):
    """Out, lse and all gradients of 64 queries' loss, in float32 over all keys; the second run equal bit for bit."""
    outcome = attempt(trial, implementation, 7)
    assert outcome.is_right, outcome


POISON = (
    case_1d(700, 65, head_dim=64, value_dim=64),
    case_1d(300, 40, stride=8, dilation=3, is_causal=True, kv_heads=2, head_dim=32, value_dim=32),
    case_of((40, 37), (7, 9), stride=(1, 4), head_dim=128, value_dim=128),
    case_of((6, 20, 22), (3, 6, 8), dilation=(1, 2, 1), head_dim=64, value_dim=64),
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", POISON, ids=str)
def test_finite_changes_outside_a_window(case, dtype, implementation):
    """What a query gives, and the gradients of its loss alone, are bit-equal whatever finite stands outside its window."""
    run, arrays = program(case, dtype, implementation), case.inputs(dtype)
    norm = np.abs(arrays["query"].astype(np.float64)).sum(-1, keepdims=True)
    arrays |= {"query": (arrays["query"].astype(np.float64) / norm).astype(dtype)}
    rng = np.random.default_rng(case.seed)
    tokens = int(np.prod(case.layout))
    mask = case.neighborhood.mask(case.layout).reshape(tokens, tokens)
    for token in (0, tokens - 1, *rng.integers(0, tokens, 4)):
        alone = loss_on(case, case.cotangents(dtype), token)
        want = run(arrays, alone)
        got = run(poisoned(rng, arrays, ~mask[token], dtype), alone)
        for name, one, other in (
            ("out", got.out, want.out),
            ("lse", got.lse[..., None], want.lse[..., None]),
            ("d query", got.gradients["query"], want.gradients["query"]),
        ):
            equal(tokens_first(one)[token], tokens_first(other)[token], f"{name} of {token}")
        for name in ("key", "value"):
            one, other = (tokens_first(x.gradients[name])[mask[token]] for x in (got, want))
            equal(one, other, f"d {name} of {token}")


FAR = (
    case_1d(2000, 100, head_dim=64, value_dim=64),
    case_1d(2400, 90, dilation=2, is_causal=True, head_dim=128, value_dim=128),
    case_of((64, 70), (7, 9), head_dim=32, value_dim=32),
    case_of((40, 9, 11), (3, 5, 7), stride=(2, 1, 1), head_dim=64, value_dim=64),
)


@pytest.mark.parametrize("case", FAR, ids=str)
def test_nan_where_no_tile_may_read(case, implementation):
    """NaN in the last quarter of the first axis, in another batch entry, under another key/value head: nothing shows."""
    case = dataclasses.replace(case, kv_heads=2, heads_per_kv=2)
    dtype = ml_dtypes.bfloat16
    run, arrays = program(case, dtype, implementation), case.inputs(dtype)
    quarter, last = case.layout[0] // 4, 3 * case.layout[0] // 4
    assert first_unread(case, quarter, implementation) <= last
    dout, dlse = case.cotangents(dtype)
    # Only the first quarter's queries of the first entry's first two heads have a loss.
    keep = np.zeros(dlse.shape, bool)
    keep[0, :quarter, ..., : case.heads_per_kv] = True
    cotangents = np.where(keep[..., None], dout, dtype(0)), np.where(keep, dlse, np.float32(0))
    clean = run(arrays, cotangents)
    for where in (np.s_[:, last:], np.s_[1:], np.s_[..., 1, :]):
        dirty = {name: arrays[name].copy() for name in ("key", "value")}
        for array in dirty.values():
            array[where] = np.nan
        got = run(arrays | dirty, cotangents)
        what = f"{case} with NaN at {where}"
        for name, one, other in (
            ("out", got.out, clean.out),
            ("lse", got.lse, clean.lse),
            ("d query", got.gradients["query"], clean.gradients["query"]),
        ):
            equal(np.asarray(one)[keep], np.asarray(other)[keep], f"{name}, {what}")
            assert np.isfinite(np.asarray(one, np.float32)[keep]).all(), f"{name}, {what}"


def first_unread(case, queries, implementation):
    """Position on axis 0 from which no tile reads a key for the first `queries` positions' sake."""
    tokens, kv = (case.batch, *case.layout), (case.kv_heads, case.head_dim)
    query = jax.ShapeDtypeStruct((*tokens, case.query_heads, case.head_dim), jnp.bfloat16)
    key = jax.ShapeDtypeStruct((*tokens, *kv), jnp.bfloat16)
    options = case.geometry | {"implementation": implementation}
    tiles = gna_jax.explain(query, key, key, **options).tiles
    dilation, rule = case.dilation[0], case.neighborhood.axes[0]
    in_group = -(-queries // dilation)
    queries = -(-in_group // tiles.q[0]) * tiles.q[0]
    length = case.layout[0] // dilation
    end = int(np.max(rule.keys(np.arange(min(queries, length)), length)[1]))
    return (end + (tiles.kv[0] if tiles.kv else 0)) * dilation


def test_nan_shows_where_it_is_seen(implementation):
    """The poison above is real: a NaN key shows in every query that sees it."""
    case = FAR[0]
    run = program(case, ml_dtypes.bfloat16, implementation)
    arrays = case.inputs(ml_dtypes.bfloat16)
    key = arrays["key"].copy()
    key[:, 1000] = np.nan
    out = np.asarray(
        run(arrays | {"key": key}, case.cotangents(ml_dtypes.bfloat16)).out, np.float32
    )
    seen = case.neighborhood.mask(case.layout)[:, 1000]
    assert np.isnan(out[:, seen]).all()


@pytest.mark.parametrize(
    "trial",
    [
        Trial((4096,), 1000, head_dim=128, value_dim=128, heads=8, kv_heads=8),
        Trial((100, 90), (30, 21), (1, 2), dtype="float16", heads=8, kv_heads=2, head_dim=64),
        Trial((12, 30, 36), (6, 10, 12), heads=8, kv_heads=8, head_dim=128, value_dim=128),
    ],
    ids=str,
)
def test_a_hundred_runs_are_bit_equal(trial, implementation):
    operands = trial.operands(11)
    run = jax.jit(differentiated(trial, implementation))

    @jax.jit
    def differ(first, second):
        bits = lambda x: jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
        pairs = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
        return sum(jnp.sum(bits(a) != bits(b)) for a, b in pairs)

    first = run(operands)
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(first))
    assert sum(int(differ(first, run(operands))) for _ in range(99)) == 0


MEMCHECK = """
import dataclasses, jax
import gna_jax
from gna_jax import gna
from gna_jax.trials import MORE_TRIALS, TRIALS
for trial in (t for t in TRIALS + MORE_TRIALS * ("NAME" == "triton") if t.is_small):
    operands = trial.operands(0)
    static = {n: operands.pop(n) for n in ("additional_lengths",) if n in operands}
    rule = dataclasses.asdict(trial.neighborhood)
    call = lambda operands: gna(**operands, **static, **rule, implementation="NAME")
    run = jax.jit(lambda operands: jax.vjp(call, operands)[1](call(operands)))
    jax.block_until_ready(run(operands))
    print("ran", trial, flush=True)
"""


def test_compute_sanitizer_finds_nothing(implementation):
    """Out-of-bounds and misaligned accesses, every array an allocation of its own."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        pytest.skip("compute-sanitizer is not on PATH: memory accesses were not checked")
    options = ["--tool", "memcheck", "--error-exitcode", "99"]
    command = [tool, *options, sys.executable, "-c", MEMCHECK.replace("NAME", implementation)]
    alone = {"XLA_PYTHON_CLIENT_ALLOCATOR": "platform", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    path = os.pathsep.join(
        [str(pathlib.Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    )
    finished = subprocess.run(
        command,
        env=os.environ | alone | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=MEMCHECK_SECONDS,
    )
    said = finished.stdout + finished.stderr
    if "Device not supported" in said:
        pytest.skip("compute-sanitizer refuses this device: memory accesses were not checked")
    assert finished.returncode == 0, said[-4000:]
    assert finished.stdout.count("ran ") >= 3 and "ERROR SUMMARY: 0 errors" in said, said[-4000:]


@pytest.mark.parametrize("seed", range(9000, 9014))
def test_random_calls_against_float64(seed, implementation):
    """Every option that the kernels have, together, in small volumes."""
    dtype = DTYPES[seed % 2]
    case = random_case(seed)
    if implementation == "cutlass" and case.scale is not None and case.scale <= 0:
        case = dataclasses.replace(case, scale=0.3)  # its kernels take no other
    dims = (case.head_dim, 64, 128)[seed % 3], (case.value_dim, 64, 128)[seed % 3]
    case = dataclasses.replace(
        case, tiles=None, has_bias=False, head_dim=dims[0], value_dim=dims[1]
    )
    arrays, cotangents = case.inputs(dtype), case.cotangents(dtype)
    got = program(case, dtype, implementation)(arrays, cotangents)
    want = oracle(case, arrays, cotangents)
    check_array(got.lse, want.lse, LSE_TOLERANCE, f"lse {case!r}")
    check_close(got, want, TOLERANCE[np.dtype(dtype).name], repr(case))


def test_more_than_two_to_the_31_elements(implementation):
    """Rows whose offset in elements needs more than 32 bits, against float32 attention of the volume's end alone."""
    tokens, heads, dim, window, tail = 140_000, 128, 128, 513, 4096
    assert tokens * heads * dim > 2**31
    if (
        implementation == "triton"
    ):  # its offsets within a sample have 32 bits: the longest that it takes
        shape = jax.ShapeDtypeStruct((1, tokens, heads, dim), jnp.bfloat16)
        with pytest.raises(NotImplementedError, match="elements of a sample in 32 bits"):
            gna_jax.explain(shape, shape, shape, window_size=window, implementation="triton")
        tokens = 2**31 // (heads * dim) - 1
    keys = jax.random.split(jax.random.key(5), 3)
    names = ("query", "key", "value")
    big = {
        name: jax.random.normal(key, (1, tokens, heads, dim), jnp.bfloat16)
        for name, key in zip(names, keys, strict=True)
    }
    run = jax.jit(
        lambda arrays: gna(
            **arrays, window_size=window, return_lse=True, implementation=implementation
        )
    )
    out, lse = run(big)
    end = {name: array[:, -tail:] for name, array in big.items()}
    got_out, got_lse = out[:, -tail:], lse[:, -tail:]
    del big, out, lse
    # Windows of the last half lie in the end, and slide at its edge as they do at the volume's.
    sample = np.unique(np.linspace(tail // 2, tail - 1, 40).astype(int))
    cotangents = sampled_cotangents(end, dim, sample, 0)
    rule = Neighborhood.of(1, window_size=window)
    want = sampled_attention(end, cotangents, rule, sample)
    assert relative_error(got_out[:, sample], want["out"]) < TOLERANCE["bfloat16"]
    assert relative_error(got_lse[:, sample], want["lse"], is_lse=True) < LSE_TOLERANCE


TRANSFORMED = (
    Trial((900,), 70, 1, 2, heads=4, kv_heads=2, batch=3),
    Trial((20, 30), (5, 7), dtype="float16", heads=4, kv_heads=2, batch=3, head_dim=128, value_dim=128),
    Trial((6, 14, 20), (3, 6, 8), (1, 2, 8), heads=4, kv_heads=2, batch=3, num_additional=9),
)  # fmt: skip


@pytest.mark.parametrize("trial", TRANSFORMED, ids=str)
def test_mapped_axes_are_the_batch(trial, implementation):
    """`vmap` over the batch, values and gradients, gives the bits of the batched call."""
    operands = trial.operands(21)
    got = jax.jit(lambda x: jax.vmap(differentiated(trial, implementation))(x))(
        jax.tree.map(lambda array: array[:, None], operands)
    )
    want = jax.jit(differentiated(trial, implementation))(operands)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        same(one[:, 0], other, trial, "mapped")


@pytest.mark.parametrize("trial", TRANSFORMED, ids=str)
def test_many_calls_of_one_program(trial, implementation):
    """Eight calls in a chain, enough for XLA to record them into a CUDA graph: run again and again, with other arrays, each gives
    what its calls give one by one."""
    call = forward_of(trial, implementation)

    @jax.jit
    def chain(operands):
        query, results = operands["query"], []
        for _ in range(8):
            out, lse = call(operands | {"query": query})
            query = out  # head and value dim are equal
            results.append((out, lse))
        return results

    single = jax.jit(call)
    for seed in (31, 32, 31):
        operands = trial.operands(seed)
        query = operands["query"]
        for number, got in enumerate(chain(operands)):
            want = single(operands | {"query": query})
            query = want[0]
            for one, other in zip(got, want, strict=True):
                same(one, other, trial, f"call {number}")


@pytest.mark.parametrize("trial", TRANSFORMED, ids=str)
def test_kernels_agree_with_xla(trial, implementation):
    """Another program for the same call; the window's rules are the same, nothing else is."""
    operands = trial.operands(41)
    got, want = (jax.jit(differentiated(trial, name))(operands) for name in (implementation, "xla"))
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert relative_error(one, other) < 2 * TOLERANCE[trial.dtype]


def same(one, other, trial, what):
    """Bit-equal; XLA's part of a call with additional keys is another in another program."""
    if not trial.num_additional:
        equal(one, other, f"{what} of {trial}")
    assert relative_error(one, other) < TOLERANCE[trial.dtype], f"{what} of {trial}"


def forward_of(trial, implementation):
    rule = dataclasses.asdict(trial.neighborhood)
    return lambda operands: gna(**operands, **rule, return_lse=True, implementation=implementation)


def differentiated(trial, implementation):
    """Out and lse, and the gradients with them as their own cotangents."""

    def run(operands):
        outputs, pull_back = jax.vjp(forward_of(trial, implementation), operands)
        return outputs, pull_back(outputs)

    return run


def program(case, dtype, implementation):
    """`compiled` by the kernels."""
    return compiled(case, dtype, implementation=implementation, precision=None)


def equal(one, other, what):
    """Bit-equal, the sign of zero apart."""
    np.testing.assert_array_equal(
        np.asarray(one, np.float32), np.asarray(other, np.float32), err_msg=what
    )
