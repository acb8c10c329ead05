"""FLUX.1 against diffusers' numbers, and its windows against dense attention under the same mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from mmdit_suite import dense_joint, golden, golden_weights, gradients, run

from gna_jax import Neighborhood
from gna_jax.models import joint
from gna_jax.models.checkpoint import count_parameters
from gna_jax.models.flux_checkpoint import flux_entries
from gna_jax.models.flux_model import FLUX, FluxConfig, FluxTransformer, flux

TINY = FluxConfig(
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
RULES = (
    Neighborhood.of(2, window_size=3),
    Neighborhood.of(2, window_size=(3, 4), stride=(1, 2)),
)


def _pretrained(tmp_path, **options):
    model = nnx.eval_shape(lambda: FluxTransformer(TINY, rngs=nnx.Rngs(0), **options))
    model.load_pretrained(golden_weights("flux", tmp_path))
    return model


def test_equals_diffusers_and_gradients_reach_every_parameter_under_remat(tmp_path):
    inputs, velocity = golden("flux")
    out, grads = gradients(_pretrained(tmp_path, remat=True), inputs)
    np.testing.assert_allclose(out, velocity, atol=1e-4)
    assert [name for name, g in grads.items() if not np.abs(g).max() > 1e-6] == []


def test_windows_equal_dense_attention_under_their_masks(tmp_path, monkeypatch):
    inputs, velocity = golden("flux")
    inputs["text_lengths"] = jnp.array([7, 2], jnp.int32)
    model = _pretrained(tmp_path)
    got = run(model, inputs, RULES)
    monkeypatch.setattr(joint, "gna_joint", dense_joint)
    np.testing.assert_allclose(got, run(model, inputs, RULES), atol=2e-5)
    assert np.abs(got - velocity).max() > 1e-2


@pytest.mark.slow
def test_remat_changes_no_gradient(tmp_path):
    inputs, _ = golden("flux")
    got, want = (gradients(_pretrained(tmp_path, remat=r), inputs, RULES)[1] for r in (True, False))
    for name, gradient in want.items():
        scale = np.abs(gradient).max()
        np.testing.assert_allclose(got[name], gradient, atol=1e-5 * scale, err_msg=name)


@pytest.mark.slow
def test_bfloat16_computes_in_bfloat16(tmp_path):
    inputs, velocity = golden("flux")
    model = _pretrained(tmp_path, dtype=jnp.bfloat16, implementation="reference")
    with jax.numpy_dtype_promotion("standard"):  # flax's norms need it
        out = run(model, inputs)
    assert out.dtype == jnp.bfloat16
    error = np.abs(np.float32(out) - velocity)
    assert error.mean() < 0.03 * np.abs(velocity).mean()


def test_published_sizes():
    """From one block of each kind and one more, because 57 take long to make even without values."""
    for name, count, keys in (("dev", 11_901_408_320, 1160), ("schnell", 11_891_178_560, 1156)):
        config = FLUX[name]

        def parameters(num_double, num_single, guidance=config.guidance):
            size = FluxConfig(num_double=num_double, num_single=num_single, guidance=guidance)
            return count_parameters(nnx.eval_shape(lambda: FluxTransformer(size, rngs=nnx.Rngs(0))))

        bare, double, single = parameters(0, 0), parameters(1, 0), parameters(0, 1)
        total = bare + config.num_double * (double - bare) + config.num_single * (single - bare)
        assert total == count
        entries = flux_entries(config.num_double, config.num_single, 24, 3072, config.guidance)
        assert len({key for entry in entries.values() for key in entry.sources}) == keys


@pytest.mark.slow
def test_whole_published_models():
    for name, count in (("dev", 11_901_408_320), ("schnell", 11_891_178_560)):
        assert count_parameters(nnx.eval_shape(lambda: flux(name, rngs=nnx.Rngs(0)))) == count  # noqa: B023


def test_other_checkpoints_are_refused_by_key(tmp_path):
    model = nnx.eval_shape(lambda: FluxTransformer(TINY, rngs=nnx.Rngs(0)))

    def lose(weights):
        del weights["transformer_blocks.0.attn.norm_added_q.weight"]
        weights["transformer_blocks.1.attn.norm_added_q.weight"] = np.ones(12, np.float32)

    with pytest.raises(
        ValueError,
        match=r"1 missing: transformer_blocks\.0\.attn\.norm_added_q\.weight; 1 that nothing uses: transformer_blocks\.1",
    ):
        model.load_pretrained(golden_weights("flux", tmp_path, lose))

    def widen(weights):
        weights["proj_out.weight"] = np.ones((16, 24), np.float32)

    with pytest.raises(
        ValueError,
        match=r"proj_out\.weight \(16, 24\) would become parameter output\.linear\.kernel",
    ):
        model.load_pretrained(golden_weights("flux", tmp_path, widen))


def test_wrong_inputs_are_named():
    inputs, _ = golden("flux")
    model = nnx.eval_shape(lambda: FluxTransformer(TINY, rngs=nnx.Rngs(0)))

    def call(rules=None, **change):
        return nnx.eval_shape(lambda m: m(**(inputs | change), rules=rules), model)

    with pytest.raises(
        ValueError,
        match=r"latents must have 4 axes, the last of 8 features; got shape \(2, 30, 8\)",
    ):
        call(latents=jnp.zeros((2, 30, 8)))
    with pytest.raises(ValueError, match=r"text must have 3 axes, the last of 12 features"):
        call(text=jnp.zeros((2, 7, 8)))
    with pytest.raises(ValueError, match="needs guidance, one scale per sample; got none"):
        call(guidance=None)
    with pytest.raises(ValueError, match="got 1 rules for 2 layers"):
        call(rules=RULES[:1])
    with pytest.raises(
        ValueError,
        match=r"window_size must not exceed the layout on any axis; got window_size=\(6, 6\)",
    ):
        call(rules=Neighborhood.of(2, window_size=6))
    with pytest.raises(ValueError, match=r"got rotary_dims=\(16, 56, 56\), head_dim=64"):
        FluxConfig(head_dim=64)
    with pytest.raises(ValueError, match="FLUX.1 comes as 'dev' or 'schnell'; got 'pro'"):
        flux("pro", rngs=nnx.Rngs(0))
