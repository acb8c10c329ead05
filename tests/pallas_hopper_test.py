"""The Hopper forward: values and lse in the interpreter against float64, no GPU needed. Resources: `kernel_resources_test.py`."""

import ast
import itertools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from attention_suite import Case, case_1d, case_of, check_array, oracle
from jax.experimental.pallas import mosaic_gpu as plgpu

from gna_jax.device import KNOWN_DEVICES
from gna_jax.problem import Operands, Problem, describe
from gna_jax.tiling import Tiles
from pallas_kernels import hopper_forward, limits, online_softmax
from pallas_kernels.plan import tile_walk

pytestmark = pytest.mark.kernel

H200 = KNOWN_DEVICES["h200"]
ON_H200 = jax.sharding.AbstractMesh(
    (),
    (),
    abstract_device=jax.sharding.AbstractDevice(device_kind=H200.kind, platform="gpu", num_cores=8),
)
TOLERANCE = {np.dtype(ml_dtypes.bfloat16): 8e-3, np.dtype(np.float16): 1e-3}
LSE = 1e-5  # float32, from exact products of 16-bit operands


def operands_of(case: Case, dtype=ml_dtypes.bfloat16) -> Operands:
    arrays = case.inputs(dtype)
    return Operands(*(jnp.asarray(arrays[name]) for name in ("query", "key", "value")))


def problem_of(case: Case, operands: Operands, device=H200) -> Problem:
    rule = case.neighborhood
    return describe(operands, rule, scale=case.scale, precision=None, device=device)


def interpret(case: Case, operands: Operands, detect_races: bool = False):
    """The kernel in the interpreter: out and lse."""
    problem = problem_of(case, operands)
    assert limits.supports(problem, case.tiles) is None
    params = plgpu.InterpretGPUParams(detect_races=detect_races)
    run = lambda operands: hopper_forward.forward(problem, operands, case.tiles, params)
    with jax.sharding.use_abstract_mesh(ON_H200):
        out, lse = jax.jit(run)(operands)
        return np.asarray(out), np.asarray(lse)


def check(case: Case, dtype=ml_dtypes.bfloat16, detect_races: bool = False) -> None:
    operands = operands_of(case, dtype)
    out, lse = interpret(case, operands, detect_races)
    want = oracle(case, case.inputs(dtype), case.cotangents(np.float32))
    assert out.dtype == dtype and lse.dtype == np.float32
    check_array(out, want.out, TOLERANCE[np.dtype(dtype)], f"out {case!r}")
    check_array(lse, want.lse, LSE, f"lse {case!r}")


def draw(seed: int, max_copies: int = 1800) -> Case:
    """A random call with tiles: ragged layouts, uneven groups, any mix of what the kernel takes.

    `max_copies` bounds the rows that the interpreter copies one by one, and so its time.
    """
    rng = np.random.default_rng([9, seed])
    while True:
        case = propose(rng, seed)
        plan, heads = (
            limits.forward_plan(case.problem(), case.tiles),
            case.query_heads * case.batch,
        )
        of_query, of_key = (
            2 * heads * (math.prod(box[:-1]) * max(1, case.head_dim // 64) + 5)
            for box in (plan.part, plan.kv_tile)
        )
        copies = plan.num_parts * (of_query + of_key)
        if copies > max_copies:
            continue
        walks = [tile_walk(plan, tile) for tile in range(plan.num_tiles)]
        copies += (sum(walk.num_visits for walk in walks) - plan.num_parts) * of_key
        if copies <= max_copies:
            return case


def propose(rng: np.random.Generator, seed: int) -> Case:
    pick = lambda *options: options[rng.integers(len(options))]
    rank = 1 + seed % 3
    longest = {1: 150, 2: 24, 3: 10}[rank]
    layout = tuple(int(n) for n in rng.integers(longest // 2, longest + 1, rank))
    dilation = tuple(int(pick(1, 1, 2, 3)) for _ in layout)
    group = [length // d for length, d in zip(layout, dilation, strict=True)]
    window = tuple(int(pick(-1, *rng.integers(1, n + 1, 4))) for n in group)
    limit = [n if w == -1 else w for n, w in zip(group, window, strict=True)]
    head_dim = int(pick(32, 64, 128))
    tiles = Tiles(
        q=shape(rng, int(pick(64, 128)), rank), kv=shape(rng, int(pick(16, 32, 64)), rank)
    )
    return Case(
        layout,
        window,
        tuple(int(pick(1, rng.integers(1, w + 1))) for w in limit),
        dilation,
        tuple(bool(rng.integers(3) == 0) for _ in layout),
        batch=int(pick(1, 1, 2)),
        kv_heads=int(pick(1, 2)),
        heads_per_kv=int(pick(1, 2)),
        head_dim=head_dim,
        value_dim=head_dim,
        scale=pick(None, None, -0.2, 0.0),
        tiles=tiles,
        seed=seed,
    )


def shape(rng: np.random.Generator, elements: int, rank: int) -> tuple[int, ...]:
    """A random power-of-two shape."""
    cuts = sorted(rng.integers(0, int(math.log2(elements)) + 1, rank - 1).tolist())
    ends = [0, *cuts, int(math.log2(elements))]
    return tuple(2 ** (b - a) for a, b in itertools.pairwise(ends))


@pytest.mark.parametrize("seed", range(9))
def test_random_cases(seed):
    check(draw(seed), dtype=(ml_dtypes.bfloat16, np.float16)[seed % 2])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(9, 60))
def test_many_random_cases(seed):
    check(draw(seed), dtype=(ml_dtypes.bfloat16, np.float16)[seed % 2])


WIDE = {"batch": 1, "heads_per_kv": 1, "head_dim": 64, "value_dim": 64}


@pytest.mark.parametrize(
    "case",
    [
        # A dilation that does not divide, on the innermost axis too; two workers.
        case_of((7, 21), (3, 6), dilation=(2, 3), **WIDE, tiles=Tiles(q=(8, 16), kv=(2, 8))),
        # Boxes larger than the layout.
        case_of((3, 2, 5), (2, 2, 3), **WIDE, tiles=Tiles(q=(4, 4, 8), kv=(4, 2, 8))),
        # Blocked causal attention, ragged.
        case_1d(100, 24, stride=24, is_causal=True, **WIDE, tiles=Tiles(q=(64,), kv=(32,))),
    ],
    ids=str,
)  # fmt: skip
def test_chosen_cases_without_races(case):
    check(case, detect_races=True)


def test_clean_tiles_between_parts_of_the_shell():
    case = case_of((20, 23), (11, 13), **WIDE, tiles=Tiles(q=(8, 8), kv=(2, 8)))
    plan = limits.forward_plan(case.problem(), case.tiles)
    walks = [tile_walk(plan, tile) for tile in range(plan.num_tiles)]
    assert any(plan.stages < walk.num_clean < walk.num_visits for walk in walks)
    check(case, detect_races=True)


def test_keys_outside_the_window_do_not_matter():
    """Finite changes of keys and values that a query does not see leave its bits alone."""
    case = case_of((9, 20), (3, 5), **WIDE, tiles=Tiles(q=(4, 16), kv=(4, 8)))
    operands = operands_of(case)
    seen = case.neighborhood.mask(case.layout)[0, 0]
    far = jnp.asarray(~seen)[None, :, :, None, None]
    change = lambda array: jnp.where(far, array * 3 + 1, array)
    changed = operands._replace(key=change(operands.key), value=change(operands.value))
    for a, b in zip(interpret(case, operands), interpret(case, changed), strict=True):
        np.testing.assert_array_equal(a[:, 0, 0].view(np.uint8), b[:, 0, 0].view(np.uint8))


def test_rows_without_a_key_are_zero_and_free_of_nan():
    scores = jnp.zeros((2, 4), jnp.float32)
    mask = jnp.asarray([[False] * 4, [True, False, True, False]])
    start = online_softmax.Softmax(
        (jnp.zeros((2, 3)),), jnp.full((2,), online_softmax.LEAST), jnp.zeros((2,))
    )
    state, weights = online_softmax.update(start, scores, mask, 1.0)
    np.testing.assert_array_equal(weights, [[0, 0, 0, 0], [1, 0, 1, 0]])
    np.testing.assert_array_equal(state.total, [0, 2])
    state, weights = online_softmax.update(state, scores, mask, 1.0)
    np.testing.assert_array_equal(state.total, [0, 4])
    assert np.isfinite(state.largest).all()


def test_no_strided_slices():
    """Mosaic GPU drops the stride of `pl.ds` when it compiles, the interpreter honours it: nothing would notice."""
    sources = sorted((Path(__file__).parents[1] / "pallas_kernels").glob("**/*.py"))
    assert sources
    for path in sources:
        assert not list(strided_slices(path.read_text())), path


def strided_slices(source: str):
    """Lines of calls of `ds`, `dslice` or `Slice` with a stride."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", None))
            has_stride = len(node.args) > 2 or any(k.arg == "stride" for k in node.keywords)
            if name in ("ds", "dslice", "Slice") and has_stride:
                yield node.lineno


def test_strided_slices_are_found():
    assert list(strided_slices("a = pl.ds(0, 4)\nb = pl.ds(0, 4, stride=2)\nc = ds(0, 4, 2)")) == [
        2,
        3,
    ]
