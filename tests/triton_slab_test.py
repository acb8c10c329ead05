"""Slabs of a volume in the Triton kernels, in Triton's interpreter (TRITON_INTERPRET=1), against the float64 oracle."""

import dataclasses

import jax
import numpy as np
import pytest
from attention_suite import (
    case_1d,
    case_of,
    check_close,
    dense,
    differentiate,
    oracle,
    pairs_of,
    places,
    random_case,
)
from jax.sharding import AxisType, PartitionSpec
from triton_suite import INTERPRETED, quick_interpreter

import gna_jax
from gna_jax import gna_sharded, interpret_gpu
from gna_jax.attention import slab_attention
from gna_jax.tiling import Tiles

pytestmark = pytest.mark.triton

FLOAT32 = 2e-6  # sums of exact products of float32, a few hundred of them
LINE = Tiles((16,), (16,), (16,), (16,))
PLANE = Tiles((4, 4), (2, 8), (2, 8), (4, 4))


def attend_slab(case, arrays, origins):
    """`slab_attention` of a case whose layout is the volume's."""
    return slab_attention(
        **arrays,
        query_origin=origins[0],
        key_origin=origins[1],
        global_layout=case.layout,
        **case.geometry,
        implementation="triton",
        tiles=case.tiles,
    )


def slab_inputs(case, layouts):
    """Operands and cotangents of slabs of these layouts."""
    of_queries, of_keys = (dataclasses.replace(case, layout=layout) for layout in layouts)
    arrays, keys = of_queries.inputs(np.float32), of_keys.inputs(np.float32)
    if case.has_bias:
        arrays |= {name: array for name, array in case.inputs(np.float32).items() if "bias" in name}
    return arrays | {n: keys[n] for n in ("key", "value")}, of_queries.cotangents(np.float32)


def outside(case, layout, origin):
    """`[*layout]` bool: which tokens of a slab lie outside the volume."""
    place = places(layout, origin)
    inside = ((place >= 0) & (place < np.asarray(case.layout)[:, None])).all(0)
    return ~inside.reshape(layout)


def poisoned(case, arrays, cotangents, origins):
    """NaN in every token outside the volume."""

    def nan(name, array):
        if name not in ("query", "key", "value"):
            return array
        mask = outside(case, array.shape[1:-2], origins[int(name != "query")])
        return np.where(mask[None, ..., None, None], np.float32(np.nan), array)

    dirty = {name: nan(name, array) for name, array in arrays.items()}
    assert any(np.isnan(array).any() for array in dirty.values())
    return dirty, (nan("query", cotangents[0]), cotangents[1])


def check_slabs(case, layouts, origin_pairs, *, has_nan=False):
    """Values, lse and all gradients of every pair of origins, through one program."""
    arrays, cotangents = slab_inputs(case, layouts)
    traces = []

    @jax.jit
    def run(arrays, cotangents, origins):
        traces.append(1)
        return differentiate(lambda a: attend_slab(case, a, origins), arrays, cotangents)

    with quick_interpreter(), interpret_gpu("a100"):
        for pair in origin_pairs:
            origins = np.asarray(pair, np.int32)
            given = poisoned(case, arrays, cotangents, origins) if has_nan else (arrays, cotangents)
            got = jax.tree.map(np.asarray, run(*given, origins))
            mask, index = pairs_of(
                case, *(places(n, o) for n, o in zip(layouts, pair, strict=True))
            )
            check_close(
                got, dense(arrays, cotangents, mask, index, case.scale), FLOAT32, (pair, case)
            )
            if not case.num_additional:
                lone = ~mask.any(1).reshape(layouts[0])
                assert (got.out[:, lone] == 0).all() and (got.lse[:, lone] == -np.inf).all()
                assert (got.gradients["query"][:, lone] == 0).all()
    assert len(traces) == 1


NARROW = {"batch": 1, "heads_per_kv": 1}


def test_a_line():
    """Inside, with a window cut at both ends of the key slab; before the volume; over its end; and some or all queries find no key."""
    case = case_1d(41, 7, stride=2, dilation=2, has_bias=True, tiles=LINE, batch=1)
    origins = [([5], [2]), ([-3], [-6]), ([30], [27]), ([20], [30]), ([0], [34])]
    check_slabs(case, ((18,), (24,)), origins)


def test_additional_keys_are_seen_by_every_query():
    """Also by those outside the volume, and by those without a key in the slab."""
    case = case_1d(21, 5, is_causal=True, num_additional=3, lengths=(0, 2), tiles=LINE)
    check_slabs(case, ((20,), (9,)), [([-2], [3]), ([4], [16])])


def test_nan_outside_the_volume():
    """Of queries, keys, values and the cotangent of out: nothing shows, gradients there are 0."""
    case = case_of((6, 9), (3, 4), stride=(2, 1), is_causal=(False, True), tiles=PLANE, **NARROW)
    check_slabs(case, ((5, 6), (5, 9)), [([-1, 5], [-1, 2])], has_nan=True)


def test_nan_around_a_slab_longer_than_the_volume():
    case = case_1d(9, 4, has_bias=True, tiles=LINE, **NARROW)
    check_slabs(case, ((14,), (13,)), [([-2], [-3])], has_nan=True)


@pytest.mark.parametrize(
    "seed", [*range(4), *(pytest.param(n, marks=pytest.mark.slow) for n in range(4, 60))]
)
def test_random_slabs(seed):
    case, rng = random_case(seed, max_tokens=60, max_loops=100), np.random.default_rng(seed)
    tiles = {1: LINE, 2: PLANE, 3: Tiles((2, 2, 4), (2, 4, 2), (2, 4, 4), (2, 2, 4))}
    case = dataclasses.replace(
        case, tiles=tiles[len(case.layout)], kv_heads=1, batch=len(case.lengths or "1")
    )
    layouts = [tuple(int(rng.integers(1, n + 2)) for n in case.layout) for _ in range(2)]
    origins = [[int(rng.integers(-4, n + 3)) for n in case.layout] for _ in range(2)]
    check_slabs(case, layouts, [origins])


def test_merged_key_slabs_are_the_whole():
    """All queries against one slab of keys after the other, additional keys with the first; where no key is found, lse's cotangent stays out."""
    case = case_1d(34, 9, num_additional=2, tiles=LINE, head_dim=12, **NARROW)
    arrays, cotangents = case.inputs(np.float32), case.cotangents(np.float32)

    def merged(arrays):
        parts = []
        for begin, end in ((0, 13), (13, 34)):
            slab = arrays | {name: arrays[name][:, begin:end] for name in ("key", "value")}
            if parts:
                slab = {name: x for name, x in slab.items() if not name.startswith("additional")}
            parts.append(attend_slab(case, slab, (np.int32([0]), np.int32([begin]))))
        return gna_jax.merge_attentions(*zip(*parts, strict=True))

    with quick_interpreter(), interpret_gpu("a100"):
        got = jax.jit(lambda a, c: differentiate(merged, a, c))(arrays, cotangents)
        got = jax.tree.map(np.asarray, got)
    check_close(got, oracle(case, arrays, cotangents), FLOAT32)


def test_the_whole_volume_as_a_slab_has_the_volumes_bits():
    case = case_of((5, 12), (3, 5), dilation=(1, 2), tiles=PLANE, **NARROW)
    arrays, cotangents = case.inputs(np.float32), case.cotangents(np.float32)
    whole = lambda a: gna_jax.gna(**a, **case.geometry, return_lse=True, implementation="triton", tiles=PLANE)  # fmt: skip
    slab = lambda a: attend_slab(case, a, np.zeros((2, 2), np.int32))
    with quick_interpreter(), interpret_gpu("a100"):
        got, want = (differentiate(f, arrays, cotangents) for f in (slab, whole))
        jax.tree.map(np.testing.assert_array_equal, got.named(), want.named())


def test_a_volume_sharded_over_space():
    """`gna_sharded`: each device's kernel gets its origins from its place on the mesh."""
    case = case_1d(24, 7, stride=2, tiles=LINE, **NARROW)
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
    arrays, cotangents = case.inputs(np.float32), case.cotangents(np.float32)
    options = {"spec": PartitionSpec(None, "x"), "mesh": mesh, "return_lse": True, "tiles": LINE}
    options |= {"implementation": "triton", "device": INTERPRETED}
    with quick_interpreter():
        function = lambda a: gna_sharded(**a, **case.geometry, **options)
        got = jax.jit(lambda a, c: differentiate(function, a, c))(arrays, cotangents)
        got = jax.tree.map(np.asarray, got)
    check_close(got, oracle(case, arrays, cotangents), FLOAT32)
