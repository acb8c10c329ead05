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


@dataclasses.dataclass(frozen=True)
class Generation:
    """The numbers of one GPU generation's kernels.

    Attributes:
      name: as people say it.
      compute_capabilities: CUDA's, of the devices it runs on.
      rows: own tokens of one worker, the rows of one matrix instruction.
      most_columns: keys per KV tile of the forward.
      most_backward_columns: queries per Q tile of dK and dV.
      backward_workers: workers that share a KV tile of dK and dV where nobody says how large it is.
    """

    name: str
    compute_capabilities: tuple[tuple[int, int], ...]
    rows: int
    most_columns: int
    most_backward_columns: int
    backward_workers: int


HOPPER = Generation(
    "Hopper",
    ((9, 0),),
    rows=64,
    # 64 x 128 scores and 64 x 128 outputs in float32 are 128 of 240 registers per thread.
    most_columns=128,
    # Scores, their gradient, dK and dV of 64 rows: 32 + 32 + 64 + 64 registers.
    most_backward_columns=64,
    backward_workers=2,
)
BLACKWELL = Generation(
    "Blackwell",
    ((10, 0), (10, 3)),
    rows=128,
    # Two Q parts of scores and output: 4 x 128 columns of tensor memory, all there are.
    most_columns=128,
    # Scores, their gradient, dK and dV: again 4 x 128.
    most_backward_columns=128,
    backward_workers=1,
)
GENERATIONS = (HOPPER, BLACKWELL)

DTYPES = ("bfloat16", "float16")
HEAD_DIMS = (32, 64, 128)
MAX_WORKERS = 2
LONGEST_BOX_SIDE = 256
"""Tokens per axis of a TMA box."""
STAGES = 2
SMEM_ALIGNMENT = 1024
"""Every buffer starts at a multiple of it: a swizzle pattern is 8 rows of 128 bytes."""
RESERVED_SMEM = 2048
"""Room for barriers and alignment, as the compiler's report has it."""
LONGEST_GRID_AXIS = 65535
"""Thread blocks on an axis of the grid other than the first."""


def generation_of(problem: Problem) -> Generation | None:
    """The generation whose kernels run on the problem's device; None for any other device."""
    capability = problem.device.compute_capability
    return next((g for g in GENERATIONS if capability in g.compute_capabilities), None)


def supports(problem: Problem, tiles: Tiles | None) -> str | None:
    """None, or why no kernel here runs the problem with these tiles; the text names the nearest legal choice.

    `tiles` None asks for the call alone. A call's operands reach the kernels with equal head dims of `HEAD_DIMS`.
    """
    generation = generation_of(problem)
    if generation is None:
        names = ", ".join(f"{g.name} ({_capabilities(g)})" for g in GENERATIONS)
        return f"the Pallas kernels run on {names}; got {problem.device.kind}: name such a device, or use 'xla'"
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
    if problem.is_slab:
        return "the Pallas kernels take whole volumes only, this call is a slab of one: use 'xla'"
    return None


def _refused_tiles(problem: Problem, tiles: Tiles, generation: Generation) -> str | None:
    got = f"got q={tiles.q}, kv={tiles.kv}, backward_q={tiles.backward_q}, backward_kv={tiles.backward_kv}"
    if tiles.kv is None or (tiles.backward_q is None) != (tiles.backward_kv is None):
        return (
            f"the Pallas kernels need tiles.q with tiles.kv, and backward_q with backward_kv; {got}"
        )
    if tiles.dynamic is False:
        return "the Pallas kernels start visited tiles where the box starts; got dynamic=False: pass dynamic=None"
    own, visited = {"q": tiles.q}, {"kv": (tiles.kv, generation.most_columns)}
    plans = [(forward_plan, 1), (query_gradient_plan, 2)]
    if tiles.backward_q is not None and tiles.backward_kv is not None:
        own["backward_kv"] = tiles.backward_kv
        visited["backward_q"] = tiles.backward_q, generation.most_backward_columns
        plans.append((key_gradient_plan, 2))
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
    needed = max(smem_bytes(plan(problem, tiles), own_arrays) for plan, own_arrays in plans)
    if needed > problem.device.smem_bytes:
        return (
            f"these tiles need {needed} bytes of shared memory, {problem.device.kind} has {problem.device.smem_bytes};"
            f" {got}: use fewer tokens per visited tile"
        )
    return None


def forward_plan(problem: Problem, tiles: Tiles) -> TilePlan:
    """The forward: a block owns a Q tile; its workers share it on the first axis that can be halved."""
    return _plan(problem, tiles.q, tiles.kv or tiles.q, is_inverse=False)


def query_gradient_plan(problem: Problem, tiles: Tiles) -> TilePlan:
    """DQ walks as the forward does. On Blackwell a block takes one part of the Q tile: tensor memory holds no more."""
    plan = forward_plan(problem, tiles)
    if generation_of(problem) is not BLACKWELL:
        return plan
    return dataclasses.replace(plan, q_tile=plan.part, num_workers=1)


def key_gradient_plan(problem: Problem, tiles: Tiles) -> TilePlan:
    """DK and dV: a block owns a KV tile and visits Q tiles. On Blackwell it owns one part of the KV tile."""
    kv_tile = tiles.backward_kv or tiles.q
    plan = _plan(problem, tiles.backward_q or kv_tile, kv_tile, is_inverse=True)
    if generation_of(problem) is not BLACKWELL:
        return plan
    return dataclasses.replace(plan, kv_tile=plan.part, num_workers=1)


def _plan(
    problem: Problem, q_tile: tuple[int, ...], kv_tile: tuple[int, ...], *, is_inverse: bool
) -> TilePlan:
    own = kv_tile if is_inverse else q_tile
    generation = generation_of(problem) or HOPPER
    num_workers = max(1, math.prod(own) // generation.rows)
    split_axis = next(axis for axis, size in enumerate(own) if size % num_workers == 0)
    return TilePlan(problem, q_tile, kv_tile, num_workers, split_axis, STAGES, is_inverse)


def smem_bytes(plan: TilePlan, own_arrays: int) -> int:
    """Shared memory of a block: its own arrays, two visited arrays per stage, statistics of rows, and barriers.

    Args:
      plan: the kernel's.
      own_arrays: arrays of own tokens that stay for the whole walk: 1 for the forward (Q), 2 for gradients (Q and dO, K and V).
    """
    own, visited = plan.num_workers * plan.rows, plan.stages * plan.columns
    operands = (
        (own_arrays * own + 2 * visited) * plan.problem.head_dim * plan.problem.dtype.itemsize
    )
    statistics = sum(
        -(-tokens * 4 // SMEM_ALIGNMENT) * SMEM_ALIGNMENT
        for tokens in 2 * (own_arrays * own // 2, visited)
    )
    return operands + statistics + RESERVED_SMEM
