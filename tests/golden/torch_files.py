"""Files that PyTorch itself wrote, loaded into a model; not among the tests, which use a stand-in for torch.

    pip install torch pytest -e '.[models]'     # Python 3.12
    python -m pytest tests/golden/torch_files.py

Ran on 2026-11-22 with Python 3.12.1, torch 2.15.0, jax 0.12.0.1, flax 0.12.12.
"""

import argparse
import os
import pathlib

import jax
import numpy as np
import pytest
import safetensors.numpy
import torch
from flax import nnx

from gna_jax.models.nat_model import NAT
from gna_jax.models.nat_presets import NATConfig

GOLDEN = pathlib.Path(__file__).parent
CONFIG = NATConfig(8, (1, 1), (2, 4), 3, window_size=3)


def weights():
    """A tiny NAT in the authors' layout."""
    stored = safetensors.numpy.load_file(GOLDEN / "nat.safetensors")
    found = {
        k.removeprefix("nat/weights/"): v for k, v in stored.items() if k.startswith("nat/weights/")
    }
    return {key: torch.from_numpy(value) for key, value in found.items()}


def loaded(path):
    model = nnx.eval_shape(lambda: NAT(CONFIG, num_classes=5, rngs=nnx.Rngs(0)))
    model.load_pretrained(path)
    return jax.tree.leaves(nnx.state(model, nnx.Param))


@pytest.mark.parametrize(
    ("name", "dtype", "wrapper"),
    [
        ("nat.pth", torch.float32, None),
        ("nat.pt", torch.float16, None),
        ("pytorch_model.bin", torch.bfloat16, None),
        ("model_best.pth.tar", torch.float64, "state_dict"),
    ],
)
def test_equals_the_safetensors_file(tmp_path, name, dtype, wrapper):
    tensors = {key: tensor.to(dtype) for key, tensor in weights().items()}
    torch.save({"epoch": 3, wrapper: tensors} if wrapper else tensors, tmp_path / name)
    plain = {key: tensor.float().numpy() for key, tensor in tensors.items()}
    safetensors.numpy.save_file(plain, tmp_path / "nat.safetensors")
    want = loaded(tmp_path / "nat.safetensors")
    jax.tree.map(np.testing.assert_array_equal, loaded(tmp_path / name), want)


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_nothing_is_executed(tmp_path):
    trap = tmp_path / "made"
    torch.save(weights() | {"norm.weight": Malicious(trap)}, tmp_path / "nat.pth")
    with pytest.raises(ValueError, match=r"nothing that reading would .* with posix\.mkdir"):
        loaded(tmp_path / "nat.pth")
    assert not trap.exists()
    torch.load(tmp_path / "nat.pth", weights_only=False)
    assert trap.exists()  # the trap works


def test_what_training_scripts_store_besides_is_refused_by_name(tmp_path):
    stored = {"model": weights(), "args": argparse.Namespace(lr=0.1)}
    torch.save(stored, tmp_path / "nat.pth")
    with pytest.raises(ValueError, match=r"with argparse\.Namespace; if you trust it"):
        loaded(tmp_path / "nat.pth")


def test_a_file_cut_short_is_damaged(tmp_path):
    torch.save(weights(), tmp_path / "nat.pth")
    whole = (tmp_path / "nat.pth").read_bytes()
    (tmp_path / "nat.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"nat\.pth of \d+ bytes is damaged"):
        loaded(tmp_path / "nat.pth")


def test_quantized_tensors_are_refused_by_key(tmp_path):
    tensors = weights() | {"norm.weight": weights()["norm.weight"].to(torch.float8_e4m3fn)}
    torch.save(tensors, tmp_path / "nat.pth")
    with pytest.raises(ValueError, match=r"got norm\.weight of float8_e4m3fn"):
        loaded(tmp_path / "nat.pth")
