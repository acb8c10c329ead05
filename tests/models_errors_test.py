"""What models refuse: damaged and foreign checkpoints, inputs of another batch, rules that do not fit. Messages name key or axis.

Wrong keys and sizes per model stand in each model's own tests.
"""

import dataclasses
import functools
import json
import pickle
import sys
import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from mmdit_suite import GOLDENS, golden_weights
from safetensors.numpy import load_file, save_file

from gna_jax import Neighborhood
from gna_jax.models import hdit_layers
from gna_jax.models.checkpoint import Checkpoint, linear, load_parameters, open_checkpoint, same
from gna_jax.models.cosmos_model import CosmosTransformer
from gna_jax.models.cosmos_presets import CosmosConfig
from gna_jax.models.flux_model import FluxConfig, FluxTransformer
from gna_jax.models.hdit_model import HDiT, HDiTConfig
from gna_jax.models.hunyuan_video_model import HunyuanVideoConfig, HunyuanVideoTransformer
from gna_jax.models.joint import gna_joint
from gna_jax.models.nat_model import NAT
from gna_jax.models.nat_presets import NATConfig
from gna_jax.models.schedule import AttentionSchedule

# --- files ----------------------------------------------------------------------------------------------------


def whole_file(folder, name="model.safetensors", **tensors):
    save_file(tensors or {"a": np.ones(3, np.float32)}, folder / name)
    return folder / name


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda whole: whole[:-4], "of .* bytes .*not fully covered.*download it again"),
        (lambda whole: b"", "of 0 bytes .*download it again"),
        (lambda whole: b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "git lfs pull"),
    ],
    ids=["truncated", "empty", "pointer"],
)  # fmt: skip
def test_a_damaged_file_is_named(tmp_path, content, message):
    path = whole_file(tmp_path)
    path.write_bytes(content(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"model\.safetensors is no whole .*{message}"):
        open_checkpoint(path)


def test_a_folder_without_weights_tells_where_they_are(tmp_path):
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"")
    (tmp_path / "transformer").mkdir()
    whole_file(tmp_path / "transformer")
    with pytest.raises(
        ValueError, match=r"got \[\] in .* or one of: .*pytorch_model\.bin, .*/transformer$"
    ):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        ("not json", ValueError, "an index is JSON .*m.safetensors.index.json .*JSONDecodeError"),
        ('{"metadata": {}}', ValueError, r"under weight_map; got .*KeyError\('weight_map'\)"),
        ("[1]", ValueError, "under weight_map; got .*TypeError"),
        (
            {"a": "s1.safetensors", "b": "s3.safetensors", "c": "s2.safetensors"},
            FileNotFoundError,
            r"not there: s2\.safetensors, s3\.safetensors; download every shard",
        ),
        ({"a": "s1.safetensors", "z": "s1.safetensors"}, ValueError, r"lacks z in s1\.safetensors"),
    ],
)
def test_a_wrong_index_is_named(tmp_path, index, error, message):
    whole_file(tmp_path, "s1.safetensors")
    text = index if isinstance(index, str) else json.dumps({"weight_map": index})
    (tmp_path / "m.safetensors.index.json").write_text(text)
    with pytest.raises(error, match=message):
        open_checkpoint(tmp_path)


class FakeTensor:
    """What is asked of a torch tensor before it is read."""

    shape, dtype = (3,), "torch.float32"

    def detach(self):
        return self


TENSOR = FakeTensor()


def refuse(path, **options):
    """The words of torch 2.15."""
    raise pickle.UnpicklingError(
        "Weights only load failed. .. WeightsUnpickler error: Unsupported global: GLOBAL argparse.Namespace was not an allowed"
        " global by default."
    )


def end_of_file(path, **options):
    raise EOFError


@pytest.mark.parametrize(
    ("load", "message"),
    [
        (refuse, r"nothing that reading would have to execute; got .*nat\.pth with argparse\.Namespace; if"),
        (end_of_file, r"nat\.pth of 5 bytes is damaged .*\(EOFError\(\)\); download"),
        (lambda path, **_: [TENSOR], r"under model, .*got a list in .*nat\.pth; save a state_dict"),
        (lambda path, **_: TENSOR, "got a FakeTensor in"),
        (
            lambda path, **_: {"epoch": 3, "net": {"a": TENSOR}},
            r"something else under epoch, net in .*nat\.pth; save the state_dict alone",
        ),
    ],
    ids=["objects", "damaged", "list", "tensor", "other names"],
)  # fmt: skip
def test_a_wrong_pickle_is_named(tmp_path, monkeypatch, load, message):
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(load=load))
    path = tmp_path / "nat.pth"
    path.write_bytes(b"hello")
    with pytest.raises(ValueError, match=message):
        open_checkpoint(path)


def test_training_scripts_write_pth_tar(tmp_path, monkeypatch):
    stored = {"epoch": 3, "state_dict": {"a": TENSOR}}
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(load=lambda path, **_: stored))
    path = tmp_path / "model_best.pth.tar"
    path.write_bytes(b"")
    assert {key: open_checkpoint(path).shape(key) for key in open_checkpoint(path)} == {"a": (3,)}


# --- tensors --------------------------------------------------------------------------------------------------


class Two(nnx.Module):
    def __init__(self, dropout=0.0, *, rngs: nnx.Rngs):
        self.one = nnx.Linear(2, 3, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs if dropout else None)


ENTRIES = {"one.kernel": linear("one.weight"), "one.bias": same("one.bias")}


@pytest.mark.parametrize("dtype", [np.int8, np.bool_, np.complex64, ml_dtypes.float8_e4m3fn])
def test_tensors_that_are_not_of_floating_point_are_named(tmp_path, dtype):
    weight = np.ones((3, 2), np.float32).astype(dtype)
    path = whole_file(tmp_path, **{"one.weight": weight, "one.bias": np.ones(3, np.float16)})
    model = Two(rngs=nnx.Rngs(0))
    before = np.array(model.one.bias[...])
    with pytest.raises(ValueError, match=r"got one\.weight of \w+ in .*quantized weights are not"):
        load_parameters(model, open_checkpoint(path), ENTRIES)
    np.testing.assert_array_equal(model.one.bias[...], before)


def test_every_tensor_is_read_once():
    stored = {"one.bias": np.ones(3, np.float32), "one.weight": np.ones((3, 2), np.float32)}
    read = []

    def reader(key):
        return lambda: read.append(key) or stored[key]

    shapes = {key: value.shape for key, value in stored.items()}
    dtypes = dict.fromkeys(stored, "float32")
    checkpoint = Checkpoint("two", {key: reader(key) for key in stored}, shapes, dtypes)
    load_parameters(Two(rngs=nnx.Rngs(0)), checkpoint, ENTRIES)
    assert sorted(read) == ["one.bias", "one.weight"]


def test_a_read_that_fails_half_way_changes_nothing():
    def fail():
        raise OSError("the disk is gone")

    readers = {"one.bias": lambda: np.ones(3, np.float32), "one.weight": fail}
    shapes = {"one.bias": (3,), "one.weight": (3, 2)}
    checkpoint = Checkpoint("two", readers, shapes, dict.fromkeys(shapes, "float32"))
    model = Two(rngs=nnx.Rngs(0))
    before = np.array(model.one.bias[...])
    with pytest.raises(OSError, match="the disk is gone"):
        load_parameters(model, checkpoint, ENTRIES)
    np.testing.assert_array_equal(model.one.bias[...], before)


def test_an_abstract_model_may_not_hold_random_keys(tmp_path):
    stored = {"one.weight": np.ones((3, 2), np.float32), "one.bias": np.ones(3, np.float32)}
    path = whole_file(tmp_path, **stored)
    model = nnx.eval_shape(lambda: Two(0.5, rngs=nnx.Rngs(0)))
    with pytest.raises(
        ValueError, match=r"got dropout\.rngs\.count, .* without a value.*drop_path=0"
    ):
        load_parameters(model, open_checkpoint(path), ENTRIES)


# --- another model --------------------------------------------------------------------------------------------


def nat_weights(case):
    stored = load_file(GOLDENS / "nat.safetensors")
    prefix = f"{case}/weights/"
    return {k.removeprefix(prefix): v for k, v in stored.items() if k.startswith(prefix)}


def nat(**changes):
    """The golden `transformers`, without values."""
    options = {"layer_scale": 0.25, "dilations": ((2,), (1,)), "window_size": 3} | changes
    classes = options.pop("num_classes", 5)
    config = NATConfig(8, (1, 1), options.pop("num_heads", (2, 4)), 2, **options)
    return nnx.eval_shape(lambda: NAT(config, num_classes=classes, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"dilations": None}, {}, r"with keys dinat\.\* and dilations=None; make the model with"),
        ({"num_classes": 7}, {}, r"classifier\.weight \(5, 16\) .*num_classes=5, or .*head=False"),
        ({}, {"head": False}, "keeps the values of the model's own head; .*without nnx.eval_shape"),
        ({"num_heads": (4, 4)}, {}, r"levels\.0\.layers\.0\.attention\.self\.rpb \(2, 5, 5\)"),
        ({"window_size": 5}, {}, r"self\.rpb \(2, 5, 5\) would .* is \(2, 9, 9\); make the model"),
    ],
)  # fmt: skip
def test_a_nat_that_is_not_the_files_is_told_apart(tmp_path, changes, options, message):
    path = whole_file(tmp_path, **nat_weights("transformers"))
    with pytest.raises(ValueError, match=message):
        nat(**changes).load_pretrained(path, **options)


def test_weights_of_nat_are_not_for_a_dilated_model(tmp_path):
    weights = {k.replace("dinat.", "nat."): v for k, v in nat_weights("transformers").items()}
    with pytest.raises(ValueError, match=r"keys nat\.\* and dilations=\(\(2,\), \(1,\)\)"):
        nat().load_pretrained(whole_file(tmp_path, **weights))


FLUX = FluxConfig(
    in_channels=8,
    out_channels=8,
    num_double=1,
    num_single=1,
    num_heads=2,
    head_dim=12,
    text_features=12,
    pooled_features=10,
    rotary_dims=(4, 4, 4),
)
HUNYUAN = HunyuanVideoConfig(
    in_channels=3,
    out_channels=3,
    num_double=1,
    num_single=0,
    num_refiner=1,
    num_heads=1,
    head_dim=6,
    text_features=4,
    pooled_features=4,
    rotary_dims=(2, 2, 2),
)
COSMOS = CosmosConfig(
    1, 1, 12, in_channels=4, text_features=4, modulation_rank=2, max_size=(8, 16, 16)
)
HDIT = HDiTConfig(
    levels=(hdit_layers.Level(1, 8, 3, head_dim=8), hdit_layers.Level(1, 8, head_dim=8)),
    mapping=hdit_layers.Mapping(depth=1, width=8, feed_forward=8),
    patch_size=(2, 2),
    num_classes=3,
)


def test_another_number_of_heads_of_the_same_width_is_refused(tmp_path):
    split = dataclasses.replace(FLUX, num_heads=3, head_dim=8, rotary_dims=(4, 2, 2))
    model = nnx.eval_shape(lambda: FluxTransformer(split, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"attn\.norm_q\.weight \(12,\) would become"):
        model.load_pretrained(golden_weights("flux", tmp_path))


# --- inputs ---------------------------------------------------------------------------------------------------

INPUTS = {
    FluxTransformer: {
        "latents": (2, 6, 4, 8),
        "text": (2, 5, 12),
        "pooled_text": (2, 10),
        "timestep": (2,),
        "guidance": (2,),
    },
    HunyuanVideoTransformer: {
        "latents": (2, 2, 6, 4, 3),
        "text": (2, 5, 4),
        "pooled_text": (2, 4),
        "timestep": (2,),
        "guidance": (2,),
    },
    CosmosTransformer: {"latents": (2, 2, 6, 4, 4), "timesteps": (2,), "text": (2, 5, 4)},
    HDiT: {"images": (2, 12, 12, 3), "sigma": (2,), "class_labels": (2,)},
}
CONFIGS = {
    FluxTransformer: FLUX,
    HunyuanVideoTransformer: HUNYUAN,
    CosmosTransformer: COSMOS,
    HDiT: HDIT,
}


@functools.cache
def abstract(kind):
    return nnx.eval_shape(lambda: kind(CONFIGS[kind], rngs=nnx.Rngs(0)))


def call(kind, change=None, **options):
    """The model's output, abstract, on inputs of which some have another shape."""
    shapes = INPUTS[kind] | (change or {})
    labels = {"class_labels": jnp.int32}
    given = {n: jax.ShapeDtypeStruct(s, labels.get(n, jnp.float32)) for n, s in shapes.items()}
    return nnx.eval_shape(lambda model, given: model(**given, **options), abstract(kind), given)


@pytest.mark.parametrize(
    ("kind", "name", "shape"),
    [
        (FluxTransformer, "pooled_text", (1, 10)),
        (HunyuanVideoTransformer, "text", (3, 5, 4)),
        (HunyuanVideoTransformer, "timestep", (1,)),
        (HunyuanVideoTransformer, "guidance", ()),
        (CosmosTransformer, "timesteps", (1,)),
        (CosmosTransformer, "text", (1, 5, 4)),
        (HDiT, "sigma", ()),
        (HDiT, "class_labels", (1,)),
    ],
)
def test_inputs_of_another_batch_are_named(kind, name, shape):
    with pytest.raises(ValueError, match=f"{name} must have one entry per sample, 2; got shape"):
        call(kind, {name: shape})


@pytest.mark.parametrize("kind", [FluxTransformer, HunyuanVideoTransformer, CosmosTransformer])
def test_wrong_text_lengths_are_named(kind):
    for lengths, message in (
        (np.array([1.0, 2.0]), r"must be integers of shape \[batch\] = \(2,\); got float"),
        ([1, 2, 3], r"must be integers of shape \[batch\] = \(2,\); got int\d+ of shape \(3,\)"),
        ([5, 6], r"must be 0 to 5, the text tokens given; got text_lengths=\[5, 6\]; cut"),
        ([-1, 5], r"must be 0 to 5.*\[-1, 5\]"),
    ):
        with pytest.raises(ValueError, match=message):
            call(kind, text_lengths=lengths)


def test_lengths_may_be_a_list_and_traced():
    x, text = jnp.ones((2, 4, 4, 1, 8)), jnp.ones((2, 3, 1, 8))
    attend = functools.partial(gna_joint, x, x, x, text, text, text, window_size=3)
    run = lambda lengths: attend(text_lengths=lengths)
    assert jax.eval_shape(lambda: run([3, 0]))[1].shape == text.shape
    assert jax.eval_shape(run, jax.ShapeDtypeStruct((2,), jnp.uint8))[1].shape == text.shape


# --- rules ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "rule", "message"),
    [
        (
            FluxTransformer,
            Neighborhood.of(2, window_size=(3, 5)),
            r"layer 1 does not fit .*window_size=\(3, 5\), .* layout \(6, 4\)",
        ),
        (
            FluxTransformer,
            Neighborhood.of(2, window_size=2, dilation=3),
            r"layer 1 .*window_size \* dilation must not exceed .* layout \(6, 4\)",
        ),
        (FluxTransformer, Neighborhood.of(3, window_size=2), "2 spatial axes of the model; got 3"),
        (
            HunyuanVideoTransformer,
            Neighborhood.of(3, window_size=(2, 4, 2)),
            r"layer 0 .* layout \(2, 3, 2\)",
        ),
        (
            CosmosTransformer,
            Neighborhood.of(3, window_size=(-1, 2, 2), stride=(3, 1, 1)),
            r"layer 0 .*stride=\(3, 1, 1\).* layout \(2, 3, 2\)",
        ),
    ],
)
def test_a_rule_that_does_not_fit_names_its_layer(kind, rule, message):
    layers = abstract(kind).num_layers
    schedule = AttentionSchedule.dense_then(
        rule, num_layers=layers, dense_steps=1, overrides=dict.fromkeys(range(layers - 1))
    )
    with pytest.raises(ValueError, match=message):
        call(kind, rules=schedule.at(1))


def test_empty_schedules_and_other_rules_are_refused():
    with pytest.raises(ValueError, match=r"start at step 0 .* got first steps \[\]"):
        AttentionSchedule(())
    with pytest.raises(ValueError, match=r"one rule per layer; got phases of \[0\] layers"):
        AttentionSchedule.constant([])
    with pytest.raises(ValueError, match=r"got phases of \[0\] layers"):
        AttentionSchedule.dense_then(None, num_layers=0)
    with pytest.raises(TypeError, match=r"a rule is a gna_jax\.Neighborhood.*got rules=\(7,\)"):
        AttentionSchedule(((0, (7,)),))
