"""The training examples: they run, go on after a kill to the same bits, and (slow) learn as much in bfloat16."""

import dataclasses
import functools
import importlib
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gna_jax.models.hdit_model import PRESETS

ROOT = pathlib.Path(__file__).parents[1]
PNG = b"\x89PNG\r\n\x1a\n"


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


def start(*command, cache):
    """Python in a process of its own; `cache` keeps what XLA compiled for the next process."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "examples", ROOT / "tests"))),
        "XLA_FLAGS": "",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, *map(str, command)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment)


def finish(process):
    output, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors
    return output


def saved(folder):
    """The last state of a run: every array by its name."""
    import orbax.checkpoint as ocp

    steps = sorted(int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdigit())
    item = folder.resolve() / "checkpoints" / str(steps[-1]) / "state"
    state = ocp.StandardCheckpointer().restore(item)
    return steps[-1], {jax.tree_util.keystr(k): v for k, v in jax.tree.leaves_with_path(state)}


def check_kill(run, folder, steps):
    """`run(folder)` starts a run of so many steps with a checkpoint every second one."""
    whole, killed = folder / "whole", folder / "killed"
    finish(run(whole))
    process = run(killed)
    checkpoints = killed / "checkpoints"
    while not (checkpoints / "2").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (checkpoints / str(steps)).exists()
    finish(run(killed))
    (step, want), (also, got) = saved(whole), saved(killed)
    assert step == also == steps
    assert want.keys() == got.keys()
    assert not [name for name in want if not np.array_equal(want[name], got[name])]


def test_a_killed_run_ends_with_the_same_bits(tmp_path):
    code = "import examples_test, pathlib, sys; examples_test.train_line(pathlib.Path(sys.argv[1]))"
    check_kill(lambda out: start("-c", code, out, cache=tmp_path / "cache"), tmp_path, 40)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["classifier", "diffusion"])
def test_a_killed_example_ends_with_the_same_bits(tmp_path, name):
    script = ROOT / f"examples/train_{name}.py"
    options = ("--steps", 8, "--batch", 4, "--save-every", 2)
    run = lambda out: start(script, *options, "--out", out, cache=tmp_path / "cache")
    check_kill(run, tmp_path, 8)


def shrink(monkeypatch, classifier, diffusion):
    """One layer where there are several, and one sample of each digit: all that is left out is compiling the same again."""
    config = dataclasses.replace(classifier.CONFIG, depths=(1, 1))
    monkeypatch.setattr(classifier, "CONFIG", config)
    levels = PRESETS["digits"].levels
    levels = tuple(dataclasses.replace(level, depth=1) for level in levels)
    monkeypatch.setattr(diffusion, "hdit", functools.partial(diffusion.hdit, levels=levels))
    monkeypatch.setattr(diffusion, "PER_CLASS", 1)


def test_the_examples_train_draw_and_judge(tmp_path, capsys, monkeypatch):
    shrink(monkeypatch, example("train_classifier"), example("train_diffusion"))
    options = {"steps": 2, "batch": 4, "accumulate": 2}
    options |= {"seed": 0, "bf16": False, "save_every": 2, "restart": True}
    example("train_classifier").main(**options, out=tmp_path / "classifier")
    output = capsys.readouterr().out
    assert re.search(r"held-out accuracy \d+\.\d% on 1000 digits", output)
    example("train_diffusion").main(
        **options, guidance=2.0, levels=2, judge=tmp_path / "classifier", out=tmp_path / "diffusion"
    )
    output = capsys.readouterr().out
    assert re.search(r"digit asked for in \d+\.\d% of 10 samples", output)
    for name in ("classifier/curve.png", "diffusion/curve.png", "diffusion/samples.png"):
        assert (tmp_path / name).read_bytes().startswith(PNG)


class Line(nnx.Module):
    """The smallest model: a linear layer on the pixels."""

    def __init__(self):
        self.linear = nnx.Linear(4, 2, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.linear(x)


def line_loss(model, keys, images, labels):
    noise = jax.vmap(lambda key: jax.random.normal(key, (4,)))(keys)
    return jnp.square(model(images + noise) - labels[:, None]).mean()


def trained(settings, folder=None, **options):
    rng = np.random.default_rng(0)
    images = rng.standard_normal((50, 4)).astype(np.float32)
    labels = images.sum(axis=1)
    train = example("training").train
    return train(settings, Line(), line_loss, images, labels, folder=folder, **options)


def train_line(folder):
    trained(example("training").Settings(40, 12, 3, 1e-2), folder, save_every=2)


def parameters(run):
    return np.concatenate([np.ravel(p) for p in jax.tree.leaves(nnx.state(run.model, nnx.Param))])


def test_a_batch_in_parts_gives_the_same_update():
    settings = example("training").Settings(4, 12, 3, 1e-2)
    whole, parts = (trained(dataclasses.replace(settings, accumulate=n)) for n in (1, 3))
    np.testing.assert_allclose(parameters(whole), parameters(parts), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(whole.losses, parts.losses, rtol=1e-5)
    with pytest.raises(ValueError, match="got batch=12, accumulate=5"):
        dataclasses.replace(settings, accumulate=5)


def test_a_finished_run_is_read_back_and_other_settings_are_refused(tmp_path):
    training = example("training")
    settings = training.Settings(4, 12, 3, 1e-2)
    first = trained(settings, tmp_path, score=lambda model: 0.5)
    again = trained(settings, tmp_path, score=lambda model: 0.5)
    assert np.array_equal(parameters(first), parameters(again))
    assert first.losses == again.losses and first.scores == again.scores == [(4, 0.5)]
    loaded = training.load_average(tmp_path, Line(), settings)
    assert np.array_equal(loaded.linear.kernel[...], first.model.linear.kernel[...])
    with pytest.raises(ValueError, match=r"settings it began with.*batch=12, now 10"):
        trained(dataclasses.replace(settings, batch=10), tmp_path)
    with pytest.raises(ValueError, match="no checkpoint in .*train first"):
        training.load_average(tmp_path / "nowhere", Line(), settings)


def test_every_epoch_goes_once_through_the_data_in_an_order_of_its_own():
    training = example("training")
    settings = training.Settings(10, 10, 3, 1e-2)
    epochs = np.split(np.concatenate([training.batch_of(settings, n, 50) for n in range(10)]), 2)
    assert all(np.array_equal(np.sort(epoch), np.arange(50)) for epoch in epochs)
    assert not np.array_equal(*epochs)
    with pytest.raises(ValueError, match="batch=60 of 50"):
        training.batch_of(dataclasses.replace(settings, batch=60), 0, 50)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["classifier", "diffusion"])
def test_bfloat16_learns_as_much_as_float32(name):
    digits = example("digits").load_digits(0)
    script, training = example(f"train_{name}"), example("training")

    def last_losses(bf16):
        settings = training.Settings(200, 32, 0, 2e-3, bf16=bf16)
        if name == "classifier":
            model, loss = script.micro_nat(settings), script.classifier_loss
        else:
            model = script.hdit("digits", dtype=settings.dtype, rngs=nnx.Rngs(0))
            loss = script.diffusion_loss
        run = training.train(settings, model, loss, digits.images, digits.labels)
        return np.mean(run.losses[-50:])

    exact, rounded = last_losses(False), last_losses(True)
    assert abs(rounded / exact - 1) < 0.05
