"""Shared by the tests of the Pallas kernels: seeded calls with tiles, the kernels in JAX's interpreter, and the float64 oracle.

A kernel is run by itself, with the statistics (lse, delta) that it would get from the others taken from the oracle.
"""

import importlib
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from attention_suite import Case, check_array, oracle
from jax.experimental.pallas import mosaic_gpu as plgpu

from gna_jax import interpret_gpu
from gna_jax.device import KNOWN_DEVICES
from gna_jax.problem import Operands, Problem, describe
from gna_jax.tiling import Tiles
from pallas_kernels import limits, row_statistics
from pallas_kernels.plan import TilePlan, tile_walk

BFLOAT16, FLOAT16 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)
DEVICES = {"hopper": "h200", "blackwell": "b200"}
GENERATIONS = {"hopper": limits.HOPPER, "blackwell": limits.BLACKWELL}
FORWARD, QUERY_GRADIENT, KEY_GRADIENT = "forward", "query_gradient", "key_gradient"
JOBS = (FORWARD, QUERY_GRADIENT, KEY_GRADIENT)
RESULTS = {FORWARD: ("out", "lse"), QUERY_GRADIENT: ("query",), KEY_GRADIENT: ("key", "value")}
PLANS = {
    FORWARD: limits.forward_plan,
    QUERY_GRADIENT: limits.query_gradient_plan,
    KEY_GRADIENT: limits.key_gradient_plan,
}
# Of the largest entry: weights, score gradients and results are rounded to 8 or 11 bits, and summed by the hundred.
TOLERANCE = {BFLOAT16: 1e-2, FLOAT16: 1.5e-3}
LSE = 1e-5  # float32, from exact products of 16-bit operands


class Call(NamedTuple):
    """What kernels read, and what they must return."""

    operands: Operands
    out_cotangent: jax.Array
    lse: jax.Array
    delta: jax.Array
    want: dict[str, np.ndarray]


def call_of(case: Case, dtype: Any = BFLOAT16) -> Call:
    """The arrays of a case; statistics and results from the oracle."""
    arrays, (dout, dlse) = case.inputs(dtype), case.cotangents(dtype)
    want = oracle(case, arrays, (dout, dlse))
    operands = Operands(*(jnp.asarray(arrays[name]) for name in ("query", "key", "value")))
    out = jnp.asarray(want.out, jnp.float32)
    delta = row_statistics.delta(out, jnp.asarray(dout), jnp.asarray(dlse, jnp.float32))
    results = {"out": want.out, "lse": want.lse, **want.gradients}
    return Call(operands, jnp.asarray(dout), jnp.asarray(want.lse, jnp.float32), delta, results)


def problem_of(case: Case, generation: str, dtype: Any = BFLOAT16) -> Problem:
    """The call that a generation's kernels get."""
    shapes = case.shapes()
    operands = (jax.ShapeDtypeStruct(shapes[name], dtype) for name in ("query", "key", "value"))
    device = KNOWN_DEVICES[DEVICES[generation]]
    return describe(
        Operands(*operands), case.neighborhood, scale=case.scale, precision=None, device=device
    )


def plan_of(case: Case, generation: str, job: str) -> TilePlan:
    """Tiles and walk of a kernel."""
    return PLANS[job](problem_of(case, generation), case.tiles)


def interpret(
    case: Case, call: Call, generation: str, job: str, *, detect_races: bool = True
) -> dict[str, np.ndarray]:
    """One kernel in the interpreter: its results by name."""
    problem = problem_of(case, generation, call.operands.query.dtype)
    refused = limits.supports(problem, case.tiles)
    assert refused is None, refused
    calls = importlib.import_module("pallas_kernels.calls")  # anew: tests plant faults in it
    params = plgpu.InterpretGPUParams(detect_races=detect_races)

    @jax.jit
    def run(operands: Operands, *rest: jax.Array) -> Any:
        if job == FORWARD:
            return calls.forward(problem, operands, case.tiles, params)
        function = calls.query_gradient if job == QUERY_GRADIENT else calls.key_gradients
        return function(problem, operands, case.tiles, *rest, params)

    with interpret_gpu(DEVICES[generation], detect_races=detect_races):
        results = run(call.operands, call.out_cotangent, call.lse, call.delta)
        arrays = [np.asarray(array) for array in jax.tree.leaves(results)]
    return dict(zip(RESULTS[job], arrays, strict=True))


def check(
    case: Case, generation: str, job: str, dtype: Any = BFLOAT16, *, detect_races: bool = True
) -> None:
    """One kernel against the oracle, in the operands' dtype, races detected."""
    call = call_of(case, dtype)
    got = interpret(case, call, generation, job, detect_races=detect_races)
    for name, array in got.items():
        assert array.dtype == (np.float32 if name == "lse" else dtype)
        tolerance = LSE if name == "lse" else TOLERANCE[np.dtype(dtype)]
        check_array(array, call.want[name], tolerance, f"{generation} {job} {name} {case!r}")


def copies_of(case: Case, generation: str, job: str) -> float:
    """Rows that the interpreter copies one by one, the most of its time."""
    plan = plan_of(case, generation, job)
    if plan.num_tiles > 16:
        return math.inf
    visits = sum(tile_walk(plan, tile).num_visits for tile in range(plan.num_tiles))
    own, visited = (2 * math.prod(box[:-1]) + 5 for box in (plan.own, plan.visited))
    heads = case.batch * case.query_heads * max(1, case.head_dim // 64)
    return (plan.num_tiles * own + visits * visited) * heads


def draw(
    seed: int, generation: str, job: str, max_copies: int, head_dims: Sequence[int] = (32, 64, 128)
) -> Case:
    """A random call with tiles: ragged layouts, uneven groups, any mix of what the kernels take, a bounded number of copies."""
    rng = np.random.default_rng([13, seed, JOBS.index(job), generation == "hopper"])
    while True:
        case = _propose(rng, seed, generation, head_dims)
        if copies_of(case, generation, job) <= max_copies:
            return case


def _propose(
    rng: np.random.Generator, seed: int, generation: str, head_dims: Sequence[int]
) -> Case:
    pick = lambda *options: options[rng.integers(len(options))]
    rank, head_dim = 1 + seed % 3, head_dims[seed // 3 % len(head_dims)]
    longest = {1: (300,), 2: (10, 50), 3: (5, 6, 40)}[rank]
    layout = tuple(int(rng.integers(n // 4, n + 1)) for n in longest)
    dilation = tuple(int(pick(1, 1, 2, 3)) for _ in layout)
    dilation = tuple(min(d, n) for d, n in zip(dilation, layout, strict=True))
    group = [length // d for length, d in zip(layout, dilation, strict=True)]
    window = tuple(int(pick(-1, *rng.integers(1, n + 1, 4))) for n in group)
    limit = [n if w == -1 else w for n, w in zip(group, window, strict=True)]
    widths = {"head_dim": head_dim, "value_dim": head_dim}
    return Case(
        layout,
        window,
        tuple(int(pick(1, rng.integers(1, w + 1))) for w in limit),
        dilation,
        tuple(bool(rng.integers(3) == 0) for _ in layout),
        batch=int(pick(1, 1, 2)),
        kv_heads=int(pick(1, 2)),
        heads_per_kv=int(pick(1, 2)),
        **widths,
        scale=pick(None, None, -0.2, 0.0),
        tiles=random_tiles(rng, rank, head_dim, generation),
        seed=seed,
    )


def random_tiles(rng: np.random.Generator, rank: int, head_dim: int, generation: str) -> Tiles:
    """Legal tiles of any shape."""
    numbers, is_wide = GENERATIONS[generation], head_dim > limits.WIDEST_NARROW_HEAD
    capacity = numbers.wide if is_wide else numbers.narrow
    pick = lambda *options: int(options[rng.integers(len(options))])
    own = lambda: pick(numbers.rows, limits.MAX_WORKERS * numbers.rows)
    visited = lambda most: pick(max(min(64, head_dim), most // 2), most)
    return Tiles(
        q=random_shape(rng, own(), rank),
        kv=random_shape(rng, visited(capacity.columns), rank),
        backward_q=random_shape(rng, visited(capacity.backward_columns), rank),
        backward_kv=random_shape(rng, own(), rank),
    )


def random_shape(rng: np.random.Generator, elements: int, rank: int) -> tuple[int, ...]:
    """A random power-of-two shape of at most 8 rows of at least 4 tokens."""
    rest = int(math.log2(elements)) - 3
    ends = [0, *sorted(rng.integers(0, 4, rank - 1).tolist()), 3]
    sizes = [2 ** (b - a) for a, b in itertools.pairwise(ends)]
    return (*sizes[:-1], sizes[-1] * 2**rest)
