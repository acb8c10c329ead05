"""Spatially sharded attention against the float64 oracle, and what compiled programs move between devices."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_suite import BIAS, Results, case_of, check_close, differentiate, oracle
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from gna_jax import gna, gna_sharded, halo, merge_over_mesh, shard_attention
from gna_jax.attention import slab_attention
from gna_jax.inspection.collectives import collectives

P = PartitionSpec
FLOAT32 = 1e-5
MESHES = {1: (1, 1, 1), 2: (2, 1, 1), 4: (2, 2, 1), 8: (2, 2, 2)}


def mesh_of(devices, axis_type=AxisType.Auto):
    return jax.make_mesh(MESHES[devices], ("x", "y", "z"), axis_types=(axis_type,) * 3)


def sharded(case, mesh, spec, **options):
    """`arrays -> (out, lse)` by `gna_sharded`."""
    return lambda arrays: gna_sharded(
        **arrays,
        **case.geometry,
        spec=spec,
        mesh=mesh,
        return_lse=True,
        precision="highest",
        **options,
    )


def check(case, mesh, spec, **options):
    """Values, lse and gradients; returns the text of the program."""
    arrays, cotangents = case.inputs(np.float32), case.cotangents(np.float32)
    function = sharded(case, mesh, spec, **options)
    run = jax.jit(lambda a, c: differentiate(function, a, c))
    program = run.lower(arrays, cotangents).compile()
    got = program(arrays, cotangents)
    check_close(got, oracle(case, arrays, cotangents), FLOAT32)
    assert got.out.sharding.is_equivalent_to(NamedSharding(mesh, P(*spec)), got.out.ndim)
    return program.as_text()


def random_problem(seed):
    """A case of any features on 2, 4 or 8 devices, any axes sharded, some over two mesh axes, shards of any size."""
    random = np.random.default_rng([7, seed])
    devices = int(random.choice([2, 4, 8]))
    rank = int(random.integers(1, 4))
    entries = [[] for _ in range(rank + 2)]  # batch, space, heads
    names = [n for n, size in zip("xyz", MESHES[devices], strict=True) if size > 1]
    for number, name in enumerate(names):  # one of them spatial at least
        entries[int(random.integers(0 if number else 1, rank + 2 if number else rank + 1))] += name
    spec = P(*(tuple(e) if len(e) > 1 else e[0] if e else None for e in entries))
    counts = [2 ** len(e) for e in entries]
    layout, window, stride, dilation = [], [], [], []
    for count in counts[1:-1]:
        length = count * int(random.integers(1, max(2, (24 if rank == 1 else 9) // count + 1)))
        d = int(random.integers(1, max(1, length // 2) + 1)) if random.random() < 0.4 else 1
        w = int(random.integers(1, length // d + 1))
        layout, dilation, window = [*layout, length], [*dilation, d], [*window, w]
        stride.append(int(random.integers(1, w + 1)) if random.random() < 0.5 else 1)
    batch = counts[0] * int(random.integers(1, 3))
    shared = counts[-1] > 1 and random.random() < 0.3
    kv_heads = 1 if shared else counts[-1] * int(random.integers(1, 3))
    more = int(random.integers(0, 4))
    has_lengths = more and random.random() < 0.5
    case = case_of(
        tuple(layout),
        tuple(window),
        stride=tuple(stride),
        dilation=tuple(dilation),
        is_causal=tuple(bool(random.random() < 0.3) for _ in layout),
        batch=batch,
        kv_heads=kv_heads,
        heads_per_kv=counts[-1] if shared else int(random.integers(1, 3)),
        num_additional=more,
        lengths=tuple(int(n) for n in random.integers(0, more + 1, batch)) if has_lengths else None,
        has_bias=bool(random.random() < 0.3),
        value_dim=int(random.choice([4, 8])),
        seed=seed,
    )
    return case, devices, spec, bool(random.random() < 0.5)


def check_random(seed):
    case, devices, spec, overlap = random_problem(seed)
    text = check(case, mesh_of(devices), spec, overlap=overlap)
    assert not any(op.kind == "all-gather" for op in collectives(text))


@pytest.mark.parametrize("seed", range(4))
def test_random_problems(seed):
    check_random(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4, 80))
def test_more_random_problems(seed):
    check_random(seed)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 4, 8])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_every_choice_of_axes(rank, devices):
    """Each mesh axis over batch, each spatial axis, and heads, in every combination."""
    case = case_of(
        (16, 8, 8)[:rank],
        (5, 3, 4)[:rank],
        stride=(2, 1, 1)[:rank],
        dilation=(1, 2, 1)[:rank],
        batch=8 if rank < 3 else 2,
        kv_heads=2,
        heads_per_kv=4,
    )
    names = [n for n, size in zip("xyz", MESHES[devices], strict=True) if size > 1]
    places = range(rank + 2)
    for choice in itertools.product(places, repeat=len(names)):
        entries = [tuple(n for n, c in zip(names, choice, strict=True) if c == p) for p in places]
        spec = P(*(entry or None for entry in entries))
        if case.batch % 2 ** len(entries[0]):
            continue
        text = check(case, mesh_of(devices), spec)
        assert not any(op.kind == "all-gather" for op in collectives(text)), spec


@pytest.mark.parametrize("name", ["plain", "overlap", "explicit"])
def test_permutes_have_exactly_the_predicted_bytes(name):
    """Of keys and values in the forward, of their gradients in the backward, and nothing else is moved."""
    case = case_of(
        (24, 12), (7, 5), stride=(2, 1), dilation=(1, 2), batch=2, kv_heads=2, value_dim=4
    )
    mesh = mesh_of(8, AxisType.Explicit if name == "explicit" else AxisType.Auto)
    spec = P(None, ("x", "y"), "z")
    place = lambda x: jax.device_put(x, NamedSharding(mesh, spec))
    arrays = {n: place(x) for n, x in case.inputs(np.float32).items()}
    cotangents = tuple(map(place, case.cotangents(np.float32)))
    function = sharded(case, mesh, spec, overlap=name == "overlap")
    axes = halo.halos(case.neighborhood, case.layout, (4, 2))
    token = case.batch * case.kv_heads * (case.head_dim + case.value_dim) * 4
    predicted = halo.exchanged_tokens(axes) * token
    forward = collectives(jax.jit(function).lower(arrays).compile().as_text())
    assert {op.kind for op in forward} == {"collective-permute"}
    assert sum(op.bytes_sent for op in forward) == predicted > 0
    run = jax.jit(lambda a, c: differentiate(function, a, c))
    both = collectives(run.lower(arrays, cotangents).compile().as_text())
    assert {op.kind for op in both} == {"collective-permute"}
    assert sum(op.bytes_sent for op in both) == 2 * predicted


def test_additional_tokens_sharded_over_space():
    """They are gathered, and lengths still count from the first of all."""
    case = case_of((8, 4), (3, 3), batch=2, kv_heads=2, num_additional=6, lengths=(5, 2))
    text = check(case, mesh_of(4), P("x", "y"), additional_spec=P("x", "y"))
    gathers = [op for op in collectives(text) if op.kind == "all-gather"]
    assert [op.elements for op in gathers] == [6 * 2 * 8] * 2  # of one sample's tokens


def test_in_ones_own_shard_map():
    """With other arrays, and under vmap's and remat's hands, too."""
    case = case_of((12, 6), (5, 3), stride=(2, 1), batch=2, kv_heads=2, has_bias=True)
    mesh, rows = mesh_of(4), P("y", "x")
    specs = {name: P() if name == BIAS else rows for name in case.shapes()}

    @jax.checkpoint
    def local(arrays):
        return shard_attention(
            **arrays,
            **case.geometry,
            spatial_axes=("x", None),
            return_lse=True,
            precision="highest",
        )

    function = jax.shard_map(local, mesh=mesh, in_specs=(specs,), out_specs=(rows, rows))
    arrays, cotangents = case.inputs(np.float32), case.cotangents(np.float32)
    got = jax.jit(lambda a, c: differentiate(function, a, c))(arrays, cotangents)
    check_close(got, oracle(case, arrays, cotangents), FLOAT32)
    out = jax.jit(jax.vmap(lambda a: function(a)[0]))({n: x[None] for n, x in arrays.items()})
    np.testing.assert_allclose(out[0], got.out, rtol=1e-6, atol=1e-6)


def test_overlap_leaves_the_interior_free_of_what_is_received():
    """Poisoned halos reach border queries alone: the interior's outputs depend on no permute."""
    case = case_of((32,), (5,), batch=1, kv_heads=1, heads_per_kv=1)
    (axis,) = halo.halos(case.neighborhood, case.layout, (2,))
    arrays = case.inputs(np.float32)
    arrays["key"][:, 16:] = np.nan
    spec = P(None, "x")
    out, _ = jax.jit(sharded(case, mesh_of(2), spec, overlap=True))(arrays)
    first, end = axis.interior
    assert (first, end) == (2, 14)
    assert np.isfinite(np.asarray(out)[:, :end]).all()
    assert np.isnan(np.asarray(out)[:, end:16]).any()


def test_halos_past_the_ends_are_not_read():
    """A device at an end gets zeros for rows that are not there: large values in front would show if they were used."""
    case = case_of((8,), (3,), batch=1, kv_heads=1, heads_per_kv=1)
    arrays = case.inputs(np.float32)
    arrays["key"] -= 1e3  # a zero key would take all the weight
    check_close(
        Results(*jax.jit(sharded(case, mesh_of(4), P(None, ("x", "y"))))(arrays), {}),
        Results(*gna(**arrays, **case.geometry, return_lse=True, precision="highest"), {}),
        1e-3,
    )


def test_keys_spread_over_devices_merge():
    """Queries that see every key of a volume on two devices, and some rows that see none."""
    case = case_of((8,), (8,), batch=2, kv_heads=2)
    mesh, arrays = mesh_of(2), case.inputs(np.float32)
    cotangents = case.cotangents(np.float32)

    def local(arrays):
        origin = jax.lax.axis_index("x") * 4
        out, lse = slab_attention(
            arrays["query"],
            arrays["key"],
            arrays["value"],
            [0],
            origin[None],
            global_layout=case.layout,
            precision="highest",
            **case.geometry,
        )
        return merge_over_mesh(out, lse, "x")

    specs = {"query": P(), "key": P(None, "x"), "value": P(None, "x")}
    function = jax.shard_map(local, mesh=mesh, in_specs=(specs,), out_specs=P())
    got = jax.jit(lambda a, c: differentiate(function, a, c))(arrays, cotangents)
    check_close(got, oracle(case, arrays, cotangents), FLOAT32)

    def empty(x):
        return merge_over_mesh(x, jnp.full(x.shape[:-1], -jnp.inf), "x")

    mapped = jax.shard_map(empty, mesh=mesh, in_specs=P("x"), out_specs=P())
    (out, lse), pull = jax.vjp(mapped, jnp.ones((4, 3)))
    assert (out == 0).all() and (lse == -jnp.inf).all()
    assert (pull((jnp.ones((2, 3)), jnp.ones(2)))[0] == 0).all()
    assert merge_over_mesh(out, lse, None) == (out, lse)


@pytest.mark.parametrize("device", [pytest.param("h200", marks=pytest.mark.slow), "b200"])
def test_pallas_kernels_stay_local(device):
    """Lowered for GPUs that are not there: kernels get slabs, halos are permuted, nothing is gathered."""
    case = case_of((32, 16), (8, 8), batch=2, kv_heads=4, head_dim=64, value_dim=64)
    abstract = {n: jax.ShapeDtypeStruct(s, jnp.bfloat16) for n, s in case.shapes().items()}
    options = {"implementation": "mosaic", "device": device, "overlap": False}
    function = sharded(case, mesh_of(8), P("z", "x", None, "y"), **options)
    backward = jax.grad(lambda a: function(a)[0].astype(jnp.float32).sum())
    for run, kernels, permutes in ((function, 1, 4), (backward, 3, 8)):
        text = jax.jit(run).trace(abstract).lower(lowering_platforms=("cuda",)).as_text()
        assert "all_gather" not in text
        assert text.count("custom_call @mosaic_gpu_v2") == kernels
        assert text.count("stablehlo.collective_permute") == permutes
        assert "tensor<1x16x16x256xbf16>" in text  # half of the rows, half of the heads as columns


def test_wrong_calls():
    case = case_of((12, 9), (5, 3), batch=2, kv_heads=2, num_additional=3)
    arrays, mesh = case.inputs(np.float32), mesh_of(8)

    def call(spec, **options):
        options = {"mesh": mesh} | options
        return gna_sharded(**arrays, **case.geometry, spec=spec, **options)

    for spec, options, message in (
        (P(None, None, "x"), {}, r"2 shards for 9 tokens on spatial axis 1.*1, 3, 9.*10 tokens"),
        (P(("x", "y")), {}, r"got 2 batch in 4 shards.*\('x', 'y'\)"),
        (P(None, None, None, ("x", "y", "z")), {}, r"got 4 query heads in 8 shards"),
        (P(None, "t"), {}, r"axes of the mesh \('x', 'y', 'z'\); got spec="),
        (P(None, None, None, None, "x"), {}, "head dim .* must not be sharded"),
        (P(*(None,) * 6), {}, "at most 5 entries"),
        (P(), {"additional_spec": P(None, "x")}, "3 additional tokens in 2 shards"),
        (P(), {"mesh": None}, "needs a mesh; got mesh=None"),
    ):
        with pytest.raises(ValueError, match=message):
            call(spec, **options)
    with pytest.raises(ValueError, match=r"3 key/value heads in 2 shards"):
        odd = case_of((4,), (3,), kv_heads=3, batch=1)
        gna_sharded(**odd.inputs(np.float32), **odd.geometry, spec=P(None, None, "x"), mesh=mesh)
    with pytest.raises(ValueError, match="surrounding jax.shard_map; got 'x'"):
        shard_attention(**arrays, **case.geometry, spatial_axes=("x", None))
    with pytest.raises(ValueError, match=r"one entry per spatial axis.*got spatial_axes=\('x',\)"):
        shard_attention(**arrays, **case.geometry, spatial_axes=("x",))
    with pytest.raises(ValueError, match="window_size must not exceed"):
        gna_sharded(**arrays, window_size=13, spec=P(None, "x"), mesh=mesh)


def test_the_current_mesh_and_that_of_the_query():
    case = case_of((8,), (3,), batch=1)
    arrays, mesh, spec = case.inputs(np.float32), mesh_of(2, AxisType.Explicit), P(None, "x")
    want = gna(**arrays, **case.geometry)
    with jax.set_mesh(mesh):
        np.testing.assert_allclose(gna_sharded(**arrays, **case.geometry, spec=spec), want, 1e-5)
        jax.jit(lambda a: gna_sharded(**a, **case.geometry, spec=spec))(arrays)
    placed = {n: jax.device_put(x, NamedSharding(mesh, spec)) for n, x in arrays.items()}
    for call in (gna_sharded, jax.jit(gna_sharded, static_argnames=("spec", "window_size"))):
        out = call(**placed, window_size=3, spec=spec)
        np.testing.assert_allclose(out, want, 1e-5)
        assert math.prod(out.sharding.shard_shape(out.shape)) * 2 == out.size
