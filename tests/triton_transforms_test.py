"""JAX's transforms and meshes over the Triton kernels, in Triton's interpreter (TRITON_INTERPRET=1), against the float64 oracle.

What `vjp_test.py` and `sharding_test.py` ask of the XLA backend. The interpreter runs in callbacks, which tell nothing about what a
partitioner moves: `triton_sharding_test.py` asks that of compiled programs.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_suite import (
    BIAS,
    LENGTHS,
    attend,
    case_1d,
    case_of,
    check_array,
    check_close,
    differentiate,
    oracle,
    stacked,
)
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from triton_calls import LINE, SMALL, TOLERANCE, interpreting
from triton_suite import INTERPRETED

from gna_jax import gna, vjp
from gna_jax.sharding import gna_sharded
from gna_jax.tiling import Tiles

pytestmark = pytest.mark.triton

FLOAT32 = 2 * TOLERANCE[np.dtype(np.float32)]  # gradients of operands that several calls share
P = PartitionSpec
SIZE = 2
CASE = case_1d(
    14, 5, stride=2, heads_per_kv=2, num_additional=3, lengths=(1, 3), has_bias=True, tiles=LINE, **SMALL
)  # fmt: skip
EVERY = ("query", "key", "value", "additional_keys", "additional_values", LENGTHS, BIAS)


def triton(case, **options):
    return lambda arrays: attend(case, arrays, implementation="triton", **options)


def run(arrays, cotangents):
    return differentiate(triton(CASE), arrays, cotangents)


def interpreted(function, *arguments):
    """A jitted function's results as numpy arrays."""
    with interpreting():
        return jax.tree.map(np.asarray, jax.jit(function)(*arguments))


@pytest.mark.parametrize(
    "names", [EVERY, ("query",), ("key", "value", LENGTHS), (BIAS,)], ids="-".join
)
def test_vmap_of_gradients(names):
    """One gradient per entry, also of operands that are not mapped."""
    arrays, entries = stacked(CASE, names, SIZE)
    cotangents = CASE.cotangents(np.float32)
    axes = {name: 0 if name in names else None for name in arrays}
    got = interpreted(jax.vmap(run, in_axes=(axes, None)), arrays, cotangents)
    for n, entry in enumerate(entries):
        one = jax.tree.map(lambda x, n=n: x[n], got)
        check_close(one, oracle(CASE, entry, cotangents), FLOAT32, f"entry {n}")


def test_vmap_over_another_axis_and_cotangents():
    arrays, entries = stacked(CASE, ("query", BIAS), SIZE, axis=1)
    rng = np.random.default_rng(5)
    shapes = [(SIZE, *x.shape) for x in CASE.cotangents(np.float32)]
    cotangents = tuple(rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    axes = {name: 1 if name in ("query", BIAS) else None for name in arrays}
    got = interpreted(jax.vmap(run, in_axes=(axes, 0)), arrays, cotangents)
    for n, entry in enumerate(entries):
        one = jax.tree.map(lambda x, n=n: x[n], got)
        check_close(one, oracle(CASE, entry, tuple(x[n] for x in cotangents)), FLOAT32)


@pytest.mark.parametrize("names", [("key", "value", LENGTHS), (BIAS,)], ids="-".join)
def test_gradient_of_vmap(names):
    """Operands that are not mapped gather the gradients of all entries."""
    arrays, entries = stacked(CASE, names, SIZE)
    cotangents = tuple(np.stack([x] * SIZE) for x in CASE.cotangents(np.float32))
    axes = {name: 0 if name in names else None for name in arrays}
    mapped = jax.vmap(triton(CASE), in_axes=(axes,))
    got = interpreted(lambda a, c: differentiate(mapped, a, c), arrays, cotangents)
    wants = [oracle(CASE, entry, CASE.cotangents(np.float32)) for entry in entries]
    for name, gradient in got.gradients.items():
        parts = [want.gradients[name] for want in wants]
        check_array(gradient, np.stack(parts) if name in names else sum(parts), FLOAT32, name)
    check_array(got.out, np.stack([want.out for want in wants]), FLOAT32)
    check_array(got.lse, np.stack([want.lse for want in wants]), FLOAT32)


def test_nested_vmap():
    """Queries outside, keys and bias inside."""
    inner_names = ("key", "value", BIAS)
    queries, query_entries = stacked(CASE, ("query",), SIZE)
    keys, key_entries = stacked(CASE, inner_names, SIZE)
    cotangents = CASE.cotangents(np.float32)
    arrays = queries | {name: keys[name] for name in inner_names}
    inner = {name: 0 if name in inner_names else None for name in arrays}
    outer = {name: 0 if name == "query" else None for name in arrays}
    nested = jax.vmap(jax.vmap(run, in_axes=(inner, None)), in_axes=(outer, None))
    got = interpreted(nested, arrays, cotangents)
    for n, m in ((0, 1), (1, 0)):
        entry = key_entries[m] | {"query": query_entries[n]["query"]}
        one = jax.tree.map(lambda x, n=n, m=m: x[n, m], got)
        check_close(one, oracle(CASE, entry, cotangents), FLOAT32, (n, m))


def test_layers_in_scan_and_remat():
    """Two layers as of a model, computed again in the backward pass, against the XLA backend."""
    case = case_1d(16, 5, batch=1, heads_per_kv=1, has_bias=True, tiles=LINE, **SMALL)
    arrays = jax.tree.map(jnp.asarray, case.inputs(np.float32))

    def loss(arrays, implementation, tiles):
        others = {n: x for n, x in arrays.items() if n in ("key", "value", BIAS)}
        options = {"window_size": 5, "precision": "highest", "tiles": tiles}

        @jax.checkpoint
        def layer(x, _):
            return x + gna(x, **others, **options, implementation=implementation), None

        return jnp.sum(jax.lax.scan(layer, arrays["query"], None, length=2)[0] ** 2)

    want = jax.jit(jax.grad(lambda a: loss(a, "xla", None)))(arrays)
    got = interpreted(jax.grad(lambda a: loss(a, "triton", LINE)), arrays)
    for name, gradient in got.items():
        check_array(gradient, want[name], 2 * FLOAT32, name)


def count_callbacks(jaxpr):
    """Kernels of a jaxpr, nested ones too: each is one callback."""
    count = 0
    for eqn in jaxpr.eqns:
        count += eqn.primitive.name == "pure_callback"
        for inner in jax.tree.leaves(list(eqn.params.values())):
            inner = getattr(inner, "jaxpr", inner)
            count += count_callbacks(inner) if hasattr(inner, "eqns") else 0
    return count


def test_remat_saves_out_and_lse_by_name():
    """With the policy the forward kernel runs once, without twice; the backward pass has three kernels."""
    arrays = CASE.inputs(np.float32)
    lengths = arrays.pop(LENGTHS)
    save = jax.checkpoint_policies.save_only_these_names(vjp.OUT_NAME, vjp.LSE_NAME)

    def loss(arrays):
        out, lse = triton(CASE)(arrays | {LENGTHS: lengths})
        return jnp.sum(jnp.tanh(out)) + jnp.sum(jnp.sin(lse))

    def kernels(policy):
        gradient = jax.grad(jax.checkpoint(loss, policy=policy))
        return count_callbacks(jax.make_jaxpr(gradient)(arrays).jaxpr)

    with interpreting():
        assert count_callbacks(jax.make_jaxpr(jax.grad(loss))(arrays).jaxpr) == 4
        assert kernels(save) == 4
        assert kernels(jax.checkpoint_policies.nothing_saveable) == 5


def test_forward_mode_raises():
    x = np.ones((1, 16, 1, 16), np.float32)
    function = lambda x: gna(x, x, x, window_size=3, implementation="triton", tiles=LINE)
    with interpreting(), pytest.raises(TypeError, match="forward-mode.*custom_vjp"):
        jax.jvp(function, (x,), (x,))


def test_donated_operands():
    """Memory of queries, keys and values that a call may overwrite."""
    case = case_1d(20, 5, batch=1, heads_per_kv=1, tiles=LINE, **SMALL)
    arrays, cotangents = case.inputs(np.float32), case.cotangents(np.float32)
    want = oracle(case, arrays, cotangents)

    def step(arrays, cotangents):
        got = differentiate(triton(case), arrays, cotangents)
        return got, jax.tree.map(lambda x, g: x + g, arrays, got.gradients)

    given = jax.tree.map(jnp.array, arrays)
    with interpreting():
        got, moved = jax.tree.map(
            np.asarray,
            jax.jit(step, donate_argnums=0)(given, jax.tree.map(jnp.asarray, cotangents)),
        )
    assert all(x.is_deleted() for x in given.values())
    check_close(got, want, FLOAT32)
    for name, x in moved.items():
        check_array(x, arrays[name] + want.gradients[name], FLOAT32, name)


MESHED = case_of((3, 5), (3, 4), batch=2, kv_heads=2, tiles=Tiles((4, 4), (2, 8)), **SMALL)
EXTRAS = dataclasses.replace(MESHED, num_additional=3, lengths=(1, 3), has_bias=True)
HEADS = P("x", None, None, "y")
SPECS = {
    "query": HEADS,
    "key": HEADS,
    "value": HEADS,
    "additional_keys": P("x", None, "y"),
    "additional_values": P("x", None, "y"),
    LENGTHS: P("x"),
    BIAS: P("y"),
}


def mesh_of(axis_type):
    return jax.make_mesh((2, 2), ("x", "y"), axis_types=(axis_type,) * 2)


def placed(case, mesh):
    """Operands and cotangents, split over batch and heads."""
    put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
    arrays = {name: put(x, SPECS[name]) for name, x in case.inputs(np.float32).items()}
    return arrays, tuple(put(x, HEADS) for x in case.cotangents(np.float32))


def check_on_mesh(case, function, mesh):
    arrays, cotangents = placed(case, mesh)
    got = interpreted(lambda a, c: differentiate(function, a, c), arrays, cotangents)
    want = oracle(case, case.inputs(np.float32), case.cotangents(np.float32))
    check_close(got, want, FLOAT32)


@pytest.mark.parametrize("axis_type", [AxisType.Explicit, AxisType.Auto], ids=["explicit", "auto"])
def test_sharded_inputs(axis_type):
    check_on_mesh(EXTRAS, triton(EXTRAS), mesh_of(axis_type))


def test_shard_map():
    """Its mesh hides the device that `interpret_gpu` plays, so the call names it."""
    mesh = mesh_of(AxisType.Auto)
    specs = {name: SPECS[name] for name in EXTRAS.inputs(np.float32)}
    function = jax.shard_map(
        triton(EXTRAS, device=INTERPRETED),
        mesh=mesh,
        in_specs=(specs,),
        out_specs=(HEADS, HEADS),
        check_vma=True,
    )
    check_on_mesh(EXTRAS, function, mesh)


def test_gna_sharded_over_batch_and_heads():
    mesh = mesh_of(AxisType.Auto)

    def function(arrays):
        tokens = [arrays[name] for name in ("query", "key", "value")]
        more = {name: x for name, x in arrays.items() if name not in ("query", "key", "value")}
        return gna_sharded(
            *tokens,
            **more,
            **EXTRAS.geometry,
            spec=P("x", None, None, "y", None),
            mesh=mesh,
            return_lse=True,
            precision="highest",
            tiles=EXTRAS.tiles,
            implementation="triton",
            device=INTERPRETED,
        )

    check_on_mesh(EXTRAS, function, mesh)
