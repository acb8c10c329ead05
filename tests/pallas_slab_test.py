"""Slabs of a volume in the Pallas kernels: their walks against brute force, the kernels in the interpreter, what the compiler says.

Like the other tests of walks these count with Python's ints; the interpreter then runs the kernels themselves against float64.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import kernel_resources
import ml_dtypes
import numpy as np
import pytest
from attention_suite import (
    Case,
    case_1d,
    case_of,
    check_array,
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
from gna_jax import interpret_gpu
from gna_jax.attention import slab_attention
from gna_jax.backends import mosaic
from gna_jax.backends.mosaic.tiles import complete
from gna_jax.inspection import Call, compile_kernel
from gna_jax.tiling import Tiles
from pallas_kernels.plan import TilePlan, tile_walk
from pallas_kernels.slabs import Origin

BFLOAT16 = ml_dtypes.bfloat16
LSE = 1e-5  # float32, from exact products of 16-bit operands
OUT = 1.5e-2
"""Of out and gradients in bfloat16, of the largest entry: weights and score gradients are rounded to 8 bits before their products."""
GPUS = ("h200", "b200")


# Walks


def slab_plan(case: Case, layouts, tiles, is_inverse: bool) -> TilePlan:
    query, key = layouts
    problem = dataclasses.replace(case.problem(), query_layout=query, key_layout=key, is_slab=True)
    own = tiles[1] if is_inverse else tiles[0]
    split_axis = next((axis for axis, size in enumerate(own) if size % 2 == 0), None)
    workers = 1 if split_axis is None else 2
    return TilePlan(problem, *tiles, workers, split_axis or 0, 2, 2, is_inverse)


def origins_of(plan: TilePlan, query_origin, key_origin) -> list[Origin]:
    own, visited = (key_origin, query_origin) if plan.is_inverse else (query_origin, key_origin)
    axes = zip(own, visited, plan.dilation, strict=True)
    return [Origin(*divmod(int(a), d), *divmod(int(b), d)) for a, b, d in axes]


def tokens_of(start, box, residues, dilation, layout):
    """Numbers in a slab of the tokens of a box, -1 for those that the slab does not hold, and their places there, row-major."""
    axes = zip(start, box, residues, dilation, strict=True)
    axes = [(first + np.arange(size)) * d + r for first, size, r, d in axes]
    grid = np.stack(np.meshgrid(*axes, indexing="ij")).reshape(len(layout), -1)
    sizes = np.asarray(layout)[:, None]
    is_held = ((grid >= 0) & (grid < sizes)).all(0)
    number = np.ravel_multi_index(tuple(np.clip(grid, 0, sizes - 1)), layout)
    return np.where(is_held, number, -1), grid


def check_walks(case: Case, plan: TilePlan, origins) -> int:
    """Every pair that attends is visited once, clean visits hide nothing, memory outside the volume is not read."""
    query, key = (
        places(n, o)
        for n, o in zip((plan.problem.query_layout, plan.problem.key_layout), origins, strict=True)
    )
    sees, _ = pairs_of(case, query, key)
    sees = sees.T if plan.is_inverse else sees
    visited_origin = np.asarray(origins[0] if plan.is_inverse else origins[1])[:, None]
    is_longer = any(np.greater(plan.visited_layout, case.layout))
    counts, computed, clean = np.zeros(sees.shape, int), set(), 0
    for tile in range(plan.num_tiles):
        walk = tile_walk(plan, tile, origins_of(plan, *origins))
        own, _ = tokens_of(walk.own_start, plan.own, walk.residues, plan.dilation, plan.own_layout)
        own = own[own >= 0]
        assert (walk.num_visits > 0) == (len(own) > 0)
        computed |= set(own.tolist())
        clean += walk.num_clean
        for step in range(walk.num_visits):
            is_clean = step < walk.num_clean
            start = walk.clean_tile(step) if is_clean else walk.shell_tile(step - walk.num_clean)
            seen, grid = tokens_of(
                start, plan.visited, walk.visited_residues, plan.dilation, plan.visited_layout
            )
            place = grid + visited_origin
            inside = ((place >= 0) & (place < np.asarray(case.layout)[:, None])).all(0)
            assert is_longer or inside[seen >= 0].all(), "a token outside the volume is read"
            if is_clean:
                assert (seen >= 0).all() and sees[np.ix_(own, seen)].all()
            counts[np.ix_(own, seen[seen >= 0])] += 1
    assert computed == set(range(len(sees))), "every own token is computed"
    assert (counts[sees] == 1).all() and (counts <= 1).all()
    return clean


@pytest.mark.parametrize("is_inverse", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_random_walks(seed, is_inverse):
    """Slabs inside the volume, across its edges, outside, longer than it; key slabs that hold a part of a window, or none."""
    case, rng = random_case(seed, max_tokens=250, max_loops=100), np.random.default_rng(seed)
    rank = len(case.layout)
    tiles = [tuple(int(n) for n in 2 ** rng.integers(0, 4, rank)) for _ in range(2)]
    layouts = [tuple(int(rng.integers(1, n + 2 + seed % 3)) for n in case.layout) for _ in range(2)]
    plan = slab_plan(case, layouts, tiles, is_inverse)
    for _ in range(2):
        origins = [[int(rng.integers(-4, n + 3)) for n in case.layout] for _ in range(2)]
        check_walks(case, plan, origins)


@pytest.mark.parametrize("is_inverse", [False, True])
def test_the_whole_volume_as_a_slab_has_the_volumes_walks(is_inverse):
    case = case_of((24, 26), (9, 10), stride=(2, 1), dilation=(1, 2), is_causal=(True, False))
    plan = slab_plan(case, [case.layout] * 2, [(2, 2)] * 2, is_inverse)
    whole = dataclasses.replace(plan, problem=dataclasses.replace(plan.problem, is_slab=False))
    origins = origins_of(plan, (0, 0), (0, 0))
    assert check_walks(case, plan, [(0, 0)] * 2) > 0
    for tile in range(plan.num_tiles):
        slab, volume = tile_walk(plan, tile, origins), tile_walk(whole, tile)
        assert (slab.num_clean, slab.num_visits) == (volume.num_clean, volume.num_visits)
        clean, shell = range(slab.num_clean), range(slab.num_visits - slab.num_clean)
        assert list(map(slab.clean_tile, clean)) == list(map(volume.clean_tile, clean))
        assert list(map(slab.shell_tile, shell)) == list(map(volume.shell_tile, shell))


# Calls


def attend_slab(case: Case, arrays, origins, **options):
    """`slab_attention` of a case whose layout is the volume's."""
    options = {"implementation": "mosaic", "tiles": case.tiles} | options
    tokens = [arrays[name] for name in ("query", "key", "value")]
    more = {name: array for name, array in arrays.items() if name.startswith("additional")}
    return slab_attention(
        *tokens, *origins, global_layout=case.layout, **case.geometry, **more, **options
    )


def slab_inputs(case: Case, query_layout, key_layout):
    """Operands and cotangents of slabs of these layouts."""
    slab = dataclasses.replace(case, layout=query_layout)
    arrays, keys = slab.inputs(BFLOAT16), dataclasses.replace(case, layout=key_layout)
    other = keys.inputs(BFLOAT16)
    return arrays | {n: other[n] for n in ("key", "value")}, slab.cotangents(BFLOAT16)


def tiled(case: Case, gpu: str, q_rows: int = 1, kv_rows: int = 1) -> Case:
    """The case with the smallest tiles, of as many rows as asked on the axis before the last."""
    rank, own = len(case.layout), {"h200": 64, "b200": 128}[gpu]
    box = lambda tokens, rows: (1,) * (rank - 2) + (rows, tokens // rows) if rank > 1 else (tokens,)
    q, kv, kv_own = box(own, q_rows), box(32, kv_rows), box(own, kv_rows)
    return dataclasses.replace(case, tiles=Tiles(q=q, kv=kv, backward_q=kv, backward_kv=kv_own))


def outside(layout, origin, volume) -> np.ndarray:
    """`[*layout]` bool: which tokens of a slab lie outside the volume."""
    place = places(layout, origin)
    inside = ((place >= 0) & (place < np.asarray(volume)[:, None])).all(0)
    return ~inside.reshape(layout)


def poisoned(case: Case, arrays, cotangents, origins):
    """NaN in every token outside the volume."""
    is_out = {
        name: outside(array.shape[1:-2], origins[int(name != "query")], case.layout)
        for name, array in arrays.items()
    }
    assert any(mask.any() for mask in is_out.values())
    nan = lambda array, mask: np.where(mask[None, ..., None, None], BFLOAT16(np.nan), array)
    dirty = {name: nan(array, is_out[name]) for name, array in arrays.items()}
    return dirty, (nan(cotangents[0], is_out["query"]), cotangents[1])


def check_slabs(case: Case, gpu: str, layouts, origin_pairs, *, has_nan: bool = False) -> None:
    """Values, lse and all gradients of every pair of origins against float64, through one program."""
    arrays, cotangents = slab_inputs(case, *layouts)

    def run(arrays, cotangents, origins):
        return differentiate(lambda a: attend_slab(case, a, origins), arrays, cotangents)

    with interpret_gpu(gpu, detect_races=True):
        program = jax.jit(run).lower(arrays, cotangents, np.asarray(origin_pairs[0], np.int32))
        program = program.compile()
        for pair in origin_pairs:
            origins = np.asarray(pair, np.int32)
            given = poisoned(case, arrays, cotangents, origins) if has_nan else (arrays, cotangents)
            got = jax.tree.map(np.asarray, program(*given, origins))
            slabs = (places(n, o) for n, o in zip(layouts, origins, strict=True))
            mask, index = pairs_of(case, *slabs)
            want = dense(arrays, cotangents, mask, index, case.scale)
            check_array(got.lse, want.lse, LSE, f"lse {pair} {case!r}")
            check_close(got, want, OUT, f"{pair} {case!r}")
            lone = ~mask.any(1).reshape(layouts[0])
            assert (got.out[:, lone] == 0).all() and (got.lse[:, lone] == -np.inf).all()
            assert (got.gradients["query"][:, lone] == 0).all()


NARROW = {"batch": 1, "head_dim": 32, "value_dim": 32}
LINE = case_1d(41, 7, stride=2, dilation=2, heads_per_kv=2, **NARROW)
ORIGINS = (
    (
        [5],
        [2],
    ),  # inside: no origin a multiple of the dilation, windows cut at both ends of the key slab
    ([-3], [-6]),  # before the volume
    ([30], [27]),  # over its end; a slab of 24 keys from 27 on
    ([0], [34]),  # no query finds a key
)


def slow_on(*names):
    """Both GPUs, some of them with the slow tests."""
    return [pytest.param(gpu, marks=pytest.mark.slow) if gpu in names else gpu for gpu in GPUS]


@pytest.mark.kernel
@pytest.mark.parametrize("gpu", slow_on("h200"))
def test_a_line(gpu):
    check_slabs(tiled(LINE, gpu), gpu, ((18,), (24,)), ORIGINS)


BOX = case_of((3, 6, 20), (2, 3, 6), stride=(1, 2, 1), dilation=(1, 2, 1), is_causal=(True, False, False), heads_per_kv=1, **NARROW)  # fmt: skip


@pytest.mark.kernel
@pytest.mark.parametrize("gpu", slow_on("h200"))
def test_nan_outside_the_volume(gpu):
    """Of queries, keys, values and the cotangent of out: nothing shows, gradients there are 0."""
    origins = [([-1, 1, 3], [-1, -1, 0]), ([1, 3, 2], [1, 2, 5])]
    check_slabs(tiled(BOX, gpu, 4, 4), gpu, ((2, 5, 12), (2, 5, 15)), origins, has_nan=True)


@pytest.mark.kernel
def test_nan_around_a_slab_longer_than_the_volume():
    case = tiled(case_1d(9, 4, heads_per_kv=1, **NARROW), "h200")
    check_slabs(case, "h200", ((14,), (13,)), [([-2], [-3])], has_nan=True)


@pytest.mark.kernel
@pytest.mark.parametrize("gpu", slow_on("b200"))
def test_merged_key_slabs_are_the_whole(gpu):
    """All queries against one slab of keys after the other, additional keys with the first; heads that are padded."""
    case = tiled(case_1d(50, 9, heads_per_kv=1, batch=1, head_dim=24, value_dim=17, num_additional=2), gpu)  # fmt: skip
    arrays, cotangents = case.inputs(BFLOAT16), case.cotangents(BFLOAT16)

    def merged(arrays):
        parts = []
        for begin, end in ((0, 23), (23, 50)):
            slab = arrays | {name: arrays[name][:, begin:end] for name in ("key", "value")}
            if parts:
                slab = {name: x for name, x in slab.items() if not name.startswith("additional")}
            parts.append(attend_slab(case, slab, (np.int32([0]), np.int32([begin]))))
        return gna_jax.merge_attentions(*zip(*parts, strict=True))

    with interpret_gpu(gpu):
        got = jax.jit(lambda a, c: differentiate(merged, a, c))(arrays, cotangents)
        got = jax.tree.map(np.asarray, got)
    want = oracle(case, arrays, cotangents)
    check_array(got.lse, want.lse, LSE)
    check_close(got, want, OUT)


@pytest.mark.kernel
def test_the_whole_volume_as_a_slab_has_the_volumes_bits():
    case = tiled(case_of((3, 20), (3, 5), heads_per_kv=1, **NARROW), "h200", 2, 2)
    arrays, cotangents = case.inputs(BFLOAT16), case.cotangents(BFLOAT16)
    whole = lambda a: gna_jax.gna(**a, **case.geometry, return_lse=True, implementation="mosaic", tiles=case.tiles)  # fmt: skip
    slab = lambda a: attend_slab(case, a, np.zeros((2, 2), np.int32))
    with interpret_gpu("h200"):
        got, want = (
            jax.tree.map(
                np.asarray, jax.jit(lambda a, c, f=f: differentiate(f, a, c))(arrays, cotangents)
            )
            for f in (slab, whole)
        )
    check_equal(got, want)


# Programs


def lowered(query_layout=None) -> str:
    """The program of out for a GPU that is not there: of the whole volume, or of a slab of queries."""
    volume = (12, 24)
    x = jax.ShapeDtypeStruct((1, *volume, 2, 64), jnp.bfloat16)
    options = {"window_size": (5, 7), "implementation": "mosaic", "device": "h200"}
    if query_layout is None:
        run, arrays = lambda q, k: gna_jax.gna(q, k, k, **options), (x, x)
    else:
        query = jax.ShapeDtypeStruct((1, *query_layout, 2, 64), jnp.bfloat16)
        origin = jax.ShapeDtypeStruct((2,), jnp.int32)
        run = lambda q, k, *origins: slab_attention(q, k, k, *origins, global_layout=volume, **options)[0]  # fmt: skip
        arrays = query, x, origin, origin
    return jax.jit(run).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()


def kernel_operands(text: str) -> list[str]:
    """Types of the arrays that the one kernel of a program reads."""
    (line,) = [line for line in text.splitlines() if "custom_call @mosaic_gpu" in line]
    return line.rpartition(" : (")[2].partition(") -> ")[0].split(", ")


def test_only_slabs_have_origins():
    """One kernel and no copy of tokens either way; a whole volume's kernel reads what it always has."""
    whole, slab = lowered(), lowered((4, 24))
    tokens = "tensor<1x12x24x128xbf16>"
    assert kernel_operands(whole)[:3] == [tokens] * 3 and "i32" not in "".join(
        kernel_operands(whole)
    )
    origins, query, *keys = kernel_operands(slab)[:4]
    assert (
        origins == "tensor<2x4xi32>" and query == "tensor<1x4x24x128xbf16>" and keys == [tokens] * 2
    )
    for text in (whole, slab):
        assert "stablehlo.pad" not in text and "stablehlo.while" not in text


def test_tiles_fill_the_slab():
    """Thin slabs get thin tiles; the whole volume as a slab is counted like the volume."""
    call = functools.partial(Call, (30, 48, 80), (18, 24, 24), heads=4, device="h200")
    whole, same = call().problem(), call(query_layout=(30, 48, 80)).problem()
    assert complete(whole, None) == complete(same, None)
    counts = [mosaic.workload(problem, None) for problem in (whole, same)]
    assert counts[0].computed_pairs == counts[1].computed_pairs
    assert counts[0].seconds == counts[1].seconds
    thin = call(query_layout=(30, 6, 80), key_layout=(30, 30, 80)).problem()
    tiles, work = complete(thin, None), mosaic.workload(thin, None)
    assert mosaic.supports(thin, tiles) is None and 6 % tiles.q[1] == 0
    assert 1 <= 8 * work.computed_pairs / counts[0].computed_pairs < 1.15
    dilated = call(query_layout=(30, 6, 81), dilation=(1, 1, 2)).problem()
    copies = "axis 2 of queries padded from 81 to 82 for dilation 2"
    assert mosaic.workload(dilated, None).copies == (copies,)


SLABS = {
    "3d-64": {"query_layout": (30, 6, 80), "key_layout": (30, 30, 80)},
    "3d-all": {"query_layout": (30, 14, 80), "key_layout": (30, 36, 80)},
}
"""Of calls of `kernel_resources`."""


def compiled_slabs():
    """Every kernel of the slabs; forwards of the first by default, the others with the slow tests."""
    for name, kernel in kernel_resources.read():
        call, volume = kernel_resources.calls()[name], name.partition("-")[2]
        if volume in SLABS:
            is_first = volume == next(iter(SLABS)) and kernel.endswith("forward")
            marks = () if is_first else (pytest.mark.slow,)
            slab = dataclasses.replace(call, **SLABS[volume])
            yield pytest.param(slab, kernel, id=f"{name}-{kernel}", marks=marks)


@pytest.mark.kernel
@pytest.mark.parametrize(("call", "kernel"), list(compiled_slabs()))
def test_no_spills(call, kernel):
    """A slab's kernel spills nothing, has the matrix instructions of the volume's, and copies no tokens around it."""
    got = compile_kernel(call, kernel).resources
    assert got.spill_bytes == got.stack_bytes == got.serialized_wgmma == 0
    assert got.registers <= got.most_registers and got.smem_bytes <= got.smem_limit
    padded = any(n % d for n, d in zip(call.query_layout, got.dilation, strict=True))
    assert padded or not any("pad_to_dilation" in text for text in got.memory_passes)
