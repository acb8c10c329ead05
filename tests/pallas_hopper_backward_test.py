"""The Hopper gradients: dQ, dK and dV in the interpreter against float64, no GPU needed."""

import itertools
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from attention_suite import Case, case_1d, case_of, check_array, oracle
from jax.experimental.pallas import mosaic_gpu as plgpu

from gna_jax.device import KNOWN_DEVICES
from gna_jax.problem import Operands, describe
from gna_jax.tiling import Tiles
from pallas_kernels import limits, row_statistics
from pallas_kernels.hopper_key_gradient import key_gradients
from pallas_kernels.hopper_query_gradient import query_gradient
from pallas_kernels.plan import tile_walk

pytestmark = pytest.mark.kernel

H200 = KNOWN_DEVICES["h200"]
ON_H200 = jax.sharding.AbstractMesh(
    (),
    (),
    abstract_device=jax.sharding.AbstractDevice(device_kind=H200.kind, platform="gpu", num_cores=8),
)
# Weights and gradients of scores are rounded to 16 bits (2^-9 and 2^-12 of each), the result once more.
TOLERANCE = {np.dtype(ml_dtypes.bfloat16): 1.2e-2, np.dtype(np.float16): 1.5e-3}
NAMES = ("query", "key", "value")


def gradients(case: Case, arrays, statistics, dtype, detect_races: bool) -> dict[str, np.ndarray]:
    """Both kernels in the interpreter: gradients by name. `statistics`: out, its cotangent, lse and lse's cotangent."""
    operands = Operands(*(jnp.asarray(arrays[name]) for name in NAMES))
    problem = describe(operands, case.neighborhood, scale=case.scale, precision=None, device=H200)
    assert limits.supports(problem, case.tiles) is None
    out, dout, lse, dlse = (jnp.asarray(array) for array in statistics)
    params = plgpu.InterpretGPUParams(detect_races=detect_races)

    def run(operands, dout, lse, delta):
        rest = (case.tiles, dout, lse, delta, params)
        return query_gradient(problem, operands, *rest), *key_gradients(problem, operands, *rest)

    delta = row_statistics.delta(out, dout, dlse)
    with jax.sharding.use_abstract_mesh(ON_H200):
        got = jax.jit(run)(operands, dout, lse, delta)
        return {name: np.asarray(array) for name, array in zip(NAMES, got, strict=True)}


def check(case: Case, dtype=ml_dtypes.bfloat16, detect_races: bool = False) -> None:
    arrays, (dout, dlse) = case.inputs(dtype), case.cotangents(dtype)
    want = oracle(case, arrays, (dout, dlse))
    statistics = want.out.astype(np.float32), dout, want.lse.astype(np.float32), dlse
    got = gradients(case, arrays, statistics, dtype, detect_races)
    for name, array in got.items():
        assert array.dtype == dtype
        check_array(array, want.gradients[name], TOLERANCE[np.dtype(dtype)], f"d{name} {case!r}")


def draw(seed: int, max_copies: int = 2500) -> Case:
    """A random call with tiles; `max_copies` bounds the rows that the interpreter copies one by one, and so its time."""
    rng = np.random.default_rng([11, seed])
    while True:
        case = propose(rng, seed)
        if num_copies(case, max_copies) <= max_copies:
            return case


def num_copies(case: Case, most: int) -> int:
    """Rows copied by both kernels, or a number above `most`."""
    copies = 0
    for make, heads in (
        (limits.query_gradient_plan, case.query_heads),
        (limits.key_gradient_plan, case.query_heads),
    ):
        plan = make(case.problem(ml_dtypes.bfloat16), case.tiles)
        if plan.num_tiles * heads * case.batch > most:
            return most + 1
        of_own, of_visited = (
            2 * math.prod(box[:-1]) * max(1, case.head_dim // 64) + 3
            for box in (plan.part, plan.visited)
        )
        visits = sum(tile_walk(plan, tile).num_visits for tile in range(plan.num_tiles))
        copies += (2 * plan.num_parts * of_own + visits * of_visited) * heads * case.batch
    return copies


def propose(rng: np.random.Generator, seed: int) -> Case:
    pick = lambda *options: options[rng.integers(len(options))]
    rank = 1 + seed % 3
    longest = {1: 150, 2: 14, 3: 6}[rank]
    layout = tuple(int(n) for n in rng.integers(longest // 2, longest + 1, rank))
    dilation = tuple(int(pick(1, 1, 2, 3)) for _ in layout)
    group = [length // d for length, d in zip(layout, dilation, strict=True)]
    window = tuple(int(pick(-1, *rng.integers(1, n + 1, 4))) for n in group)
    limit = [n if w == -1 else w for n, w in zip(group, window, strict=True)]
    head_dim = int(pick(32, 64, 128))
    columns = int(pick(16, 32, 64))
    return Case(
        layout,
        window,
        tuple(int(pick(1, rng.integers(1, w + 1))) for w in limit),
        dilation,
        tuple(bool(rng.integers(3) == 0) for _ in layout),
        batch=int(pick(1, 1, 2)),
        kv_heads=int(pick(1, 2)),
        heads_per_kv=int(pick(1, 2, 3)),
        head_dim=head_dim,
        value_dim=head_dim,
        scale=pick(None, None, -0.2, 0.0),
        tiles=Tiles(
            q=shape(rng, int(pick(64, 128)), rank),
            kv=shape(rng, int(pick(16, 32, 64, 128)), rank),
            # Statistics of queries are read in units of 16 bytes: four on the last axis.
            backward_q=shape(rng, columns, rank, last=4),
            backward_kv=shape(rng, int(pick(64, 128)), rank),
        ),
        seed=seed,
    )


def shape(rng: np.random.Generator, elements: int, rank: int, last: int = 1) -> tuple[int, ...]:
    """A random power-of-two shape, at least `last` on the last axis."""
    free = int(math.log2(elements // last))
    ends = [0, *sorted(rng.integers(0, free + 1, rank - 1).tolist()), free]
    sizes = [2 ** (b - a) for a, b in itertools.pairwise(ends)]
    return (*sizes[:-1], sizes[-1] * last)


@pytest.mark.parametrize("seed", range(9))
def test_random_cases(seed):
    check(draw(seed), dtype=(ml_dtypes.bfloat16, np.float16)[seed % 2])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(9, 60))
def test_many_random_cases(seed):
    check(draw(seed, max_copies=8000), dtype=(ml_dtypes.bfloat16, np.float16)[seed % 2])


WIDE = {"batch": 1, "heads_per_kv": 1, "head_dim": 64, "value_dim": 64}


def tiles(own: tuple[int, ...], visited: tuple[int, ...]) -> Tiles:
    return Tiles(q=own, kv=visited, backward_q=visited, backward_kv=own)


@pytest.mark.parametrize(
    "case",
    [
        # A dilation that does not divide, on the innermost axis too; two workers.
        case_of((7, 21), (3, 6), dilation=(2, 3), **WIDE, tiles=tiles((8, 16), (2, 8))),
        # Boxes larger than the layout.
        case_of((3, 2, 5), (2, 2, 3), **WIDE, tiles=tiles((4, 4, 8), (4, 2, 8))),
        # Blocked causal attention, ragged, three query heads per key.
        case_1d(100, 24, stride=24, is_causal=True, **WIDE | {"heads_per_kv": 3}, tiles=tiles((64,), (64,))),
    ],
    ids=str,
)  # fmt: skip
def test_chosen_cases_without_races(case):
    check(case, detect_races=True)


def test_clean_tiles_between_parts_of_the_shell():
    """More clean visits than stages, per head of a group of two, and a shell after them, in both kernels."""
    case = case_1d(150, 97, **WIDE | {"heads_per_kv": 2}, tiles=tiles((64,), (16,)))
    for make in (limits.query_gradient_plan, limits.key_gradient_plan):
        plan = make(case.problem(ml_dtypes.bfloat16), case.tiles)
        walks = [tile_walk(plan, tile) for tile in range(plan.num_tiles)]
        assert any(plan.stages < walk.num_clean < walk.num_visits for walk in walks)
    check(case, detect_races=True)


def test_what_no_window_joins_does_not_matter():
    """Finite changes of keys that a query does not see leave its dQ's bits alone; of queries that do not see a key, its dK's."""
    case = case_of((9, 20), (3, 5), **WIDE, tiles=tiles((4, 16), (4, 8)))
    arrays, (dout, dlse) = case.inputs(ml_dtypes.bfloat16), case.cotangents(ml_dtypes.bfloat16)
    rows = (case.batch, *case.layout, case.query_heads)
    statistics = [np.zeros(dout.shape, np.float32), dout, np.full(rows, 3.0, np.float32), dlse]
    mask = case.neighborhood.mask(case.layout)
    before = gradients(case, arrays, statistics, ml_dtypes.bfloat16, False)
    for changed, kept, seen in (
        (("key", "value"), ("query",), mask[0, 0]),
        (("query",), ("key", "value"), mask[:, :, 0, 0]),
    ):
        far = ~seen[None, :, :, None, None]
        change = lambda array, far=far: np.where(far, array * 2 + 1, array).astype(array.dtype)
        others = arrays | {name: change(arrays[name]) for name in changed}
        after = gradients(case, others, statistics, ml_dtypes.bfloat16, False)
        for name in kept:
            a, b = (x[name][:, 0, 0].view(np.uint8) for x in (before, after))
            np.testing.assert_array_equal(a, b, err_msg=name)
        assert any(np.any(before[name] != after[name]) for name in kept)
