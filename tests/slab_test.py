"""Slabs of a volume: each against the float64 oracle, assembled against the whole, merged over key slabs."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_suite import (
    BIAS,
    LENGTHS,
    Results,
    accumulator,
    case_1d,
    case_of,
    check_close,
    check_equal,
    dense,
    differentiate,
    oracle,
    pairs_of,
    places,
    random_case,
)

import gna_jax
from gna_jax.attention import slab_attention
from gna_jax.tiling import Tiles

SLOW = pytest.mark.slow


def attend_slab(case, arrays, origins, **options):
    """`slab_attention` on a case whose layout is the volume's."""
    options = {"precision": "highest", "implementation": "xla"} | options
    tokens = [arrays[name] for name in ("query", "key", "value")]
    extras = {n: x for n, x in arrays.items() if n.startswith(("additional", "relative"))}
    return slab_attention(
        *tokens, *origins, global_layout=case.layout, **case.geometry, **extras, **options
    )


def slab_oracle(case, arrays, cotangents, origins):
    slabs = [
        places(arrays[name].shape[1:-2], origin)
        for name, origin in zip(("query", "key"), origins, strict=True)
    ]
    return dense(arrays, cotangents, *pairs_of(case, *slabs), case.scale)


def slab_inputs(case, query_layout, key_layout, dtype=np.float32):
    """Operands and cotangents of slabs of these layouts."""
    query = dataclasses.replace(case, layout=query_layout)
    rng = np.random.default_rng(case.seed + 9)
    arrays = case.inputs(dtype)
    shapes = {"query": query_layout, "key": key_layout, "value": key_layout}
    for name, layout in shapes.items():
        batch, *_, heads, dim = arrays[name].shape
        arrays[name] = rng.standard_normal((batch, *layout, heads, dim)).astype(dtype)
    return arrays, query.cotangents(dtype)


def program(case, **options):
    """One jitted program for any origins; `traces` counts how often it was traced."""
    traces = []

    @jax.jit
    def run(arrays, cotangents, origins):
        traces.append(1)
        return differentiate(lambda a: attend_slab(case, a, origins, **options), arrays, cotangents)

    return run, traces


def check_slabs(case, query_layout, key_layout, origin_pairs, **options):
    """Every pair of origins against the oracle, all through one compilation."""
    arrays, cotangents = slab_inputs(case, query_layout, key_layout)
    run, traces = program(case, **options)
    for origins in origin_pairs:
        origins = tuple(np.asarray(x, np.int32) for x in origins)
        got = run(arrays, cotangents, origins)
        want = slab_oracle(case, arrays, cotangents, origins)
        check_close(got, want, 1e-5, (origins, query_layout, key_layout, case))
        check_equal(run(arrays, cotangents, origins), got, "second run")
    assert len(traces) == 1


def random_slabs(seed):
    """A case, slab layouts, and origins inside, across the edges of, and outside the volume."""
    case = dataclasses.replace(random_case(seed), tiles=None)
    rng = np.random.default_rng(seed)
    layouts = [tuple(int(rng.integers(1, n + 2)) for n in case.layout) for _ in range(2)]
    origins = [
        [[int(rng.integers(-4, n + 3)) for n in case.layout] for _ in range(2)] for _ in range(3)
    ]
    origins.append([[0] * len(case.layout)] * 2)
    tiles = Tiles(q=tuple(int(rng.integers(1, n + 1)) for n in layouts[0]), kv=None)
    return case, *layouts, origins, tiles if seed % 2 else None


@pytest.mark.parametrize(
    "seed", [400, 402, *(pytest.param(n, marks=SLOW) for n in (401, 403, 404))]
)
def test_random_slabs(seed):
    *slabs, tiles = random_slabs(seed)
    check_slabs(*slabs, tiles=tiles)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4000, 4100))
def test_many_random_slabs(seed):
    *slabs, tiles = random_slabs(seed)
    check_slabs(*slabs, tiles=tiles)


@pytest.mark.parametrize("seed", [410, pytest.param(411, marks=SLOW)])
def test_reference_on_random_slabs(seed):
    *slabs, _ = random_slabs(seed)
    check_slabs(*slabs, implementation="reference")


def seen_range(case, axis, begin, stop):
    """Keys `[first, end)` of one axis that queries `begin..stop-1` see, from the axis's mask."""
    mask = case.neighborhood.axes[axis].mask(case.layout[axis])[begin:stop].any(axis=0)
    keys = np.flatnonzero(mask)
    return int(keys[0]), int(keys[-1]) + 1


def cut(array, axis, begin, stop):
    return jax.lax.slice_in_dim(array, begin, stop, axis=1 + axis)


def assembled(case, arrays, axis, cuts):
    """The whole volume from slabs of queries `cuts[n]..cuts[n+1]` along `axis`, each with just the keys it sees."""
    parts = []
    for begin, stop in itertools.pairwise(cuts):
        first, end = seen_range(case, axis, begin, stop)
        slab = arrays | {"query": cut(arrays["query"], axis, begin, stop)}
        slab |= {name: cut(arrays[name], axis, first, end) for name in ("key", "value")}
        origins = [np.zeros(len(case.layout), np.int32) for _ in range(2)]
        origins[0][axis], origins[1][axis] = begin, first
        parts.append(attend_slab(case, slab, origins))
    return tuple(jnp.concatenate(part, axis=1 + axis) for part in zip(*parts, strict=True))


@pytest.mark.parametrize(
    ("case", "axis", "cuts"),
    [
        pytest.param(case_1d(30, 7, has_bias=True, num_additional=2, lengths=(2, 0)), 0, (0, 10, 20, 30), marks=SLOW),
        # Uneven; a stride group and dilation groups cross the cuts.
        (case_1d(35, 6, stride=4, dilation=3, kv_heads=2), 0, (0, 1, 17, 35)),
        pytest.param(case_1d(29, 9, stride=2, is_causal=True, has_bias=True), 0, (0, 14, 29), marks=SLOW),
        pytest.param(case_of((9, 8), (4, 3), stride=(2, 3), dilation=(2, 1)), 0, (0, 4, 9), marks=SLOW),
        pytest.param(case_of((9, 8), (4, 3), stride=(2, 3), dilation=(1, 2), is_causal=(True, False)), 1, (0, 3, 8), marks=SLOW),
        pytest.param(case_of((4, 5, 6), (3, -1, 4), has_bias=True, dilation=(1, 2, 1)), 0, (0, 2, 4), marks=SLOW),
        pytest.param(case_of((4, 5, 6), (3, -1, 4), num_additional=1), 1, (0, 3, 5), marks=SLOW),
        pytest.param(case_of((4, 5, 6), (3, 2, 4), is_causal=(False, True, True)), 2, (0, 3, 6), marks=SLOW),
    ],
    ids=str,
)  # fmt: skip
def test_assembled_slabs_equal_the_whole(case, axis, cuts):
    """Values, lse, and the gradients of the whole volume's operands through the slabs."""
    arrays, cotangents = case.inputs(np.float32), case.cotangents(np.float32)
    run = jax.jit(lambda a, c: differentiate(lambda a: assembled(case, a, axis, cuts), a, c))
    check_close(run(arrays, cotangents), oracle(case, arrays, cotangents), 1e-5, repr(case))


def test_equal_slabs_share_one_program():
    """The view of a row of devices: one program, origins as data, the halo cut at a traced place."""
    case = case_of((48, 3), (5, 3), dilation=(2, 1), stride=(2, 1), batch=1)
    arrays, cotangents = case.inputs(np.float32), case.cotangents(np.float32)
    slab, halo = 8, 9  # a window of 5 dilated by 2 and clamped at an edge spans 9 tokens
    box = slab + 2 * halo

    def piece(begin, arrays):
        first = jnp.clip(begin - halo, 0, 48 - box)
        local = {"query": jax.lax.dynamic_slice_in_dim(arrays["query"], begin, slab, axis=1)}
        for name in ("key", "value"):
            local[name] = jax.lax.dynamic_slice_in_dim(arrays[name], first, box, axis=1)
        return attend_slab(case, local, [jnp.stack([x, jnp.int32(0)]) for x in (begin, first)])

    def whole(arrays):
        pieces = jax.lax.map(lambda begin: piece(begin, arrays), jnp.arange(0, 48, slab))
        return tuple(jnp.concatenate(list(x), axis=1) for x in pieces)

    got = jax.jit(lambda a, c: differentiate(whole, a, c))(arrays, cotangents)
    check_close(got, oracle(case, arrays, cotangents), 1e-5)


@pytest.mark.parametrize(
    ("case", "cuts"),
    [
        (case_1d(26, 9, stride=3, has_bias=True, num_additional=2, lengths=(1, 2)), (0, 11, 13, 26)),
        pytest.param(case_1d(27, 6, dilation=4, is_causal=True, kv_heads=2), (0, 9, 18, 27), marks=SLOW),
        pytest.param(case_of((8, 6), (5, 4), stride=(2, 1), has_bias=True), (0, 3, 8), marks=SLOW),
    ],
    ids=str,
)  # fmt: skip
def test_merged_key_slabs_equal_the_whole(case, cuts):
    """All queries against one slab of keys after the other; the additional keys go with the first."""
    arrays, cotangents = case.inputs(np.float32), case.cotangents(np.float32)
    rank = len(case.layout)

    def merged(arrays):
        parts = []
        for begin, stop in itertools.pairwise(cuts):
            slab = arrays | {n: cut(arrays[n], 0, begin, stop) for n in ("key", "value")}
            if parts:
                slab = {n: x for n, x in slab.items() if not n.startswith("additional")}
            key_origin = np.zeros(rank, np.int32)
            key_origin[0] = begin
            parts.append(attend_slab(case, slab, (np.zeros(rank, np.int32), key_origin)))
        return gna_jax.merge_attentions(*zip(*parts, strict=True))

    got = jax.jit(lambda a, c: differentiate(merged, a, c))(arrays, cotangents)
    check_close(got, oracle(case, arrays, cotangents), 1e-5, repr(case))


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_queries_without_keys(implementation):
    """Half the queries find no key in the slab: out 0, lse -inf, gradients exactly 0, and nothing is NaN."""
    case = case_1d(20, 3, has_bias=True)
    arrays, cotangents = slab_inputs(case, (8,), (8,))
    origins = np.asarray(
        [[6], [10]], np.int32
    )  # queries 6..13, of which 6..8 see none of keys 10..17
    run, _ = program(case, implementation=implementation)
    got = run(arrays, cotangents, origins)
    check_close(got, slab_oracle(case, arrays, cotangents, origins), 1e-5)
    assert (np.asarray(got.out)[:, :3] == 0).all() and (np.asarray(got.lse)[:, :3] == -np.inf).all()
    assert (got.gradients["query"][:, :3] == 0).all() and (got.gradients["query"][:, 3:] != 0).any()
    # Nobody sees anything.
    got = run(arrays, cotangents, np.asarray([[0], [12]], np.int32))
    assert (got.out == 0).all() and (got.lse == -np.inf).all()
    assert all((gradient == 0).all() for gradient in got.gradients.values())


def test_queries_outside_the_volume():
    """Origins before 0 and past the end: such tokens see nothing and nobody sees them."""
    case = case_of((7, 6), (3, 3), dilation=(2, 1), stride=(2, 2), has_bias=True)
    origins = [([-3, -2], [-1, -4]), ([5, 4], [4, 3]), ([-9, 0], [0, 0]), ([0, 6], [0, 0])]
    check_slabs(case, (5, 5), (6, 7), origins)


def test_large_bias_on_padding_rows():
    """A dilation that does not divide pads the slab; whatever bias those rows meet stays there."""
    case = case_1d(25, 5, stride=2, dilation=3, has_bias=True)
    arrays, cotangents = slab_inputs(case, (7,), (25,))
    arrays[BIAS] = arrays[BIAS] + np.float32(1000)
    run, _ = program(case, tiles=Tiles(q=(3,), kv=None))
    for begin in (0, 8, 18):
        origins = np.asarray([[begin], [0]], np.int32)
        want = slab_oracle(case, arrays, cotangents, origins)
        check_close(run(arrays, cotangents, origins), want, 2e-4)  # lse of about 1000 costs digits


@pytest.mark.parametrize("dtype", [np.float64, jnp.bfloat16, jnp.float16])
def test_dtypes(dtype):
    case = case_1d(21, 5, dilation=2, has_bias=True, num_additional=2, lengths=(0, 1))
    with jax.enable_x64(dtype == np.float64):
        arrays, cotangents = slab_inputs(case, (9,), (13,), dtype)
        origins = np.asarray([[6], [2]], np.int32)
        got = program(case)[0](arrays, cotangents, origins)
        assert got.out.dtype == dtype and got.lse.dtype == accumulator(dtype)
        want = slab_oracle(case, arrays, cotangents, origins)
        check_close(got, want, 1e-12 if dtype == np.float64 else 2 * float(jnp.finfo(dtype).eps))


@pytest.mark.parametrize("origin_dtype", [np.uint8, np.int16])
def test_origins_of_any_integer_dtype(origin_dtype):
    case = case_1d(16, 5)
    arrays, cotangents = slab_inputs(case, (4,), (12,))
    origins = [np.asarray([6], origin_dtype), np.asarray([2], origin_dtype)]
    out, lse = attend_slab(case, arrays, origins)
    want = slab_oracle(case, arrays, cotangents, origins)
    check_close(Results(out, lse, {}), Results(want.out, want.lse, {}), 1e-5)


def test_whole_volume_as_a_slab():
    """The slab that is the whole volume is `gna`."""
    case = case_of((6, 7), (3, 4), stride=(2, 4), num_additional=2, lengths=(1, 2), has_bias=True)
    arrays, cotangents = case.inputs(np.float32), case.cotangents(np.float32)
    assert LENGTHS in arrays
    got = program(case)[0](arrays, cotangents, np.zeros((2, 2), np.int32))
    check_close(got, oracle(case, arrays, cotangents), 1e-5)
