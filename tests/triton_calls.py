"""Shared by the tests of the Triton kernels' values: calls of `gna` in Triton's interpreter, and random calls with legal tiles.

The interpreter takes milliseconds per program and visit, however large a tile is: `draw` bounds both.
"""

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from attention_suite import (
    Arrays,
    Case,
    Results,
    attend,
    case_1d,
    case_of,
    check_close,
    differentiate,
    oracle,
)
from triton_suite import INTERPRETED, quick_interpreter

from gna_jax import interpret_gpu
from gna_jax.backends.triton.calls import forward_plan, key_gradient_plan
from gna_jax.backends.triton.tiles import LEAST, MOST, complete
from gna_jax.problem import Operands, Problem, describe
from gna_jax.simulator import Simulation
from gna_jax.tiling import Tiles

FLOAT16, BFLOAT16 = np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)
# Of the largest entry. float32: sums of exact products, hundreds of them. 16 bits: weights, score gradients and results are rounded.
TOLERANCE = {np.dtype(np.float32): 3e-6, FLOAT16: 2e-3, BFLOAT16: 1.6e-2}
HEAD_DIMS = (16, 24, 32, 48, 64, 80, 96, 128, 160, 256)
LINE = Tiles((16,), (16,), (16,), (16,))
PLANE = Tiles((4, 4), (2, 8), (2, 8), (4, 4))
VOLUME = Tiles((2, 2, 4), (2, 4, 2), (2, 4, 4), (2, 2, 4))
SMALL = {"head_dim": 16, "value_dim": 16}
ONE = SMALL | {"batch": 1, "heads_per_kv": 1}

CHOSEN = {
    "all at once": case_1d(20, 5, dilation=2, has_bias=True, num_additional=3, lengths=(0, 3), tiles=LINE),
    "several clean tiles": case_1d(60, 40, stride=4, tiles=LINE, **ONE),
    "causal": case_1d(37, 21, is_causal=True, tiles=LINE, **ONE),
    "bias of two axes": case_of((3, 7), (3, 3), dilation=(1, 2), has_bias=True, tiles=PLANE, **ONE),
    "additional keys": case_1d(34, 5, num_additional=20, lengths=(18,), tiles=LINE, **ONE),
    "bias of three axes": case_of((2, 3, 5), (2, 3, 4), has_bias=True, tiles=VOLUME, **ONE),
    "bias of causal and strided axes": case_of(
        (9, 8), (7, 5), stride=(2, 1), is_causal=(False, True), has_bias=True, tiles=PLANE, **ONE
    ),
    "causal groups of two lengths": case_1d(
        37, 4, stride=3, dilation=2, is_causal=True, tiles=LINE, head_dim=12, value_dim=20, scale=-0.3
    ),
    "each query sees itself": case_of((5, 4), (1, 1), tiles=PLANE, **ONE),
    "each query sees everything": case_of((3, 4, 5), (-1, -1, -1), tiles=VOLUME, **ONE),
    "blocked": case_of((11, 13), (4, 5), stride=(4, 5), tiles=PLANE, **ONE),
    "one token": case_1d(1, 1, tiles=LINE, **ONE),
    "axes of one token": case_of((1, 17, 1), (1, 3, 1), tiles=Tiles((1, 16, 1), (1, 16, 1))),
    "tiles past every end": case_of((3, 2), (3, 2), tiles=Tiles((16, 8), (8, 16), (8, 8), (8, 8))),
    "multi-query": case_1d(30, 7, heads_per_kv=8, num_additional=1, tiles=LINE, head_dim=4, batch=1),
    "three heads of two": case_1d(16, 5, kv_heads=2, heads_per_kv=3, has_bias=True, tiles=LINE, batch=1),
    "two heads of two": case_1d(16, 5, kv_heads=2, tiles=LINE, batch=1, **SMALL),
    "no scores": case_1d(20, 5, scale=0.0, num_additional=2, tiles=LINE, **ONE),
    "scores upside down": case_1d(40, 19, scale=-1.0, tiles=LINE, **ONE),
    "more keys than tokens": case_1d(5, 3, num_additional=70, lengths=(70, 33), tiles=LINE, **SMALL),
    "tiles by default": case_of((9, 12), (5, 4), dilation=(1, 2), has_bias=True, **ONE),
}  # fmt: skip


@contextlib.contextmanager
def interpreting() -> Iterator[None]:
    """Calls of `implementation="triton"` run in the interpreter."""
    with quick_interpreter(), interpret_gpu("a100"):
        yield


def interpret(case: Case, arrays: Arrays, cotangents: Any, **options: Any) -> Results:
    """Out, lse and the gradients of a case, eager."""
    options = {"implementation": "triton"} | options
    arrays, cotangents = jax.tree.map(jnp.asarray, (arrays, cotangents))
    with interpreting():
        got = differentiate(lambda a: attend(case, a, **options), arrays, cotangents)
        return jax.tree.map(np.asarray, got)


def check(case: Case, dtype: Any = np.float32, **options: Any) -> Results:
    """Out, lse and all gradients against float64, in the operands' dtype. Rounding grows with the scores."""
    arrays, cotangents = case.inputs(dtype), case.cotangents(dtype)
    got = interpret(case, arrays, cotangents, **options)
    tolerance = TOLERANCE[np.dtype(dtype)] * max(1.0, abs(case.scale or 0.0) * case.head_dim**0.5)
    if np.dtype(dtype).itemsize == 2:  # delta sums as many products of a rounded out
        tolerance *= max(1.0, case.value_dim / 32) ** 0.5
    check_close(got, oracle(case, arrays, cotangents), tolerance, repr(case))
    assert got.out.dtype == dtype and got.lse.dtype == np.float32
    assert all(gradient.dtype == dtype for gradient in got.gradients.values())
    return got


def problem_of_case(case: Case, dtype: Any = np.float32) -> Problem:
    """The call that the kernels get."""
    shapes = {name: jax.ShapeDtypeStruct(s, dtype) for name, s in case.shapes().items()}
    lengths = None
    if case.lengths is not None:
        lengths = jax.ShapeDtypeStruct((case.batch,), np.int32)
    operands = Operands(
        shapes["query"],
        shapes["key"],
        shapes["value"],
        additional_keys=shapes.get("additional_keys"),
        additional_values=shapes.get("additional_values"),
        additional_lengths=lengths,
        bias=shapes.get("relative_position_bias"),
    )
    return describe(
        operands, case.neighborhood, scale=case.scale, precision=None, device=INTERPRETED
    )


def work_of(case: Case) -> int:
    """Programs and visits of all kernels of the case."""
    problem = problem_of_case(case)
    tiles = complete(problem, case.tiles)
    rule, layout = case.neighborhood, case.layout
    assert tiles.backward_q is not None
    forward = Simulation.of(rule, layout, Tiles(tiles.q, tiles.kv, dynamic=True)).forward
    transposed = Tiles(tiles.backward_q, tiles.backward_kv, dynamic=True)
    backward = Simulation.of(rule, layout, transposed).backward
    own, inverse = forward_plan(problem, tiles), key_gradient_plan(problem, tiles)
    kernels = 3 if case.has_bias else 2
    queries = kernels * (own.q_tiles + forward.visits)
    if case.has_bias:
        queries += own.q_tiles * own.q_rows  # read one by one
    queries += 2 * own.q_tiles * -(-case.num_additional // own.kv_rows)
    keys = inverse.kv_tiles + case.heads_per_kv * backward.visits
    more = inverse.additional_tiles * (
        1 + case.heads_per_kv * -(-math.prod(layout) // inverse.q_rows)
    )
    return case.batch * (case.query_heads * queries + case.kv_heads * (keys + more))


def draw(seed: int, most: int, dims: Sequence[int] = (16, 16, 24, 32)) -> Case:
    """A random call of any mix of features, with `most` programs and visits or somewhat fewer: ragged layouts, any legal tiles."""
    rng = np.random.default_rng([8, seed])
    while True:
        case = _propose(rng, seed, dims)
        if most // 2 <= work_of(case) <= most:
            return case


def _propose(rng: np.random.Generator, seed: int, dims: Sequence[int]) -> Case:
    pick = lambda *options: options[rng.integers(len(options))]
    rank = 1 + seed % 3
    longest = {1: (150,), 2: (14, 24), 3: (6, 8, 10)}[rank]
    layout = tuple(int(rng.integers(1, n + 1)) for n in longest)
    dilation = tuple(min(int(pick(1, 1, 2, 3)), n) for n in layout)
    group = [length // d for length, d in zip(layout, dilation, strict=True)]
    window = tuple(int(pick(-1, *rng.integers(1, n + 1, 5))) for n in group)
    limit = [n if w == -1 else w for n, w in zip(group, window, strict=True)]
    batch, rows = int(pick(1, 1, 2)), int(rng.integers(1, 40))
    num_additional = int(pick(0, rows))
    head_dim = int(pick(*dims))
    return Case(
        layout,
        window,
        tuple(int(pick(1, 1, rng.integers(1, w + 1), w)) for w in limit),
        dilation,
        tuple(bool(rng.integers(3) == 0) for _ in layout),
        batch=batch,
        kv_heads=int(pick(1, 1, 2)),
        heads_per_kv=int(pick(1, 1, 2, 3)),
        head_dim=head_dim,
        value_dim=int(pick(*dims)),
        num_additional=num_additional,
        lengths=tuple(int(n) for n in rng.integers(0, num_additional + 1, batch))
        if num_additional and rng.integers(2)
        else None,
        has_bias=bool(rng.integers(5) < 2),
        scale=pick(None, None, None, 2 * head_dim**-0.5, -(head_dim**-0.5), 0.0),
        tiles=random_tiles(rng, rank),
        seed=seed,
    )


def random_tiles(rng: np.random.Generator, rank: int) -> Tiles | None:
    """Legal tiles of any shape, of the forward alone, or none."""
    shapes = [random_shape(rng, rank) for _ in range(4)]
    kind = rng.integers(5)
    return None if kind == 0 else Tiles(*shapes[:2]) if kind == 1 else Tiles(*shapes)


def random_shape(rng: np.random.Generator, rank: int) -> tuple[int, ...]:
    """16 to 128 tokens, a power of two on every axis, most of them small."""
    bits = int(rng.choice(range(LEAST.bit_length() - 1, MOST.bit_length()), p=(0.4, 0.3, 0.2, 0.1)))
    ends = [0, *sorted(rng.integers(0, bits + 1, rank - 1).tolist()), bits]
    return tuple(2 ** (b - a) for a, b in itertools.pairwise(ends))
