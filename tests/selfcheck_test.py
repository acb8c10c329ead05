"""`gna-jax selfcheck`: what is wrong is told, and hides nothing else. Kernels are played by the backends that run everywhere.

Parts run in this process where a test plays the machine, and in processes of their own where that is what is tested.
"""

import dataclasses
import json
import math
import re
import time

import jax
import pytest
from cuda_library_test import made
from selfcheck_parts import abort, hang, raise_an_error
from typer.testing import CliRunner

from cuda_ffi import library
from gna_jax import selfcheck as library_of_selfcheck
from gna_jax import verification
from gna_jax.backends import RUNGS, Rung
from gna_jax.backends.triton import toolchain
from gna_jax.backends.verified import stamp_path
from gna_jax.cli import app
from gna_jax.device import KNOWN_DEVICES
from gna_jax.problem import FLOAT8
from gna_jax.selfcheck import Check, SelfCheck, machine, selfcheck, timing
from gna_jax.selfcheck import report as reports
from gna_jax.selfcheck.machine import Device, Library, Standing, optional
from gna_jax.selfcheck.processes import Part, Ran, run_apart
from gna_jax.selfcheck.stamp import record_success
from gna_jax.selfcheck.timing import BOTH, FORWARD, SIZES, Timed
from gna_jax.simulator.published import PAPER_TILES
from gna_jax.trials import MORE_TRIALS
from gna_jax.verification import OPTIONAL_TRIALS, TRIALS, Outcome, Trial, one_line

SMALL = Trial((5, 7), (3, 4), (2, 1), heads=4, kv_heads=2, head_dim=16, value_dim=8)
TIMED = Trial((6, 8), 3, heads=2, head_dim=16, value_dim=16)
KERNELS = ("xla", "reference")
"""They play GPU kernels."""


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """Stamps and libraries of this machine stay out of the tests, and theirs out of the machine."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def slow_h200(monkeypatch):
    """A machine with one, on which `KERNELS` run, with one small call to compare and one to time."""
    spec = KNOWN_DEVICES["h200"]
    rungs = [Rung(name, f"gna_jax.backends.{name}", ("cuda",)) for name in KERNELS]
    monkeypatch.setattr(machine.backends, "RUNGS", (RUNGS[0], *rungs, RUNGS[2]))
    monkeypatch.setattr(machine, "resolve_device", lambda device: spec)
    monkeypatch.setattr(timing, "resolve_device", lambda device: spec)
    monkeypatch.setattr(verification, "TRIALS", (SMALL,))
    monkeypatch.setattr(verification, "OPTIONAL_TRIALS", ())
    monkeypatch.setattr(timing, "SIZES", {"tiny": TIMED})
    monkeypatch.setattr(reports, "SIZES", {"tiny": TIMED})
    monkeypatch.setattr(timing, "ROUNDS", 1)
    return spec


@pytest.fixture
def h200(slow_h200, monkeypatch):
    """The same, where comparing and timing say at once that all is well."""
    error = lambda trial: {"out": 1e-6 if trial.dtype == "float32" else 1e-3}
    monkeypatch.setattr(verification, "attempt", lambda trial, *_: Outcome(trial, error(trial)))
    seconds = {"seconds": (0.01,), "dense": (0.1,)}
    timed = lambda timed, trial, implementation: dataclasses.replace(timed, **seconds)
    monkeypatch.setattr(timing, "_measured", timed)
    return slow_h200


def run_here(parts, seconds, report):
    """As `run_apart`, in this process, and as slow as it likes."""
    results = [Ran() for _ in parts]
    for part, ran in zip(parts, results, strict=True):
        try:
            part.run(ran.messages.append, *part.arguments)
        except Exception as error:
            ran.failure = one_line(error)
    return results


def run_command(*arguments):
    result = CliRunner().invoke(app, ["selfcheck", *arguments], env={"COLUMNS": "400"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    error = result.stderr.replace("│", "")
    return result.exit_code, result.stdout, " ".join(error.split())


def test_what_ends_a_process_ends_no_other():
    parts = [
        Part("aborting", abort, most=3),
        Part("raising", raise_an_error, ("address",)),
    ]
    said = []
    aborting, raising = run_apart(parts, 120, said.append)
    assert raising == Ran([1], "RuntimeError: illegal address")
    wanted = "its process ended with SIGABRT; the end of what it wrote: CUDA_ERROR_ILLEGAL_ADDRESS"
    assert aborting.messages == [1, "two"] and aborting.failure.startswith(wanted)
    assert said[0].startswith("aborting 0/3, raising 0/1; 1")


def test_what_hangs_is_stopped():
    started = time.monotonic()
    (ran,) = run_apart([Part("hanging", hang)], 0.5, lambda text: None)
    assert ran.failure.startswith("stopped when its 0 s were up, ") and not ran.messages
    assert time.monotonic() - started < 20


def test_a_kernel_is_timed(slow_h200, monkeypatch):
    """For real; cuDNN, which is not here, is told."""
    rungs = [rung for rung in machine.backends.RUNGS if rung.name != "xla"]
    monkeypatch.setattr(machine.backends, "RUNGS", rungs)
    monkeypatch.setattr(verification, "attempt", lambda trial, *_: Outcome(trial, {"out": 1e-3}))
    found = selfcheck(run=run_here)
    (check,) = found.checks
    assert check.name == "reference" and found.problems == ()
    assert [one.direction for one in check.timed] == [FORWARD, BOTH]
    for one in check.timed:
        assert len(one.seconds) == 1 and one.useful_tflops > 0
        assert not one.failure and one.dense_failure and one.times_dense is None
    assert check.empty_call > 0
    text = reports.markdown(found)
    assert "- tiny forward, cuDNN: " in text and str(TIMED) in text


def test_all_is_right(h200):
    found = selfcheck(run=run_here)
    assert found.problems == ()
    assert [check.name for check in found.checks] == list(KERNELS)
    for check in found.checks:
        assert check.is_right and [o.trial for o in check.outcomes] == [SMALL]
        stamp = json.loads(stamp_path(check.name, h200).read_text())
        assert check.stamp == str(stamp_path(check.name, h200))
        assert stamp["versions"]["jax"] == jax.__version__ and stamp["device"] == h200.kind
        assert [one.times_dense for one in check.timed] == [pytest.approx(10)] * 2
    text = reports.markdown(found)
    assert "- xla is right in 1 calls" in text and "- reference is right in 1 calls" in text
    assert "`triton`: " in text


def test_what_is_optional_is_compared_where_it_runs(h200, monkeypatch):
    """Float8, float32, a bias: the kernel that xla plays takes them, the one that the dense reference plays does not."""
    more = [dataclasses.replace(SMALL, dtype=FLOAT8), dataclasses.replace(SMALL, dtype="float32")]
    monkeypatch.setattr(verification, "OPTIONAL_TRIALS", tuple(more))
    takes = machine.optional
    monkeypatch.setattr(
        machine, "optional", lambda rung, d: () if rung.name == "reference" else takes(rung, d)
    )
    found = selfcheck(run=run_here)
    assert [check.trials for check in found.checks] == [(SMALL, *more), (SMALL,)]
    assert found.problems == ()
    row = "| out | 1.0e-03 | 1.5e-02 | 1.0e-03 | 6.0e-02 | 1.0e-06 | 1.0e-05 |"
    assert row in re.sub(" +", " ", reports.markdown(found))


def test_which_optional_calls_an_implementation_takes(monkeypatch):
    monkeypatch.setattr(toolchain, "check", lambda is_interpreted: None)
    of = {
        (name, device): optional(next(r for r in RUNGS if r.name == name), KNOWN_DEVICES[device])
        for name, device in (("mosaic", "b200"), ("triton", "a100"), ("xla", "h200"))
    }
    assert of["xla", "h200"] == OPTIONAL_TRIALS
    assert of["triton", "a100"] == MORE_TRIALS
    kinds = {(t.arithmetic, t.has_bias) for t in of["mosaic", "b200"]}
    assert kinds == {("bfloat16", False)}


def test_one_that_raises_hides_nothing_of_the_others(h200, monkeypatch):
    def attempt(trial, implementation, seed):
        failure = "RuntimeError: CUDA_ERROR_ILLEGAL_ADDRESS" if implementation == "xla" else ""
        return Outcome(trial, {"out": 1e-3}, failure=failure)

    monkeypatch.setattr(verification, "attempt", attempt)
    found = selfcheck(run=run_here)
    xla, reference = found.checks
    assert found.problems == ("xla is wrong in 1 of 1 calls",)
    assert reference.is_right and reference.timed and reference.stamp
    assert not xla.timed and not xla.stamp and not stamp_path("xla", h200).exists()
    text = reports.markdown(found)
    assert "- **Problem**: xla is wrong in 1 of 1 calls" in text
    assert f"- **WRONG** `{SMALL}` bfloat16: RuntimeError: CUDA_ERROR_ILLEGAL_ADDRESS" in text
    assert "not timed, since it is not right" in text and "- reference is right" in text


def test_one_whose_results_cannot_be_compared_hides_nothing_of_the_others(h200, monkeypatch):
    """An error that is not the call's own: after an illegal access, say, when the next arrays are made."""

    def attempt(trial, implementation, seed):
        if implementation == "xla":
            raise RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS")
        return Outcome(trial, {"out": 1e-3})

    monkeypatch.setattr(verification, "attempt", attempt)
    found = selfcheck(run=run_here)
    said = "RuntimeError: CUDA_ERROR_ILLEGAL_ADDRESS"
    assert found.problems == (f"xla: 0 of 1 calls were compared; `{SMALL}`: {said}",)
    assert found.checks[1].is_right and found.checks[1].timed


def test_a_kernel_that_fails_at_a_published_size_leaves_the_rest(slow_h200, monkeypatch):
    def fails(*arrays, **options):
        raise RuntimeError("RESOURCE_EXHAUSTED: 3 GiB")

    monkeypatch.setattr(verification, "attempt", lambda trial, *_: Outcome(trial, {"out": 1e-3}))
    monkeypatch.setattr(timing, "gna", fails)
    found = selfcheck(run=run_here)
    said = "RuntimeError: RESOURCE_EXHAUSTED: 3 GiB"
    assert found.problems[0] == f"xla, tiny forward: {said}" and len(found.problems) == 4
    assert all(check.is_right for check in found.checks)
    assert f"- tiny forward: {said}" in reports.markdown(found)


def test_the_calls_of_a_kernel_are_shared_by_processes(h200, monkeypatch):
    """One that ends takes its share along; the rest is told in order."""
    trials = tuple(dataclasses.replace(SMALL, heads=heads) for heads in (2, 4, 6, 8))
    monkeypatch.setattr(verification, "TRIALS", trials)

    def run(parts, seconds, report):
        ran = run_here(parts, seconds, report)
        if parts[0].run is library_of_selfcheck.compare:
            assert [part.arguments[1] for part in parts[:3]] == [trials[::3], trials[1:2], trials[2:3]]  # fmt: skip
            ran[0] = Ran(ran[0].messages[:1], "its process ended with SIGABRT")
        return ran

    found = selfcheck(run=run)
    assert [outcome.trial for outcome in found.checks[0].outcomes] == list(trials[:3])
    said = f"xla: 3 of 4 calls were compared; `{trials[3]}`: its process ended with SIGABRT"
    assert found.problems == (said,)
    assert [outcome.trial for outcome in found.checks[1].outcomes] == list(trials)


def test_what_was_not_reached_is_told(h200):
    """The time is up after looking at the machine."""

    def run(parts, seconds, report):
        if parts[0].run is machine.look:
            return run_here(parts, seconds, report)
        return [Ran([], "stopped when its 9 s were up, 9 s after its last result") for _ in parts]

    found = selfcheck(0.5, run=run)
    assert found.problems[0] == (
        f"xla: 0 of 1 calls were compared; `{SMALL}`: stopped when its 9 s were up, 9 s after its last result"
    )
    assert "No result was compared." in reports.markdown(found)


def test_a_cache_that_cannot_be_written_is_told(h200, cache):
    cache.write_text("in the way")
    found = selfcheck(run=run_here)
    assert len(found.problems) == 2
    assert found.problems[0].startswith("xla: its stamp could not be written: NotADirectoryError")
    assert found.checks[0].is_right and found.checks[0].timed


def test_looking_that_fails_is_told():
    def run(parts, seconds, report):
        return [Ran([], "its process ended with SIGSEGV")]

    found = selfcheck(run=run)
    assert found.problems == ("looking at the machine failed: its process ended with SIGSEGV",)
    text = reports.markdown(found)
    assert "unknown device" in text and "not known: looking at the machine failed" in text


def test_an_implementation_that_cannot_be_loaded_is_told(h200, monkeypatch):
    rungs = (*machine.backends.RUNGS, Rung("odd", "gna_jax.backends.odd", ("cuda",)))
    monkeypatch.setattr(machine.backends, "RUNGS", rungs)
    found = selfcheck(run=run_here)
    assert found.problems == (
        "odd: ModuleNotFoundError: No module named 'gna_jax.backends.odd'",
    )  # fmt: skip
    assert len(found.checks) == 2


def test_without_a_gpu_the_report_says_what_is_missing(tmp_path):
    """As a person runs it, processes and all."""
    file = tmp_path / "report.md"
    code, out, error = run_command("--out", str(file))
    assert code == 1 and file.read_text() == out
    assert "JAX's default device here is cpu: " in error and "or pass --interpret b200" in error
    assert "# gna-jax selfcheck" in out and "- `mosaic`: mosaic runs on cuda, the device is" in out
    assert f"| jax | {jax.__version__} |" in re.sub(" +", " ", out)
    assert "- not loaded: the CUDA library is not built; build it with `gna-jax build-cuda`" in out


@pytest.mark.parametrize(
    ("found", "hint"),
    [
        ({"driver": "none: nvidia-smi does not answer"}, "nvidia-smi finds no driver: run it on"),
        ({"driver": "580.1"}, "driver 580.1 is there, JAX's plugin is not: pip install 'gna-jax"),
        ({"driver": "580.1", "jax-cuda13-plugin": "0.12"}, "look at JAX_PLATFORMS and CUDA_VISI"),
    ],
)
def test_what_a_missing_gpu_may_be(found, hint):
    assert hint in machine.missing_gpu("cpu", found)


def test_bad_input_ends_with_code_2_before_anything_runs(tmp_path):
    assert "minutes must be a positive number; got 0" in run_command("--minutes", "0")[2]
    for minutes in ("0", "-1", "nan"):
        assert run_command("--minutes", minutes)[:2] == (2, "")
    for out, why in (
        (tmp_path / "no" / "r.md", "No such file or directory"),
        (tmp_path, "Is a directory"),
        (tmp_path / (300 * "x"), "File name too long"),
    ):
        code, printed, error = run_command("--out", str(out))
        assert (code, printed) == (2, "") and why in error
    code, out, error = run_command("--interpret", "abacus")
    assert (code, out) == (2, "") and "got device='abacus'" in error


def test_the_library_and_what_built_it(cache):
    path = made(cache / "gna_jax" / "cuda")
    record = path.with_name(library.RECORD)
    text = json.loads(record.read_text()) | {"nvcc": "Build cuda_13.0", "cutlass": "4.2.0.0"}
    record.write_text(json.dumps(text))
    found = machine.find_library()
    assert found.failure == "" and found.facts["path"] == str(path)
    assert found.facts["compute capability"] == "9.0 and 10.0"
    assert found.facts["built: nvcc"] == "Build cuda_13.0"
    assert found.facts["built: cutlass"] == "4.2.0.0"
    assert found.facts["built: sha256"] == library.sha256(path)


def test_a_library_for_another_jaxlib_is_a_problem(cache, h200):
    major, minor = library.ffi_version()
    made(cache / "gna_jax" / "cuda", ffi_version=(major, minor + 1))
    found = selfcheck(run=run_here)
    (problem,) = found.problems
    assert problem.startswith("the CUDA library is there and cannot be used: ")
    assert "update jaxlib, or remove it" in problem
    assert all(check.is_right for check in found.checks)


def test_published_sizes_are_the_presets_and_their_flops():
    """Tera-flops forward as arXiv 2504.16922 and NATTEN's documents have them."""
    known = {
        "hunyuan-s16x8x8": 14.677,
        "flux-s16": 5.154,
        "1d-s1": 0.0344,
        "hunyuan-s1": 14.677,
    }
    assert SIZES.keys() == known.keys()
    for size, flops in known.items():
        assert timing.useful_flops(SIZES[size], FORWARD) / 1e12 == pytest.approx(flops, rel=0.01)
        assert timing.useful_flops(SIZES[size], BOTH) == 3.5 * timing.useful_flops(
            SIZES[size], FORWARD
        )


@pytest.mark.parametrize("device", ["h200", "b200"])
def test_predictions_are_of_the_kernel_s_own_tiles(device):
    problem = machine.problem_of(SIZES["flux-s16"], KNOWN_DEVICES[device])
    forward = timing.predicted(problem, "mosaic", FORWARD)
    both = timing.predicted(problem, "mosaic", BOTH)
    assert 2e-3 < forward < 12e-3  # NATTEN: 7.9 ms on an H100, 4.1 on a B200
    assert 3 * forward < both < 6 * forward
    assert PAPER_TILES["flux-4k"].kv is not None
    unknown = dataclasses.replace(problem.device, kind="NVIDIA X1")
    elsewhere = dataclasses.replace(problem, device=unknown)
    assert timing.predicted(elsewhere, "mosaic", FORWARD) is None
    # Its cost model is of the kernels that use a generation's own matrix unit.
    assert timing.predicted(problem, "triton", FORWARD) is None
    # Tiles without keys are not a kernel's.
    assert timing.predicted(problem, "xla", FORWARD) is None


def test_a_stamp_is_for_what_is_right(cache):
    right = Outcome(SMALL, {"out": 1e-3})
    for outcomes in ((), (right, dataclasses.replace(right, is_repeatable=False))):
        with pytest.raises(ValueError, match="a stamp needs results that are all right"):
            record_success("xla", KNOWN_DEVICES["h200"], outcomes)
    assert not cache.exists()


def full():
    """A report with everything in it."""
    h200 = KNOWN_DEVICES["h200"]
    errors = {"out": 2e-3, "lse": 3e-7, "d query": 4e-3, "d key": math.nan}
    outcomes = [Outcome(trial, errors | {"d key": 1e-3}) for trial in TRIALS]
    wrong = [
        dataclasses.replace(outcomes[0], errors=errors, is_repeatable=False),
        dataclasses.replace(outcomes[1], errors={}, failure="XlaRuntimeError: a | b " + 99 * "x "),
    ]
    timed = [
        Timed(size, direction, 10**13, 1.1e-2, (1.31e-2, 1.32e-2, 1.4e-2), (0.13,) * 3)
        for size in SIZES
        for direction in (FORWARD, BOTH)
    ]
    timed[-1] = dataclasses.replace(timed[-1], dense=(), dense_failure="cuDNN: no plan")
    mosaic = Check("mosaic", TRIALS, tuple(outcomes), "", "~/stamp", "", tuple(timed), "", 5e-5)
    cutlass = Check("cutlass", TRIALS, tuple(wrong), "stopped", timing_failure="not timed")
    standings = tuple(Standing(rung.name, bool(rung.platforms)) for rung in RUNGS)
    return SelfCheck(
        "2026-11-21T21:00:00+00:00",
        5.0,
        None,
        machine.environment(),
        Device(h200, 8),
        Library({"path": "~/.cache/gna_jax/cuda/libgna_jax_cuda.so"}, "", True),
        standings,
        "",
        (cutlass, mosaic),
        240.0,
    )


def test_the_report_is_markdown_and_plain_text():
    text = reports.markdown(full())
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if not line.startswith("|"):
            assert "  " not in line.strip() and not (line == "" and lines[number - 1] == ""), line
            continue
        # A table: as many bars in every row of it, hardly longer than a narrow terminal, blank lines around.
        bars = [at for at, letter in enumerate(line) if letter == "|"]
        if lines[number - 1].startswith("|"):
            assert bars == [at for at, c in enumerate(lines[number - 1]) if c == "|"]
        else:
            assert lines[number - 1] == "" and lines[number + 1].startswith("|-")
        assert len(line) <= 84
    row = "| hunyuan-s16x8x8 | forward | 13.2 | 758 | 130 | 9.85 | 11 |"
    assert row in re.sub(" +", " ", text)
    assert (
        "- **WRONG** `70 w9, 1 heads x 32` bfloat16: d key nan, another result the second" in text
    )
    assert "- hunyuan-s1 forward+backward, cuDNN: cuDNN: no plan" in text
    assert "the first of 8" in text and "takes 50 us" in text


@pytest.mark.kernel
def test_the_whole_report_in_the_interpreter(monkeypatch):
    """As a laptop has it: one small call, the kernels' own source, processes of their own."""
    monkeypatch.setattr(verification, "TRIALS", TRIALS[:1])
    found = selfcheck(8.0, interpret="b200")
    assert found.problems == (), found.problems
    (check,) = found.checks
    assert check.name == "mosaic" and check.is_right and not check.stamp
    assert len(check.timed) == 8 and all(one.predicted and not one.seconds for one in check.timed)
    reasons = {one.name: one.reason for one in found.standings}
    assert "is interpreted here: use 'mosaic', which can be" in reasons["cutlass"]
    text = reports.markdown(found)
    assert "Interpreted calls are not timed." in text and "played by JAX's interpreter" in text
