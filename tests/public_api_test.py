"""The public names, pinned: a change here is a change for users."""

import inspect

import gna_jax
from gna_jax.attention import slab_attention


def test_public_names():
    assert gna_jax.__all__ == [
        "DeviceSpec",
        "Explanation",
        "GnaPerformanceWarning",
        "Neighborhood",
        "Tiles",
        "attention_fn",
        "explain",
        "gna",
        "gna_sharded",
        "interpret_gpu",
        "merge_attentions",
        "merge_over_mesh",
        "na1d",
        "na2d",
        "na3d",
        "shard_attention",
    ]
    for name in gna_jax.__all__:
        assert getattr(gna_jax, name) is not None
        assert getattr(gna_jax, name).__doc__


def test_signature_of_gna():
    parameters = inspect.signature(gna_jax.gna).parameters
    assert list(parameters) == [
        "query",
        "key",
        "value",
        "window_size",
        "stride",
        "dilation",
        "is_causal",
        "scale",
        "additional_keys",
        "additional_values",
        "additional_lengths",
        "relative_position_bias",
        "return_lse",
        "precision",
        "implementation",
        "tiles",
        "device",
    ]
    assert all(p.kind is p.KEYWORD_ONLY for p in list(parameters.values())[3:])


def test_explain_takes_the_arguments_of_gna():
    ours, theirs = (inspect.signature(f).parameters for f in (gna_jax.explain, gna_jax.gna))
    assert list(ours) == list(theirs)
    assert [p.default for p in ours.values()] == [p.default for p in theirs.values()]


def test_slab_attention_takes_the_arguments_of_gna():
    slab = list(inspect.signature(slab_attention).parameters)
    assert slab[:6] == ["query", "key", "value", "query_origin", "key_origin", "global_layout"]
    wanted = [n for n in inspect.signature(gna_jax.gna).parameters if n != "return_lse"]
    assert slab[:3] + slab[6:] == wanted
