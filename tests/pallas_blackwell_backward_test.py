"""The Blackwell gradients in the interpreter against float64, with race detection, no GPU needed."""

import functools
import itertools
import math
from typing import Any, NamedTuple

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
from pallas_kernels import blackwell_key_gradient, blackwell_query_gradient, limits, row_statistics
from pallas_kernels.plan import TilePlan, tile_walk

pytestmark = pytest.mark.kernel

B200 = KNOWN_DEVICES["b200"]
ON_B200 = jax.sharding.AbstractMesh(
    (),
    (),
    abstract_device=jax.sharding.AbstractDevice(device_kind=B200.kind, platform="gpu", num_cores=8),
)
# P, dS and the result are rounded to 16 bits; a gradient sums up to a few hundred of them.
TOLERANCE = {np.dtype(ml_dtypes.bfloat16): 1e-2, np.dtype(np.float16): 1.5e-3}


class Call(NamedTuple):
    """A call of the kernels: what they read."""

    operands: Operands
    out_cotangent: jax.Array
    lse: jax.Array
    delta: jax.Array


def call_of(case: Case, dtype: Any) -> tuple[Call, dict[str, np.ndarray]]:
    """The kernels' arrays, statistics from the oracle, and the gradients that they should return."""
    arrays, (dout, dlse) = case.inputs(dtype), case.cotangents(dtype)
    dlse = np.asarray(dlse, np.float32)
    want = oracle(case, arrays, (dout, dlse))
    operands = Operands(*(jnp.asarray(arrays[name]) for name in ("query", "key", "value")))
    out = jnp.asarray(want.out, jnp.float32)
    delta = row_statistics.delta(out, jnp.asarray(dout), jnp.asarray(dlse))
    call = Call(operands, jnp.asarray(dout), jnp.asarray(want.lse, jnp.float32), delta)
    return call, want.gradients


@functools.cache
def kernels(problem: Problem, tiles: Tiles) -> Any:
    """Both kernels as one program of the interpreter: dQ, dK and dV."""
    params = plgpu.InterpretGPUParams(detect_races=True)

    def run(operands: Operands, *rest: jax.Array) -> tuple[jax.Array, ...]:
        arguments = problem, operands, tiles, *rest, params
        query = blackwell_query_gradient.query_gradient(*arguments)
        return query, *blackwell_key_gradient.key_gradients(*arguments)

    return jax.jit(run)


def interpret(case: Case, call: Call) -> dict[str, np.ndarray]:
    """The gradients by operand."""
    problem = describe(
        call.operands, case.neighborhood, scale=case.scale, precision=None, device=B200
    )
    assert limits.supports(problem, case.tiles) is None
    with jax.sharding.use_abstract_mesh(ON_B200):
        gradients = kernels(problem, case.tiles)(*call)
        return dict(zip(("query", "key", "value"), map(np.asarray, gradients), strict=True))


def check(case: Case, dtype: Any = ml_dtypes.bfloat16) -> None:
    call, want = call_of(case, dtype)
    for name, gradient in interpret(case, call).items():
        assert gradient.dtype == dtype
        check_array(gradient, want[name], TOLERANCE[np.dtype(dtype)], f"d {name} {case!r}")


def plans_of(case: Case) -> tuple[TilePlan, TilePlan]:
    problem = describe(
        Operands(*(jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in case.shapes().values())),
        case.neighborhood,
        scale=None,
        precision=None,
        device=B200,
    )
    return limits.query_gradient_plan(problem, case.tiles), limits.key_gradient_plan(
        problem, case.tiles
    )


def copies_of(case: Case) -> int:
    """Rows that the interpreter copies one by one: most of its time."""
    total, heads = 0, case.batch * case.query_heads
    for plan in plans_of(case):
        if plan.num_tiles > 8:
            return 1 << 30
        visits = sum(tile_walk(plan, tile).num_visits for tile in range(plan.num_tiles))
        own, visited = (2 * math.prod(box[:-1]) for box in (plan.own, plan.visited))
        total += plan.num_tiles * own + visits * (visited + 10)
    return total * heads


def draw(seed: int, max_copies: int = 600) -> Case:
    """A random call with tiles: ragged layouts, uneven groups, any mix of what the kernels take, a bounded number of copies."""
    rng = np.random.default_rng([11, seed])
    while True:
        case = propose(rng, seed)
        if copies_of(case) <= max_copies:
            return case


def propose(rng: np.random.Generator, seed: int) -> Case:
    pick = lambda *options: options[rng.integers(len(options))]
    rank = 1 + seed % 3
    longest = {1: (300,), 2: (10, 50), 3: (4, 5, 40)}[rank]
    layout = tuple(int(rng.integers(max(3, n // 3), n + 1)) for n in longest)
    dilation = tuple(int(pick(1, 1, 2, 3)) for _ in layout)
    group = [length // d for length, d in zip(layout, dilation, strict=True)]
    window = tuple(int(pick(-1, *rng.integers(1, n + 1, 4))) for n in group)
    limit = [n if w == -1 else w for n, w in zip(group, window, strict=True)]
    head_dim = (32, 64, 128)[seed // 3 % 3]
    visited = lambda: shape(rng, int(pick(min(64, head_dim), 128)), rank)
    tiles = Tiles(
        q=shape(rng, int(pick(128, 256)), rank),
        kv=visited(),
        backward_q=visited(),
        backward_kv=shape(rng, int(pick(128, 256)), rank),
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
    """A random power-of-two shape of at most 8 rows of the last axis."""
    rest = int(math.log2(elements)) - 3
    ends = [0, *sorted(rng.integers(0, 4, rank - 1).tolist()), 3]
    sizes = [2 ** (b - a) for a, b in itertools.pairwise(ends)]
    return (*sizes[:-1], sizes[-1] * 2**rest)


@pytest.mark.parametrize("seed", range(6))
def test_random_cases(seed):
    check(draw(seed), dtype=(ml_dtypes.bfloat16, np.float16)[seed % 2])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6, 45))
def test_many_random_cases(seed):
    check(draw(seed, 1500), dtype=(ml_dtypes.bfloat16, np.float16)[seed % 2])


def tiles_of(q: Any, kv: Any, backward_q: Any, backward_kv: Any) -> Tiles:
    return Tiles(q=q, kv=kv, backward_q=backward_q, backward_kv=backward_kv)


WIDE = {"batch": 1, "heads_per_kv": 1, "head_dim": 64, "value_dim": 64}
NARROW = {"batch": 1, "heads_per_kv": 1, "head_dim": 32, "value_dim": 32}
BROAD = {"batch": 1, "heads_per_kv": 1, "head_dim": 128, "value_dim": 128}
SHELLS = case_of((3, 110), (3, 105), **NARROW, tiles=tiles_of((2, 64), (1, 32), (1, 32), (2, 64)))


@pytest.mark.parametrize(
    "case",
    [
        # A dilation that does not divide, on the innermost axis too: groups of two lengths; several heads per key.
        case_of(
            (7, 21), (3, 6), dilation=(2, 3), batch=1, head_dim=32, value_dim=32,
            tiles=tiles_of((8, 32), (2, 16), (4, 8), (4, 32)),
        ),
        # Boxes larger than the layout.
        case_of((3, 2, 5), (2, 2, 3), **WIDE, tiles=tiles_of((4, 4, 8), (2, 2, 16), (1, 4, 16), (2, 4, 32))),
        # Blocked causal attention, ragged; two workers in dQ, one in dK and dV; tiles of two parts.
        case_1d(500, 192, stride=192, is_causal=True, **BROAD, tiles=tiles_of(256, 128, 64, 256)),
    ],
    ids=str,
)  # fmt: skip
def test_chosen_cases(case):
    check(case)


def test_clean_tiles_between_parts_of_the_shell():
    for plan in plans_of(SHELLS):
        walks = [tile_walk(plan, tile) for tile in range(plan.num_tiles)]
        assert any(plan.stages < walk.num_clean < walk.num_visits for walk in walks), plan
    check(SHELLS)


SLIDING = case_of((9, 20), (3, 5), **WIDE, tiles=tiles_of((4, 32), (2, 32), (2, 32), (4, 32)))


def test_gradients_are_the_same_bits_every_time():
    call, _ = call_of(SLIDING, ml_dtypes.bfloat16)
    first, second = interpret(SLIDING, call), interpret(SLIDING, call)
    for name in first:
        np.testing.assert_array_equal(first[name].view(np.uint16), second[name].view(np.uint16))


def test_tokens_that_do_not_meet_do_not_matter():
    """Finite changes of what a token neither sees nor is seen by leave the bits of its gradients alone."""
    case = SLIDING
    call, _ = call_of(case, ml_dtypes.bfloat16)
    mask = case.neighborhood.mask(case.layout)
    spread = lambda far: jnp.asarray(far)[None, :, :, None, None]
    change = lambda array, far: jnp.where(far, array * 3 + 1, array)
    operands = call.operands
    unseen, blind = spread(~mask[0, 0]), spread(~mask[:, :, 0, 0])
    before = interpret(case, call)
    keys = operands._replace(key=change(operands.key, unseen), value=change(operands.value, unseen))
    after = interpret(case, call._replace(operands=keys))
    bits = lambda gradient: gradient[:, 0, 0].view(np.uint16)
    np.testing.assert_array_equal(bits(before["query"]), bits(after["query"]))
    queries = call._replace(
        operands=operands._replace(query=change(operands.query, blind)),
        out_cotangent=change(call.out_cotangent, blind),
        lse=change(call.lse, blind[..., 0]),
        delta=change(call.delta, blind[..., 0]),
    )
    after = interpret(case, queries)
    for name in ("key", "value"):
        np.testing.assert_array_equal(bits(before[name]), bits(after[name]))
