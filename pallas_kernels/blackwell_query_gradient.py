"""Gradient of the queries on Blackwell: dQ by tcgen05 and TMA in one warp-specialised kernel, deterministic.

A thread block computes dQ of 128 queries of one head, which stays in tensor memory. One warp (the producer) walks the KV tiles
of the queries' key box, as the forward does; one warp issues the products S = Q K^T, dP = dO V^T and dQ += dS K; two
warpgroups (the workers) turn S and dP into dS, half of a tile's keys each. Scores have two slots: the next tile's are
computed while the workers are at this one's.

Reading order: `plan`, `token_boxes`, `masks`, `softmax_gradient`, `blackwell_warpgroups`, then here. The gradients of keys and
values: `blackwell_key_gradient`. Budget and resources: docs/deep-dives/blackwell-backward.md.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gna_jax.problem import Operands, Problem
from gna_jax.tiling import Tiles
from pallas_kernels import blackwell_warpgroups as warpgroups
from pallas_kernels import masks
from pallas_kernels.blackwell_warpgroups import ROW, ProductColumns, VisitedColumns
from pallas_kernels.launch import launch
from pallas_kernels.limits import query_gradient_plan
from pallas_kernels.online_softmax import LOG2_E
from pallas_kernels.plan import TilePlan, TileWalk, part_number, tile_walk
from pallas_kernels.row_statistics import to_parts
from pallas_kernels.slots import drain_slots, wait_for_slot
from pallas_kernels.softmax_gradient import gradient_of_scores, weights_of
from pallas_kernels.token_boxes import BoxBuffer, BoxPlace, TokenArray

SCORE_SLOTS = 2


def query_gradient(
    problem: Problem,
    operands: Operands,
    tiles: Tiles,
    out_cotangent: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    interpret: Any = None,
) -> jax.Array:
    """`dQ = scale * (P * (dO V^T - delta)) K`, `[B, *space, N, H]` in the operands' dtype.

    Args:
      problem, tiles: what `supports` accepts.
      operands: query [B, *space, N, H], key and value [B, *space, K, H].
      out_cotangent: dO [B, *space, N, H], in the operands' dtype.
      lse: [B, *space, N] float32, natural log.
      delta: [B, *space, N] float32, see `row_statistics.delta`.
      interpret: `plgpu.InterpretGPUParams` to run in the interpreter on a CPU, None on a GPU.
    """
    kernel = QueryGradientKernel(query_gradient_plan(problem, tiles), interpret is not None)
    queries, keys, plan = kernel.queries, kernel.keys, kernel.plan
    (gradient,) = launch(
        kernel.body,
        plan,
        heads=problem.query_heads,
        num_warpgroups=kernel.columns.num_workers + 1,
        outputs=[
            jax.ShapeDtypeStruct(queries.shape(problem.batch, problem.query_layout), problem.dtype)
        ],
        scratch=kernel.scratch(),
        interpret=interpret,
    )(
        queries.split(operands.query),
        queries.split(out_cotangent),
        keys.split(operands.key),
        keys.split(operands.value),
        to_parts(plan, lse * LOG2_E),
        to_parts(plan, delta),
    )
    return queries.merge(gradient, problem.query_layout)


class Memory(NamedTuple):
    """A block's references: arrays in memory, scratch in shared and in tensor memory, barriers."""

    query: Any
    out_cotangent: Any
    key: Any
    value: Any
    lse: Any
    delta: Any
    gradient: Any
    query_slots: Any
    cotangent_slots: Any
    key_slots: Any
    value_slots: Any
    score_columns: Any
    product_columns: Any
    sum_columns: Any
    own_ready: Any
    key_ready: Any
    value_ready: Any
    key_free: Any
    value_free: Any
    scores_ready: Any
    products_ready: Any
    gradients_ready: Any
    sums_ready: Any


@dataclasses.dataclass(frozen=True)
class QueryGradientKernel:
    """The kernel of one plan.

    Args:
      plan: tiles and walk; one part per block.
      interpreted: whether the interpreter runs it; see `token_boxes` and `ProductColumns`.
    """

    plan: TilePlan
    interpreted: bool

    @property
    def queries(self) -> TokenArray:
        """How query, out's cotangent and the gradient lie."""
        problem = self.plan.problem
        return TokenArray(self.plan.dilation, problem.query_heads, problem.head_dim)

    @property
    def keys(self) -> TokenArray:
        """How key and value lie."""
        problem = self.plan.problem
        return TokenArray(self.plan.dilation, problem.kv_heads, problem.head_dim)

    @property
    def query_buffer(self) -> BoxBuffer:
        """The block's queries, at the end their gradient; and the like for out's cotangent."""
        return BoxBuffer(self.queries, self.plan.q_tile, 1, self.interpreted)

    @property
    def key_buffer(self) -> BoxBuffer:
        """One slot per stage."""
        return BoxBuffer(self.keys, self.plan.kv_tile, self.plan.stages, self.interpreted)

    @property
    def columns(self) -> VisitedColumns:
        """How the workers share the keys of a visited tile."""
        return VisitedColumns(self.plan)

    @property
    def scores(self) -> ProductColumns:
        """S in two slots, replaced by dS."""
        return ProductColumns(self.columns, SCORE_SLOTS, self.interpreted)

    def scratch(self) -> list[Any]:
        """Shared memory, tensor memory and barriers in the order of `Memory`."""
        plan, dtype, workers = self.plan, self.plan.problem.dtype, self.columns.num_workers
        own, visited = self.query_buffer, self.key_buffer
        loaded = functools.partial(plgpu.Barrier, num_arrivals=visited.num_copies)
        ordered = functools.partial(plgpu.Barrier, orders_tensor_core=True)
        return [
            *(own.scratch(dtype) for _ in range(2)),
            *(visited.scratch(dtype) for _ in range(2)),
            self.scores.scratch(dtype),
            plgpu.TMEM((plan.rows, plan.columns), jnp.float32),
            plgpu.TMEM((plan.rows, plan.problem.head_dim), jnp.float32),
            plgpu.Barrier(num_arrivals=2 * own.num_copies),
            *(loaded(num_barriers=plan.stages) for _ in range(2)),
            *(ordered(num_barriers=plan.stages) for _ in range(2)),
            ordered(num_barriers=SCORE_SLOTS),
            ordered(),
            ordered(num_arrivals=workers),
            ordered(),
        ]

    def body(self, *references: Any) -> None:
        """One block. A tile without tokens has no work at all."""
        memory = Memory(*references)

        def with_walk(role: Any) -> None:
            # Computed in each role anew: scalars that lived through the fork of roles would cost all of them registers.
            walk = tile_walk(self.plan, lax.axis_index("tile"))
            pl.when(walk.num_visits > 0)(lambda: role(memory, walk))

        warpgroups.take_roles(
            self.columns.num_workers,
            lambda worker: with_walk(functools.partial(self._work, worker=worker)),
            lambda: with_walk(self._multiply),
            lambda: with_walk(self._produce),
        )

    def _place(self, walk: TileWalk, start: Any, *, is_key: bool) -> BoxPlace:
        head = lax.axis_index("head")
        if is_key and self.plan.problem.heads_per_kv > 1:
            head = lax.div(head, jnp.int32(self.plan.problem.heads_per_kv))
        return BoxPlace(lax.axis_index("batch"), head, walk.residues, tuple(start))

    def _slot(self, step: Any) -> Any:
        return lax.rem(step, jnp.int32(self.plan.stages))

    def _produce(self, memory: Memory, walk: TileWalk) -> None:
        """Starts the copies of Q and dO, and of every visited KV tile as soon as its slot is free."""
        own, visited, stages = self.query_buffer, self.key_buffer, self.plan.stages
        place = self._place(walk, walk.own_start, is_key=False)
        own.load(memory.query, memory.query_slots, 0, place, memory.own_ready)
        own.load(memory.out_cotangent, memory.cotangent_slots, 0, place, memory.own_ready)

        def load(step: Any, start: Any) -> None:
            slot, place = self._slot(step), self._place(walk, start, is_key=True)
            wait_for_slot(memory.key_free, step, stages)
            visited.load(memory.key, memory.key_slots, slot, place, memory.key_ready.at[slot])
            wait_for_slot(memory.value_free, step, stages)
            ready = memory.value_ready.at[slot]
            visited.load(memory.value, memory.value_slots, slot, place, ready)

        @pl.loop(jnp.int32(0), walk.num_clean)
        def _(step):
            load(step, walk.clean_tile(step))

        @pl.loop(walk.num_clean, walk.num_visits)
        def _(step):
            load(step, walk.shell_tile(step - walk.num_clean))

        drain_slots(walk.num_visits, stages, memory.key_free, memory.value_free)

    def _multiply(self, memory: Memory, walk: TileWalk) -> None:
        """Issues all products. Instructions of one warp run in the order of issue.

        Hence the scores of a tile may overwrite dS of the tile before the last.
        """
        plgpu.barrier_wait(memory.own_ready)
        self._multiply_keys(memory, jnp.int32(0))
        self._multiply_values(memory, jnp.int32(0))

        @pl.loop(jnp.int32(1), walk.num_visits)
        def _(step):
            self._multiply_keys(memory, step)
            plgpu.barrier_wait(memory.gradients_ready)  # of step - 1: its dP has been read
            self._multiply_values(memory, step)
            self._add_to_sums(memory, step - 1)

        plgpu.barrier_wait(memory.gradients_ready)
        self._add_to_sums(memory, walk.num_visits - 1)
        plgpu.tcgen05_commit_arrive(memory.sums_ready)

    def _multiply_keys(self, memory: Memory, step: Any) -> None:
        """Scores of a tile: S = Q K^T, not scaled."""
        slot, score_slot = self._slot(step), lax.rem(step, jnp.int32(SCORE_SLOTS))
        query = self.query_buffer.operand(memory.query_slots)
        key = self.key_buffer.operand(memory.key_slots)
        plgpu.barrier_wait(memory.key_ready.at[slot])
        warpgroups.multiply_operands(
            self.scores.product(memory.score_columns, score_slot),
            lambda chunk: query.at[0, chunk],
            lambda chunk: key.at[slot, chunk],
            self.keys.num_chunks,
        )
        plgpu.tcgen05_commit_arrive(memory.scores_ready.at[score_slot])

    def _multiply_values(self, memory: Memory, step: Any) -> None:
        """dP = dO V^T of a tile."""
        slot = self._slot(step)
        cotangent = self.query_buffer.operand(memory.cotangent_slots)
        value = self.key_buffer.operand(memory.value_slots)
        plgpu.barrier_wait(memory.value_ready.at[slot])
        warpgroups.multiply_operands(
            memory.product_columns,
            lambda chunk: cotangent.at[0, chunk],
            lambda chunk: value.at[slot, chunk],
            self.keys.num_chunks,
        )
        plgpu.tcgen05_commit_arrive(memory.products_ready)
        plgpu.tcgen05_commit_arrive(memory.value_free.at[slot])

    def _add_to_sums(self, memory: Memory, step: Any) -> None:
        """dQ += dS K of a tile."""
        slot, score_slot = self._slot(step), lax.rem(step, jnp.int32(SCORE_SLOTS))
        key = self.key_buffer.operand(memory.key_slots)
        warpgroups.add_products(
            lambda chunk: self._sum(memory, chunk),
            lambda worker: self.scores.operand_of(memory.score_columns, score_slot, worker),
            lambda chunk, rows: key.at[slot, chunk, rows],
            chunks=self.keys.num_chunks,
            columns=self.columns,
            is_started=step > 0,
        )
        plgpu.tcgen05_commit_arrive(memory.key_free.at[slot])

    def _sum(self, memory: Memory, chunk: int) -> Any:
        width = self.keys.chunk
        return memory.sum_columns.at[:, pl.ds(chunk * width, width)]

    def _work(self, memory: Memory, walk: TileWalk, worker: Any) -> None:
        """A worker: dS of its half of every tile. The first one writes dQ out."""
        plan = self.plan
        place = self._place(walk, walk.own_start, is_key=False)
        part = part_number(plan, walk, walk.own_start)
        lse, delta = (
            plgpu.load(rows.at[place.batch, place.head, part], layout=ROW, optimized=False)
            for rows in (memory.lse, memory.delta)
        )
        rows = masks.digits(warpgroups.iota(plan.rows, ROW), plan.q_tile)
        queries = tuple(first + row for first, row in zip(walk.own_start, rows, strict=True))
        intervals = masks.key_intervals(plan.problem.neighborhood.axes, queries, walk.lengths)

        def visit(step: Any, mask: Any) -> None:
            slot = lax.rem(step, jnp.int32(SCORE_SLOTS))
            plgpu.barrier_wait(memory.scores_ready.at[slot])
            scores = warpgroups.read(self.scores.product_of(memory.score_columns, slot, worker))
            weights = weights_of(scores, lse, mask(), scale=plan.problem.scale, query_axis=0)
            plgpu.barrier_wait(memory.products_ready)
            width = self.columns.width
            products = warpgroups.read(memory.product_columns.at[:, pl.ds(worker * width, width)])
            gradient = gradient_of_scores(weights, products, delta, query_axis=0)
            self.scores.replace(
                memory.score_columns, slot, worker, gradient, memory.gradients_ready
            )

        @pl.loop(jnp.int32(0), walk.num_clean)
        def _(step):
            visit(step, lambda: None)

        @pl.loop(walk.num_clean, walk.num_visits)
        def _(step):
            first = walk.shell_tile(step - walk.num_clean)
            visit(step, lambda: self.columns.seen(intervals, first, worker))

        @pl.when(worker == 0)
        def _():
            self._write(memory, place)

    def _write(self, memory: Memory, place: BoxPlace) -> None:
        """The gradient through the slot of the queries."""
        problem = self.plan.problem
        gradient = self.query_buffer.operand(memory.query_slots)
        plgpu.barrier_wait(memory.sums_ready)
        for chunk in range(self.queries.num_chunks):
            sums = warpgroups.read(self._sum(memory, chunk)) * problem.scale
            gradient[0, chunk] = sums.astype(problem.dtype)
        plgpu.commit_smem()
        self.query_buffer.store(memory.query_slots, 0, memory.gradient, place)
        plgpu.wait_smem_to_gmem(0)
