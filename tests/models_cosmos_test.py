"""Cosmos-Predict: outputs of diffusers' own classes, parameter counts, gradients, published windows, refused input."""

import dataclasses
import doctest
import functools
import itertools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import save_file

from gna_jax import Neighborhood
from gna_jax.models import cosmos_windows
from gna_jax.models.checkpoint import count_parameters
from gna_jax.models.cosmos_blocks import CosmosSelfAttention
from gna_jax.models.cosmos_model import CosmosTransformer, LearnedPositions, cosmos
from gna_jax.models.cosmos_presets import COSMOS, CosmosConfig
from gna_jax.models.cosmos_windows import BASE_SIZE, predict2_schedule, scale_rule
from gna_jax.models.schedule import preset_schedule
from gna_jax.simulator import simulate

GOLDEN = pathlib.Path(__file__).parent / "golden"
NAMES = ("predict1", "predict2")

# python tests/golden/export_cosmos.py --count: diffusers 0.42.1's own model, by its number of input channels.
PARAMETERS = {
    "predict1-7b-text2world": 7_236_192_256,
    "predict1-7b-video2world": 7_236_208_640,
    "predict1-14b-text2world": 14_267_149_312,
    "predict1-14b-video2world": 14_267_169_792,
    "predict2-2b-text2image": 1_956_405_248,
    "predict2-2b-video2world": 1_956_413_440,
    "predict2-14b-text2image": 14_265_265_152,
    "predict2-14b-video2world": 14_265_285_632,
}


@dataclasses.dataclass(frozen=True)
class Golden:
    """What diffusers was asked and what it said, in this package's layout."""

    config: CosmosConfig
    weights: dict
    arguments: tuple
    options: dict
    rules: tuple
    output: np.ndarray
    output_windowed: np.ndarray


@functools.cache
def golden(name):
    with safe_open(GOLDEN / f"cosmos_{name}.safetensors", "np") as file:
        meta = {key: json.loads(text) for key, text in file.metadata().items()}
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    last = lambda key: np.ascontiguousarray(np.moveaxis(tensors[key], 1, -1))
    told = meta["config"]
    config = CosmosConfig(
        num_layers=told["num_layers"],
        num_heads=told["num_attention_heads"],
        head_dim=told["attention_head_dim"],
        in_channels=told["in_channels"],
        out_channels=told["out_channels"],
        patch_size=tuple(told["patch_size"]),
        mlp_ratio=told["mlp_ratio"],
        text_features=told["text_embed_dim"],
        modulation_rank=told["adaln_lora_dim"],
        max_size=tuple(told["max_size"]),
        rope_scale=tuple(told["rope_scale"]),
        learned_positions=told["extra_pos_embed_type"] == "learnable",
    )
    options = {"padding_mask": tensors["padding_mask"][:, 0], **meta["options"]}
    times = tensors["timestep"]
    if name == "predict2":
        times = times[:, 0, :, 0, 0]  # one per frame
        options["condition_mask"] = last("condition_mask")
        options["text_lengths"] = tensors["attention_mask"].sum(1).astype(np.int32)
    rules = tuple(
        Neighborhood.of(3, window_size=window, stride=stride, dilation=dilation)
        for window, stride, dilation in meta["windows"]
    )
    prefix = "weights."
    return Golden(
        config,
        {key.removeprefix(prefix): x for key, x in tensors.items() if key.startswith(prefix)},
        (last("hidden_states"), times, tensors["encoder_hidden_states"]),
        options,
        rules,
        last("output"),
        last("output_windowed"),
    )


def saved(weights, folder):
    """Weights as diffusers saves large ones: two shards and an index."""
    keys = sorted(weights)
    index = {}
    for number, part in enumerate((keys[::2], keys[1::2]), start=1):
        name = f"diffusion_pytorch_model-0000{number}-of-00002.safetensors"
        save_file({key: weights[key] for key in part}, folder / name)
        index |= dict.fromkeys(part, name)
    name = "diffusion_pytorch_model.safetensors.index.json"
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def loaded(name, folder, num_layers=2, **options):
    """A model with the golden weights, which takes a tenth of the time of drawing random ones."""
    config = dataclasses.replace(golden(name).config, num_layers=num_layers)
    model = nnx.eval_shape(lambda: CosmosTransformer(config, **options, rngs=nnx.Rngs(0)))
    layers = [f"transformer_blocks.{layer}." for layer in range(num_layers, 2)]
    weights = {k: x for k, x in golden(name).weights.items() if not k.startswith(tuple(layers))}
    model.load_pretrained(saved(weights, folder))
    return model


@functools.partial(nnx.jit, static_argnames=("rules", "fps"))
def run(model, *arguments, rules=None, fps=None, **options):
    return model(*arguments, rules=rules, fps=fps, **options)


def ask(model, name, rules=None, **changes):
    arguments = [jnp.asarray(x) for x in golden(name).arguments]
    return run(model, *arguments, rules=rules, **(golden(name).options | changes))


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_those_of_diffusers(name, tmp_path):
    model, wanted = loaded(name, tmp_path), golden(name)
    assert abs(ask(model, name) - wanted.output).max() < 1e-4
    # diffusers ran the same windows as a brute-force mask in its dense attention.
    assert abs(ask(model, name, wanted.rules) - wanted.output_windowed).max() < 1e-4
    assert abs(wanted.output - wanted.output_windowed).max() > 0.1


def parameters_of(config):
    return count_parameters(nnx.eval_shape(lambda: CosmosTransformer(config, rngs=nnx.Rngs(0))))


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_counted_as_by_diffusers(name):
    """From models of one and two layers; layers are alike."""
    one, two = (parameters_of(dataclasses.replace(COSMOS[name], num_layers=n)) for n in (1, 2))
    assert one + (COSMOS[name].num_layers - 1) * (two - one) == PARAMETERS[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", COSMOS)
def test_parameters_of_all_layers_are_counted_as_by_diffusers(name):
    assert parameters_of(COSMOS[name]) == PARAMETERS[name]


def gradients(folder, rules, remat):
    wanted = golden("predict1")
    arguments = [jnp.asarray(x) for x in wanted.arguments]
    model = loaded("predict1", folder, num_layers=len(rules), remat=remat)

    @nnx.jit
    def compute(model):
        def loss(model):
            return jnp.mean(model(*arguments, rules=rules, **wanted.options) ** 2)

        return nnx.grad(loss)(model)

    return {path: leaf.get_value() for path, leaf in nnx.to_flat_state(compute(model))}


def test_gradients_reach_every_parameter_under_jit_and_remat(tmp_path):
    found = gradients(tmp_path, golden("predict1").rules[1:], remat=True)
    assert len(found) == 30
    for path, gradient in found.items():
        assert jnp.isfinite(gradient).all() and abs(gradient).max() > 0, path


@pytest.mark.slow
def test_gradients_of_several_layers_are_the_same_with_remat_and_without(tmp_path):
    rules = (None, golden("predict1").rules[0])
    plain, recomputed = (gradients(tmp_path, rules, remat) for remat in (False, True))
    assert plain.keys() == recomputed.keys() and len(plain) > 30
    for path, one in plain.items():
        assert abs(one).max() > 0, path
        assert abs(one - recomputed[path]).max() <= 1e-5 * abs(one).max() + 1e-8, path


@pytest.mark.slow
def test_bfloat16_stays_near_float32(tmp_path):
    model = loaded("predict1", tmp_path, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    wanted = golden("predict1")
    latents, times, text = wanted.arguments
    given = jnp.asarray(latents, jnp.bfloat16), jnp.asarray(times), jnp.asarray(text, jnp.bfloat16)
    with jax.numpy_dtype_promotion("standard"):  # flax's norms promote to float32 implicitly
        out = run(model, *given, rules=wanted.rules, **wanted.options)
    assert out.dtype == jnp.bfloat16
    difference = np.asarray(out, np.float32) - wanted.output_windowed
    assert np.sqrt(np.mean(difference**2) / np.mean(wanted.output_windowed**2)) < 0.03


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """One layer."""
    return loaded("predict1", tmp_path_factory.mktemp("weights"), num_layers=1)


def test_input_that_means_the_same_gives_the_same(model):
    latents, times, text = (jnp.asarray(x) for x in golden("predict1").arguments)
    zeros = jnp.zeros((1, 4, 6))
    out = run(model, latents, times, text.at[1, 2:].set(0), text_lengths=jnp.array([5, 2]))
    per_frame = jnp.repeat(times[:, None], latents.shape[1], axis=1)
    poisoned = text.at[1, 2:].set(jnp.nan)  # past the second sample's two tokens
    same = run(
        model,
        latents,
        per_frame,
        poisoned,
        text_lengths=jnp.array([5, 2]),
        padding_mask=zeros,
        fps=24,
    )
    assert abs(out - same).max() < 1e-5


def test_positions_of_a_new_checkpoint_have_a_gradient():
    """diffusers makes them zero, where the root mean square has no derivative."""
    make = lambda: LearnedPositions(
        golden("predict1").config, param_dtype=jnp.float32, rngs=nnx.Rngs(0)
    )
    positions = nnx.eval_shape(make)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape), nnx.state(positions))
    nnx.update(positions, zeros)
    assert abs(positions((2, 3, 4))).max() == 0
    gradient = nnx.jit(nnx.grad(lambda positions: positions((2, 3, 4)).sum()))(positions)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(gradient))


def test_self_attention_stands_alone():
    attention = CosmosSelfAttention(2, 8, implementation=["reference", "xla"], rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (1, 5, 6, 16))

    @nnx.jit
    def attend(attention, x):
        return attention(x), attention(x, rule=Neighborhood.of(2, window_size=(-1, 6)))

    dense, whole = attend(attention, x)
    assert dense.shape == x.shape and abs(dense - whole).max() < 1e-6


# --- published windows ----------------------------------------------------------------------------------------


def test_sparsities_are_the_published_ones():
    layout, tiles = (24, 44, 80), {"q_tile": (8, 4, 8), "kv_tile": (4, 4, 8)}
    published = {
        (4, 16): (98, {0, 1}),
        (12, 16): (95, {2, 5, 10}),
        (12, 24): (92, {3, 4, 6, 7, 8, 9, 27}),
        (20, 40): (77, {*range(11, 23), 24, 25, 26}),
        (28, 56): (55, {23}),
    }
    layers = {window: set() for window in published}
    for layer, rule in enumerate(predict2_schedule("2b", layout).at(0)):
        window = rule.window_size[1:]
        sparsity = 100 * simulate(layout, **dataclasses.asdict(rule), **tiles).sparsity
        assert abs(sparsity - published[window][0]) < 0.7
        layers[window].add(layer)
    assert layers == {window: of for window, (_, of) in published.items()}
    large = predict2_schedule("14b", layout).at(0)
    assert len(large) == 36 and [layer for layer, rule in enumerate(large) if rule is None] == [27]
    # At the size they were made for nothing scales.
    assert preset_schedule("cosmos-predict2-14b", 36).at(0) == large


def as_published(rule, layout, base):
    """Window, stride and dilation as Cosmos-Predict2 computes them, axis by axis."""
    scaled = []
    for size, window, stride, dilation, meant in zip(
        layout, rule.window_size, rule.stride, rule.dilation, base, strict=True
    ):
        window = window if window > 1 else size
        scale = size / (meant if meant > 0 else size)
        window = min(max(2, round(window * scale)), size)
        stride = min(max(1, round(stride * scale)), window)
        scaled.append((window, stride, min(max(1, round(dilation * scale)), size // window)))
    return tuple(zip(*scaled, strict=True))


def test_windows_scale_to_other_grids_as_published():
    rules = {*predict2_schedule("2b", (24, 44, 80)).at(0)}
    sizes = itertools.product((2, 3, 20, 24), (2, 5, 15, 22, 30, 44, 68), (2, 9, 26, 40, 52, 80))
    for rule, layout in itertools.product(rules, sizes):
        ours = scale_rule(rule, layout)
        ours.check_layout(layout)
        window, stride, dilation = as_published(rule, layout, BASE_SIZE)
        whole = tuple(n if w == -1 else w for n, w in zip(layout, ours.window_size, strict=True))
        assert (whole, ours.stride, ours.dilation) == (window, stride, dilation), (rule, layout)
    assert len(rules) == 5


def test_an_image_is_dense_and_another_base_size_scales():
    assert set(predict2_schedule("2b", (1, 44, 80)).at(5)) == {None}
    half = predict2_schedule("2b", (24, 44, 80), base_size=(-1, 88, 160)).at(0)[3]
    assert (half.window_size, half.stride) == ((-1, 6, 12), (1, 2, 4))


def test_predict1_is_dense_for_12_steps():
    schedule = preset_schedule("cosmos-56", COSMOS["predict1-7b-text2world"].num_layers)
    assert set(schedule.at(11)) == {None}
    (rule,) = set(schedule.at(12))
    assert (rule.window_size, rule.stride) == ((16, 32, 48), (1, 8, 16))
    rule.check_layout((16, 44, 80))


def test_doctests():
    assert doctest.testmod(cosmos_windows).attempted > 0
    assert doctest.testmod(cosmos_windows).failed == 0


# --- refused input --------------------------------------------------------------------------------------------


def test_a_checkpoint_of_another_model_is_refused_by_key(tmp_path):
    weights, config = golden("predict1").weights, golden("predict1").config

    def load(weights, **changes):
        other = dataclasses.replace(config, **changes)
        model = nnx.eval_shape(lambda: CosmosTransformer(other, rngs=nnx.Rngs(0)))
        save_file(weights, tmp_path / "one.safetensors")
        model.load_pretrained(tmp_path / "one.safetensors")

    with pytest.raises(
        ValueError, match=r"patch_embed\.proj\.weight .*another size|another size.*patch_embed"
    ):
        load(weights, in_channels=5)
    with pytest.raises(ValueError, match=r"transformer_blocks\.2\.attn1"):
        load(weights, num_layers=3)
    with pytest.raises(ValueError, match=r"nothing uses: learnable_pos_embed\.pos_emb_h"):
        load(weights, learned_positions=False)
    fewer = {key: x for key, x in weights.items() if key != "transformer_blocks.1.ff.net.2.weight"}
    with pytest.raises(ValueError, match=r"1 missing: transformer_blocks\.1\.ff\.net\.2\.weight"):
        load(fewer)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"latents": (1, 2, 8, 8, 3)},
            r"4 channels.*got latents of shape \(1, 2, 8, 8, 3\), no cond",
        ),
        ({"condition_mask": (1, 2, 8, 8, 1)}, r"condition_mask of shape \(1, 2, 8, 8, 1\)"),
        ({"latents": (1, 2, 7, 8, 4)}, "along Y must be a multiple of the patch, 2, .*got 7"),
        ({"latents": (1, 9, 8, 8, 4)}, "along T must be .* at most 8; got 9"),
        ({"timesteps": (1, 3)}, r"one per sample and frame \[B, 2\]; got shape \(1, 3\)"),
        ({"text": (1, 3, 11)}, "text must have 3 axes, the last of 12 features"),
        ({"rules": (None, None)}, "got 2 rules for 1 layers"),
        ({"rules": Neighborhood.of(2, window_size=3)}, "3 spatial axes of the model; got 2"),
        ({"rules": Neighborhood.of(3, window_size=3)}, r"must not exceed the layout.*\(2, 4, 4\)"),
    ],
)
def test_input_that_does_not_fit_is_refused(model, change, message):
    shapes = {"latents": (1, 2, 8, 8, 4), "timesteps": (1,), "text": (1, 3, 12)}
    given = shapes | change
    given = {key: jnp.ones(x) if key != "rules" else x for key, x in given.items()}
    latents, times, text = (given.pop(key) for key in shapes)
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda model: model(latents, times, text, **given), model)


def test_names_and_sizes_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="predict2-2b-video2world.*got 'predict2-7b'"):
        cosmos("predict2-7b", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"size must be one of \['14b', '2b'\]; got size='7b'"):
        predict2_schedule("7b", (24, 44, 80))
    with pytest.raises(ValueError, match="base_size must be at least 1"):
        scale_rule(Neighborhood.of(1, window_size=3), (8,), (0,))
    with pytest.raises(ValueError, match="head_dim must be even and at least 12"):
        CosmosConfig(1, 1, head_dim=6)
    masked = dataclasses.replace(golden("predict1").config, padding_mask=False)
    model = nnx.eval_shape(lambda: CosmosTransformer(masked, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="takes no padding_mask"):
        model(
            jnp.ones((1, 2, 8, 8, 4)),
            jnp.ones(1),
            jnp.ones((1, 3, 12)),
            padding_mask=jnp.ones((1, 8, 8)),
        )
