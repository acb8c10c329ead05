"""Batch and head sharding on Explicit and Auto meshes and in shard_map: same results, sharding kept, nothing gathered."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_suite import BIAS, Results, attend, case_of, check_close, differentiate, oracle
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from gna_jax.attention import slab_attention

P = PartitionSpec
FLOAT32 = 1e-5
CASE = case_of((6, 5), (3, 4), batch=4, kv_heads=2, heads_per_kv=2, stride=(2, 1))
EXTRAS = case_of(
    (6, 5), (3, 4), batch=4, kv_heads=2, heads_per_kv=2, num_additional=3, has_bias=True
)
ONE_SAMPLE = case_of((6, 5), (3, 4), batch=1, kv_heads=2)
SPECS = {
    "batch": P("x"),
    "heads": P(None, None, None, "y"),
    "both": P("x", None, None, "y"),
}


def mesh_of(axis_type):
    """2 x 2 devices; axis types Explicit are JAX's default."""
    return jax.make_mesh((2, 2), ("x", "y"), axis_types=(axis_type,) * 2)


def placed(case, mesh, spec, tokens=("query", "key", "value")):
    """Operands and cotangents: `tokens` sharded as `spec`, the rest replicated."""
    arrays, (dout, dlse) = case.inputs(np.float32), case.cotangents(np.float32)
    put = lambda x, s: jax.device_put(x, NamedSharding(mesh, s))
    arrays = {name: put(x, spec if name in tokens else P()) for name, x in arrays.items()}
    return arrays, (put(dout, spec), put(dlse, spec))


def forward(case):
    return lambda arrays: attend(case, arrays)


def forward_and_backward(case):
    return lambda arrays, cotangents: differentiate(forward(case), arrays, cotangents)


def gathered(program):
    """Elements of every all-gather's result in a compiled program."""
    shapes = re.findall(r"= \(?\w+\[([\d,]*)\][^=\n]* all-gather(?:-start)?\(", program.as_text())
    text = program.as_text()
    assert len(shapes) == len(re.findall(r" all-gather(?:-start)?\(", text))
    return [math.prod(map(int, filter(None, shape.split(",")))) for shape in shapes]


def is_sharded_as(array, spec):
    """Same placement as `spec` on the array's mesh."""
    expected = NamedSharding(array.sharding.mesh, spec)
    return array.sharding.is_equivalent_to(expected, array.ndim)


def check_program(case, mesh, spec, arrays, cotangents):
    """Forward, then forward and backward: values, output sharding, and what the partitioner moved."""
    want = oracle(case, case.inputs(np.float32), case.cotangents(np.float32))
    program = jax.jit(forward(case)).lower(arrays).compile()
    assert gathered(program) == []
    out, lse = program(arrays)
    check_close(Results(out, lse, {}), Results(want.out, want.lse, {}), FLOAT32)
    assert is_sharded_as(out, spec) and is_sharded_as(lse, spec)

    program = jax.jit(forward_and_backward(case)).lower(arrays, cotangents).compile()
    got = program(arrays, cotangents)
    check_close(got, want, FLOAT32)
    for name in ("query", "key", "value"):
        assert is_sharded_as(got.gradients[name], spec), name
    shards = [math.prod(arrays[n].sharding.shard_shape(arrays[n].shape)) for n in ("query", "key")]
    # Only the small gradients of replicated additional tokens, whose types say replicated, may be gathered.
    assert all(size < min(shards) for size in gathered(program))
    if not case.num_additional:
        assert gathered(program) == []


@pytest.mark.parametrize("case", [CASE, EXTRAS], ids=["plain", "extras"])
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("axis_type", [AxisType.Explicit, AxisType.Auto], ids=["explicit", "auto"])
def test_plain_jit(axis_type, name, case):
    mesh = mesh_of(axis_type)
    check_program(case, mesh, SPECS[name], *placed(case, mesh, SPECS[name]))


@pytest.mark.parametrize("axis_type", [AxisType.Explicit, AxisType.Auto], ids=["explicit", "auto"])
def test_under_set_mesh(axis_type):
    mesh = mesh_of(axis_type)
    with jax.set_mesh(mesh):
        check_program(EXTRAS, mesh, SPECS["both"], *placed(EXTRAS, mesh, SPECS["both"]))


def test_explicit_types_say_the_sharding():
    """In the traced program, not only on devices."""
    mesh = mesh_of(AxisType.Explicit)
    arrays, _ = placed(EXTRAS, mesh, SPECS["both"])
    with jax.set_mesh(mesh):
        out, lse = jax.eval_shape(forward(EXTRAS), arrays)
    assert out.sharding.spec == P("x", None, None, "y", None)
    assert lse.sharding.spec == P("x", None, None, "y")


@pytest.mark.slow
def test_eager_on_an_explicit_mesh():
    mesh = mesh_of(AxisType.Explicit)
    arrays, cotangents = placed(EXTRAS, mesh, SPECS["both"])
    want = oracle(EXTRAS, EXTRAS.inputs(np.float32), EXTRAS.cotangents(np.float32))
    got = forward_and_backward(EXTRAS)(arrays, cotangents)
    check_close(got, want, FLOAT32)
    assert is_sharded_as(got.out, SPECS["both"])


def test_reference_on_an_explicit_mesh():
    """The dense reference takes unsharded arrays of a mesh; sharding is the other implementations' business."""
    mesh = mesh_of(AxisType.Explicit)
    arrays, _ = placed(CASE, mesh, P())
    out, _ = jax.jit(lambda a: attend(CASE, a, implementation="reference"))(arrays)
    want = oracle(CASE, CASE.inputs(np.float32), CASE.cotangents(np.float32))
    check_close(Results(out, want.lse, {}), Results(want.out, want.lse, {}), FLOAT32)


@pytest.mark.parametrize("sharded", ["batch", "mapped"])
@pytest.mark.parametrize("axis_type", [AxisType.Explicit, AxisType.Auto], ids=["explicit", "auto"])
def test_vmap_on_a_mesh(axis_type, sharded):
    """A mapped axis joins the batch axis: with the batch sharded, and with samples mapped over a sharded axis."""
    mesh = mesh_of(axis_type)
    case, spec = (CASE, P(None, "x")) if sharded == "batch" else (ONE_SAMPLE, P("x"))
    entries = [case.inputs(np.float32) for _ in range(2)]
    entries[1] = {name: -x for name, x in entries[1].items()}
    put = lambda x: jax.device_put(x, NamedSharding(mesh, spec))
    arrays = {name: put(np.stack([e[name] for e in entries])) for name in entries[0]}
    cotangents = case.cotangents(np.float32)
    stacked = tuple(put(np.stack([x, x])) for x in cotangents)
    program = jax.jit(jax.vmap(forward_and_backward(case))).lower(arrays, stacked).compile()
    assert gathered(program) == []
    got = program(arrays, stacked)
    for n, entry in enumerate(entries):
        one = jax.tree.map(lambda x, n=n: np.asarray(x)[n], got)
        check_close(one, oracle(case, entry, cotangents), FLOAT32)
    assert is_sharded_as(got.out, spec)


def mapped(case, mesh, specs, out_spec):
    return jax.shard_map(
        forward(case), mesh=mesh, in_specs=(specs,), out_specs=(out_spec, out_spec), check_vma=True
    )


SHARD_MAPS = {
    "batch": (EXTRAS, {"query": P("x"), "additional_keys": P("x"), BIAS: P()}, P("x")),
    "batch-replicated-extras": (
        # The same text tokens for every sample would need a batch axis: here only the bias is replicated.
        case_of((6, 5), (3, 4), batch=4, kv_heads=2, has_bias=True),
        {"query": P("x"), BIAS: P()},
        P("x"),
    ),
    "heads": (
        EXTRAS,
        {
            "query": P(None, None, None, "y"),
            "additional_keys": P(None, None, "y"),
            BIAS: P("y"),
        },
        P(None, None, None, "y"),
    ),
    "heads-multi-query": (
        # One key/value head, replicated: every device has it, its gradient is their sum.
        case_of(
            (6, 5), (3, 4), batch=2, kv_heads=1, heads_per_kv=4, num_additional=2, has_bias=True
        ),
        {"query": P(None, None, None, "y"), "key": P(), "additional_keys": P(), BIAS: P("y")},
        P(None, None, None, "y"),
    ),
    "both": (
        EXTRAS,
        {
            "query": P("x", None, None, "y"),
            "additional_keys": P("x", None, "y"),
            BIAS: P("y"),
        },
        P("x", None, None, "y"),
    ),
}


@pytest.mark.parametrize("axis_type", [AxisType.Explicit, AxisType.Auto], ids=["explicit", "auto"])
@pytest.mark.parametrize("name", SHARD_MAPS)
def test_shard_map(name, axis_type):
    case, given, out_spec = SHARD_MAPS[name]
    mesh = mesh_of(axis_type)
    arrays, cotangents = case.inputs(np.float32), case.cotangents(np.float32)
    specs = given | {"key": given.get("key", given["query"])}
    specs |= {"value": specs["key"]}
    if "additional_keys" in given:
        specs["additional_values"] = given["additional_keys"]
    specs = {name: specs[name] for name in arrays}
    arrays = {n: jax.device_put(x, NamedSharding(mesh, specs[n])) for n, x in arrays.items()}
    cotangents = tuple(jax.device_put(x, NamedSharding(mesh, out_spec)) for x in cotangents)
    function = mapped(case, mesh, specs, out_spec)
    want = oracle(case, case.inputs(np.float32), case.cotangents(np.float32))
    program = jax.jit(function).lower(arrays).compile()
    assert gathered(program) == []
    out, lse = program(arrays)
    check_close(Results(out, lse, {}), Results(want.out, want.lse, {}), FLOAT32)

    def both(arrays, cotangents):
        return differentiate(function, arrays, cotangents)

    program = jax.jit(both).lower(arrays, cotangents).compile()
    assert gathered(program) == []
    check_close(program(arrays, cotangents), want, FLOAT32)


def test_multi_query_with_replicated_keys_on_a_mesh():
    """Plain jit, query heads sharded, the one key/value head replicated: its gradient is all-reduced."""
    case = case_of((6, 5), (3, 4), batch=2, kv_heads=1, heads_per_kv=4)
    spec = SPECS["heads"]
    for axis_type in (AxisType.Explicit, AxisType.Auto):
        mesh = mesh_of(axis_type)
        arrays, cotangents = placed(case, mesh, spec, tokens=("query",))
        program = jax.jit(forward_and_backward(case)).lower(arrays, cotangents).compile()
        got = program(arrays, cotangents)
        check_close(
            got, oracle(case, case.inputs(np.float32), case.cotangents(np.float32)), FLOAT32
        )
        assert gathered(program) == []
        assert is_sharded_as(got.out, spec) and is_sharded_as(got.gradients["query"], spec)


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_sharded_space_raises(name):
    """On an Explicit mesh the types say so before anything runs."""
    mesh = mesh_of(AxisType.Explicit)
    arrays, _ = placed(CASE, mesh, P("x"))
    spec = P("x", "y")
    arrays[name] = jax.device_put(CASE.inputs(np.float32)[name], NamedSharding(mesh, spec))
    message = rf"spatial axes of {name} must not be sharded.*'y'.*slab_attention"
    with pytest.raises(ValueError, match=message):
        jax.jit(forward(CASE))(arrays)


def test_slabs_in_shard_map():
    """A spatial axis over devices by hand: the caller gathers what windows reach, origins differ per device."""
    case = case_of((8, 4), (3, 3), batch=2, has_bias=True, dilation=(2, 1))
    mesh = mesh_of(AxisType.Auto)
    arrays, cotangents = case.inputs(np.float32), case.cotangents(np.float32)
    rows = P(None, "x")

    def local(arrays):
        begin = jax.lax.axis_index("x") * 4
        whole = [jax.lax.all_gather(arrays[n], "x", axis=1, tiled=True) for n in ("key", "value")]
        return slab_attention(
            arrays["query"],
            *whole,
            jnp.stack([begin, jnp.zeros_like(begin)]),
            np.zeros(2, np.int32),
            global_layout=case.layout,
            relative_position_bias=arrays[BIAS],
            precision="highest",
            **case.geometry,
        )

    specs = {name: P() if name == BIAS else rows for name in arrays}
    function = jax.shard_map(local, mesh=mesh, in_specs=(specs,), out_specs=(rows, rows))
    got = jax.jit(lambda a, c: differentiate(function, a, c))(arrays, cotangents)
    check_close(got, oracle(case, arrays, cotangents), FLOAT32)
