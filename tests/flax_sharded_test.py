"""`GNAttention` with a `spec` over data, heads and space of 8 devices: trains as on one device, weights stay sharded."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from sharded_modules import (
    AUTO,
    EXPLICIT,
    P,
    arrays_of,
    assert_close,
    check_training_step,
    gathered,
    mesh_of,
    placed,
)

from gna_jax.flax import GNAttention, attention_fn
from gna_jax.flax.linen import GNAttention as LinenGNAttention
from gna_jax.flax.partition import check_spec

SPEC = P("data", "time", None, "heads", None)
WIDTH, HEADS = 16, 4
OPTIONS = {"window_size": (3, 5), "stride": (2, 1)}
ROWS = P("data", "time")


def made_by(rngs, spec, **options):
    return GNAttention(HEADS, WIDTH, **OPTIONS, spec=spec, rngs=rngs, **options)


def check_attention(axis_type, **options):
    (x,) = arrays_of([(2, 8, 6, WIDTH)])
    out, _ = check_training_step(
        lambda spec: made_by(nnx.Rngs(0), spec, **options),
        SPEC,
        (x,),
        (ROWS,),
        image=x.size // 4,
        axis_type=axis_type,
    )
    assert P(*out.sharding.spec[:2]) == ROWS


def test_training_step():
    check_attention(AUTO)


@pytest.mark.slow
@pytest.mark.parametrize("axis_type", [AUTO, EXPLICIT], ids=["auto", "explicit"])
def test_training_step_with_everything(axis_type):
    check_attention(axis_type, normalize_qk=True, relative_position_bias=True, num_kv_heads=2)


def test_spec_shards_parameters_unless_told_otherwise():
    with jax.set_mesh(mesh_of(AUTO)):
        module = made_by(nnx.Rngs(0), SPEC, relative_position_bias=True)
        told = made_by(nnx.Rngs(0), SPEC, kernel_metadata={}, out_kernel_metadata={"note": 1})
        specs = nnx.to_pure_dict(nnx.get_partition_spec(nnx.state(module)))
    into = {"kernel": P(None, "heads", None), "bias": P("heads", None)}
    out_of = {"kernel": P("heads", None, None), "bias": P(None)}
    parts = {"query": into, "key": into, "value": into, "out": out_of}
    assert specs == parts | {"relative_position_bias": P("heads", None, None)}
    assert module.query.kernel[...].sharding.spec == into["kernel"]
    assert "out_sharding" not in told.query.kernel.get_metadata()
    assert told.out.kernel.note == 1 and told.query.bias.out_sharding == ("heads", None)
    # A spec without heads leaves parameters where they are, mesh or none.
    plain = made_by(nnx.Rngs(0), P("data", "time", None, None, None), relative_position_bias=True)
    assert "out_sharding" not in plain.query.kernel.get_metadata()


def check_same_outside_and_on_the_mesh(attend, x, axis_type):
    """`attend(spec)` is a function of one array; on the mesh nothing as large as a shard of it is gathered."""
    want = jax.jit(attend(None))(x)
    mesh = mesh_of(axis_type)
    with jax.set_mesh(mesh):
        x = placed(x, P(*SPEC[: x.ndim - 1]) if x.ndim == 4 else SPEC, mesh)
        program = jax.jit(attend(SPEC)).lower(x).compile()
        got = program(x)
    assert_close(got, want)
    assert all(size < x.size // 8 for size in gathered(program))
    assert P(*got.sharding.spec[:2]) == ROWS


@pytest.mark.slow
@pytest.mark.parametrize("axis_type", [AUTO, EXPLICIT], ids=["auto", "explicit"])
def test_linen_twin(axis_type):
    (x,) = arrays_of([(2, 8, 6, WIDTH)])
    params = LinenGNAttention(HEADS, **OPTIONS).init(jax.random.key(0), x)

    def attend(spec):
        twin = LinenGNAttention(HEADS, **OPTIONS, spec=spec)
        return lambda x: twin.apply(params, x)

    check_same_outside_and_on_the_mesh(attend, x, axis_type)


@pytest.mark.slow
@pytest.mark.parametrize("axis_type", [AUTO, EXPLICIT], ids=["auto", "explicit"])
def test_linen_twin_with_sharded_kernels(axis_type):
    """The output is a sum over devices, which the twin tells Explicit types where to end."""
    (x,) = arrays_of([(2, 8, 6, WIDTH)])
    want, params = LinenGNAttention(HEADS, **OPTIONS).init_with_output(jax.random.key(0), x)
    mesh = mesh_of(axis_type)
    twin = LinenGNAttention(HEADS, **OPTIONS, spec=SPEC)
    into = {"kernel": P(None, "heads"), "bias": P("heads")}
    specs = dict.fromkeys(("query", "key", "value"), into)
    specs = {"params": specs | {"out": {"kernel": P("heads"), "bias": P()}}}
    with jax.set_mesh(mesh):
        params, x = placed((params, x), (specs, ROWS), mesh)
        out = jax.jit(twin.apply)(params, x)
    assert_close(out, want)
    assert P(*out.sharding.spec[:2]) == ROWS


@pytest.mark.slow
def test_attention_fn_in_flax_module():
    (x,) = arrays_of([(2, 8, 6, WIDTH)])

    def attend(spec):
        window = attention_fn(**OPTIONS, spec=spec)
        return nnx.MultiHeadAttention(
            HEADS, WIDTH, attention_fn=window, decode=False, rngs=nnx.Rngs(0)
        )

    check_same_outside_and_on_the_mesh(attend, x, AUTO)


def test_attention_fn_takes_one_batch_axis():
    q = jnp.zeros((1, 2, 8, 6, HEADS, 4))
    with pytest.raises(ValueError, match=r"exactly one batch axis.*got 2 .*reshape"):
        attention_fn(**OPTIONS, spec=SPEC)(q, q, q)


@pytest.mark.parametrize(
    "spec, rank", [(P("data"), None), (SPEC, 3), (P(None, None, None, None, "heads"), 2)]
)
def test_spec_names_every_axis(spec, rank):
    with pytest.raises(ValueError, match=r"one entry per axis.*got spec=" + re.escape(str(spec))):
        check_spec(spec, rank)


def test_rank_of_spec_is_that_of_the_window():
    with pytest.raises(ValueError, match="that is 6 of them"):
        GNAttention(HEADS, WIDTH, window_size=(3, 3, 3), spec=SPEC, rngs=nnx.Rngs(0))


def test_spec_needs_a_mesh():
    module = made_by(nnx.Rngs(0), P("data", None, None, None, None))
    with pytest.raises(ValueError, match="set_mesh"):
        nnx.jit(lambda m, x: m(x))(module, np.zeros((2, 8, 6, WIDTH), np.float32))
