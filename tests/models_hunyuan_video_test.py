"""HunyuanVideo against diffusers' numbers with texts of two lengths, and its windows against dense attention under their mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from mmdit_suite import dense_joint, golden, golden_weights, gradients, run

from gna_jax import Neighborhood
from gna_jax.models import joint
from gna_jax.models.checkpoint import count_parameters
from gna_jax.models.hunyuan_video_checkpoint import hunyuan_video_entries
from gna_jax.models.hunyuan_video_model import (
    HUNYUAN_VIDEO,
    HunyuanVideoConfig,
    HunyuanVideoTransformer,
    hunyuan_video,
)

TINY = HunyuanVideoConfig(
    in_channels=3,
    out_channels=3,
    num_double=1,
    num_single=1,
    num_refiner=1,
    num_heads=2,
    head_dim=12,
    text_features=10,
    pooled_features=9,
    rotary_dims=(4, 4, 4),
)
RULES = (
    Neighborhood.of(3, window_size=(3, 2, 3), stride=(1, 2, 1)),
    Neighborhood.of(3, window_size=(2, 2, -1), dilation=(1, 2, 1)),
)
WITHOUT_EFFECT = ["text_refiner.blocks.0.key.bias"]
"""It adds the same number to all scores of a query."""


def _pretrained(tmp_path, **options):
    model = nnx.eval_shape(lambda: HunyuanVideoTransformer(TINY, rngs=nnx.Rngs(0), **options))
    model.load_pretrained(golden_weights("hunyuan_video", tmp_path))
    return model


def _with_padding(inputs, value):
    """The inputs with `value` in every text token past its sample's length."""
    text = inputs["text"]
    padding = jnp.arange(text.shape[1])[None] >= inputs["text_lengths"][:, None]
    assert padding.any()
    return inputs | {"text": jnp.where(padding[..., None], value, text)}


def test_equals_diffusers_and_gradients_reach_every_parameter_under_remat(tmp_path):
    """With texts of two lengths, and NaN where the shorter one ends."""
    inputs, velocity = golden("hunyuan_video")
    assert inputs["text_lengths"].tolist() == [7, 3]
    model = _pretrained(tmp_path, remat=True)
    out, grads = gradients(model, _with_padding(inputs, jnp.nan))
    np.testing.assert_allclose(out, velocity, atol=1e-4)
    assert all(np.all(np.isfinite(g)) for g in grads.values())
    assert [n for n, g in grads.items() if not np.abs(g).max() > 2e-5] == WITHOUT_EFFECT


def test_windows_equal_dense_attention_under_their_masks(tmp_path, monkeypatch):
    inputs, velocity = golden("hunyuan_video")
    inputs["text_lengths"] = jnp.array([5, 0], jnp.int32)
    model = _pretrained(tmp_path)
    got = run(model, inputs, RULES)
    monkeypatch.setattr(joint, "gna_joint", dense_joint)
    np.testing.assert_allclose(got, run(model, inputs, RULES), atol=2e-5)
    assert np.abs(got - velocity).max() > 1e-2


@pytest.mark.slow
def test_remat_changes_no_gradient(tmp_path):
    inputs, _ = golden("hunyuan_video")
    got, want = (gradients(_pretrained(tmp_path, remat=r), inputs, RULES)[1] for r in (True, False))
    for name, gradient in want.items():
        scale = max(np.abs(gradient).max(), 1.0)
        np.testing.assert_allclose(got[name], gradient, atol=1e-5 * scale, err_msg=name)


@pytest.mark.slow
def test_bfloat16_computes_in_bfloat16(tmp_path):
    inputs, velocity = golden("hunyuan_video")
    model = _pretrained(tmp_path, dtype=jnp.bfloat16, implementation="reference")
    with jax.numpy_dtype_promotion("standard"):  # flax's norms need it
        out = run(model, inputs)
    assert out.dtype == jnp.bfloat16
    assert np.abs(np.float32(out) - velocity).mean() < 0.05 * np.abs(velocity).mean()


def test_published_size():
    """From one block of each kind and one more, because 60 take long to make even without values."""

    def parameters(num_double, num_single):
        size = HunyuanVideoConfig(num_double=num_double, num_single=num_single)
        return count_parameters(
            nnx.eval_shape(lambda: HunyuanVideoTransformer(size, rngs=nnx.Rngs(0)))
        )

    bare, double, single = parameters(0, 0), parameters(1, 0), parameters(0, 1)
    assert bare + 20 * (double - bare) + 40 * (single - bare) == 12_821_012_544
    size = HUNYUAN_VIDEO["t2v"]
    entries = hunyuan_video_entries(
        size.num_double, size.num_single, size.num_refiner, 24, 3072, size.guidance
    )
    assert len({key for entry in entries.values() for key in entry.sources}) == 1264


@pytest.mark.slow
def test_whole_published_model():
    model = nnx.eval_shape(lambda: hunyuan_video(rngs=nnx.Rngs(0)))
    assert count_parameters(model) == 12_821_012_544


def test_other_checkpoints_are_refused_by_key(tmp_path):
    model = nnx.eval_shape(lambda: HunyuanVideoTransformer(TINY, rngs=nnx.Rngs(0)))

    def lose(weights):
        del weights["context_embedder.proj_in.bias"]

    with pytest.raises(ValueError, match=r"1 missing: context_embedder\.proj_in\.bias; 0 that"):
        model.load_pretrained(golden_weights("hunyuan_video", tmp_path, lose))


def test_wrong_inputs_are_named():
    inputs, _ = golden("hunyuan_video")
    model = nnx.eval_shape(lambda: HunyuanVideoTransformer(TINY, rngs=nnx.Rngs(0)))

    def call(rules=None, **change):
        return nnx.eval_shape(lambda m: m(**(inputs | change), rules=rules), model)

    with pytest.raises(ValueError, match=r"a multiple of the patch \(1, 2, 2\) .* got \(3, 7, 6\)"):
        call(latents=jnp.zeros((2, 3, 7, 6, 3)))
    with pytest.raises(ValueError, match="needs guidance, one scale per sample; got none"):
        call(guidance=None)
    with pytest.raises(ValueError, match="got 2 axes at layer 0"):
        call(rules=Neighborhood.of(2, window_size=2))
    with pytest.raises(ValueError, match=r"got window_size=\(4, 4, 4\), .* layout \(3, 4, 3\)"):
        call(rules=Neighborhood.of(3, window_size=4))
    with pytest.raises(ValueError, match="HunyuanVideo comes as 't2v'; got 'i2v'"):
        hunyuan_video("i2v", rngs=nnx.Rngs(0))
