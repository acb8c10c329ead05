"""`gna-jax verify`: right kernels get their stamp, wrong ones are named. Kernels are played by the xla backend."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_suite import case_1d, case_of, check_array, oracle
from typer.testing import CliRunner

from gna_jax import gna, verification
from gna_jax.backends import RUNGS
from gna_jax.backends.verified import stamp_path
from gna_jax.cli import app
from gna_jax.device import KNOWN_DEVICES, resolve_device
from gna_jax.problem import FLOAT8, Operands, describe
from gna_jax.trials import FLOAT8_TOLERANCE, LSE_TOLERANCE, MORE_TRIALS, TOLERANCE
from gna_jax.verification import (
    TRIALS,
    Trial,
    attempt,
    sample_tokens,
    sampled_attention,
    sampled_cotangents,
)

SMALL = Trial((5, 7), (3, 4), (2, 1), heads=4, kv_heads=2, head_dim=16, value_dim=8)
SMALL_FLOAT8 = dataclasses.replace(SMALL, dtype=FLOAT8)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """Stamps of this machine stay out of the tests, and theirs out of the machine."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def on_a_gpu(monkeypatch):
    """The command believes that this is an H200, and tries one small call."""
    monkeypatch.setattr(verification, "this_gpu", lambda: KNOWN_DEVICES["h200"])
    monkeypatch.setattr(verification, "TRIALS", (SMALL,))
    monkeypatch.setattr(verification, "OPTIONAL_TRIALS", (SMALL_FLOAT8,))
    return stamp_path("xla", KNOWN_DEVICES["h200"])


def run(*arguments):
    result = CliRunner().invoke(app, ["verify", *arguments], env={"COLUMNS": "200"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, " ".join(result.stderr.split())


@pytest.mark.parametrize(
    "case",
    [
        case_1d(23, 5, stride=2, dilation=3, is_causal=True, num_additional=3, lengths=(0, 2)),
        case_of((5, 4, 6), (3, -1, 2), dilation=(1, 2, 1), kv_heads=2, value_dim=5, has_bias=True),
    ],
    ids=str,
)
def test_sampled_attention_against_float64(case, monkeypatch):
    """All arrays of the sample, and every key's gradient, also where the sample is cut into parts."""
    monkeypatch.setattr(verification, "SCORES_AT_A_TIME", 200)
    arrays = case.inputs(np.float32)
    operands = jax.tree.map(jnp.asarray, arrays)
    sample = sample_tokens(case.layout, 9, 1)
    assert len(sample) == 9 and {0, np.prod(case.layout) - 1} <= set(sample.tolist())
    cotangents = sampled_cotangents(operands, case.value_dim, sample, 2)
    rows = lambda x: np.asarray(x).reshape(case.batch, -1, *x.shape[1 + len(case.layout) :])
    elsewhere = np.setdiff1d(np.arange(np.prod(case.layout)), sample)
    for cotangent in cotangents:
        assert (rows(cotangent)[:, elsewhere] == 0).all()
        assert (rows(cotangent)[:, sample] != 0).all()
    got = sampled_attention(operands, cotangents, case.neighborhood, sample)
    want = oracle(case, arrays, cotangents).named()
    for name in ("out", "lse", "d query"):
        want[name] = rows(want[name])[:, sample]
    assert got.keys() == want.keys()
    for name, array in got.items():
        check_array(array, want[name], 1e-5, name)


def test_a_right_implementation_is_right_and_a_wrong_one_is_not(monkeypatch):
    outcome = attempt(SMALL, "xla", 3)
    assert outcome.is_right and outcome.is_repeatable
    assert set(outcome.errors) == {"out", "lse", "d query", "d key", "d value"}
    assert 0 < outcome.errors["out"]  # bfloat16 against float32
    # One key more on one axis, as a kernel with a wrong end of its window computes.
    wider = lambda *a, window_size, **options: gna(*a, window_size=(4, 4), **options)
    monkeypatch.setattr(verification, "gna", wider)
    wrong = attempt(SMALL, "xla", 3)
    assert not wrong.is_right
    assert wrong.errors["lse"] > 100 * LSE_TOLERANCE


def test_float8_is_compared_forward_alone():
    """What rounding the weights to its 4 bits changes is within the tolerance; a key too many is not, by lse."""
    outcome = attempt(SMALL_FLOAT8, "xla", 5)
    assert outcome.is_right and outcome.errors.keys() == {"out", "lse"}
    rng = np.random.default_rng(0)
    scores, values = rng.standard_normal((2, 64, 300)), rng.standard_normal((2, 300, 64))
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    rounded = weights.astype(jnp.float8_e4m3fn).astype(np.float64)
    out, got = (w @ values / weights.sum(-1, keepdims=True) for w in (weights, rounded))
    error = np.abs(got - out).max() / np.abs(out).max()
    assert 0.2 < error / FLOAT8_TOLERANCE < 0.7
    assert verification.tolerance("out", FLOAT8) == FLOAT8_TOLERANCE
    assert verification.tolerance("lse", FLOAT8) == LSE_TOLERANCE


def test_interpreted_trials_are_the_small_ones():
    more = verification.OPTIONAL_TRIALS
    assert verification.trials_with(more, False) == (*TRIALS, *more)
    small = verification.trials_with(more, True)
    assert len(small) == 4 and all(trial.is_small for trial in small)
    assert {trial.dtype for trial in small} == {"bfloat16", "float16", "float32"}


def test_nan_and_a_result_that_changes_are_wrong():
    trial = dataclasses.replace(SMALL, dtype="float32", has_bias=True)
    assert str(trial).endswith(", bias") and trial.shapes()["relative_position_bias"] == (4, 5, 7)
    right = attempt(trial, "xla", 4)
    assert right.is_right and "d relative_position_bias" in right.errors
    assert not dataclasses.replace(right, is_repeatable=False).is_right
    assert not dataclasses.replace(right, errors={"out": float("nan")}).is_right
    assert not dataclasses.replace(right, errors={}).is_right
    # What TF32 rounds is none of float32's, unless it was asked for.
    assert max(right.errors.values()) < TOLERANCE["float32"] < 0.01 * TOLERANCE["tf32"]
    rounded = dataclasses.replace(right, errors={"out": 5e-4, "lse": 5e-4})
    asked = dataclasses.replace(trial, precision="default")
    assert not rounded.is_right and dataclasses.replace(rounded, trial=asked).is_right
    same = verification.same_bits
    x = jnp.asarray([1.0, jnp.nan])
    assert not same(x, x) and same(x[:1], x[:1]) and not same(x[:1], x[:1] * 2)


def test_an_error_of_a_kernel_is_an_outcome_and_a_refusal_is_raised(monkeypatch):
    def broken(**options):
        raise RuntimeError("illegal\n   address")

    monkeypatch.setattr(verification, "gna", broken)
    outcome = attempt(SMALL, "xla", 0)
    assert outcome.failure == "RuntimeError: illegal address" and not outcome.is_right
    monkeypatch.undo()
    with pytest.raises(NotImplementedError, match="runs on cuda, the device is cpu"):
        verification.verify("mosaic", (SMALL,))


def test_without_a_gpu_the_command_says_so_and_the_way_out(cache):
    code, out, error = run()
    assert (code, out) == (1, "")
    assert "JAX's default device here is cpu" in error and "pass --interpret h200" in error
    assert not list(cache.iterdir())


def test_success_writes_the_stamp(on_a_gpu):
    code, out, error = run("--implementation", "xla")
    assert (code, error) == (0, "")
    assert (
        str(SMALL) in out and "NVIDIA H200" in out and f"stamp: {on_a_gpu}" in out.replace("\n", "")
    )
    stamp = json.loads(on_a_gpu.read_text())
    assert stamp["versions"]["jax"] == jax.__version__
    errors = stamp["errors"]
    assert errors[f"bfloat16 {SMALL}"]["out"] < TOLERANCE["bfloat16"]
    # The xla backend takes float8 as well, forward alone.
    assert errors[f"{FLOAT8} {SMALL}"].keys() == {"out", "lse"}


def test_failure_ends_with_code_1_and_writes_nothing(on_a_gpu, monkeypatch):
    zeros = lambda *a, **options: jax.tree.map(jnp.zeros_like, gna(*a, **options))
    monkeypatch.setattr(verification, "gna", zeros)
    code, out, error = run("--implementation", "xla")
    assert code == 1 and not on_a_gpu.exists()
    assert "xla is wrong in 2 of 2 calls" in error and "Please report the table above" in error
    assert jax.__version__ in error and str(SMALL) in error and str(SMALL) in out


def test_trials_cover_what_kernels_offer():
    mosaic = next(rung for rung in RUNGS if rung.name == "mosaic").load()
    device = KNOWN_DEVICES["h200"]
    problems = []
    for trial in TRIALS:
        operands = jax.eval_shape(trial.operands, 0)
        problems.append(problem_of(operands, trial, device))
        assert mosaic.supports(problems[-1], None) is None, trial
    assert {p.rank for p in problems} == {1, 2, 3}
    for dtype in ("bfloat16", "float16"):
        assert {p.head_dim for p in problems if p.dtype == dtype} >= {32, 64, 128}
    assert {p.heads_per_kv for p in problems} >= {1, 2, 3}
    biased = {(t.dtype, t.head_dim) for t in MORE_TRIALS if t.has_bias}
    assert biased >= {("bfloat16", dim) for dim in (16, 32, 128, 256)} | {("float32", 64)}
    rules = [p.neighborhood for p in problems]
    for rank in (1, 2, 3):
        mine = [rule for rule in rules if rule.rank == rank]
        assert any(any(rule.is_causal) for rule in mine)
        assert any(max(rule.stride) > 1 for rule in mine)
        assert any(max(rule.dilation) > 1 for rule in mine)


def problem_of(operands, trial, device):
    arrays = Operands(
        operands["query"],
        operands["key"],
        operands["value"],
        additional_keys=operands.get("additional_keys"),
        additional_values=operands.get("additional_values"),
        additional_lengths=operands.get("additional_lengths"),
    )
    return describe(arrays, trial.neighborhood, scale=None, precision=None, device=device)


@pytest.mark.kernel
@pytest.mark.slow  # selfcheck_test runs some of them by default
def test_the_small_trials_in_the_interpreter(cache):
    """The command as a laptop has it, kernels and all."""
    code, out, error = run("--interpret", "h200")
    assert code == 0, error
    assert "interpreted as h200: no stamp is written" in out
    assert not list(cache.iterdir())


def test_this_gpu_is_the_default_device(monkeypatch):
    fake = types.SimpleNamespace(
        device_kind="NVIDIA H200", platform="gpu", core_count=132, compute_capability="9.0"
    )
    monkeypatch.setattr(jax, "devices", lambda *a: [fake])
    assert verification.this_gpu() == resolve_device("h200")
