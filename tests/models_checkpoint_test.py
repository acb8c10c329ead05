"""Reading weights files, and putting them into a model: everything accounted for, or nothing changed."""

import json
import sys
import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from gna_jax.models.checkpoint import (
    Entry,
    bias_heads,
    conv,
    count_parameters,
    linear,
    linear_heads,
    linear_out,
    load_parameters,
    open_checkpoint,
    same,
)


class Small(nnx.Module):
    """One of each kind of layer."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.stem = nnx.Conv(2, 4, (3, 5), rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            2, 4, decode=False, qkv_features=6, use_bias=True, rngs=rngs
        )
        self.heads = nnx.List([nnx.Linear(4, out, rngs=rngs) for out in (3, 3, 2)])


ENTRIES = {
    "stem.kernel": conv("stem.weight"),
    "stem.bias": same("stem.bias"),
    **{f"attention.{n}.kernel": linear_heads(f"{n}.weight", 2) for n in ("query", "key", "value")},
    **{f"attention.{n}.bias": bias_heads(f"{n}.bias", 2) for n in ("query", "key", "value")},
    "attention.out.kernel": linear_out("out.weight", 2),
    "attention.out.bias": same("out.bias"),
    # Two parameters of one tensor, and one of two.
    "heads.0.kernel": Entry(("both.weight",), lambda weight: weight[:3].T),
    "heads.1.kernel": Entry(("both.weight",), lambda weight: weight[3:].T),
    "heads.0.bias": same("both.bias"),
    "heads.2.kernel": linear("plain.weight"),
    "heads.2.bias": same("plain.bias"),
    "heads.1.bias": Entry(("one.bias", "two.bias"), lambda a, b: jnp.concatenate([a, b])),
}


def tensors(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {
        "stem.weight": (4, 2, 3, 5),
        "stem.bias": (4,),
        **{f"{name}.weight": (6, 4) for name in ("query", "key", "value")},
        **{f"{name}.bias": (6,) for name in ("query", "key", "value")},
        "out.weight": (4, 6),
        "out.bias": (4,),
        "both.weight": (6, 4),
        "both.bias": (3,),
        "plain.weight": (2, 4),
        "plain.bias": (2,),
        "one.bias": (1,),
        "two.bias": (2,),
    }
    return {key: rng.standard_normal(shape, np.float32) for key, shape in shapes.items()}


def written(folder, stored=None, name="model.safetensors"):
    save_file(tensors() if stored is None else stored, folder / name)
    return folder / name


def values(model) -> dict[str, np.ndarray]:
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): np.asarray(param.get_value()) for path, param in flat}


def expected(stored) -> dict[str, np.ndarray]:
    """By loops and numpy alone."""
    out = {"stem.bias": stored["stem.bias"], "attention.out.bias": stored["out.bias"]}
    stem = np.zeros((3, 5, 2, 4), np.float32)
    for o, i, y, x in np.ndindex(4, 2, 3, 5):
        stem[y, x, i, o] = stored["stem.weight"][o, i, y, x]
    out["stem.kernel"] = stem
    for name in ("query", "key", "value"):
        kernel, bias = np.zeros((4, 2, 3), np.float32), np.zeros((2, 3), np.float32)
        for head, dim in np.ndindex(2, 3):
            bias[head, dim] = stored[f"{name}.bias"][3 * head + dim]
            for i in range(4):
                kernel[i, head, dim] = stored[f"{name}.weight"][3 * head + dim, i]
        out[f"attention.{name}.kernel"], out[f"attention.{name}.bias"] = kernel, bias
    kernel = np.zeros((2, 3, 4), np.float32)
    for head, dim, o in np.ndindex(2, 3, 4):
        kernel[head, dim, o] = stored["out.weight"][o, 3 * head + dim]
    out["attention.out.kernel"] = kernel
    for head in (0, 1):
        out[f"heads.{head}.kernel"] = stored["both.weight"][3 * head : 3 * head + 3].T
    out["heads.2.kernel"] = np.array(
        [[stored["plain.weight"][o, i] for o in (0, 1)] for i in range(4)]
    )
    out["heads.2.bias"] = stored["plain.bias"]
    out["heads.0.bias"] = stored["both.bias"]
    out["heads.1.bias"] = np.concatenate([stored["one.bias"], stored["two.bias"]])
    return out


def check_loaded(model, stored):
    got, want = values(model), expected(stored)
    assert got.keys() == want.keys()
    for path in want:
        np.testing.assert_array_equal(got[path], want[path], err_msg=path)


def test_every_kind_of_entry_from_one_file(tmp_path):
    model = Small(rngs=nnx.Rngs(0))
    load_parameters(model, open_checkpoint(written(tmp_path)), ENTRIES)
    check_loaded(model, tensors())


def test_a_folder_with_an_index_of_shards(tmp_path):
    stored = tensors()
    keys = sorted(stored)
    shards = {"a.safetensors": keys[:5], "b.safetensors": keys[5:]}
    for name, part in shards.items():
        save_file({key: stored[key] for key in part}, tmp_path / name)
    files = {key: name for name, part in shards.items() for key in part}
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    for path in (tmp_path, index):
        model = Small(rngs=nnx.Rngs(0))
        load_parameters(model, open_checkpoint(path), ENTRIES)
        check_loaded(model, stored)
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="names a shard that is not there: .*b.safetensors"):
        open_checkpoint(index)


def test_an_abstract_model_gets_its_parameters_here(tmp_path):
    model = nnx.eval_shape(lambda: Small(rngs=nnx.Rngs(0)))
    assert count_parameters(model) == sum(x.size for x in expected(tensors()).values())
    load_parameters(model, open_checkpoint(written(tmp_path)), ENTRIES)
    check_loaded(model, tensors())


def test_values_take_the_parameters_dtype_and_sharding(tmp_path):
    stored = {key: value.astype(ml_dtypes.bfloat16) for key, value in tensors().items()}
    mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.NamedSharding(mesh, jax.P(None, "model", None))
    model = Small(rngs=nnx.Rngs(0))
    kernel = model.attention.query.kernel
    kernel.set_value(jax.device_put(kernel.get_value(), sharding))
    load_parameters(model, open_checkpoint(written(tmp_path, stored)), ENTRIES)
    check_loaded(model, {key: value.astype(np.float32) for key, value in stored.items()})
    assert model.attention.query.kernel.get_value().sharding == sharding


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("key.bias"), "got 1 missing: key.bias; 0 that nothing uses: none"),
        (lambda s: s.update(more=s["out.bias"]), "0 missing: none; 1 that nothing uses: more;"),
        (
            lambda s: s.update({"out.weight": s["out.weight"][:3]}),
            r"out.weight \(3, 6\) would become parameter attention.out.kernel \(2, 3, 3\); the model's is \(2, 3, 4\)",
        ),
        (
            lambda s: s.update({"key.bias": s["key.bias"][:5]}),
            r"key.bias \(5,\) cannot become parameter attention.key.bias \(2, 3\)",
        ),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_changes(tmp_path, change, message):
    stored = tensors()
    change(stored)
    model = Small(rngs=nnx.Rngs(0))
    before = values(model)
    with pytest.raises(ValueError, match=message):
        load_parameters(model, open_checkpoint(written(tmp_path, stored)), ENTRIES)
    for path, value in values(model).items():
        np.testing.assert_array_equal(value, before[path])


def test_many_keys_are_counted(tmp_path):
    stored = tensors() | {f"extra.{i}": np.zeros(1, np.float32) for i in range(20)}
    checkpoint = open_checkpoint(written(tmp_path, stored))
    with pytest.raises(ValueError, match="20 that nothing uses: extra.0, .* and 12 more"):
        load_parameters(Small(rngs=nnx.Rngs(0)), checkpoint, ENTRIES)
    model = Small(rngs=nnx.Rngs(0))
    load_parameters(model, checkpoint, ENTRIES, ignored=lambda key: key.startswith("extra."))
    check_loaded(model, tensors())


def test_a_table_that_leaves_parameters_out_is_refused(tmp_path):
    entries = {path: entry for path, entry in ENTRIES.items() if path != "stem.bias"}
    with pytest.raises(ValueError, match="no entry for stem.bias, no parameter for none"):
        load_parameters(Small(rngs=nnx.Rngs(0)), open_checkpoint(written(tmp_path)), entries)


def test_files_of_other_kinds(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        open_checkpoint(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="one .safetensors file; got"):
        open_checkpoint(tmp_path)
    other = tmp_path / "weights.ckpt"
    other.write_bytes(b"")
    with pytest.raises(ValueError, match=r"or one of .pth, .pth.tar, .pt, .bin; got weights.ckpt"):
        open_checkpoint(other)
    written(tmp_path, name="a.safetensors")
    written(tmp_path, name="b.safetensors")
    with pytest.raises(ValueError, match=r"got \['a.safetensors', 'b.safetensors'\]"):
        open_checkpoint(tmp_path)


class FakeTensor:
    """What is asked of a torch tensor; bfloat16 has no numpy type in torch."""

    def __init__(self, array):
        self.array, self.shape = array, array.shape
        self.dtype = "torch.bfloat16" if array.dtype == ml_dtypes.bfloat16 else "torch.float32"

    def detach(self):
        return self

    def contiguous(self):
        return self

    def view(self, dtype):
        return FakeTensor(self.array.view(dtype))

    def numpy(self):
        if self.array.dtype == ml_dtypes.bfloat16:
            raise TypeError("Got unsupported ScalarType BFloat16")
        return self.array


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"epoch": 3, "model": {"state_dict": s}}])
def test_pickles_are_read_by_torch_without_running_anything(tmp_path, monkeypatch, wrap):
    stored = tensors()
    stored["key.bias"] = stored["key.bias"].astype(ml_dtypes.bfloat16)

    def load(path, *, map_location, weights_only):
        assert weights_only is True and map_location == "cpu"
        return wrap({key: FakeTensor(value) for key, value in stored.items()})

    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(load=load, int16=np.int16))
    path = tmp_path / "nat.pth"
    path.write_bytes(b"")
    model = Small(rngs=nnx.Rngs(0))
    load_parameters(model, open_checkpoint(path), ENTRIES)
    check_loaded(model, {key: value.astype(np.float32) for key, value in stored.items()})


def test_missing_packages_are_named(tmp_path, monkeypatch):
    path = tmp_path / "nat.pth"
    path.write_bytes(b"")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(RuntimeError, match="torch is not installed;.* or save the checkpoint as"):
        open_checkpoint(path)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(RuntimeError, match=r"pip install 'gna-jax\[models\]'"):
        open_checkpoint(written(tmp_path))
