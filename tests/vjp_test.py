"""JAX's transforms over the custom_vjp: jit, vmap in every order, remat with a policy, export, and what must raise."""

import contextlib
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_suite import (
    BIAS,
    LENGTHS,
    Results,
    attend,
    case_1d,
    case_of,
    check_array,
    check_close,
    differentiate,
    oracle,
    stacked,
)
from jax import export

from gna_jax import gna, vjp
from gna_jax.attention import slab_attention

FLOAT32 = 1e-5
CASE = case_of(
    (6, 5),
    (3, 4),
    stride=(2, 1),
    dilation=(2, 1),
    kv_heads=2,
    num_additional=3,
    lengths=(0, 2),
    has_bias=True,
)
SIZE = 3


EVERY = (
    "query",
    "key",
    "value",
    "additional_keys",
    "additional_values",
    LENGTHS,
    BIAS,
)
MAPPED = [
    EVERY,
    ("query",),
    ("key", "value"),
    (LENGTHS,),
    *(
        pytest.param(names, marks=pytest.mark.slow)
        for names in (EVERY[:-1], ("additional_keys", "additional_values", LENGTHS), (BIAS,))
    ),
]


def run(arrays, cotangents):
    return differentiate(lambda a: attend(CASE, a), arrays, cotangents)


@pytest.mark.parametrize("names", MAPPED, ids="-".join)
def test_vmap_of_gradients(names):
    """One gradient per entry, also of operands that are not mapped."""
    arrays, entries = stacked(CASE, names, SIZE)
    cotangents = CASE.cotangents(np.float32)
    axes = {name: 0 if name in names else None for name in arrays}
    got = jax.jit(jax.vmap(run, in_axes=(axes, None)))(arrays, cotangents)
    for n, entry in enumerate(entries):
        one = jax.tree.map(lambda x, n=n: x[n], got)
        check_close(one, oracle(CASE, entry, cotangents), FLOAT32, f"entry {n}")


def test_vmap_over_another_axis_and_cotangents():
    arrays, entries = stacked(CASE, ("query", BIAS), SIZE, axis=1)
    rng = np.random.default_rng(5)
    shapes = [(SIZE, *x.shape) for x in CASE.cotangents(np.float32)]
    cotangents = tuple(rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    axes = {name: 1 if name in ("query", BIAS) else None for name in arrays}
    got = jax.jit(jax.vmap(run, in_axes=(axes, 0)))(arrays, cotangents)
    for n, entry in enumerate(entries):
        one = jax.tree.map(lambda x, n=n: x[n], got)
        check_close(one, oracle(CASE, entry, tuple(x[n] for x in cotangents)), FLOAT32)


@pytest.mark.parametrize("names", [("key", "value", LENGTHS), (BIAS,)], ids="-".join)
def test_gradient_of_vmap(names):
    """Operands that are not mapped gather the gradients of all entries."""
    arrays, entries = stacked(CASE, names, SIZE)
    cotangents = tuple(np.stack([x] * SIZE) for x in CASE.cotangents(np.float32))
    axes = {name: 0 if name in names else None for name in arrays}
    mapped = jax.vmap(lambda a: attend(CASE, a), in_axes=(axes,))
    got = jax.jit(lambda a, c: differentiate(mapped, a, c))(arrays, cotangents)
    wants = [oracle(CASE, entry, CASE.cotangents(np.float32)) for entry in entries]
    for name, gradient in got.gradients.items():
        parts = [want.gradients[name] for want in wants]
        check_array(gradient, np.stack(parts) if name in names else sum(parts), FLOAT32, name)
    check_array(got.out, np.stack([want.out for want in wants]), FLOAT32)
    check_array(got.lse, np.stack([want.lse for want in wants]), FLOAT32)


def test_nested_vmap():
    """Queries outside, keys and bias inside."""
    queries, query_entries = stacked(CASE, ("query",), SIZE)
    keys, key_entries = stacked(CASE, ("key", "value", BIAS), SIZE)
    cotangents = CASE.cotangents(np.float32)
    inner_names = ("key", "value", BIAS)
    arrays = queries | {name: keys[name] for name in inner_names}
    inner = {name: 0 if name in inner_names else None for name in arrays}
    outer = {name: 0 if name == "query" else None for name in arrays}
    nested = jax.vmap(jax.vmap(run, in_axes=(inner, None)), in_axes=(outer, None))
    got = jax.jit(nested)(arrays, cotangents)
    for n, m in ((0, 0), (1, 2), (2, 1)):
        entry = key_entries[m] | {"query": query_entries[n]["query"]}
        one = jax.tree.map(lambda x, n=n, m=m: x[n, m], got)
        check_close(one, oracle(CASE, entry, cotangents), FLOAT32, (n, m))


def test_unbatched_arrays_through_vmap():
    """Arrays without a batch axis: `gna` of one sample, mapped."""
    case = case_1d(20, 5)
    arrays, cotangents = case.inputs(np.float32), case.cotangents(np.float32)

    def sample(arrays):
        one = {name: x[None] for name, x in arrays.items()}
        return tuple(x[0] for x in attend(case, one))

    got = jax.jit(lambda a, c: differentiate(jax.vmap(sample), a, c))(arrays, cotangents)
    check_close(got, oracle(case, arrays, cotangents), FLOAT32)


def test_vmap_over_origins():
    """Slabs of one volume side by side: gradients of what they share add up."""
    case = case_1d(24, 5, stride=2, dilation=2, has_bias=True)
    arrays, cotangents = case.inputs(np.float32), case.cotangents(np.float32)

    def slab(query, origin, arrays):
        return slab_attention(
            query,
            arrays["key"],
            arrays["value"],
            origin,
            np.zeros(1, np.int32),
            global_layout=case.layout,
            relative_position_bias=arrays[BIAS],
            precision="highest",
            implementation="xla",
            **case.geometry,
        )

    def whole(arrays):
        query = jnp.stack(jnp.split(arrays["query"], 4, axis=1))
        origins = jnp.arange(0, 24, 6, dtype=jnp.int32)[:, None]
        parts = jax.vmap(slab, in_axes=(0, 0, None))(query, origins, arrays)
        return tuple(jnp.concatenate(list(x), axis=1) for x in parts)

    got = jax.jit(lambda a, c: differentiate(whole, a, c))(arrays, cotangents)
    check_close(got, oracle(case, arrays, cotangents), FLOAT32)


@pytest.mark.slow
def test_eager_equals_the_oracle():
    arrays, cotangents = CASE.inputs(np.float32), CASE.cotangents(np.float32)
    check_close(run(arrays, cotangents), oracle(CASE, arrays, cotangents), FLOAT32)


def test_only_out_or_only_lse_is_used():
    arrays, (dout, dlse) = CASE.inputs(np.float32), CASE.cotangents(np.float32)
    lengths = arrays.pop(LENGTHS)

    def loss(arrays, with_out):
        out, lse = attend(CASE, arrays | {LENGTHS: lengths})
        return jnp.sum(out * dout) if with_out else jnp.sum(lse * dlse)

    for with_out in (True, False):
        got = jax.jit(jax.grad(loss), static_argnums=1)(arrays, with_out)
        used = (dout, np.zeros_like(dlse)) if with_out else (np.zeros_like(dout), dlse)
        want = oracle(CASE, arrays | {LENGTHS: lengths}, used).gradients
        for name, gradient in got.items():
            check_array(gradient, want[name], FLOAT32, name)


def count_primitives(jaxpr, name):
    """Equations of a primitive, in nested jaxprs too."""
    count = 0
    for eqn in jaxpr.eqns:
        count += eqn.primitive.name == name
        for inner in jax.tree.leaves(list(eqn.params.values())):
            inner = getattr(inner, "jaxpr", inner)
            count += count_primitives(inner, name) if hasattr(inner, "eqns") else 0
    return count


def test_remat_saves_out_and_lse_by_name():
    """With the policy the forward pass runs once; without, twice. `log` is taken in the forward alone."""
    arrays = CASE.inputs(np.float32)
    lengths = arrays.pop(LENGTHS)
    save = jax.checkpoint_policies.save_only_these_names

    def loss(arrays):
        out, lse = attend(CASE, arrays | {LENGTHS: lengths})
        return jnp.sum(jnp.tanh(out)) + jnp.sum(jnp.sin(lse))

    def gradient(policy):
        return jax.grad(jax.checkpoint(loss, policy=policy))

    def logs(function):
        return count_primitives(jax.make_jaxpr(function)(arrays).jaxpr, "log")

    plain, policy = logs(jax.grad(loss)), save(vjp.OUT_NAME, vjp.LSE_NAME)
    assert plain >= 1
    assert logs(gradient(policy)) == plain
    assert logs(gradient(save(vjp.OUT_NAME))) == 2 * plain
    assert logs(gradient(jax.checkpoint_policies.nothing_saveable)) == 2 * plain

    text = io.StringIO()
    checkpointed = jax.checkpoint(loss, policy=policy)
    with contextlib.redirect_stdout(text):
        jax.ad_checkpoint.print_saved_residuals(checkpointed, arrays)
    lines = [line for line in text.getvalue().splitlines() if "from the argument" not in line]
    assert sum(f"named '{vjp.OUT_NAME}'" in line for line in lines) == 1, lines
    assert sum(f"named '{vjp.LSE_NAME}'" in line for line in lines) == 1, lines

    wanted = jax.jit(jax.grad(loss))(arrays)
    got = jax.jit(gradient(policy))(arrays)
    for name, array in got.items():
        np.testing.assert_array_equal(array, wanted[name], err_msg=name)


@pytest.mark.parametrize("platforms", [("cpu",), ("cpu", "cuda")], ids="-".join)
def test_export_round_trip(platforms):
    """One trace, serialized, read back and called; with its gradient."""
    arrays, cotangents = CASE.inputs(np.float32), CASE.cotangents(np.float32)
    exported = export.export(jax.jit(lambda a: attend(CASE, a)), platforms=platforms)(arrays)
    data = exported.serialize(vjp_order=1)
    loaded = export.deserialize(data)
    assert loaded.platforms == platforms
    want = oracle(CASE, arrays, cotangents)
    got = loaded.call(arrays)
    check_close(Results(*got, {}), Results(want.out, want.lse, {}), FLOAT32)
    got = jax.jit(lambda a, c: differentiate(loaded.call, a, c))(arrays, cotangents)
    check_close(got, want, FLOAT32)


def test_forward_mode_raises():
    """Only the reference has forward mode; JAX says why the others do not."""
    x = np.ones((1, 6, 1, 2), np.float32)

    def function(x):
        return gna(x, x, x, window_size=3, implementation="xla")

    with pytest.raises(TypeError, match="forward-mode.*custom_vjp"):
        jax.jvp(function, (x,), (x,))


def test_geometry_is_static_and_cached():
    """Same shapes and geometry: one compilation; another stride: another."""
    traces = []

    def counted(x, stride):
        traces.append(stride)
        return gna(x, x, x, window_size=[3, 3], stride=stride)

    function = jax.jit(counted, static_argnames="stride")
    x = np.ones((1, 4, 5, 1, 2), np.float32)
    for stride in (1, 1, (1, 1), (2, 3), (2, 3)):
        function(x, stride=stride)
    assert len(traces) == 3


def test_inside_scan():
    """As layers of a model are; keys and values are closed over."""
    case = case_1d(16, 5)
    arrays = case.inputs(np.float32)

    def layers(x):
        def layer(x, _):
            return x + gna(x, arrays["key"], arrays["value"], window_size=5), None

        return jax.lax.scan(layer, x, None, length=3)[0]

    def loss(x):
        return jnp.sum(layers(x) ** 2)

    x = arrays["query"]
    direction = np.random.default_rng(0).standard_normal(x.shape).astype(np.float32)
    gradient = jax.jit(jax.grad(loss))(x)
    with jax.enable_x64(True):
        wide = arrays | {"query": x.astype(np.float64)}
        wide = {name: value.astype(np.float64) for name, value in wide.items()}

        def oracle_loss(x):
            for _ in range(3):
                one = oracle(case, wide | {"query": x}, case.cotangents(np.float64))
                x = x + one.out
            return np.sum(x**2)

        step = 1e-6
        plus, minus = (oracle_loss(wide["query"] + s * direction) for s in (step, -step))
        check_array(np.vdot(gradient, direction), (plus - minus) / (2 * step), 1e-4)
