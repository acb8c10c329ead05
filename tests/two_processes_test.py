"""Training on two processes: to what one process finds, and, with one of them killed on the way, to the same bits."""

import functools
import importlib
import os
import pathlib
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

ROOT = pathlib.Path(__file__).parents[1]
BATCH = 8
PATIENCE = 600  # seconds until processes that wait for each other are killed
# Devices' parts of sums are added in another order: parameters below 1 came out equal to 1e-7.
ROUNDING = 1e-6


@pytest.fixture(autouse=True)
def optax_mixes_dtypes():
    """AdamW raises a float to an integer's power, which the strict promotion of these tests forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@functools.cache
def example(name):
    """A script of examples/ as a module."""
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)


class Noise:
    """In the place of 5,000 digits, which take seconds to read."""

    rng = np.random.default_rng(0)
    images = held_out_images = rng.standard_normal((16, 28, 28)).astype(np.float32)
    labels = held_out_labels = rng.integers(10, size=16).astype(np.int32)


class Plain(nnx.Module):
    """In the place of the example's model where any will do: it compiles faster."""

    def __init__(self, width, layers, *, rngs):
        self.head = nnx.Linear(4, 10, rngs=rngs)

    def __call__(self, tokens):
        return self.head(tokens.mean(axis=(1, 2)))


def shrunk(model):
    """The example with few images, and a smaller model or the plain one."""
    models = {"attention": original_model(), "plain": Plain}
    script = example("train_two_processes")
    script.load_digits = lambda seed: Noise
    script.WIDTH, script.LAYERS = 16, 1
    script.Classifier = models[model]
    return script


@functools.cache
def original_model():
    """The example's, remembered when first asked for, before another takes its place."""
    return example("train_two_processes").Classifier


def be_one_of_two(model):
    """What each process of a run does: the example, as its launcher starts it, but for a score that takes long to compile."""
    import typer

    script = shrunk(model)
    script.accuracy = lambda *arguments: jnp.zeros(())
    typer.run(script.main)


@pytest.fixture
def started(monkeypatch, tmp_path):
    """A list for processes, which end with the test if not before. They find the examples and compile quickly."""
    paths = [*map(str, (ROOT, ROOT / "examples", ROOT / "tests")), *sys.path]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    processes = []

    def kill():
        for process in processes:
            process.kill()

    timer = threading.Timer(PATIENCE, kill)
    timer.start()
    yield processes
    timer.cancel()
    kill()


def start_two(started, model, out, *, steps, save_every):
    """The example on two processes of two devices each."""
    out.mkdir(exist_ok=True)
    options = {"steps": steps, "batch": BATCH, "save-every": save_every, "out": out}
    options = [str(text) for name, value in options.items() for text in (f"--{name}", value)]
    code = f"import two_processes_test as t; t.be_one_of_two({model!r})"
    command = [sys.executable, "-c", code, *options]
    two = example("launch").start_processes(command, processes=2, devices=2, logs=out)
    started.extend(two)
    return two


def saved(model, out, settings):
    """The last state of a run, every array by its name, and the losses."""
    script, training = shrunk(model), example("training")
    fresh = script.Classifier(script.WIDTH, script.LAYERS, rngs=nnx.Rngs(1))
    optimizer = training.make_optimizer(settings)
    like = training.first_state(nnx.state(fresh, nnx.Param), optimizer)
    state, losses, _ = training.Checkpoints(out, settings).restore(like)
    assert len(losses) == settings.steps
    return {
        jax.tree_util.keystr(k): np.asarray(v) for k, v in jax.tree.leaves_with_path(state)
    }, losses


def test_two_processes_train_as_one(started, tmp_path):
    settings = example("training").Settings(4, BATCH, 0, rate=2e-3)
    two = start_two(started, "attention", tmp_path / "two", steps=4, save_every=4)
    example("launch").wait_for(two)
    got, losses = saved("attention", tmp_path / "two", settings)

    script = shrunk("attention")
    alone = script.mesh_of(jax.devices()[:1], 1)
    script.train_digits(settings, alone, tmp_path / "one", save_every=4)
    want, want_losses = saved("attention", tmp_path / "one", settings)
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=0, atol=ROUNDING, err_msg=name)
    np.testing.assert_allclose(losses, want_losses, rtol=ROUNDING)


@pytest.mark.parametrize("model", ["plain", pytest.param("attention", marks=pytest.mark.slow)])
def test_a_killed_process_costs_no_bit_of_the_result(started, tmp_path, model):
    launch, training = example("launch"), example("training")
    settings = training.Settings(12, BATCH, 0, rate=2e-3)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    launch.wait_for(start_two(started, model, whole, steps=12, save_every=12))

    two = start_two(started, model, killed, steps=12, save_every=2)
    while not (killed / "checkpoints/4").exists():  # by then that of step 2 is complete
        assert all(process.poll() is None for process in two)
        time.sleep(0.002)
    two[1].kill()
    with pytest.raises(launch.ProcessDiedError, match="process 1 was killed by SIGKILL"):
        launch.wait_for(two)
    assert two[0].poll() is not None
    assert 2 <= training.Checkpoints(killed).last < 12

    launch.wait_for(start_two(started, model, killed, steps=12, save_every=12))
    (want, losses), (got, resumed_losses) = (saved(model, out, settings) for out in (whole, killed))
    assert resumed_losses == losses
    assert got.keys() == want.keys()
    assert not [name for name in want if not np.array_equal(want[name], got[name])]


def test_when_one_ends_badly_all_do(started, tmp_path):
    code = "import sys, time; sys.exit(3) if sys.argv[-1] == '1' else time.sleep(600)"
    with pytest.raises(
        SystemExit, match=r"process 1 failed with code 3, and all .* stopped.*\.log"
    ):
        example("train_two_processes").launch([sys.executable, "-c", code], 2, 1, tmp_path)


def test_a_process_does_not_outlive_its_launcher(started, tmp_path):
    waits = (
        "import launch, time; launch.end_with_launcher(); print('up', flush=True); time.sleep(600)"
    )
    starts = (
        "import launch, pathlib, sys; command = [sys.executable, '-c', sys.argv[1]];"
        "launch.wait_for(launch.start_processes(command, processes=1, devices=1, logs=pathlib.Path()))"
    )
    command = [sys.executable, "-c", starts, waits]
    launcher = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    started.append(launcher)
    assert launcher.stdout.readline() == "up\n"
    launcher.kill()
    assert launcher.communicate(timeout=60)[0] == ""  # once no process holds the other end


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((3, 2, 16), "16 rows of tokens; got 3 processes"),
        ((2, 3, 16), "got batch=16 on 3 devices"),
        ((2, 16, 16), "1000 held out; got batch=16 on 16 devices"),
    ],
)
def test_unequal_parts_are_refused(sizes, words):
    import typer

    with pytest.raises(typer.BadParameter, match=words):
        example("train_two_processes").check_sizes(*sizes)


@pytest.mark.slow
def test_the_script_starts_itself_twice_and_tells_its_result_once(started, tmp_path):
    options = ("--steps", "2", "--batch", "4", "--out", tmp_path / "out")
    command = [sys.executable, ROOT / "examples/train_two_processes.py", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("held-out accuracy") == 1
    assert "on 4 devices of 2 processes" in done.stdout
    assert (tmp_path / "out/curve.png").exists() and (tmp_path / "out/checkpoints/2").exists()
