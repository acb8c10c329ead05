"""Which implementation runs: names, ladders, the default, verification, and warnings; with stand-in rungs."""

import json
import sys
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_suite import attend, case_1d, check_array, oracle

from gna_jax import DeviceSpec, GnaPerformanceWarning, backends, gna
from gna_jax.backends import RUNGS, Choice, Rung, choose, verified, warn_declined
from gna_jax.device import KNOWN_DEVICES
from gna_jax.problem import Operands, describe

GPU = KNOWN_DEVICES["h200"]


def problem_on(device):
    case = case_1d(8, 3)
    arrays = case.inputs(np.float32)
    operands = Operands(arrays["query"], arrays["key"], arrays["value"])
    return describe(operands, case.neighborhood, scale=None, precision=None, device=device)


@pytest.fixture
def rungs(monkeypatch):
    """A ladder of stand-ins: two GPU kernels, the first of which refuses, then "xla" and "reference"."""

    def module(name, reason, platforms):
        stand_in = types.ModuleType(name)
        stand_in.supports = lambda problem, tiles: reason
        stand_in.PLATFORMS = platforms
        monkeypatch.setitem(sys.modules, name, stand_in)
        return name

    return (
        Rung("first", module("stand_in_first", "first needs head_dim 64", ("cuda",)), ("cuda",)),
        Rung("second", module("stand_in_second", None, ("cuda",)), ("cuda",)),
        Rung("absent", module("stand_in_absent", "absent is not here", ("cuda",)), ("cuda",)),
        Rung("xla", module("stand_in_xla", None, None)),
        Rung("reference", module("stand_in_reference", None, None)),
    )


@pytest.fixture(autouse=True)
def no_stamps(monkeypatch, tmp_path):
    """Stamps of this machine stay out of the tests, and theirs out of the machine."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_a_name_runs(rungs):
    for name in ("second", "xla", "reference"):
        assert choose(problem_on(GPU), name, None, rungs) == Choice(name, ())


def test_a_name_raises_its_reason(rungs):
    with pytest.raises(NotImplementedError, match="'first' cannot run this call: first needs head"):
        choose(problem_on(GPU), "first", None, rungs)
    with pytest.raises(NotImplementedError, match="absent is not here"):
        choose(problem_on(GPU), "absent", None, rungs)
    message = "second runs on cuda, the device is cpu; name the target with device=, or use 'xla'"
    with pytest.raises(NotImplementedError, match=message):
        choose(problem_on(KNOWN_DEVICES["cpu"]), "second", None, rungs)


def test_a_sequence_is_the_callers_ladder(rungs):
    problem = problem_on(GPU)
    choice = choose(problem, ["first", "absent", "second", "xla"], None, rungs)
    assert choice.name == "second"
    assert [name for name, _ in choice.reasons] == ["first", "absent"]
    assert choose(problem, ("reference", "xla"), None, rungs).name == "reference"
    with pytest.raises(NotImplementedError, match=r"first needs head_dim 64; absent is not here"):
        choose(problem, ("first", "absent"), None, rungs)


@pytest.mark.parametrize("implementation", ["third", (), ("xla", "third")])
def test_unknown_names(rungs, implementation):
    with pytest.raises(ValueError, match=r"one of \('first', 'second', 'absent', 'xla', 'ref"):
        choose(problem_on(GPU), implementation, None, rungs)


def test_default_on_cpu_is_xla(rungs):
    choice = choose(problem_on(KNOWN_DEVICES["cpu"]), None, None, rungs)
    assert choice.name == "xla"
    reasons = dict(choice.reasons)
    assert "runs on cuda, the device is cpu" in reasons["first"]
    assert "runs on cuda, the device is cpu" in reasons["second"]


def test_default_skips_an_unverified_kernel(rungs):
    choice = choose(problem_on(GPU), None, None, rungs)
    assert choice.name == "xla"
    reasons = dict(choice.reasons)
    assert reasons["first"] == "first needs head_dim 64"
    assert reasons["second"].startswith("second has not been verified on NVIDIA H200; pass impl")


def test_default_takes_a_kernel_that_a_stamp_verifies(rungs, no_stamps):
    path = verified.write_stamp("second", GPU, {"max_error": 1e-3})
    assert path.is_relative_to(no_stamps) and json.loads(path.read_text()) == {"max_error": 1e-3}
    assert choose(problem_on(GPU), None, None, rungs).name == "second"
    # Another kind of device is another matter.
    assert choose(problem_on(KNOWN_DEVICES["b200"]), None, None, rungs).name == "xla"
    assert not verified.is_verified("first", GPU)


def test_default_takes_a_kernel_that_a_committed_result_verifies(rungs, monkeypatch):
    monkeypatch.setattr(verified, "_committed", lambda: {"second": ["NVIDIA H200"]})
    assert choose(problem_on(GPU), None, None, rungs).name == "second"
    assert choose(problem_on(KNOWN_DEVICES["h100"]), None, None, rungs).name == "xla"


def test_committed_results_name_real_rungs():
    text = (verified.importlib.resources.files("gna_jax.backends") / "verified.json").read_text()
    assert set(json.loads(text)) <= {rung.name for rung in RUNGS if rung.platforms}


def test_stamps_differ_by_kernel_device_and_version(monkeypatch):
    path = verified.stamp_path("second", GPU)
    assert path != verified.stamp_path("first", GPU)
    assert path != verified.stamp_path("second", KNOWN_DEVICES["h100"])
    monkeypatch.setattr(verified, "_version", lambda: "other")
    assert path != verified.stamp_path("second", GPU)
    # Kinds may hold any character; the name is one plain file.
    strange = verified.stamp_path("second", DeviceSpec("a/../b c", "cuda"))
    assert strange.parent == path.parent


def test_default_never_takes_the_reference(rungs):
    only = tuple(rung for rung in rungs if rung.name != "xla")
    with pytest.raises(NotImplementedError, match="no implementation can run.*reference is dense"):
        choose(problem_on(GPU), None, None, only)


def declined(choice, device, rungs):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_declined(problem_on(device), choice, rungs)
    return caught


def test_one_warning_per_distinct_reason(rungs, monkeypatch):
    monkeypatch.setattr(backends, "_warned", set())
    choice = choose(problem_on(GPU), None, None, rungs)
    caught = declined(choice, GPU, rungs)
    assert all(w.category is GnaPerformanceWarning for w in caught)
    texts = [str(w.message) for w in caught]
    assert len(texts) == len(set(texts)) == 3
    assert texts[0] == "gna runs 'xla' on NVIDIA H200: first needs head_dim 64"
    assert declined(choice, GPU, rungs) == []
    other = Choice("xla", (("first", "first needs bfloat16"),))
    assert len(declined(other, GPU, rungs)) == 1


def test_no_warning_off_the_kernels_platform(rungs, monkeypatch):
    monkeypatch.setattr(backends, "_warned", set())
    cpu = KNOWN_DEVICES["cpu"]
    assert declined(choose(problem_on(cpu), None, None, rungs), cpu, rungs) == []


def test_gna_warns_only_by_default(monkeypatch):
    monkeypatch.setattr(backends, "_warned", set())
    x = np.ones((1, 4, 1, 2), np.float32)
    abstract = jax.eval_shape(
        lambda: gna(x, x, x, window_size=3, device="h200", implementation="xla")
    )
    assert abstract.shape == x.shape
    with pytest.warns(GnaPerformanceWarning, match="gna runs 'xla' on NVIDIA H200") as caught:
        jax.eval_shape(lambda: gna(x, x, x, window_size=3, device="h200"))
    assert caught[0].filename == __file__, "the warning points at the caller"
    jax.eval_shape(lambda: gna(x, x, x, window_size=3, device="h200"))  # warned already


def test_scale_zero_means_zero():
    """Every key weighs the same: out is the mean of the values, lse the log of their number."""
    case = case_1d(12, 5, scale=0.0)
    arrays = case.inputs(np.float32)
    for implementation in ("xla", "reference"):
        out, lse = attend(case, arrays, implementation=implementation, tiles=None)
        want = oracle(case, arrays, case.cotangents(np.float32))
        check_array(out, want.out, 1e-6)
        check_array(lse, np.full(lse.shape, np.log(5.0)), 1e-6)


def test_static_arguments_of_every_kind():
    """Lists, tuples, numpy ints, numpy arrays and concrete jax arrays mean the same."""
    x = np.random.default_rng(0).standard_normal((1, 6, 7, 2, 4)).astype(np.float32)
    want = gna(x, x, x, window_size=(3, 3), stride=(2, 2), is_causal=(True, True))
    for three, two, true in (
        (3, 2, True),
        ([3, 3], [2, 2], [True, True]),
        (np.int64(3), np.uint8(2), np.True_),
        (np.asarray([3, 3]), np.asarray(2), np.asarray([True, True])),
        (jnp.asarray([3, 3]), jnp.asarray(2), 1),
    ):
        got = gna(x, x, x, window_size=three, stride=two, is_causal=true)
        np.testing.assert_array_equal(got, want)


def test_numpy_and_jax_inputs_are_the_same():
    case = case_1d(10, 3, num_additional=2, lengths=(1, 2), has_bias=True)
    arrays = case.inputs(np.float32)
    got = attend(case, arrays)
    want = attend(case, jax.tree.map(jnp.asarray, arrays))
    for a, b in zip(got, want, strict=True):
        assert isinstance(a, jax.Array)
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("lengths_dtype", [np.int8, np.uint32, np.int64])
def test_lengths_of_any_integer_dtype(lengths_dtype):
    case = case_1d(10, 3, num_additional=3, lengths=(1, 3))
    arrays = case.inputs(np.float32)
    want = attend(case, arrays)
    got = attend(case, arrays | {"additional_lengths": np.asarray([1, 3], lengths_dtype)})
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)


def test_default_returns_out_alone():
    case = case_1d(10, 3)
    arrays = case.inputs(np.float32)
    out = gna(**arrays, window_size=3)
    assert isinstance(out, jax.Array) and out.shape == arrays["query"].shape
