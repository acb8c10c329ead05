"""What the Hopper kernels take, what they need, and the static plan of supported tiles. The kernel: `hopper_forward`."""

import math

from gna_jax.problem import Problem
from gna_jax.tiling import Tiles
from pallas_kernels.plan import TilePlan

COMPUTE_CAPABILITY = (9, 0)
DTYPES = ("bfloat16", "float16")
HEAD_DIMS = (32, 64, 128)
ROWS = 64
"""Queries of one warpgroup: the rows of a wgmma instruction."""
MAX_WORKERS = 2
MOST_COLUMNS = 128
"""Keys per KV tile that the registers hold: 64 x 128 scores and 64 x 128 outputs in float32 are 128 of 240 registers."""
MMA_DEPTH = 16
"""Keys per step of a 16-bit wgmma: KV tiles are multiples of it."""
LONGEST_BOX_SIDE = 256
"""Tokens per axis of a TMA box."""
STAGES = 2
SMEM_ALIGNMENT = 1024
"""Every buffer starts at a multiple of it: a swizzle pattern is 8 rows of 128 bytes."""
RESERVED_SMEM = 2048
"""Room for barriers and alignment, as the compiler's report has it."""
LONGEST_GRID_AXIS = 65535
"""Thread blocks on an axis of the grid other than the first."""


def supports(problem: Problem, tiles: Tiles | None) -> str | None:
    """None, or why this kernel cannot run the problem with these tiles; the text names the nearest legal choice."""
    for reason in (
        _refused_call(problem),
        None if tiles is None else _refused_tiles(problem, tiles),
    ):
        if reason is not None:
            return reason
    return None


def _refused_call(problem: Problem) -> str | None:
    device = problem.device
    if device.compute_capability != COMPUTE_CAPABILITY:
        return f"the Hopper kernel runs on compute capability 9.0; got {device.kind}: name a Hopper device, or use 'xla'"
    if problem.dtype.name not in DTYPES:
        return f"the Hopper kernel takes bfloat16 and float16; got {problem.dtype.name}: cast the operands, or use 'xla'"
    if problem.head_dim not in HEAD_DIMS:
        wider = [dim for dim in HEAD_DIMS if dim > problem.head_dim]
        advice = f"pad the heads to {wider[0]}" if wider else "use 'xla'"
        return f"the Hopper kernel takes head_dim {HEAD_DIMS}; got {problem.head_dim}: {advice}"
    if problem.value_dim != problem.head_dim:
        return (
            "the Hopper kernel takes values as wide as the keys;"
            f" got head_dim={problem.head_dim}, value_dim={problem.value_dim}: pad the narrower, or use 'xla'"
        )
    if problem.num_additional or problem.has_bias:
        return (
            "the Hopper kernel has no additional keys and no relative position bias yet: attend to the additional keys"
            " apart and join with merge_attentions, or use 'xla'"
        )
    if max(problem.batch, problem.query_heads) > LONGEST_GRID_AXIS:
        return (
            f"the Hopper kernel takes at most {LONGEST_GRID_AXIS} batch entries and heads;"
            f" got batch={problem.batch}, {problem.query_heads} query heads: split the batch"
        )
    if problem.is_slab:
        return "the Hopper kernel takes whole volumes only, this call is a slab of one: use 'xla'"
    return None


def _refused_tiles(problem: Problem, tiles: Tiles) -> str | None:
    if tiles.kv is None or len(tiles.q) != problem.rank:
        return f"the Hopper kernel needs a Q and a KV tile of {problem.rank} sizes; got q={tiles.q}, kv={tiles.kv}"
    if tiles.dynamic is False:
        return "the Hopper kernel starts KV tiles where the key box starts; got dynamic=False: pass dynamic=None"
    sizes = (*tiles.q, *tiles.kv)
    if any(size & (size - 1) or size > LONGEST_BOX_SIDE for size in sizes):
        return f"tile sizes are powers of two up to {LONGEST_BOX_SIDE} per axis; got q={tiles.q}, kv={tiles.kv}"
    queries, keys = math.prod(tiles.q), math.prod(tiles.kv)
    if queries not in (ROWS, MAX_WORKERS * ROWS):
        return f"a Q tile has {ROWS} or {MAX_WORKERS * ROWS} queries; got q={tiles.q}, {queries} queries"
    if keys % MMA_DEPTH or keys > MOST_COLUMNS:
        return f"a KV tile has a multiple of {MMA_DEPTH} and at most {MOST_COLUMNS} keys; got kv={tiles.kv}, {keys} keys"
    needed = smem_bytes(tile_plan(problem, tiles))
    if needed > problem.device.smem_bytes:
        return (
            f"these tiles need {needed} bytes of shared memory, {problem.device.kind} has {problem.device.smem_bytes};"
            f" got q={tiles.q}, kv={tiles.kv}: use fewer keys per tile"
        )
    return None


def tile_plan(problem: Problem, tiles: Tiles) -> TilePlan:
    """The static plan of supported tiles: the first axis that can be halved is shared by the workers."""
    num_workers = math.prod(tiles.q) // ROWS
    split_axis = next(axis for axis, size in enumerate(tiles.q) if size % num_workers == 0)
    kv_tile = tiles.q if tiles.kv is None else tiles.kv
    return TilePlan(problem, tiles.q, kv_tile, num_workers, split_axis, STAGES)


def smem_bytes(plan: TilePlan) -> int:
    """Shared memory of a block: Q (later out) of every worker, the stages of K and V, lse rows and barriers."""
    tokens = plan.num_workers * plan.rows + 2 * plan.stages * plan.columns
    operands = tokens * plan.problem.head_dim * plan.problem.dtype.itemsize
    lse = -(-plan.num_workers * plan.rows * 4 // SMEM_ALIGNMENT) * SMEM_ALIGNMENT
    return operands + lse + RESERVED_SMEM
