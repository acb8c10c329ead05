"""`gna-jax tune`: its lists are the library's, its tables are found by later calls, and what cannot be is said in one line."""

import datetime
import json
import sys

import jax
import jax.numpy as jnp
import pytest
from typer.testing import CliRunner

import gna_jax
from gna_jax import tuning
from gna_jax.backends.mosaic import tiles as mosaic_tiles
from gna_jax.backends.mosaic import tuned
from gna_jax.cli import app
from gna_jax.device import KNOWN_DEVICES
from gna_jax.neighborhood import Neighborhood
from gna_jax.problem import Operands, describe
from gna_jax.simulator import PRESETS
from gna_jax.tuning import Measurement

LINE = "4096 -w 512 -s 64 -n 4"
DRY = "--dry-run --device h200"


def run(arguments, width=200):
    """Exit code, standard output, and standard error as one line without the frame drawn around it."""
    environment = {"COLUMNS": str(width), "NO_COLOR": "1"}
    result = CliRunner().invoke(app, ["tune", *arguments.split()], env=environment)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, " ".join(result.stderr.replace("│", "").split())


def line_problem(device="h200", heads=4, kv_heads=4, **changes):
    query, key = (jax.ShapeDtypeStruct((1, 4096, n, 128), jnp.bfloat16) for n in (heads, kv_heads))
    rule = Neighborhood.of(1, window_size=512, stride=64, **changes)
    spec = KNOWN_DEVICES[device]
    return describe(Operands(query, key, key), rule, scale=None, precision=None, device=spec)


@pytest.fixture(autouse=True)
def no_tables(monkeypatch, tmp_path):
    """Tables of this machine stay out of the tests, and theirs out of the machine."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def gpu(monkeypatch):
    """An H200 where the second candidate of the forward takes 1 ms and every other 2 ms; the last fails."""

    def measure(problem, direction, tried, rounds, report):
        report("timing")
        done = []
        for number, one in enumerate(tried):
            seconds = 1e-3 if direction == "forward" and number == 2 else 2e-3
            failed = number == len(tried) - 1
            times, failure = (
                ((), "ValueError: [no] registers") if failed else ((seconds,) * rounds, "")
            )
            done.append(Measurement(one, times, failure))
        return done

    command = sys.modules["gna_jax.cli.tune"]  # the package holds the function of this name
    spec = KNOWN_DEVICES["h200"]
    monkeypatch.setattr(command, "resolve_device", lambda name: spec)
    monkeypatch.setattr(tuning, "resolve_device", lambda name: spec)
    monkeypatch.setattr(tuning, "measure_kernels", measure)


@pytest.mark.parametrize("device", ["h200", "b200"])
def test_a_dry_run_lists_the_librarys_candidates(device, no_tables):
    options = f"{LINE} --dilation 2 -c 1 --kv-heads 2 --candidates 3 --dry-run --device {device}"
    code, out, error = run(f"{options} --json")
    assert (code, error) == (0, "")
    (told,) = json.loads(out)
    problem = line_problem(device, kv_heads=2, dilation=2, is_causal=True)
    assert told["device"] == problem.device.kind and told["table"] is None
    assert (told["window_size"], told["is_causal"]) == ([512], [True])
    for direction in tuning.DIRECTIONS:
        expected = tuning.candidates(problem, direction, 3)
        assert [(tuple(row["q"]), tuple(row["kv"])) for row in told[direction]] == [
            one.pair(direction) for one in expected
        ]
        predicted = [one.predicted_seconds for one in expected]
        assert [row["predicted_seconds"] for row in told[direction]] == predicted
        assert 2 <= len(expected) <= 4  # the default, and as many others as there are
        others = [False] * (len(expected) - 1)
        assert [row["is_default"] for row in told[direction]] == [True, *others]
        assert not any(row["seconds"] or row["is_chosen"] for row in told[direction])
    assert not (no_tables / "cache").exists()


def test_a_dry_run_prints_tables():
    code, out, error = run(f"{LINE} --candidates 2 {DRY}")
    assert (code, error) == (0, "")
    lines = [line.rstrip() for line in out.splitlines()]
    assert lines[:2] == [
        "4096 tokens, window 512, stride 64, dilation 1",
        "batch 1, 4 heads (4 key/value) x 128, bfloat16 on NVIDIA H200",
    ]
    assert [line for line in lines if line.startswith(("forward", "backward"))] == [
        "forward",
        "backward, dK and dV",
    ]
    assert sum(line.endswith("default") for line in lines) == 2
    assert "measured" not in out and "written" not in out
    forward = tuning.candidates(line_problem(), "forward", 2)
    times = [one.predicted_seconds for one in forward]
    first = min(forward, key=lambda one: one.predicted_seconds)
    (q,), (kv,) = first.pair("forward")
    assert lines[4].startswith(f"{q} / {kv}"), "the fastest first"
    assert times[0] == forward[0].predicted_seconds


def test_a_preset_is_all_its_rules_once(monkeypatch):
    tried = []
    real = tuning.candidates

    def candidates(problem, direction, most, report):
        tried.append(problem)
        return real(problem, direction, most, report)

    monkeypatch.setattr(tuning, "candidates", candidates)
    code, out, _ = run(f"--preset 1d-32k --candidates 1 {DRY} --json")
    preset = PRESETS["1d-32k"]
    assert code == 0 and len(json.loads(out)) == len(preset.rules) == 3
    assert [problem.neighborhood for problem in tried[::2]] == [
        r.neighborhood for r in preset.rules
    ]
    for problem in tried:
        assert (problem.global_layout, problem.dtype.name) == ((32768,), "float16")
        assert (problem.query_heads, problem.head_dim) == (1, 128)


def test_a_tuning_is_printed_written_and_found(gpu):
    problem = line_problem()
    default = mosaic_tiles.counted(problem)
    code, out, error = run(f"{LINE} --candidates 4")
    assert (code, error) == (0, "")
    path = tuned.machine_table(problem.device)
    assert out.endswith(f"written to {path}\n")
    lines = [line.rstrip() for line in out.splitlines()]
    chosen = tuning.candidates(problem, "forward", 4)[2]
    (q,), (kv,) = chosen.pair("forward")
    row = next(line for line in lines if line.endswith("chosen"))
    assert row.split()[:3] == [str(q), "/", str(kv)]
    assert row.split()[-6:] == ["1", "ms", "0", "ms", "2.00x", "chosen"]
    assert sum(line.endswith("ValueError: [no] registers") for line in lines) == 2
    assert sum("default, chosen" in line for line in lines) == 1, "nothing beat it backward"
    entry, found_in = tuned.lookup(problem)
    assert found_in == path
    assert entry.forward == tuned.Timed((q,), (kv,), 1e-3, chosen.predicted_seconds, 2e-3)
    assert (entry.backward.q, entry.backward.kv) == (default.backward_q, default.backward_kv)
    assert entry.date == datetime.datetime.now(datetime.UTC).date().isoformat()
    assert entry.versions["gna-jax"] == gna_jax.__version__
    assert entry.versions["jax"] == jax.__version__ and set(entry.versions) >= {"jaxlib"}
    x = jax.ShapeDtypeStruct((5, 4096, 2, 128), jnp.bfloat16)
    call = {"window_size": 512, "stride": 64, "device": "h200", "implementation": "mosaic"}
    told = gna_jax.explain(x, x, x, **call)
    assert told.tiles == entry.tiles and f"(tuned on {entry.date})" in str(told)


def test_json_of_a_tuning(gpu, no_tables):
    table = no_tables / "mine.json"
    code, out, _ = run(f"{LINE} --candidates 2 --rounds 3 --into {table} --json")
    (told,) = json.loads(out)
    assert code == 0 and told["table"] == str(table)
    assert [row["is_chosen"] for row in told["forward"]] == [True, False, False]
    assert told["forward"][0]["seconds"] == [2e-3] * 3
    assert told["forward"][2]["failure"] == "ValueError: [no] registers"
    (entry,) = tuned.read(table)["NVIDIA H200"].values()
    assert entry.forward.seconds == entry.forward.default_seconds == 2e-3
    assert tuned.lookup(line_problem()) is None, (
        "a file of one's own is for carrying, not for calls"
    )


def test_into_package_writes_the_packages_table(gpu, monkeypatch, no_tables):
    monkeypatch.setattr(tuned, "package_table", lambda: no_tables / "tuned.json")
    code, out, _ = run(f"{LINE} --candidates 1 --into package")
    assert code == 0 and out.endswith(f"written to {no_tables / 'tuned.json'}\n")
    assert tuned.lookup(line_problem())[1] == no_tables / "tuned.json"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (LINE, 1, "gna-jax: tuning measures kernels on an NVIDIA GPU; the default device is cpu: run it where there is one, or list the candidates without one: --dry-run --device h200"),
        (f"--preset hunyuan-91 {LINE} {DRY}", 2, "needs a LAYOUT with --window, or a --preset; got layout=4096"),
        (f"4096 {DRY}", 2, "needs a LAYOUT with --window, or a --preset; got layout=4096, window=None"),
        (DRY, 2, "got layout=None, window=None, preset=None"),
        (f"--preset mine {DRY}", 2, "--preset must be one of flux-4k"),
        (f"{LINE} --dry-run --device abacus", 2, "got device='abacus'"),
        (f"{LINE} --dry-run --device a100", 1, "run on Hopper (9.0), Blackwell (10.0, 10.3); got NVIDIA A100"),
        (f"{LINE} --dry-run", 1, "mosaic runs on cuda, the device is cpu"),
        (f"{LINE} --dtype float32 {DRY}", 1, "take bfloat16 and float16; got float32"),
        (f"8 -w 9 {DRY}", 2, "window_size must not exceed the layout"),
        (f"{LINE} --candidates 0 {DRY}", 2, "--candidates"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said(arguments, code, message):
    got, out, error = run(arguments)
    assert (got, out) == (code, "")
    assert message in error


def test_a_device_is_named_for_dry_runs_alone(gpu):
    code, _, error = run(f"{LINE} --device h200")
    assert code == 2 and "--device goes with --dry-run; got --device h200" in error


def test_a_broken_table_ends_the_command_with_its_name(gpu, no_tables):
    table = no_tables / "mine.json"
    table.write_text("{")
    code, _, error = run(f"{LINE} --candidates 1 --into {table}")
    assert code == 1 and f"{table} is no table of tuned tiles" in error
    assert table.read_text() == "{"
