"""The demo: it runs from start to end, holds out what it says, and (slow) reaches its accuracy."""

import functools
import importlib.util
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[1]
PNG = b"\x89PNG\r\n\x1a\n"


@functools.cache
def train_digits():
    """The script as a module; beside it lies the one that it imports."""
    sys.path.insert(0, str(ROOT / "examples"))
    spec = importlib.util.spec_from_file_location("train_digits", ROOT / "examples/train_digits.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.pop(0)
    return module


def run_demo(out, *options, **environment):
    command = [sys.executable, ROOT / "examples/train_digits.py", "--out", out, *options]
    completed = subprocess.run(
        command, capture_output=True, text=True, cwd=out, timeout=900, env=os.environ | environment
    )
    assert completed.returncode == 0, completed.stderr
    return completed.stdout


def test_the_demo_trains_draws_and_compares(tmp_path):
    # Compiled quickly: most of this run is compiling. The slow test below is of the real thing.
    quickly = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    output = run_demo(tmp_path, "--steps", "2", "--rounds", "1", **quickly)
    assert re.search(r"held-out accuracy \d+\.\d% on 1000 digits", output)
    assert re.search(r"training took \d+ s \(2 steps", output)
    for name in ("window.png", "training.png"):
        assert (tmp_path / name).read_bytes().startswith(PNG)
    faster = [float(x) for x in re.findall(r"([\d.]+)x faster", output)]
    smaller = [float(x) for x in re.findall(r"([\d.]+)x smaller", output)]
    assert len(faster) == len(smaller) == 2
    # Memory is the compiler's count and cannot vary; time may, on a busy machine, but not tenfold.
    assert min(smaller) > 10 and min(faster) > 0.5
    assert float(re.search(r"results differ by (\S+) at most", output)[1]) < 1e-4


@pytest.mark.slow
def test_the_demo_reaches_its_accuracy(tmp_path):
    output = run_demo(tmp_path, "--rounds", "1")
    assert float(re.search(r"held-out accuracy ([\d.]+)%", output)[1]) >= 96.0


def test_training_never_sees_a_held_out_digit():
    digits, again, other = (train_digits().load_digits(seed) for seed in (3, 3, 4))
    assert (len(digits.images), len(digits.held_out_images)) == (4000, 1000)
    assert (np.bincount(digits.held_out_labels) == 100).all()
    assert (np.bincount(digits.labels) == 400).all()
    kept = {image.tobytes() for image in digits.images}
    assert not [image for image in digits.held_out_images if image.tobytes() in kept]
    assert np.array_equal(digits.held_out_images, again.held_out_images)
    assert not np.array_equal(digits.held_out_images, other.held_out_images)


def test_two_by_two_tokens_become_one():
    x = np.arange(2 * 4 * 6 * 3, dtype=np.float32).reshape(2, 4, 6, 3)
    merged = train_digits().merge_two_by_two(x)
    assert merged.shape == (2, 2, 3, 12)
    for y, column in np.ndindex(2, 3):
        patch = x[1, 2 * y : 2 * y + 2, 2 * column : 2 * column + 2]
        assert np.array_equal(merged[1, y, column], patch.reshape(-1))
