"""What the kernels of each GPU generation take, what they need, and the static plans of supported tiles.

One rule for all: a call's shape and dtype, and its tiles, against the numbers of a generation (`HOPPER`, `BLACKWELL`). Which
backend asks is the business of `gna_jax.backends`; the kernels themselves never check.
"""

import dataclasses
import math

from gna_jax.problem import Problem
from gna_jax.tiling import Tiles
from pallas_kernels.plan import TilePlan
from pallas_kernels.row_statistics import ALIGNED_FLOATS
from pallas_kernels.token_boxes import WIDEST_CHUNK

DTYPES = ("bfloat16", "float16")
HEAD_DIMS = (32, 64, 128, 256)
WIDEST_NARROW_HEAD = 128
MAX_WORKERS = 2
LONGEST_BOX_SIDE = 256
"""Tokens per axis of a TMA box."""
STAGES = 2
SMEM_ALIGNMENT = 1024
"""Every buffer starts at a multiple of it: a swizzle pattern is 8 rows of 128 bytes."""
LONGEST_GRID_AXIS = 65535
"""Thread blocks on an axis of the grid other than the first."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One kernel's thread block: how many workers, and what lies in its shared memory beside visited tiles.

    A worker takes one part of an own tile, `Generation.rows` tokens. A tile of more parts than workers is several blocks' job.

    Attributes:
      workers: at most.
      own_arrays: arrays of own tokens.
      own_rows: vectors of 32-bit numbers of own tokens: lse, delta, factors, notes.
      visited_rows: such vectors of visited tokens, by stages.
      staged_columns: 16-bit weights per own row that wait there.
      other_bytes: room for barriers, and what the compiler adds.
    """

    workers: int
    own_arrays: int
    own_rows: int
    visited_rows: int = 0
    staged_columns: int = 0
    other_bytes: int = 1024


@dataclasses.dataclass(frozen=True)
class Capacity:
    """What registers, shared memory and tensor memory of a thread block hold, for some head dims.

    Attributes:
      columns: keys per KV tile of the forward, at most.
      backward_columns: queries per Q tile of dK and dV, at most.
      forward, query_gradient, key_gradient: the kernels' blocks.
      value_stages: tiles of V in flight in dQ, and of dO in dK and dV.
      key_gradient_passes: the gradients that a block of dK and dV sums up at once; several passes walk several times.
    """

    columns: int
    backward_columns: int
    forward: Job
    query_gradient: Job
    key_gradient: Job
    value_stages: int = STAGES
    key_gradient_passes: tuple[tuple[str, ...], ...] = (("key", "value"),)


@dataclasses.dataclass(frozen=True)
class Generation:
    """The numbers of one GPU generation's kernels.

    Attributes:
      name: as people say it.
      compute_capabilities: CUDA's, of the devices it runs on.
      rows: own tokens of one worker, the rows of one matrix instruction.
      narrow: what a block holds with head dims up to `WIDEST_NARROW_HEAD`.
      wide: what it holds with wider ones.
    """

    name: str
    compute_capabilities: tuple[tuple[int, int], ...]
    rows: int
    narrow: Capacity
    wide: Capacity


_ONE_BY_ONE = (("key",), ("value",))
_HOPPER_FORWARD = Job(workers=2, own_arrays=1, own_rows=2, other_bytes=2048)
HOPPER = Generation(
    "Hopper",
    ((9, 0),),
    rows=64,
    narrow=Capacity(
        # 64 x 128 scores and 64 x 128 outputs in float32 are 128 of 232 registers per thread.
        columns=128,
        # Scores, their gradient, dK and dV of 64 rows: 32 + 32 + 64 + 64 registers.
        backward_columns=64,
        forward=_HOPPER_FORWARD,
        query_gradient=Job(workers=2, own_arrays=2, own_rows=3),
        key_gradient=Job(workers=2, own_arrays=2, own_rows=1, visited_rows=2),
    ),
    wide=Capacity(
        # 64 x 64 scores and 64 x 256 outputs: 32 + 128 registers.
        columns=64,
        # Scores, their gradient, and dK or dV: 32 + 32 + 128.
        backward_columns=64,
        forward=_HOPPER_FORWARD,
        # Two own arrays of 64 rows are 64 KiB of shared memory, two stages of two visited ones 128 KiB.
        query_gradient=Job(workers=1, own_arrays=2, own_rows=3, staged_columns=64),
        key_gradient=Job(workers=1, own_arrays=2, own_rows=1, visited_rows=2, staged_columns=64),
        key_gradient_passes=_ONE_BY_ONE,
    ),
)
_BLACKWELL_QUERY_GRADIENT = Job(workers=1, own_arrays=2, own_rows=0)
_BLACKWELL_KEY_GRADIENT = Job(workers=1, own_arrays=2, own_rows=0, visited_rows=2)
BLACKWELL = Generation(
    "Blackwell",
    ((10, 0), (10, 3)),
    rows=128,
    narrow=Capacity(
        # Two Q parts of scores and output: 4 x 128 columns of tensor memory, all there are.
        columns=128,
        # Scores, their gradient, dK and dV: again 4 x 128.
        backward_columns=128,
        forward=Job(workers=2, own_arrays=1, own_rows=2, other_bytes=2048),
        query_gradient=_BLACKWELL_QUERY_GRADIENT,
        key_gradient=_BLACKWELL_KEY_GRADIENT,
    ),
    wide=Capacity(
        # 256 columns of output, and in shared memory 64 KiB of Q beside 128 KiB of K and V.
        columns=64,
        backward_columns=64,
        forward=Job(workers=1, own_arrays=1, own_rows=2, other_bytes=2048),
        query_gradient=_BLACKWELL_QUERY_GRADIENT,
        key_gradient=_BLACKWELL_KEY_GRADIENT,
        # Two own arrays take 128 KiB, and three visited tiles 96 of the 99 KiB that are left.
        value_stages=1,
        key_gradient_passes=_ONE_BY_ONE,
    ),
)
GENERATIONS = (HOPPER, BLACKWELL)


def generation_of(problem: Problem) -> Generation | None:
    """The generation whose kernels run on the problem's device; None for any other device."""
    capability = problem.device.compute_capability
    return next((g for g in GENERATIONS if capability in g.compute_capabilities), None)


def capacity_of(problem: Problem) -> Capacity:
    """What a thread block holds of the problem, on its device; on any other than a GPU of `GENERATIONS`, what Hopper's does."""
    generation = generation_of(problem) or HOPPER
    is_wide = max(problem.head_dim, problem.value_dim) > WIDEST_NARROW_HEAD
    return generation.wide if is_wide else generation.narrow


def supports(problem: Problem, tiles: Tiles | None) -> str | None:
    """None, or why no kernel here runs the problem with these tiles; the text names the nearest legal choice.

    `tiles` None asks for the call alone. A call's operands reach the kernels with equal head dims of `HEAD_DIMS`.
    """
    generation = generation_of(problem)
    if generation is None:
        names = ", ".join(f"{g.name} ({_capabilities(g)})" for g in GENERATIONS)
        return f"the Pallas kernels run on {names}; got {problem.device.kind}: name such a device, or use 'triton' (Ampere and later) or 'xla'"
    reason = _refused_call(problem)
    if reason is None and tiles is not None:
        reason = _refused_tiles(problem, tiles, generation)
    return reason


def _capabilities(generation: Generation) -> str:
    return ", ".join(f"{major}.{minor}" for major, minor in generation.compute_capabilities)


def _refused_call(problem: Problem) -> str | None:
    if problem.dtype.name not in DTYPES:
        return f"the Pallas kernels take bfloat16 and float16; got {problem.dtype.name}: cast the operands, or use 'xla'"
    if max(problem.head_dim, problem.value_dim) > HEAD_DIMS[-1]:
        return (
            f"the Pallas kernels take head dims up to {HEAD_DIMS[-1]};"
            f" got head_dim={problem.head_dim}, value_dim={problem.value_dim}: use more and narrower heads, or 'xla'"
        )
    if problem.has_bias:
        return "the Pallas kernels have no relative position bias: use 'xla'"
    if max(problem.batch, problem.query_heads) > LONGEST_GRID_AXIS:
        return (
            f"the Pallas kernels take at most {LONGEST_GRID_AXIS} batch entries and heads;"
            f" got batch={problem.batch}, {problem.query_heads} query heads: split the batch"
        )
    return None


def _refused_tiles(problem: Problem, tiles: Tiles, generation: Generation) -> str | None:
    got = f"got q={tiles.q}, kv={tiles.kv}, backward_q={tiles.backward_q}, backward_kv={tiles.backward_kv}"
    if tiles.kv is None or (tiles.backward_q is None) != (tiles.backward_kv is None):
        return (
            f"the Pallas kernels need tiles.q with tiles.kv, and backward_q with backward_kv; {got}"
        )
    if tiles.dynamic is False:
        return "the Pallas kernels start visited tiles where the box starts; got dynamic=False: pass dynamic=None"
    capacity = capacity_of(problem)
    own, visited = {"q": tiles.q}, {"kv": (tiles.kv, capacity.columns)}
    plans = [(forward_plan, capacity.forward), (query_gradient_plan, capacity.query_gradient)]
    if tiles.backward_q is not None and tiles.backward_kv is not None:
        own["backward_kv"] = tiles.backward_kv
        visited["backward_q"] = tiles.backward_q, capacity.backward_columns
        plans.append((key_gradient_plan, capacity.key_gradient))
        if tiles.backward_q[-1] < ALIGNED_FLOATS:
            return f"tiles.backward_q has at least {ALIGNED_FLOATS} queries on the last axis, 16 bytes of lse; {got}"
    for shape in (*own.values(), *(shape for shape, _ in visited.values())):
        if any(size & (size - 1) or size > LONGEST_BOX_SIDE for size in shape):
            return f"tile sizes are powers of two up to {LONGEST_BOX_SIDE} per axis; {got}"
    rows = generation.rows, MAX_WORKERS * generation.rows
    for name, shape in own.items():
        if math.prod(shape) not in rows:
            return f"on {generation.name} tiles.{name} has {rows[0]} or {rows[1]} tokens, not {math.prod(shape)}; {got}"
    # Visited tokens are what the second product sums over, and an operand spans whole swizzle patterns of a chunk's width.
    least = min(WIDEST_CHUNK, problem.head_dim)
    for name, (shape, most) in visited.items():
        if math.prod(shape) % least or math.prod(shape) > most:
            return f"on {generation.name} tiles.{name} has {least} to {most} tokens with head_dim {problem.head_dim}, not {math.prod(shape)}; {got}"
    needed = max(smem_bytes(plan(problem, tiles), job) for plan, job in plans)
    if needed > problem.device.smem_bytes:
        return (
            f"these tiles need {needed} bytes of shared memory, {problem.device.kind} has {problem.device.smem_bytes};"
            f" {got}: use fewer tokens per visited tile"
        )
    return None


def forward_plan(problem: Problem, tiles: Tiles) -> TilePlan:
    """The forward: a block owns a Q tile; its workers share it on the first axis that can be halved."""
    workers = capacity_of(problem).forward.workers
    return _plan(problem, tiles.q, tiles.kv or tiles.q, workers)


def query_gradient_plan(problem: Problem, tiles: Tiles) -> TilePlan:
    """DQ walks as the forward does."""
    capacity = capacity_of(problem)
    plan = _plan(problem, tiles.q, tiles.kv or tiles.q, capacity.query_gradient.workers)
    return dataclasses.replace(plan, value_stages=capacity.value_stages)


def key_gradient_plan(problem: Problem, tiles: Tiles) -> TilePlan:
    """DK and dV: a block owns a KV tile and visits Q tiles."""
    capacity, kv_tile = capacity_of(problem), tiles.backward_kv or tiles.q
    plan = _plan(
        problem,
        kv_tile,
        tiles.backward_q or kv_tile,
        capacity.key_gradient.workers,
        is_inverse=True,
    )
    return dataclasses.replace(plan, value_stages=capacity.value_stages)


def _plan(
    problem: Problem,
    own: tuple[int, ...],
    visited: tuple[int, ...],
    most_workers: int,
    *,
    is_inverse: bool = False,
) -> TilePlan:
    """An own tile of more parts than a block has workers is cut: a block takes as many parts as it has."""
    rows = (generation_of(problem) or HOPPER).rows
    parts = max(1, math.prod(own) // rows)
    split_axis = next(axis for axis, size in enumerate(own) if size % parts == 0)
    num_workers = min(parts, most_workers)
    own = tuple(
        size * num_workers // parts if axis == split_axis else size for axis, size in enumerate(own)
    )
    q_tile, kv_tile = (visited, own) if is_inverse else (own, visited)
    return TilePlan(problem, q_tile, kv_tile, num_workers, split_axis, STAGES, STAGES, is_inverse)


def smem_bytes(plan: TilePlan, job: Job) -> int:
    """Shared memory of a block: its own arrays, two visited arrays by stages, vectors, staged weights, barriers."""
    own, stages = plan.num_workers * plan.rows, plan.stages + plan.value_stages
    tokens = job.own_arrays * own + stages * plan.columns
    operands = tokens * plan.problem.head_dim + own * job.staged_columns
    rows = job.own_rows * (own,) + job.visited_rows * (plan.stages * plan.columns,)
    statistics = sum(-(-4 * row // SMEM_ALIGNMENT) * SMEM_ALIGNMENT for row in rows)
    return operands * plan.problem.dtype.itemsize + statistics + job.other_bytes
