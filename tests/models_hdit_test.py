"""HDiT: its published definition as torch computed it, gradients, remat, bfloat16, what it refuses, denoising and sampling."""

import dataclasses
import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import save_file

from gna_jax.models.hdit_diffusion import Preconditioning, guided, noise_levels, sample
from gna_jax.models.hdit_layers import GLOBAL, Fixed, Level, Mapping, level_rotation
from gna_jax.models.hdit_model import PRESETS, HDiT, HDiTConfig, hdit

GOLDEN = pathlib.Path(__file__).parent / "golden/hdit.safetensors"
GOLDEN_CONFIG = HDiTConfig(
    levels=(
        Level(1, 16, 3, feed_forward=24, head_dim=16),
        Level(2, 32, 3, feed_forward=24, head_dim=16),
        Level(1, 48, GLOBAL, feed_forward=32, head_dim=16),
    ),
    mapping=Mapping(depth=2, width=24, feed_forward=40),
    patch_size=(2, 2),
    num_classes=5,
    condition_features=6,
)
TINY = HDiTConfig(
    levels=(Level(1, 16, 3, head_dim=8), Level(1, 16, GLOBAL, head_dim=8, dropout=0.5)),
    mapping=Mapping(depth=1, width=16, feed_forward=16),
    channels=1,
    patch_size=(2, 2),
    num_classes=3,
)


@functools.cache
def golden():
    with safe_open(GOLDEN, framework="np") as file:
        return {key: file.get_tensor(key) for key in file.keys()}


def weights():
    return {k.removeprefix("model."): v for k, v in golden().items() if k.startswith("model.")}


def written(folder, tensors):
    path = folder / "model.safetensors"
    save_file(tensors, path)
    return path


def inputs():
    images = golden()["images"].transpose(0, 2, 3, 1)
    names = ("sigma", "class_labels", "augmentation", "condition")
    return images, {name: jnp.asarray(golden()[name]) for name in names}


def shaken(model, seed=0):
    """Every parameter moved at random, so that none of those that start at zero hides what lies before it."""
    params = nnx.state(model, nnx.Param)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    moved = [p + 0.2 * jax.random.normal(k, p.shape) for p, k in zip(leaves, keys, strict=True)]
    nnx.update(model, jax.tree.unflatten(tree, moved))
    return model


ONE_LEVEL = dataclasses.replace(TINY, levels=(Level(1, 16, 3, head_dim=8),))


def tiny(config=TINY, **options):
    return shaken(HDiT(config, rngs=nnx.Rngs(0, dropout=1), **options))


def tiny_inputs(seed=0, batch=2):
    rng = np.random.default_rng(seed)
    images = rng.standard_normal((batch, 12, 16, 1)).astype(np.float32)
    sigma = np.exp(rng.standard_normal(batch)).astype(np.float32)
    return images, sigma, rng.integers(0, 3, batch).astype(np.int32)


def test_torch_computes_the_same_from_the_published_keys(tmp_path):
    model = HDiT(GOLDEN_CONFIG, rngs=nnx.Rngs(0))
    model.load_pretrained(written(tmp_path, weights()))
    images, conditions = inputs()
    out = nnx.jit(lambda model: model(images, **conditions))(model)
    want = golden()["output"].transpose(0, 2, 3, 1)
    np.testing.assert_allclose(out, want, rtol=0, atol=1e-4)
    assert want.std() > 0.5


def test_a_checkpoint_of_something_else_is_refused_by_key_and_changes_nothing(tmp_path):
    model = HDiT(GOLDEN_CONFIG, rngs=nnx.Rngs(0))
    before = jax.tree.leaves(nnx.state(model))
    right = weights()
    scale = "mid_level.0.self_attn.scale"
    cases = [
        ({k: v for k, v in right.items() if k != scale}, f"1 missing: {re.escape(scale)}"),
        (right | {"more.weight": right[scale]}, "more.weight"),
        (right | {scale: right[scale][:2]}, re.escape(f"{scale} (2,)")),
        ({k: v for k, v in right.items() if k != "aug_emb.weight"}, "aug_emb.weight"),
        (right | {"time_emb.weight": right["time_emb.weight"][:3]}, r"time_emb.weight \(3, 1\)"),
    ]
    for tensors, message in cases:
        with pytest.raises(ValueError, match=message):
            model.load_pretrained(written(tmp_path, tensors))
    for old, new in zip(before, jax.tree.leaves(nnx.state(model)), strict=True):
        assert np.array_equal(old, new)


@nnx.jit
def gradient(model, images, sigma, labels):
    return nnx.grad(lambda model: jnp.square(model(images, sigma, labels)).mean())(model)


def test_gradients_reach_every_parameter():
    model = tiny(implementation="reference")  # compiles fastest; backends agree elsewhere
    leaves = dict(nnx.to_flat_state(gradient(model, *tiny_inputs())))
    assert len(leaves) == len(jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert not [path for path, leaf in leaves.items() if not np.any(np.asarray(leaf))]


@pytest.mark.slow
def test_remat_changes_no_gradient():
    plain, again = (
        gradient(tiny(ONE_LEVEL, remat=remat), *tiny_inputs()) for remat in (False, True)
    )
    for (path, want), (_, got) in zip(
        nnx.to_flat_state(plain), nnx.to_flat_state(again), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6, err_msg=str(path))


def test_dropout_with_remat_draws_from_the_key_of_the_call():
    images, sigma, labels = tiny_inputs()
    model = tiny(remat=True)

    @nnx.jit
    def run(model, key):
        rngs = nnx.Rngs(dropout=key)
        return model(images, sigma, labels, deterministic=False, rngs=rngs)

    one, same, other = (np.asarray(run(model, jax.random.key(seed))) for seed in (1, 1, 2))
    assert np.array_equal(one, same)
    assert abs(one - other).max() > 1e-3


@pytest.mark.slow
def test_bfloat16_stays_close_and_parameters_float32():
    images, sigma, labels = tiny_inputs()
    exact, rounded = tiny(ONE_LEVEL), tiny(ONE_LEVEL, dtype=jnp.bfloat16)
    run = nnx.jit(lambda model: model(images, sigma, labels))
    want, got = run(exact), run(rounded)
    assert got.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(rounded, nnx.Param))} == {
        jnp.dtype("float32")
    }
    difference = got.astype(jnp.float32) - want
    assert float(jnp.square(difference).mean() / jnp.square(want).mean()) < 0.05**2


def test_the_frequencies_of_the_noise_are_no_parameters():
    model = tiny()
    assert len(jax.tree.leaves(nnx.state(model, Fixed))) == 2
    params = nnx.state(model, nnx.Param)
    assert not [path for path, _ in nnx.to_flat_state(params) if "noise_features" in path]


def test_positions_of_a_coarse_level_are_means_of_the_fine_one():
    level = Level(1, 8, head_dim=8)  # one frequency per axis, pi
    angle = [np.arctan2(t.sin, t.cos) for t in (level_rotation(s, level) for s in ((4, 8), (2, 4)))]
    fine, coarse = (a[:, :, 0] / np.pi for a in angle)
    np.testing.assert_allclose(
        coarse, fine.reshape(2, 2, 4, 2, 2).mean(axis=(1, 3)), rtol=0, atol=1e-6
    )
    np.testing.assert_allclose(fine[0, 0], (-0.375, -0.875), rtol=0, atol=1e-6)


def test_presets_have_the_published_size():
    model = nnx.eval_shape(lambda: hdit("oxford-flowers", rngs=nnx.Rngs(0)))

    def layer(width):
        return 2 * 256 * width + 4 * width**2 + width // 64 + 9 * width**2

    mapping = 2 * 256**2 + 2 * (256 + 256 * 1536 + 768 * 256) + 2 * 256
    merging = 2 * 4 * (128 * 256 + 256 * 512) + 2
    want = 2 * 48 * 128 + 128 + mapping + merging
    want += 4 * layer(128) + 4 * layer(256) + 4 * layer(512)
    params = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert sum(np.prod(p.shape, dtype=int) for p in params) == want
    assert PRESETS["digits"].levels[0].window_size == 7


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: hdit("flowers", rngs=nnx.Rngs(0)), "preset must be one of .*got preset='flowers'"),
        (lambda: Level(1, 24, head_dim=12), "multiple of 8 .* got head_dim=12, width=24"),
        (lambda: Level(1, 24, head_dim=16), "divides width; got head_dim=16, width=24"),
        (lambda: run_tiny((2, 12, 14, 1)), "multiple of 4.*got 14 pixels on axis x"),
        (lambda: run_tiny((2, 12, 16, 3)), r"images must be .* got shape \(2, 12, 16, 3\)"),
        (lambda: run_tiny((2, 12, 16, 1), None), "class_labels must be given .* num_classes=3"),
        (lambda: run_tiny((2, 4, 16, 1)), "window"),
    ],
)
def test_what_is_wrong_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def run_tiny(shape, labels=(0, 1)):
    labels = None if labels is None else jnp.asarray(labels)
    return jax.eval_shape(lambda: tiny()(jnp.zeros(shape), jnp.ones(2), labels))


def test_preconditioning_gives_inputs_and_targets_of_variance_one():
    rng = np.random.default_rng(0)
    scale = Preconditioning(sigma_data=0.7)
    images = jnp.asarray(0.7 * rng.standard_normal((4, 64, 64, 1)), jnp.float32)
    noise = jnp.asarray(rng.standard_normal((4, 64, 64, 1)), jnp.float32)
    sigma = jnp.asarray([0.02, 0.5, 3.0, 70.0])
    inputs = []

    def model(x, sigma):
        inputs.append(x)
        return jnp.zeros_like(x)

    loss = scale.loss(model, images, noise, sigma)
    np.testing.assert_allclose(jnp.var(inputs[0], axis=(1, 2, 3)), np.ones(4), rtol=0.1)
    np.testing.assert_allclose(loss, np.ones(4), rtol=0.1)
    np.testing.assert_allclose(
        scale.soft_min_snr(sigma), (sigma * 0.7) ** 2 / (sigma**2 + 0.49) ** 2, rtol=1e-5
    )


def test_the_sampler_follows_the_exact_path_of_normal_images():
    # Images of N(m, s^2): D(x) = m + s^2 (x - m) / (s^2 + sigma^2); the path ends at m + s * (start - m) / sqrt(s^2 + sigma^2).
    mean, spread = 0.3, 0.5

    def denoise(x, sigma):
        sigma = sigma[:, None, None, None]
        return mean + spread**2 * (x - mean) / (spread**2 + sigma**2)

    noise = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 3, 1)), jnp.float32)
    want = mean + spread * (80.0 * noise - mean) / np.hypot(spread, 80.0)
    errors = [
        float(abs(sample(denoise, noise, noise_levels(steps)) - want).max()) for steps in (40, 160)
    ]
    assert errors[0] < 0.02
    assert errors[1] < errors[0] / 8  # of second order


def test_guidance_moves_from_no_class_through_the_class():
    def denoise(x, sigma, labels):
        return x + labels[:, None, None, None].astype(x.dtype)

    x, sigma, labels = jnp.zeros((2, 1, 1, 1)), jnp.ones(2), jnp.asarray([1, 2])
    for scale, want in ((0.0, [9, 9]), (1.0, [1, 2]), (2.0, [-7, -5])):
        out = guided(denoise, labels, no_class=9, scale=scale)(x, sigma)
        np.testing.assert_allclose(out.ravel(), want)


def test_noise_levels_fall_to_zero():
    levels = noise_levels(10, sigma_min=0.01, sigma_max=50.0)
    assert levels.shape == (11,) and (np.diff(levels) < 0).all()
    np.testing.assert_allclose(levels[[0, -2, -1]], [50.0, 0.01, 0.0], rtol=1e-5)
    with pytest.raises(ValueError, match="got steps=1"):
        noise_levels(1)
