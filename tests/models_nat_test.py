"""NAT and DiNAT: outputs, keys and sizes against PyTorch's goldens (`golden/export_nat.py`), and what training needs.

`golden/nat.safetensors` holds tiny models with random weights in both layouts of keys, `golden/nat_keys.json` the keys
and shapes of the published sizes; neither was made by code of this package.
"""

import dataclasses
import doctest
import functools
import inspect
import json
import math
import pathlib
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from flax import nnx
from safetensors import safe_open

from gna_jax.models import nat_checkpoint, nat_layers, nat_model
from gna_jax.models.checkpoint import Checkpoint, count_parameters
from gna_jax.models.nat_model import NAT, dinat, dinat_isotropic, dinat_s, nat, nat_isotropic
from gna_jax.models.nat_presets import (
    DINAT_ISOTROPIC_SIZES,
    DINAT_S_SIZES,
    DINAT_SIZES,
    NAT_ISOTROPIC_SIZES,
    NAT_SIZES,
    NATConfig,
)

GOLDEN = pathlib.Path(__file__).parent / "golden"
CASES = ("nat", "nat_layer_scale", "dinat", "dinat_s", "isotropic", "transformers")
CLASSES = 5
FAMILIES = {
    "nat": (nat, NAT_SIZES),
    "dinat": (dinat, DINAT_SIZES),
    "dinat_s": (dinat_s, DINAT_S_SIZES),
    "nat_isotropic": (nat_isotropic, NAT_ISOTROPIC_SIZES),
    "dinat_isotropic": (dinat_isotropic, DINAT_ISOTROPIC_SIZES),
}
COUNTS = {
    ("nat", "mini"): 19_984_174,
    ("nat", "tiny"): 27_901_582,
    ("nat", "small"): 50_743_297,
    ("nat", "base"): 89_769_652,
    ("dinat", "mini"): 19_984_174,
    ("dinat", "tiny"): 27_901_582,
    ("dinat", "small"): 50_719_681,
    ("dinat", "base"): 89_769_652,
    ("dinat", "large"): 200_943_514,
    ("dinat", "large_384"): 200_943_514,
    ("dinat", "large_21k"): 200_943_514,
}
"""Added up by hand from the architecture, and as published in millions: 20, 28, 51, 90, 200."""
MILLIONS = {
    ("dinat_s", "tiny"): 28,
    ("dinat_s", "small"): 50,
    ("dinat_s", "base"): 88,
    ("dinat_s", "large"): 197,
    ("nat_isotropic", "small"): 22,
    ("nat_isotropic", "base"): 86,
    ("dinat_isotropic", "small"): 22,
    ("dinat_isotropic", "base"): 86,
}
"""As published."""


def stored():
    return safe_open(GOLDEN / "nat.safetensors", framework="np")


def config_of(case):
    """The configuration that the exporter wrote beside a case."""
    options, _ = json.loads(stored().metadata()["cases"])[case]
    dilations = options.get("dilations")
    return NATConfig(
        dim=options["dim"],
        depths=tuple(options["depths"]),
        num_heads=tuple(options["heads"]),
        mlp_ratio=options["mlp_ratio"],
        window_size=options["kernel"],
        dilations=None if dilations is None else tuple(map(tuple, dilations)),
        layer_scale=0.25 if options.get("layer_scale") else None,
        patch_size=options.get("patch"),
    )


def weights(case):
    prefix = f"{case}/weights/"
    file = stored()
    return {k.removeprefix(prefix): file.get_tensor(k) for k in file.keys() if k.startswith(prefix)}


def golden(case, name):
    return jnp.asarray(stored().get_tensor(f"{case}/{name}"))


def write(folder, tensors):
    path = folder / "model.safetensors"
    safetensors.numpy.save_file(tensors, path)
    return path


def loaded(case, folder, tensors=None, **options):
    """The golden model; made abstract, because initial values take longer than all else."""
    options = {"num_classes": CLASSES} | options
    model = nnx.eval_shape(lambda: NAT(config_of(case), **options, rngs=nnx.Rngs(0)))
    model.load_pretrained(write(folder, weights(case) if tensors is None else tensors))
    return model


@nnx.jit
def run(model, images):
    return model(images, deterministic=True)


@nnx.jit
def run_with_features(model, images):
    """Logits and maps of one pass, since compiling is what takes time."""
    maps = model.features(images, deterministic=True)
    with mock.patch.object(NAT, "features", return_value=maps):
        return model(images), maps


def check_close(got, want):
    np.testing.assert_allclose(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_equals_pytorch(case, tmp_path):
    logits, maps = run_with_features(loaded(case, tmp_path), golden(case, "images"))
    check_close(logits, golden(case, "logits"))
    if case != "transformers":
        for level, got in enumerate(maps):
            check_close(got, golden(case, f"maps/{level}"))


def test_bfloat16_is_near_float32(tmp_path):
    model = loaded("nat", tmp_path, dtype=jnp.bfloat16)
    got = run(model, golden("nat", "images"))
    want = golden("nat", "logits")
    assert got.dtype == jnp.bfloat16
    assert model.levels[0].blocks[0].attention.query.kernel[...].dtype == jnp.float32
    assert np.abs(np.asarray(got, np.float32) - want).max() < 0.05 * np.abs(want).max()


def test_without_head(tmp_path):
    """The mean features, from a file with or without the head."""
    model = loaded("dinat", tmp_path, num_classes=0)
    assert model.head is None
    pooled = nnx.eval_shape(lambda: model(jnp.zeros((2, 28, 20, 3)), deterministic=True))
    assert pooled.shape == (2, 16)


@functools.cache
def published(family, size):
    return nnx.eval_shape(lambda: FAMILIES[family][0](size, drop_path=0.0, rngs=nnx.Rngs(0)))


def expand(runs):
    """Keys and shapes of a size: `0-2` in a key stands for three layers."""
    shapes = {}
    for key, text in runs.items():
        found = re.search(r"\b0-(\d+)\b", key)
        for i in range(int(found[1]) + 1 if found else 1):
            name = key.replace(found[0], str(i)) if found else key
            shapes[name] = tuple(map(int, text.split("x")))
    return shapes


def golden_shapes(layout, family, size):
    """Variants of a size that differ in dilations or drop path alone share keys and shapes."""
    size = "large_11x11" if size.endswith("11x11") else re.sub("_384|_21k", "", size)
    if family in ("nat", "dinat"):
        name = f"{family}_small" if size == "small" else size
    else:
        name = f"s_{size}" if family == "dinat_s" else f"isotropic_{size}"
    return expand(json.loads((GOLDEN / "nat_keys.json").read_text())[f"{layout}/{name}"])


class ReadingBeginsError(Exception):
    """All keys and shapes were found right, and the first tensor is asked for."""


def check_accounted(model, shapes):
    """The model takes exactly these keys and shapes."""

    def read():
        raise ReadingBeginsError

    dtypes = dict.fromkeys(shapes, "float32")
    checkpoint = Checkpoint("published", dict.fromkeys(shapes, read), shapes, dtypes)
    with pytest.raises(ReadingBeginsError):
        nat_checkpoint.load(model, checkpoint)


DEFAULT_SIZES = {
    *(("dinat", size) for size in ("mini", "tiny", "small", "base", "large")),
    *(("dinat_s", "tiny"), ("nat_isotropic", "small")),
}


@pytest.mark.parametrize(
    ("family", "size"),
    [
        pytest.param(
            family, size, marks=[] if (family, size) in DEFAULT_SIZES else pytest.mark.slow
        )
        for family, (_, sizes) in FAMILIES.items()
        for size in sizes
    ],
)
def test_published_sizes(family, size):
    """As many parameters as published, and every key accounted for in both layouts."""
    model = published(family, size)
    count = count_parameters(model)
    shapes = golden_shapes("authors", family, size)
    assert count == sum(math.prod(shape) for shape in shapes.values())
    if (family, size) in COUNTS:
        assert count == COUNTS[family, size]
    elif (family, size) in MILLIONS:
        assert abs(count / 1e6 - MILLIONS[family, size]) <= 0.51
    check_accounted(model, shapes)
    if family in ("nat", "dinat"):
        # Of transformers' NAT, which its newest version no longer has, only the names differ.
        keys = golden_shapes("transformers", family, size).items()
        check_accounted(model, {k.replace("dinat.", f"{family}.", 1): s for k, s in keys})


def test_published_dilations():
    """At the resolution a model is for, window x dilation covers its maps."""
    for size, config in DINAT_SIZES.items():
        pixels = 384 if "384" in size or "11x11" in size else 224
        for level, dilations in enumerate(config.dilations):
            assert set(dilations[::2]) == {1}
            assert set(dilations[1::2]) == {pixels // 4 // 2**level // config.window_size}
    for config in DINAT_ISOTROPIC_SIZES.values():
        assert config.dilations == ((1, 2) * 6,)
    assert NAT_SIZES["base"].dilations is None


def values(model):
    state = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): np.asarray(x[...], np.float32) for path, x in state}


@pytest.mark.parametrize("prefix", ["nat.", ""])
def test_other_names_of_transformers(prefix, tmp_path):
    """Files of its `nat` models, and of models without classifier."""
    tensors = {k.replace("dinat.", prefix): x for k, x in weights("transformers").items()}
    if not prefix:
        del tensors["classifier.weight"], tensors["classifier.bias"]
    want = values(loaded("transformers", tmp_path, num_classes=0))
    dilations = None if prefix == "nat." else config_of("transformers").dilations
    config = dataclasses.replace(config_of("transformers"), dilations=dilations)
    model = nnx.eval_shape(lambda: NAT(config, num_classes=0, rngs=nnx.Rngs(0)))
    model.load_pretrained(write(tmp_path, tensors))
    jax.tree.map(np.testing.assert_array_equal, values(model), want)


def test_own_head_and_buffers(tmp_path):
    """`head=False` loads all but the head, whatever its size; a ViT's index buffer is no weight."""
    tensors = weights("nat") | {
        "levels.0.blocks.0.attn.relative_position_index": np.arange(4, dtype=np.int64)
    }
    model = filled(lambda: NAT(config_of("nat"), param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    before = values(model)
    model.load_pretrained(write(tmp_path, tensors), head=False)
    after = values(model)
    assert {k for k in after if np.array_equal(before[k], after[k])} == {"head.kernel", "head.bias"}
    kernel = model.levels[0].blocks[0].mlp_in.kernel[...]
    want = jnp.asarray(tensors["levels.0.blocks.0.mlp.fc1.weight"].T, jnp.bfloat16)
    assert kernel.dtype == jnp.bfloat16
    np.testing.assert_array_equal(kernel, want)


def dropout_key(seed):
    return jax.random.key(seed, impl="unsafe_rbg")  # compiles in a tenth of the default's time


def filled(build):
    """A model with drawn parameters, none of them zero or one; its initializers would compile for seconds."""
    rng = np.random.default_rng(7)

    def draw(x):
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            return dropout_key(1)
        return jnp.asarray(0.3 * rng.standard_normal(x.shape), x.dtype)

    model = nnx.eval_shape(build)
    nnx.update(model, jax.tree.map(draw, nnx.state(model)))
    return model


SMALL = NATConfig(
    8, (1, 1), (2, 2), 2, window_size=3, dilations=((2,), (1,)), layer_scale=0.5, drop_path=0.5
)


def small(config=SMALL, **options):
    options = {"num_classes": CLASSES, "in_channels": 1} | options
    return filled(lambda: NAT(config, **options, rngs=nnx.Rngs(params=0, dropout=dropout_key(0))))


def pictures(batch=4, seed=3):
    drawn = np.random.default_rng(seed).standard_normal((batch, 20, 24, 1), dtype=np.float32)
    return jnp.asarray(drawn)


@nnx.jit
def gradients(model, images, rng):
    def loss(model):
        logits = model(images, deterministic=False, rngs=rng)
        return -jnp.mean(jax.nn.log_softmax(logits)[:, 0])

    return nnx.grad(loss)(model)


def test_gradients_reach_every_parameter_under_remat():
    """All but keys' biases: they add the same to all scores of a query, which softmax ignores."""
    model = small(remat=True)
    found = values(gradients(model, pictures(), dropout_key(5)))
    assert found.keys() == values(model).keys()
    largest = max(np.abs(x).max() for x in found.values())
    for name, gradient in found.items():
        unused = name.endswith("attention.key.bias")
        assert (np.abs(gradient).max() < 1e-6 * largest) == unused, name


@pytest.mark.slow
def test_remat_changes_no_gradient():
    plain, again = (
        values(gradients(small(remat=remat), pictures(), dropout_key(5))) for remat in (False, True)
    )
    largest = max(np.abs(x).max() for x in plain.values())
    for name, gradient in plain.items():
        np.testing.assert_allclose(again[name], gradient, atol=1e-6 * largest, err_msg=name)


def test_drop_path_drops_whole_samples():
    """A sample's branch is left out, or stands as it is over the probability of that."""
    config = dataclasses.replace(SMALL, depths=(2, 1), dilations=None)
    assert [rate for level in (0, 1) for _, rate in config.layers(level)] == [0.0, 0.25, 0.5]
    model = small()
    assert model.levels[0].blocks[0].drop_path is None
    block = model.levels[1].blocks[0]
    block.mlp_out.kernel.set_value(jnp.zeros_like(block.mlp_out.kernel[...]))
    block.mlp_out.bias.set_value(jnp.zeros_like(block.mlp_out.bias[...]))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((64, 3, 3, 16), dtype=np.float32))

    @nnx.jit
    def branches(block, x):
        return block(x, True, None) - x, block(x, False, dropout_key(1)) - x

    branch, dropped = map(np.asarray, branches(block, x))
    left_out = np.abs(dropped).max((1, 2, 3)) == 0.0
    assert 16 <= left_out.sum() <= 48
    np.testing.assert_allclose(dropped[~left_out], 2.0 * branch[~left_out], atol=1e-5)


def test_deterministic_as_in_gna_attention():
    """The call's choice, else what `train` and `eval` set, else the constructor's; none of these is an error."""
    call = nnx.jit(lambda model, images: model(images))
    model, images = small(remat=True), pictures()
    with pytest.raises(ValueError, match="deterministic"):
        call(model, images)
    model.eval()
    want = call(model, images)
    np.testing.assert_array_equal(call(small(remat=True, deterministic=True), images), want)
    model.train()
    first, second = call(model, images), call(model, images)
    assert np.abs(first - want).max() > 0.0
    assert np.abs(first - second).max() > 0.0


def test_a_key_is_split_over_drop_paths():
    """With one key for all, the same samples would lose every branch."""
    given = []

    def record(self, branch, *, deterministic, rngs):
        given.append(rngs)
        return branch

    with mock.patch.object(nnx.Dropout, "__call__", record):
        call = lambda model: model(pictures(), deterministic=False, rngs=dropout_key(0))
        nnx.eval_shape(call, small())
    assert len(given) == 2  # both branches of the second layer
    assert all(isinstance(rngs, nnx.Rngs) for rngs in given)


def test_without_drop_path_nothing_is_random():
    model = nnx.eval_shape(lambda: NAT(config_of("nat"), rngs=nnx.Rngs(params=0)))
    assert not jax.tree.leaves(nnx.state(model, nnx.RngState))
    with_rates = nnx.eval_shape(lambda: nat_isotropic("small", rngs=nnx.Rngs(0)))
    keys = nnx.to_flat_state(nnx.state(with_rates, nnx.RngKey))
    assert len(keys) == 12 - 1  # not the first layer
    without = nnx.eval_shape(lambda: nat_isotropic("small", drop_path=0.0, rngs=nnx.Rngs(params=0)))
    assert not jax.tree.leaves(nnx.state(without, nnx.RngState))


def test_initial_values():
    """As published: deviation 0.02 of linear maps and biases of positions, layer scales as given."""
    rngs = nnx.Rngs(dropout_key(0))
    initial = inspect.signature(NAT.__init__).parameters["kernel_init"].default
    layers = nat_layers.Layers(None, jnp.float32, None, None, None, initial, rngs)
    attention = layers.attention(16, 2, 3, 1)
    for drawn in (attention.out.kernel, attention.relative_position_bias):
        assert 0.01 < np.std(drawn[...]) < 0.03
    scale = layers.layer_scale(16, 0.5)
    np.testing.assert_array_equal(scale[...], np.full(16, 0.5, np.float32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": (2,)}, r"one number per level; got num_heads=\(2,\), depths=\(1, 1\)"),
        ({"dilations": ((1, 2), (1,))}, r"one number per layer of each level; got dilations="),
        ({"num_heads": (2, 3)}, r"must divide the features of its level; got 3 heads for 16"),
    ],
)
def test_wrong_configurations(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **change)


@pytest.mark.parametrize("shape", [(20, 24, 1), (2, 20, 24, 3), (2, 1, 20, 24)])
def test_wrong_images(shape):
    model = nnx.eval_shape(small)
    with pytest.raises(ValueError, match=r"images must be \[batch, height, width, in_channels=1\]"):
        model(jnp.zeros(shape), deterministic=True)


def test_unknown_size():
    with pytest.raises(
        ValueError, match=r"nat is published as mini, tiny, small, base; got size='large'"
    ):
        nat("large", rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("case", "tensors", "options", "message"),
    [
        ("nat", {"norm.bias": None}, {}, r"1 missing: norm\.bias"),
        ("nat", {"extra": np.zeros(2)}, {}, r"1 that nothing uses: extra"),
        ("nat", {}, {"num_classes": 7}, r"head\.weight \(5, 16\) would become parameter head\.kernel \(16, 5\); the model's is \(16, 7\)"),
        ("nat", {}, {"in_channels": 1}, r"patch_embed\.proj\.0\.weight \(4, 3, 3, 3\) .* stem\.conv1\.kernel"),
        ("nat_layer_scale", {"levels.0.blocks.0.gamma1": None}, {}, r"1 missing: levels\.0\.blocks\.0\.gamma1"),
        ("transformers", {"classifier.weight": None, "classifier.bias": None}, {}, r"2 missing: classifier\.bias, classifier\.weight"),
    ],
)  # fmt: skip
def test_wrong_checkpoints(case, tensors, options, message, tmp_path):
    tensors = {k: x for k, x in (weights(case) | tensors).items() if x is not None}
    with pytest.raises(ValueError, match=message):
        loaded(case, tmp_path, tensors, **options)


def test_checkpoint_of_another_model(tmp_path):
    """Keys of neither layout, and a DiNAT_s for a NAT."""
    with pytest.raises(
        ValueError, match=r"named as in .*; got .*model\.safetensors with blocks\.0\.w"
    ):
        loaded("nat", tmp_path, {"blocks.0.w": np.zeros(2, np.float32)})
    with pytest.raises(
        ValueError,
        match=r"missing: patch_embed\.proj\.0\.bias, .*nothing uses: patch_embed\.proj\.bias",
    ):
        loaded("nat", tmp_path, weights("dinat_s"))


@pytest.mark.slow
def test_bfloat16_trains_as_float32():
    """Mean loss of the last 50 of 200 steps within 5 %."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, 256)
    prototypes = rng.standard_normal((CLASSES, 20, 24, 1))
    images = 0.3 * prototypes[labels] + rng.standard_normal((256, 20, 24, 1))
    images, labels = jnp.asarray(images, jnp.float32), jnp.asarray(labels)

    def losses(dtype):
        model = small(dtype=dtype, remat=True)
        optimizer = nnx.Optimizer(model, optax.sgd(0.02, momentum=0.9), wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer, images, labels):
            def loss(model):
                logits = model(images, deterministic=False).astype(jnp.float32)
                return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

            value, gradient = nnx.value_and_grad(loss)(model)
            optimizer.update(model, gradient)
            return value

        batches = np.random.default_rng(1).integers(0, 256, (200, 32))
        return [float(step(model, optimizer, images[i], labels[i])) for i in batches]

    full, half = losses(None), losses(jnp.bfloat16)
    assert np.mean(full[-50:]) < 0.7 * np.mean(full[:10])
    np.testing.assert_allclose(np.mean(half[-50:]), np.mean(full[-50:]), rtol=0.05)


@pytest.mark.slow
def test_doctests():
    assert doctest.testmod(nat_model) == doctest.TestResults(failed=0, attempted=5)
