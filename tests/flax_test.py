"""`gna_jax.flax`: both GNAttention modules and `attention_fn` against flax's own modules and dense float64 attention."""

import functools
import math
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import gna_jax.flax
from gna_jax.flax import GNAttention, attention_fn
from gna_jax.flax.linen import GNAttention as LinenGNAttention
from gna_jax.neighborhood import Neighborhood
from gna_jax.tiling import Tiles

BATCH, FEATURES, HEADS = 2, 16, 4


def normal(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def tokens(layout, seed=0, batch=(BATCH,)):
    return normal((*batch, *layout, FEATURES), seed)


def randomize(module, seed=7):
    """Random values for every parameter, also those that start at zero or one."""
    leaves, structure = jax.tree.flatten(nnx.state(module, nnx.Param))
    drawn = [jnp.asarray(0.3 * normal(x.shape, seed + i), x.dtype) for i, x in enumerate(leaves)]
    nnx.update(module, jax.tree.unflatten(structure, drawn))
    return module


def dropout_key(seed):
    return jax.random.key(seed, impl="unsafe_rbg")  # compiles in a tenth of the default's time


def make(**options):
    """A GNAttention with random parameters; its initializers are tested apart."""
    zeros = nnx.initializers.zeros_init()
    rngs = nnx.Rngs(0, dropout=dropout_key(1))
    return randomize(GNAttention(HEADS, FEATURES, kernel_init=zeros, **options, rngs=rngs))


@nnx.jit
def run(module, *arguments, **options):
    return module(*arguments, **options)


def parameters(module):
    return nnx.to_pure_dict(nnx.state(module, nnx.Param))


def layer_norm(x, scale):
    centered = x - x.mean(-1, keepdims=True)
    return centered / np.sqrt((centered**2).mean(-1, keepdims=True) + 1e-6) * scale


def bias_of_pairs(table, neighborhood, layout):
    """`[heads, tokens, tokens]`: the table's entry of every pair, where the pair is a legal one."""
    places = np.stack(np.unravel_index(np.arange(math.prod(layout)), layout), -1)
    window, dilation = np.array(neighborhood.window_size), np.array(neighborhood.dilation)
    offsets = (places[None] - places[:, None]) // dilation + window - 1
    offsets = np.clip(offsets, 0, 2 * window - 2)  # others are masked
    return table[(slice(None), *np.moveaxis(offsets, -1, 0))]


def dense_float64(module, inputs, **geometry):
    """The module's formula on all pairs of tokens, in numpy float64."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), parameters(module))
    layout = inputs.shape[1:-1]
    neighborhood = Neighborhood.of(len(layout), **geometry)
    x = np.asarray(inputs, np.float64).reshape(inputs.shape[0], -1, inputs.shape[-1])
    query, key, value = (
        np.einsum("btc,cnh->btnh", x, p[name]["kernel"]) + p[name].get("bias", 0.0)
        for name in ("query", "key", "value")
    )
    if "query_ln" in p:
        query = layer_norm(query, p["query_ln"]["scale"])
        key = layer_norm(key, p["key_ln"]["scale"])
    groups = query.shape[2] // key.shape[2]
    key, value = np.repeat(key, groups, axis=2), np.repeat(value, groups, axis=2)
    scores = np.einsum("btnh,bsnh->bnts", query, key) / math.sqrt(query.shape[-1])
    if "relative_position_bias" in p:
        scores = scores + bias_of_pairs(p["relative_position_bias"], neighborhood, layout)[None]
    mask = neighborhood.mask(layout).reshape(x.shape[1], x.shape[1])
    scores = np.where(mask, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights = weights / weights.sum(-1, keepdims=True)
    heads = np.einsum("bnts,bsnh->btnh", weights, value)
    out = np.einsum("btnh,nhc->btc", heads, p["out"]["kernel"]) + p["out"].get("bias", 0.0)
    return out.reshape(*inputs.shape[:-1], -1)


OPTIONS = {
    "plain": {},
    "gqa-norm": {"num_kv_heads": 2, "normalize_qk": True},
    "narrow": {"qkv_features": 8, "out_features": 24, "use_bias": False},
}


# nnx.MultiHeadAttention's parameters


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_whole_window_is_flax_attention_with_the_same_state(options):
    flax_module = nnx.MultiHeadAttention(HEADS, FEATURES, decode=False, rngs=nnx.Rngs(3), **options)
    module = GNAttention(HEADS, FEATURES, window_size=(5, 6), rngs=nnx.Rngs(3), **options)
    # Equal rngs give equal parameters.
    jax.tree.map(np.testing.assert_array_equal, parameters(module), parameters(flax_module))
    state = nnx.state(randomize(flax_module))
    nnx.update(module, state)
    assert jax.tree.structure(nnx.state(module)) == jax.tree.structure(state)
    x = tokens((5, 6))
    expected = run(flax_module, x.reshape(BATCH, 30, FEATURES)).reshape(BATCH, 5, 6, -1)
    np.testing.assert_allclose(run(module, x), expected, rtol=1e-5, atol=1e-5)


def constants(init):
    """Initializers that tell who asked, and what each projection must then hold."""
    options = {
        "kernel_init": init.constant(1.0),
        "bias_init": init.constant(2.0),
        "out_kernel_init": init.constant(3.0),
        "out_bias_init": init.constant(4.0),
    }
    into = {"kernel": 1.0, "bias": 2.0}
    expected = {"query": into, "key": into, "value": into, "out": {"kernel": 3.0, "bias": 4.0}}
    return options, expected


def test_initializers_reach_their_parameters():
    options, expected = constants(nnx.initializers)
    module = GNAttention(HEADS, FEATURES, window_size=3, **options, rngs=nnx.Rngs(0))
    assert jax.tree.map(lambda x: np.unique(x).item(), parameters(module)) == expected


# Values at a real window


@pytest.mark.parametrize(
    ("layout", "geometry", "options"),
    [
        ((17,), {"window_size": 5, "is_causal": True}, {}),
        (
            (9, 8),
            {"window_size": (4, 3), "stride": (2, 1), "dilation": (1, 2)},
            {"num_kv_heads": 1},
        ),
        ((9, 8), {"window_size": (5, 3)}, {"relative_position_bias": True, "normalize_qk": True}),
        ((4, 5, 6), {"window_size": (2, 3, 3), "is_causal": (True, False, False)}, {}),
    ],
    ids=["1d", "2d-gqa", "2d-bias-norm", "3d"],
)
def test_matches_dense_float64(layout, geometry, options):
    module = make(**geometry, **options)
    x = tokens(layout, seed=1)
    expected = dense_float64(module, x, **geometry)
    np.testing.assert_allclose(run(module, x), expected, rtol=1e-4, atol=1e-4)


def test_every_argument_reaches_gna(monkeypatch):
    received = []

    def spy(query, key, value, **arguments):
        received.append(arguments)
        return jnp.zeros_like(query)

    monkeypatch.setattr(sys.modules["gna_jax.flax.partition"], "gna", spy)
    static = {
        "window_size": (4, 3),
        "stride": (2, 1),
        "dilation": (1, 2),
        "is_causal": (True, False),
        "scale": 0.3,
        "implementation": ("reference", "xla"),
        "tiles": Tiles((2, 2), (4, 4)),
        "device": "cpu",
    }
    own = {"precision": "highest", "relative_position_bias": True}
    extra = additional() | {"additional_lengths": np.array([0, 4], np.int32)}
    x = tokens((8, 7))
    module, twin = make(**static, **own), LinenGNAttention(HEADS, **static, **own)
    jax.eval_shape(module, x, **extra)
    jax.eval_shape(twin.apply, {"params": parameters(module)}, x, **extra)
    attention_fn(**static)(*normal((3, BATCH, 8, 7, HEADS, 4)), precision="highest")
    for arguments in received:
        assert arguments.pop("precision") == "highest"
        assert {name: arguments.pop(name) for name in static} == static
    shapes = {name: value.shape for name, value in extra.items()}
    shapes["relative_position_bias"] = (HEADS, 7, 5)
    for arguments in received[:2]:
        assert {name: value.shape for name, value in arguments.items()} == shapes
    assert set(received[2].values()) == {None}
    assert len(received) == 3


def test_position_bias_starts_at_zero_with_one_entry_per_offset():
    module = GNAttention(
        HEADS, FEATURES, window_size=(5, 3), relative_position_bias=True, rngs=nnx.Rngs(0)
    )
    np.testing.assert_array_equal(
        parameters(module)["relative_position_bias"], np.zeros((HEADS, 9, 5))
    )


def additional(seed=5):
    keys, values = normal((2, BATCH, 4, HEADS, FEATURES // HEADS), seed)
    return {"additional_keys": keys, "additional_values": values}


def test_additional_tokens_are_seen_up_to_their_length():
    module, x = make(window_size=3), tokens((10,))
    lengths = np.array([0, 4], np.int32)
    seen, alone = run(module, x, **additional(), additional_lengths=lengths), run(module, x)
    np.testing.assert_allclose(seen[0], alone[0], rtol=1e-5, atol=1e-5)
    assert np.abs(seen[1] - alone[1]).max() > 1e-2


# Rotary hook


def test_rotary_gets_normalized_heads_and_its_result_is_used():
    given = []

    def rotary(query, key):
        given.append((query.shape, key.shape))
        return 2.0 * query, key

    options = {"window_size": (3, 3), "num_kv_heads": 2, "normalize_qk": True}
    x = tokens((5, 6))
    rotated = run(make(**options, rotary=rotary), x)
    # A factor before the norm would vanish in it; after it, it is a factor of the scale.
    scaled = run(make(**options, scale=2.0 / math.sqrt(4)), x)
    np.testing.assert_allclose(rotated, scaled, rtol=1e-5, atol=1e-5)
    assert given == [((BATCH, 5, 6, HEADS, 4), (BATCH, 5, 6, 2, 4))]


class LearnedRotation(nnx.Module):
    def __init__(self):
        self.angle = nnx.Param(jnp.ones((4,)))

    def __call__(self, query, key):
        angle = self.angle[...].reshape(1, 1, 1, 4)
        return query.astype(jnp.float32) * angle, key.astype(jnp.float32)


def test_rotary_may_be_a_module_and_compute_in_float32():
    module = make(window_size=3, rotary=LearnedRotation(), dtype=jnp.bfloat16)
    assert parameters(module)["rotary"]["angle"].shape == (4,)
    assert jax.eval_shape(module, tokens((8,))).dtype == jnp.bfloat16


@pytest.mark.parametrize("rotary", [lambda q, k: (q, k[..., :2]), lambda q, k: q])
def test_rotary_that_changes_shapes_is_refused(rotary):
    module = make(window_size=3, rotary=rotary)
    with pytest.raises(ValueError, match=r"rotary must return \(query, key\) in the shapes"):
        jax.eval_shape(module, tokens((8,)))


# Dropout, dtypes, training


def test_dropout_follows_train_and_eval():
    module, x = make(window_size=3, out_dropout_rate=0.5), tokens((16,))
    plain = np.asarray(run(make(window_size=3), x))
    with pytest.raises(ValueError, match="deterministic"):
        run(module, x)
    module.eval()
    np.testing.assert_array_equal(run(module, x), plain)
    module.train()
    first, second = np.asarray(run(module, x)), np.asarray(run(module, x))
    dropped = first == 0.0
    assert 0.35 < dropped.mean() < 0.65
    np.testing.assert_allclose(first[~dropped], 2.0 * plain[~dropped], rtol=1e-5)
    assert not np.array_equal(first, second)
    again = [run(module, x, rngs=nnx.Rngs(dropout=dropout_key(5))) for _ in range(2)]
    np.testing.assert_array_equal(*again)
    deterministic = nnx.jit(lambda module, x: module(x, deterministic=True))(module, x)
    np.testing.assert_array_equal(deterministic, plain)


def test_without_dropout_the_state_holds_parameters_alone():
    module = make(window_size=3)
    _, parameters_only, rest = nnx.split(module, nnx.Param, ...)
    assert len(jax.tree.leaves(parameters_only)) == 8
    assert not jax.tree.leaves(rest)
    module.train()
    assert jax.eval_shape(module, tokens((8,))).shape == (BATCH, 8, FEATURES)


# flax's own layer norm needs jax's standard promotion below float32.
@pytest.mark.parametrize(
    ("normalize_qk", "promotion"), [(False, "strict"), (True, "standard")], ids=["plain", "norm"]
)
def test_computes_in_dtype_and_keeps_param_dtype(normalize_qk, promotion):
    options = {"window_size": 5, "normalize_qk": normalize_qk}
    exact, mixed = make(**options), make(**options, dtype=jnp.bfloat16)
    half = make(**options, param_dtype=jnp.bfloat16)
    x = tokens((12,))
    with jax.numpy_dtype_promotion(promotion):
        out = run(mixed, x)
        half_out = jax.eval_shape(half, x.astype(jnp.bfloat16))
    assert {leaf.dtype for leaf in jax.tree.leaves(parameters(mixed))} == {jnp.dtype("float32")}
    assert {leaf.dtype for leaf in jax.tree.leaves(parameters(half))} == {jnp.dtype("bfloat16")}
    assert out.dtype == half_out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), run(exact, x), rtol=0.1, atol=0.1)


def highest_products(apply, *arguments):
    """Matrix products of a program, and how many of them are at the highest precision."""
    text = jax.jit(lambda *arguments: apply(*arguments)).lower(*arguments).as_text()
    return text.count("stablehlo.dot_general"), text.count("precision = [HIGHEST, HIGHEST]")


def test_precision_is_that_of_all_products():
    x, high = tokens((8,)), {"precision": "highest"}
    module = make(window_size=3, **high)
    twin = LinenGNAttention(HEADS, 3, **high)
    for products, highest in (
        highest_products(module, x),
        highest_products(twin.apply, {"params": parameters(module)}, x),
        highest_products(flax_pair(attention_fn(window_size=3), **high)[0], x),
    ):
        assert products == highest >= 6  # four projections, scores, sum of values
    assert highest_products(make(window_size=3), x)[1] == 0


def test_training_steps_under_jit_reduce_the_loss():
    module = make(window_size=(3, 3), normalize_qk=True, relative_position_bias=True)
    x, target = tokens((6, 6), seed=1), tokens((6, 6), seed=2)

    @nnx.jit
    def step(module):
        loss, gradients = nnx.value_and_grad(lambda m: jnp.mean((m(x) - target) ** 2))(module)
        moved = jax.tree.map(lambda p, g: p - 0.3 * g, nnx.state(module, nnx.Param), gradients)
        nnx.update(module, moved)
        return loss, gradients

    losses, gradients = zip(*(step(module) for _ in range(15)), strict=True)
    assert losses[-1] < 0.95 * losses[0]
    largest = jax.tree.map(lambda g: float(np.abs(g).max()), nnx.to_pure_dict(gradients[0]))
    assert all(np.isfinite(size) and size > 0.0 for size in jax.tree.leaves(largest)), largest


def test_equal_modules_share_one_compilation():
    traces = []

    @nnx.jit
    def apply(module, x):
        traces.append(1)
        return module.query(x)

    for _ in range(2):
        apply(make(window_size=[3, 3]), tokens((5, 5)))
    assert len(traces) == 1


# Linen twin


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_kv_heads": 2, "normalize_qk": True, "out_features": 24, "use_bias": False},
        {"relative_position_bias": True, "stride": (2, 1), "dilation": (1, 2), "scale": 0.3},
        {"dtype": jnp.bfloat16, "rotary": lambda q, k: (q * 2, k)},
    ],
    ids=["plain", "gqa-norm", "bias", "bf16-rotary"],
)
def test_linen_twin_is_bit_equal(options):
    options = {"window_size": (4, 3), **options}
    module, twin = make(**options), LinenGNAttention(HEADS, **options)
    x, variables = tokens((8, 7)), {"params": parameters(module)}
    made = jax.eval_shape(twin.init, jax.random.key(0), x)
    describe = functools.partial(jax.tree.map, lambda leaf: (leaf.shape, leaf.dtype))
    assert describe(made) == describe(variables)
    with jax.numpy_dtype_promotion("standard"):  # for flax's layer norm
        np.testing.assert_array_equal(jax.jit(twin.apply)(variables, x), run(module, x))


def test_linen_dropout_and_additional_tokens():
    variables, x = {"params": parameters(make(window_size=3))}, tokens((16,))

    calls = {
        rate: jax.jit(
            LinenGNAttention(HEADS, 3, out_dropout_rate=rate).apply, static_argnames="deterministic"
        )
        for rate in (0.0, 0.5)
    }

    def apply(rate, **options):
        return calls[rate](variables, x, **options, **additional())

    expected = np.asarray(apply(0.0))
    np.testing.assert_array_equal(apply(0.5, deterministic=True), expected)
    dropped = np.asarray(apply(0.5, deterministic=False, rngs={"dropout": dropout_key(1)}))
    zero = dropped == 0.0
    assert 0.35 < zero.mean() < 0.65
    np.testing.assert_allclose(dropped[~zero], 2.0 * expected[~zero], rtol=1e-5)
    keyed = [apply(0.5, deterministic=False, dropout_rng=dropout_key(4)) for _ in range(2)]
    np.testing.assert_array_equal(*keyed)


def test_linen_initializers_reach_their_parameters():
    options, expected = constants(nn.initializers)
    init = jax.jit(LinenGNAttention(HEADS, 3, **options).init)
    params = init(jax.random.key(0), tokens((8,)))["params"]
    assert jax.tree.map(lambda x: np.unique(x).item(), params) == expected


# Sharding metadata


def test_metadata_shards_parameters_and_computation():
    mesh = jax.make_mesh(
        (2, 2), ("data", "model"), (AxisType.Explicit,) * 2, devices=jax.devices()[:4]
    )
    x = tokens((5, 6))
    plain = GNAttention(HEADS, FEATURES, window_size=(3, 3), rngs=nnx.Rngs(0))
    with jax.set_mesh(mesh):
        module = GNAttention(
            HEADS,
            FEATURES,
            window_size=(3, 3),
            kernel_metadata={"out_sharding": (None, "model", None)},
            out_kernel_metadata={"out_sharding": ("model", None, None)},
            bias_metadata={"out_sharding": ("model", None)},
            out_bias_metadata={"out_sharding": (None,)},
            rngs=nnx.Rngs(0),
        )
        specs = nnx.to_pure_dict(nnx.get_partition_spec(nnx.state(module)))
        sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
        out = nnx.jit(lambda m, x: m(x, out_sharding=PartitionSpec("data")))(module, sharded)
    assert out.sharding.spec[0] == "data"
    into = {"kernel": PartitionSpec(None, "model", None), "bias": PartitionSpec("model", None)}
    out_of = {"kernel": PartitionSpec("model", None, None), "bias": PartitionSpec(None)}
    assert specs == {"query": into, "key": into, "value": into, "out": out_of}
    assert module.query.kernel[...].sharding.spec == into["kernel"]
    np.testing.assert_allclose(out, run(plain, x), rtol=1e-5, atol=1e-5)


def test_out_metadata_default_to_those_of_the_projections():
    options = {"kernel_metadata": {"note": "heads"}, "bias_metadata": {"note": "shift"}}
    module = make(window_size=3, **options)
    assert module.out.kernel.note == "heads"
    assert module.out.bias.note == "shift"
    bare = make(window_size=3, **options, out_kernel_metadata={})
    assert "note" not in bare.out.kernel.get_metadata()


def test_linen_initializers_carry_sharding():
    kernel_init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model", None))
    twin = LinenGNAttention(HEADS, 3, kernel_init=kernel_init)
    specs = nn.get_partition_spec(jax.eval_shape(twin.init, jax.random.key(0), tokens((8,))))
    assert specs["params"]["key"]["kernel"] == PartitionSpec(None, "model", None)


# attention_fn in flax's own modules


def flax_pair(window, linen=None, **options):
    """nnx and linen attention modules that look through `window`, and the parameters of both."""
    linen_options = options if linen is None else linen
    zeros = nnx.initializers.zeros_init()
    nnx_module = nnx.MultiHeadAttention(
        HEADS,
        FEATURES,
        attention_fn=window,
        kernel_init=zeros,
        decode=False,
        rngs=nnx.Rngs(0),
        **options,
    )
    linen_module = nn.MultiHeadDotProductAttention(HEADS, attention_fn=window, **linen_options)
    return randomize(nnx_module), linen_module, {"params": parameters(nnx_module)}


def test_attention_fn_in_flax_modules_is_gn_attention():
    geometry = {"window_size": (4, 3), "stride": (2, 1), "is_causal": (False, True)}
    nnx_module, linen_module, variables = flax_pair(attention_fn(**geometry))
    module = make(**geometry)
    nnx.update(module, nnx.state(nnx_module, nnx.Param))
    x = tokens((7, 6))
    expected = run(module, x)
    np.testing.assert_array_equal(run(nnx_module, x), expected)
    np.testing.assert_array_equal(jax.jit(linen_module.apply)(variables, x), expected)


def test_attention_fn_serves_grouped_heads_and_dtype():
    module, _, _ = flax_pair(attention_fn(window_size=3), dtype=jnp.bfloat16)
    grouped, _, _ = flax_pair(attention_fn(window_size=3), linen={}, num_kv_heads=2)
    assert jax.eval_shape(module, tokens((8,))).dtype == jnp.bfloat16
    assert jax.eval_shape(grouped, tokens((8,))).shape == (BATCH, 8, FEATURES)


def test_attention_fn_casts_to_dtype():
    query, key, value = (
        jax.ShapeDtypeStruct((BATCH, 8, HEADS, 4), dtype)
        for dtype in (jnp.float32, jnp.bfloat16, jnp.float16)
    )
    window = functools.partial(attention_fn(window_size=3), dtype=jnp.float32)
    assert jax.eval_shape(window, query, key, value).dtype == jnp.float32


@pytest.mark.parametrize("batch", [(), (2, 3)], ids=["none", "two"])
def test_a_window_per_axis_fixes_the_rank_and_folds_batch_axes(batch):
    nnx_module, _, _ = flax_pair(attention_fn(window_size=(3, 4)))
    x = tokens((5, 6), batch=batch)
    expected = dense_float64(nnx_module, x.reshape(-1, 5, 6, FEATURES), window_size=(3, 4))
    out = run(nnx_module, x)
    np.testing.assert_allclose(out, expected.reshape(x.shape), rtol=1e-4, atol=1e-4)


def test_one_window_for_all_axes_takes_every_axis_but_the_first_as_space():
    module, _, _ = flax_pair(attention_fn(window_size=3))
    x = tokens((5, 6))
    expected = dense_float64(module, x, window_size=(3, 3))
    np.testing.assert_allclose(run(module, x), expected, rtol=1e-4, atol=1e-4)


def test_attention_fn_compares_by_its_choices():
    one = attention_fn(window_size=[3, np.int64(5)], implementation=["reference", "xla"])
    same = attention_fn(window_size=np.array([3, 5]), implementation=("reference", "xla"))
    assert one == same
    assert hash(one) == hash(same)
    assert one != attention_fn(window_size=(3, 5))
    assert one.window_size == (3, 5)
    assert one.stride == (1, 1)


REFUSED_CALLS = [
    ({"mask": np.ones((1, 1, 8, 8), bool)}, "the window is the mask"),
    ({"bias": np.ones((1, 1, 8, 8), np.float32)}, "use relative_position_bias"),
    ({"is_causal": True}, r"attention_fn\(is_causal=\.\.\.\)"),
    ({"dropout_rate": 0.1}, "use out_dropout_rate of GNAttention"),
    ({"module": object()}, "cannot sow them"),
    ({"input_positions": np.arange(8)}, r"GNAttention\(rotary=\.\.\.\)"),
    ({"qk_attn_weights_einsum": jnp.einsum}, "takes no einsum of yours"),
    ({"attn_weights_value_einsum": jnp.einsum}, "takes no einsum of yours"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED_CALLS)
def test_attention_fn_refuses(arguments, message):
    query, key, value = normal((3, BATCH, 8, HEADS, 4))
    window = attention_fn(window_size=3)
    with pytest.raises(ValueError, match=message):
        window(query, key, value, **arguments)


def test_flax_modules_reach_the_refusals():
    window = attention_fn(window_size=3)
    nnx_module, linen_module, variables = flax_pair(window, dropout_rate=0.1, deterministic=True)
    x = tokens((8,))
    mask = jnp.ones((BATCH, 1, 8, 8), bool)
    assert jax.eval_shape(nnx_module, x).shape == x.shape
    for call, message in [
        ({"mask": mask}, "the window is the mask"),
        ({"is_causal": True}, "causality belongs to the window"),
        ({"sow_weights": True}, "got sow_weights=True"),
        ({"deterministic": False}, "no attention-probability dropout"),
        ({"input_positions": jnp.arange(8)}, "got input_positions"),
    ]:
        with pytest.raises(ValueError, match=message):
            nnx_module(x, **call)
    for call, message in [
        ({"mask": mask}, "the window is the mask"),
        ({"sow_weights": True}, "got sow_weights=True"),
    ]:
        with pytest.raises(ValueError, match=message):
            linen_module.apply(variables, x, **call)
    active = linen_module.clone(deterministic=False)
    with pytest.raises(ValueError, match="no attention-probability dropout"):
        active.apply(variables, x, rngs={"dropout": jax.random.key(0)})
    einsum = linen_module.clone(
        qk_attn_weights_einsum_cls=lambda: jnp.einsum,
        attn_weights_value_einsum_cls=lambda: jnp.einsum,
    )
    with pytest.raises(ValueError, match="takes no einsum of yours"):
        einsum.apply(variables, x)


# Errors of the modules: the same in both


BAD_MODULES = [
    ({"qkv_features": 18}, (8,), "must be a multiple of num_heads; got 18 features, num_heads=4"),
    ({"num_kv_heads": 3}, (8,), "num_kv_heads must divide num_heads"),
    ({"num_kv_heads": 0}, (8,), "num_kv_heads must divide num_heads"),
    ({"out_dropout_rate": 1.0}, (8,), r"out_dropout_rate must be in \[0, 1\); got"),
    ({"relative_position_bias": True}, (8,), "window_size must name every axis"),
    ({"relative_position_bias": True, "window_size": (3, -1)}, (8, 8), "may not be -1"),
    ({"window_size": (3, 3)}, (8,), "with 2 spatial axes, one per entry of window_size"),
    ({"window_size": (3, 3)}, (2, 8, 8), "reshape several batch axes into one"),
    ({}, (), "with 1 to 3 spatial axes"),
    ({}, (2, 2, 2, 2), "with 1 to 3 spatial axes"),
    ({"window_size": (3, 3), "stride": (1, 1, 1)}, (8, 8), "stride must be one value or one per"),
    ({"window_size": 0}, (8,), "window_size must be at least 1"),
    ({"window_size": 9}, (8,), "window_size must not exceed the layout"),
]


@pytest.mark.parametrize(("options", "layout", "message"), BAD_MODULES)
def test_modules_explain_what_is_wrong(options, layout, message):
    options = {"window_size": 3, **options}
    x = tokens(layout)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda x: GNAttention(HEADS, FEATURES, **options, rngs=nnx.Rngs(0))(x), x)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(LinenGNAttention(HEADS, **options).init, jax.random.key(0), x)


def test_inputs_of_another_width_are_refused():
    module = make(window_size=3)
    with pytest.raises(ValueError, match="must hold in_features=16 features"):
        module(jnp.ones((BATCH, 8, FEATURES + 1)))


def test_too_few_axes_for_the_window_are_refused():
    array = jnp.ones((8, HEADS, 4))
    with pytest.raises(ValueError, match=r"query must be \[batch\.\.\., 2 spatial axes"):
        attention_fn(window_size=(3, 3))(array, array, array)


def test_a_traced_window_is_refused():
    with pytest.raises(TypeError, match="window_size must be static"):
        jax.jit(lambda window: attention_fn(window_size=window).rank)(3)


# Package


def test_attention_fn_needs_no_flax():
    program = """
import sys
sys.modules["flax"] = None
import gna_jax.flax
gna_jax.flax.attention_fn(window_size=3)
for name in ("GNAttention", "nnx", "linen"):
    try:
        getattr(gna_jax.flax, name)
    except ImportError as error:
        assert "pip install 'gna-jax[flax]'" in str(error), error
    else:
        raise SystemExit(f"{name} was imported without flax")
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_package_offers_its_names():
    assert gna_jax.flax.linen.GNAttention is LinenGNAttention
    assert gna_jax.flax.nnx.GNAttention is GNAttention
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = gna_jax.flax.nothing


def test_readme_example_runs():
    readme = pathlib.Path(gna_jax.flax.__file__).with_name("README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert blocks
    names = {}
    for block in blocks:
        exec(block, names)
