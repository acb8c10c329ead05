"""Blocks and models over data, heads and space of 8 devices train as on one, their weights sharded, no image gathered."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from mmdit_suite import golden, golden_weights, run
from models_flux_test import TINY
from sharded_modules import (
    AUTO,
    EXPLICIT,
    P,
    arrays_of,
    assert_close,
    check_training_step,
    gathered,
    mesh_of,
    permutes,
    placed,
)

from gna_jax import Neighborhood
from gna_jax.models.cosmos_blocks import CosmosBlock, TimeVectors
from gna_jax.models.cosmos_model import CosmosTransformer, cosmos_rotation
from gna_jax.models.cosmos_presets import CosmosConfig
from gna_jax.models.flux_model import FluxConfig, FluxTransformer
from gna_jax.models.hdit_layers import GLOBAL, Level, Mapping
from gna_jax.models.hdit_model import HDiT, HDiTConfig
from gna_jax.models.hunyuan_video_model import HunyuanVideoConfig, HunyuanVideoTransformer
from gna_jax.models.joint import gna_joint
from gna_jax.models.mmdit import DoubleStreamBlock, SingleStreamBlock
from gna_jax.models.nat_model import NAT
from gna_jax.models.nat_presets import NATConfig

VIDEO = P("data", "time", None, None, "heads", None)
PLANE = P("data", "time", None, "heads", None)
LAYOUT, TEXT, WIDTH = (8, 2, 3), 5, 16
RULE = Neighborhood.of(3, window_size=(3, 2, 2), stride=(2, 1, 1))
IMAGE, SAMPLE = P("data", "time"), P("data")
AXIS_TYPES = pytest.mark.parametrize("axis_type", [AUTO, EXPLICIT], ids=["auto", "explicit"])


def by(spec):
    """On one device by the dense reference: another implementation, and one that compiles soon."""
    return {"spec": spec, "implementation": "reference" if spec is None else None}


@pytest.mark.slow
def test_joint_attention():
    """Text queries see image keys on every device; one sample has no text at all."""
    image, text = [(4, 4, 3, 2, 8)] * 3, [(4, TEXT, 2, 8)] * 3
    lengths = jnp.asarray([3, 0, 5, 1], jnp.int32)

    def attend(spec, **options):
        geometry = {"window_size": 3, "stride": (2, 1), "text_lengths": lengths}
        return lambda *arrays: gna_joint(*arrays, return_lse=True, spec=spec, **geometry, **options)

    arrays = tuple(arrays_of(image + text))
    want = attend(None, implementation="reference")(*arrays)
    mesh, rows = mesh_of(AUTO), P("data", None, "heads")
    with jax.set_mesh(mesh):
        program = jax.jit(attend(PLANE)).lower(*placed(arrays, (PLANE,) * 3 + (rows,) * 3, mesh))
        program = program.compile()
        got = program(*placed(arrays, (PLANE,) * 3 + (rows,) * 3, mesh))
    for one, other in zip(got, want, strict=True):
        assert np.array_equal(np.isneginf(one), np.isneginf(other))
        assert_close(np.nan_to_num(one, neginf=0), np.nan_to_num(other, neginf=0))
    assert gathered(program) == [] and permutes(program) > 0


@pytest.mark.slow
@AXIS_TYPES
@pytest.mark.parametrize("block", [DoubleStreamBlock, SingleStreamBlock])
def test_mmdit_blocks(block, axis_type):
    image, text, vector = arrays_of([(2, *LAYOUT, WIDTH), (2, TEXT, WIDTH), (2, WIDTH)])
    lengths = jnp.asarray([3, 5], jnp.int32)
    check_training_step(
        lambda spec: block(WIDTH, 2, 8, 24, **by(spec), rngs=nnx.Rngs(0)),
        VIDEO,
        (image, text, vector, None, lengths),
        (IMAGE, SAMPLE, SAMPLE, None, SAMPLE),
        image=image.size // 4,
        axis_type=axis_type,
        rule=RULE,
    )


COSMOS = CosmosConfig(
    num_layers=1,
    num_heads=2,
    head_dim=12,
    in_channels=4,
    out_channels=4,
    patch_size=(1, 2, 2),
    text_features=10,
    modulation_rank=6,
    max_size=(16, 16, 16),
    mlp_ratio=2.0,
)


@pytest.mark.slow
@AXIS_TYPES
def test_cosmos_block(axis_type):
    width = COSMOS.features
    shapes = [(2, *LAYOUT, width), (2, TEXT, 10), (2, 1, 1, 1, width), (2, 1, 1, 1, 3 * width)]
    image, text, *vectors = arrays_of(shapes)
    rotation = cosmos_rotation(COSMOS, LAYOUT)
    check_training_step(
        lambda spec: CosmosBlock(COSMOS, **by(spec), rngs=nnx.Rngs(0)),
        VIDEO,
        (image, text, TimeVectors(*vectors), rotation, None, jnp.asarray([3, 5], jnp.int32)),
        (IMAGE, SAMPLE, TimeVectors(SAMPLE, SAMPLE), type(rotation)(P(), P()), None, SAMPLE),
        image=image.size // 4,
        axis_type=axis_type,
        rule=RULE,
    )


@pytest.mark.slow
def test_cosmos_over_two_spatial_axes():
    """Neither of which is the first: flat tokens of such a grid could not stay sharded."""
    video, time, text = arrays_of([(2, 2, 8, 8, 4), (2,), (2, TEXT, 10)])
    spec = P(None, None, "data", "time", "heads", None)
    check_training_step(
        lambda spec: CosmosTransformer(COSMOS, **by(spec), rngs=nnx.Rngs(0)),
        spec,
        (video, time, text),
        (P(*spec[:4]), P(), P()),
        image=2 * 2 * 4 * 4 * COSMOS.features // 4,
        rules=Neighborhood.of(3, window_size=(2, 3, 2)),
    )


@AXIS_TYPES
def test_weights_load_into_an_abstract_model_where_its_spec_puts_them(tmp_path, axis_type):
    with jax.set_mesh(mesh_of(axis_type)):
        model = nnx.eval_shape(lambda: FluxTransformer(TINY, spec=PLANE, rngs=nnx.Rngs(0)))
        model.load_pretrained(golden_weights("flux", tmp_path))
    kernel = model.double_blocks[0].image.heads.query.kernel[...]
    assert kernel.sharding.spec == P(None, "heads", None)
    assert kernel.sharding.shard_shape(kernel.shape)[1] == 1


@pytest.mark.slow
def test_loaded_flux_equals_diffusers(tmp_path):
    inputs, velocity = golden("flux")
    with jax.set_mesh(mesh_of(AUTO)):
        model = nnx.eval_shape(lambda: FluxTransformer(TINY, spec=PLANE, rngs=nnx.Rngs(0)))
        model.load_pretrained(golden_weights("flux", tmp_path))
        out = run(model, inputs)
    np.testing.assert_allclose(out, velocity, atol=1e-4)


@pytest.mark.slow
def test_flux():
    config = FluxConfig(8, 8, 1, 1, 2, 16, 12, 10, True, (4, 6, 6), mlp_ratio=2.0)
    shapes = [(2, 8, 6, 8), (2, TEXT, 12), (2, 10), (2,), (2,)]
    check_training_step(
        lambda spec: FluxTransformer(config, **by(spec), rngs=nnx.Rngs(0)),
        PLANE,
        tuple(arrays_of(shapes)),
        (IMAGE, *[SAMPLE] * 4),
        image=8 * 6 * 32 // 2,
        rules=Neighborhood.of(2, window_size=(5, 4), stride=(2, 2)),
    )


@pytest.mark.slow
@pytest.mark.parametrize("remat", [False, True], ids=["", "remat"])
def test_hunyuan_video(remat):
    config = HunyuanVideoConfig(
        4, 4, (1, 2, 2), 1, 1, 1, 2, 16, 12, 10, True, (4, 6, 6), mlp_ratio=2.0
    )
    latents, text, pooled, time, guidance = arrays_of(
        [(2, 8, 4, 6, 4), (2, TEXT, 12), (2, 10), (2,), (2,)]
    )
    check_training_step(
        lambda spec: HunyuanVideoTransformer(config, remat=remat, **by(spec), rngs=nnx.Rngs(0)),
        VIDEO,
        (latents, text, pooled, time, guidance),
        (IMAGE, *[SAMPLE] * 4),
        image=8 * 2 * 3 * 32 // 2,
        rules=RULE,
    )


@pytest.mark.slow
def test_hdit():
    """A level with windows and a global one, whose keys go all around."""
    levels = (
        Level(1, 16, 3, feed_forward=16, head_dim=8),
        Level(1, 32, GLOBAL, feed_forward=16, head_dim=8),
    )
    config = HDiTConfig(levels, Mapping(1, 8, 8), 3, (2, 2), num_classes=3)
    images, sigma = arrays_of([(2, 16, 12, 3), (2,)])
    check_training_step(
        lambda spec: HDiT(config, **by(spec), rngs=nnx.Rngs(0)),
        PLANE,
        (images, jnp.abs(sigma) + 0.1, jnp.asarray([0, 2], jnp.int32)),
        (IMAGE, SAMPLE, SAMPLE),
        image=4 * 3 * 32 // 2,
    )


@pytest.mark.slow
def test_nat_over_batch_and_heads():
    config = NATConfig(16, (1, 1), (2, 4), 2.0, 3, ((1,), (2,)))
    (images,) = arrays_of([(4, 32, 24, 3)])
    check_training_step(
        lambda spec: NAT(config, num_classes=5, **by(spec), rngs=nnx.Rngs(0)),
        P(("data", "time"), None, None, "heads", None),
        (images,),
        (P(("data", "time")),),
        image=8 * 6 * 16,
        exchanges=False,
    )


def test_nat_refuses_sharded_space():
    with pytest.raises(NotImplementedError, match=r"NAT shards batch and heads.*'time'"):
        NAT(NATConfig(16, (1,), (2,), 2.0), spec=PLANE, rngs=nnx.Rngs(0))
