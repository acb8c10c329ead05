"""Every rule of the API by its message: what is wrong, what was given, and the way out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gna_jax import Tiles, gna
from gna_jax.attention import slab_attention


def tokens(layout=(8, 8), *, batch=2, heads=2, dim=4, dtype=np.float32):
    return np.zeros((batch, *layout, heads, dim), dtype)


def call(query=None, key=None, value=None, **options):
    """`gna` on correct 8 x 8 arrays, but for what is given."""
    query = tokens() if query is None else query
    key = query if key is None else key
    value = key if value is None else value
    return gna(query, key, value, **{"window_size": 3} | options)


def test_correct_call_passes():
    assert call().shape == (2, 8, 8, 2, 4)


GEOMETRY = [
    ({"window_size": 9}, r"window_size must not exceed the layout.*window_size=\(9, 9\).*layout \(8, 8\).*or -1"),
    ({"window_size": (3, 9)}, r"window_size must not exceed the layout.*\(3, 9\)"),
    ({"window_size": 0}, r"window_size must be at least 1, or -1.*got window_size=\(0, 0\)"),
    ({"window_size": (3, -2)}, r"at least 1, or -1 for the whole axis; got window_size=\(3, -2\)"),
    ({"stride": 4}, r"stride must not exceed window_size.*stride=\(4, 4\), window_size=\(3, 3\).*blocked"),
    ({"stride": (1, 0)}, r"stride must be at least 1; got stride=\(1, 0\)"),
    ({"dilation": 0}, r"dilation must be at least 1; got dilation=\(0, 0\)"),
    ({"dilation": 3}, r"window_size \* dilation must not exceed the layout.*dilation=\(3, 3\).*pad the layout"),
    ({"window_size": -1, "stride": 9}, r"dilation group of the layout must hold at least `stride` tokens"),
    ({"window_size": -1, "dilation": 9}, r"dilation group of the layout must hold.*dilation=\(9, 9\)"),
    ({"window_size": (3, 3, 3)}, r"window_size must be one value or one per spatial axis.*for 2 spatial axes"),
    ({"stride": (1,)}, r"stride must be one value or one per spatial axis; got stride=\(1,\)"),
    ({"dilation": [1, 1, 1]}, r"dilation must be one value or one per spatial axis"),
    ({"is_causal": (True,)}, r"is_causal must be one value or one per spatial axis"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "message"), GEOMETRY, ids=[str(o) for o, _ in GEOMETRY])
def test_geometry(options, message):
    with pytest.raises(ValueError, match=message):
        call(**options)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("window_size", True, "window_size must be an integer or a tuple of integers; got True"),
        ("window_size", (3, True), "window_size must be an integer"),
        ("window_size", 3.0, r"window_size must be an integer or a tuple of integers; got 3\.0"),
        ("window_size", np.asarray([3.0, 3.0]), "window_size must be an integer"),
        ("window_size", None, "window_size must be an integer"),
        ("window_size", "3", "window_size must be an integer"),
        ("stride", np.True_, "stride must be an integer"),
        ("dilation", (1, 1.5), "dilation must be an integer"),
        ("is_causal", 2, "is_causal must be a bool or a tuple of bools; got 2"),
        ("is_causal", "yes", "is_causal must be a bool"),
        ("is_causal", (True, None), "is_causal must be a bool"),
    ],
)
def test_kinds_of_geometry(name, value, message):
    with pytest.raises(TypeError, match=message):
        call(**{name: value})


@pytest.mark.parametrize("name", ["window_size", "stride", "dilation", "is_causal"])
@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x, x)], ids=["one", "tuple"])
def test_traced_geometry(name, wrap):
    """A tracer is told how to become static."""
    value = True if name == "is_causal" else 1
    message = rf"{name} must be static.*static_argnames=\('{name}',\)"
    with pytest.raises(TypeError, match=message):
        jax.jit(lambda x: call(**{name: wrap(x)}))(value)
    with pytest.raises(TypeError, match=message):
        jax.jit(lambda x: call(**{name: x}))(jnp.asarray([value, value]))


@pytest.mark.parametrize("shape", [(2, 2, 4), (2, 4), (4,), (), (1, 2, 2, 2, 2, 2, 4)], ids=str)
def test_rank(shape):
    with pytest.raises(ValueError, match=r"1 to 3 spatial axes; got query of shape \("):
        call(np.zeros(shape, np.float32))


def test_missing_batch_axis_is_named():
    with pytest.raises(ValueError, match=r"add a batch axis, or map over it with jax\.vmap"):
        call(np.zeros((8, 2, 4), np.float32))


SHAPES = [
    ((None, tokens((8,)), None), r"must have the same number of axes; got query \(2, 8, 8, 2, 4\), key \(2, 8, 2, 4\)"),
    ((None, None, tokens((8,))), "must have the same number of axes"),
    ((None, tokens(batch=1), None), "must agree in batch"),
    ((None, None, tokens(batch=3)), r"must agree in batch.*value \(3, 8, 8, 2, 4\)"),
    ((None, None, tokens((8, 7))), "key and value must agree in layout"),
    ((None, tokens((8, 7)), None), "query and key must agree in layout.*cross attention.*additional_keys"),
    ((None, tokens(dim=5), tokens()), "query and key must agree in head_dim"),
    ((None, tokens(heads=1), tokens()), "key and value must agree in heads"),
    ((tokens(heads=3), tokens(heads=2), None), "key/value heads must divide query heads; got 3 query heads, 2"),
    ((tokens(heads=2), tokens(heads=4), None), "key/value heads must divide query heads; got 2 query heads, 4"),
    ((tokens(batch=0), None, None), r"may be empty; got query \(0,"),
    ((tokens(dim=0), None, None), "may be empty"),
    ((None, None, tokens(dim=0)), "may be empty"),
    ((tokens((8, 0)), None, None), "may be empty"),
    ((tokens(heads=0), None, None), "may be empty"),
]  # fmt: skip


@pytest.mark.parametrize(("arrays", "message"), SHAPES, ids=[m[:50] for _, m in SHAPES])
def test_shapes(arrays, message):
    with pytest.raises(ValueError, match=message):
        call(*arrays)


@pytest.mark.parametrize(
    "dtype", [np.int32, np.bool_, np.complex64, jnp.float8_e4m3, jnp.float8_e5m2], ids=str
)
def test_dtypes(dtype):
    message = r"must be one of bfloat16, float16, float32, float64; got query of .*cast them"
    with pytest.raises(ValueError, match=message):
        call(tokens(dtype=dtype))


@pytest.mark.parametrize("name", ["key", "value", "additional_keys", "additional_values"])
def test_mixed_dtypes(name):
    other = {"key": tokens(), "value": tokens()}
    other |= {
        n: np.zeros((2, 3, 2, 4), np.float32) for n in ("additional_keys", "additional_values")
    }
    other[name] = other[name].astype(jnp.bfloat16)
    message = rf"{name} must have query's dtype; got query of float32, {name} of bfloat16; cast with {name}\."
    with pytest.raises(ValueError, match=message):
        call(**other)


def more(count=3, *, batch=2, heads=2, dim=4):
    return np.zeros((batch, count, heads, dim), np.float32)


ADDITIONAL = [
    ((more(), None, None), "go together; got additional_values=None"),
    ((None, more(), None), "go together; got additional_keys=None"),
    ((None, None, np.ones(2, np.int32)), "additional_lengths needs additional_keys"),
    ((more(batch=1), more(), None), r"additional_keys must be \[batch, tokens.*= \(2, 3, 2, 4\); got .*\(1, 3, 2, 4\)"),
    ((more(heads=1), more(), None), "additional_keys must be"),
    ((more(dim=5), more(), None), "additional_keys must be"),
    ((more()[0], more(), None), r"additional_keys must be .*got additional_keys of shape \(3, 2, 4\)"),
    ((more(), more(4), None), r"additional_values must be .*\(2, 3, 2, 4\); got additional_values of shape \(2, 4"),
    ((more(), more(dim=3), None), "additional_values must be"),
    ((more(0), more(0), None), r"must hold at least one token; got 0; leave it out \(None\)"),
    ((more(), more(), np.ones(3, np.int32)), r"additional_lengths must be integers of shape \[batch\] = \(2,\)"),
    ((more(), more(), np.ones((2, 1), np.int32)), r"additional_lengths must be integers.*shape \(2, 1\)"),
    ((more(), more(), np.ones(2, np.float32)), "additional_lengths must be integers.*got float32"),
    ((more(), more(), 2), "additional_lengths must be integers"),
]  # fmt: skip


@pytest.mark.parametrize(("arrays", "message"), ADDITIONAL, ids=[m[:60] for _, m in ADDITIONAL])
def test_additional_tokens(arrays, message):
    names = ("additional_keys", "additional_values", "additional_lengths")
    with pytest.raises(ValueError, match=message):
        call(**dict(zip(names, arrays, strict=True)))


@pytest.mark.parametrize("shape", [(2, 5), (1, 5, 5), (2, 3, 3), (2, 5, 6), (5, 5)], ids=str)
def test_bias_shape(shape):
    message = r"\[query heads, 2 \* window - 1 per axis\] = \(2, 5, 5\); got shape \("
    with pytest.raises(ValueError, match=message):
        call(relative_position_bias=np.zeros(shape, np.float32))


def test_bias_of_a_whole_group_and_of_integers():
    message = r"= \(2, 7, 15\); got"
    with pytest.raises(ValueError, match=message):
        bias = np.zeros((2, 5, 5), np.float32)
        call(window_size=-1, dilation=(2, 1), relative_position_bias=bias)
    with pytest.raises(ValueError, match="relative_position_bias must be floating; got .* int32"):
        call(relative_position_bias=np.zeros((2, 5, 5), np.int32))


@pytest.mark.parametrize("scale", [np.nan, np.inf, -np.inf])
def test_scale_must_be_finite(scale):
    with pytest.raises(ValueError, match="scale must be finite; got scale="):
        call(scale=scale)


def test_kinds_of_scale():
    with pytest.raises(TypeError, match=r"scale must be static.*Multiply the query.*scale=1\.0"):
        jax.jit(lambda s: call(scale=s))(0.5)
    for scale in ("big", [1.0, 2.0], 1j):
        with pytest.raises(TypeError, match="scale must be a number or None; got scale="):
            call(scale=scale)


@pytest.mark.parametrize("implementation", ["cudnn", "", (), ("xla", "flash"), "XLA"], ids=str)
def test_unknown_implementation(implementation):
    message = (
        r"implementation must be one of \('cutlass', .*'xla', 'reference'\).*got implementation="
    )
    with pytest.raises(ValueError, match=message):
        call(implementation=implementation)


def test_precision():
    message = (
        r"precision must be one of \[.*'highest'.*\] or a jax.lax.Precision; got precision='best'"
    )
    with pytest.raises(ValueError, match=message):
        call(precision="best")
    for precision in ("highest", "HIGH", jax.lax.Precision.DEFAULT, ("high", "highest"), None):
        assert call(precision=precision).shape == (2, 8, 8, 2, 4)


def test_tiles():
    with pytest.raises(
        TypeError, match=r"tiles must be a gna_jax.Tiles or None; got tiles=\(4, 4\)"
    ):
        call(tiles=(4, 4))
    with pytest.raises(
        ValueError, match=r"one size per spatial axis; got Tiles\(q=\(4,\).*\(8, 8\)"
    ):
        call(tiles=Tiles(q=4, kv=None))
    with pytest.raises(
        NotImplementedError, match=r"xla reads the key box.*got kv=\(2, 2\).*kv=None"
    ):
        call(tiles=Tiles(q=(4, 4), kv=(2, 2)), implementation="xla")
    with pytest.raises(
        NotImplementedError, match="xla starts every key box where the window starts"
    ):
        call(tiles=Tiles(q=(4, 4), kv=None, dynamic=False), implementation="xla")
    with pytest.raises(ValueError, match=r"tiles.q must be at least 1.*got tiles.q=\(4, 0\)"):
        Tiles(q=(4, 0), kv=None)
    with pytest.raises(
        ValueError, match=r"must all have one size per spatial axis; got q=\(4, 4\), kv=\(2,\)"
    ):
        Tiles(q=(4, 4), kv=2)
    with pytest.raises(TypeError, match="tiles.q must be an integer"):
        Tiles(q=(4.5, 1), kv=None)
    with pytest.raises(TypeError, match="tiles.dynamic must be a bool"):
        Tiles(q=4, kv=None, dynamic="yes")
    with pytest.raises(TypeError, match="tiles.q must be static"):
        jax.jit(lambda n: Tiles(q=n, kv=None).q)(4)


def call_slab(**options):
    x = tokens((4, 4))
    arguments = {
        "query": x,
        "key": x,
        "value": x,
        "query_origin": np.zeros(2, np.int32),
        "key_origin": np.zeros(2, np.int32),
        "global_layout": (8, 8),
        "window_size": 3,
    }
    return slab_attention(**arguments | options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"query_origin": np.zeros(3, np.int32)}, r"query_origin must be integers of shape \[rank\] = \(2,\)"),
        ({"key_origin": np.zeros(2, np.float32)}, r"key_origin must be integers.*got float32 of shape \(2,\)"),
        ({"key_origin": 0}, r"key_origin must be integers.*of shape \(\)"),
        ({"global_layout": (8, 8, 8)}, "global_layout must be one value or one per spatial axis"),
        ({"global_layout": (8, 2)}, r"window_size must not exceed the layout.*layout \(8, 2\)"),
        ({"key": tokens((4, 3))}, "key and value must agree in layout"),
        ({"query": tokens((4, 4), batch=1)}, "must agree in batch"),
        ({"global_layout": (8, 0)}, "window_size must not exceed the layout"),
    ],
)  # fmt: skip
def test_slabs(options, message):
    assert call_slab()[0].shape == (2, 4, 4, 2, 4)
    with pytest.raises(ValueError, match=message):
        call_slab(**options)


def test_traced_global_layout():
    with pytest.raises(TypeError, match="global_layout must be static"):
        jax.jit(lambda n: call_slab(global_layout=(n, 8)))(8)


def test_errors_come_before_any_work():
    """Under jit and with abstract arrays too: checks need shapes alone."""
    abstract = jax.ShapeDtypeStruct((2, 8, 8, 2, 4), jnp.float32)
    with pytest.raises(ValueError, match="window_size must not exceed the layout"):
        jax.eval_shape(lambda x: gna(x, x, x, window_size=9), abstract)
