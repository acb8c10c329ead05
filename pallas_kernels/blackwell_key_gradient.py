"""Gradients of keys and values on Blackwell: dK and dV by tcgen05 and TMA in one warp-specialised kernel, deterministic.

A thread block computes dK and dV of 128 keys of one key head, which stay in tensor memory. One warp (the producer) walks the
Q tiles of the queries that see the keys, for every query head of the group; one warp issues the products S^T = K Q^T,
dP^T = V dO^T, dV += P^T dO and dK += dS^T Q; two warpgroups (the workers) turn S^T into P^T and dP^T into dS^T, half of a
tile's queries each. The workers' two halves of a step and the matrix unit's take turns: while P^T is made, dK and the next
dP^T are multiplied, and while dS^T is, dV and the next S^T.

Reading order: `plan`, `token_boxes`, `row_statistics`, `masks`, `softmax_gradient`, `blackwell_warpgroups`, then here. The
gradient of the queries: `blackwell_query_gradient`. Budget and resources: docs/deep-dives/blackwell-backward.md.
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
from pallas_kernels.blackwell_warpgroups import COLUMN, ROW, ProductColumns, VisitedColumns
from pallas_kernels.launch import launch
from pallas_kernels.limits import key_gradient_plan
from pallas_kernels.online_softmax import LOG2_E
from pallas_kernels.plan import TilePlan, TileWalk, quotient_and_digit, tile_walk
from pallas_kernels.row_statistics import RowBoxes, to_boxes
from pallas_kernels.slots import drain_slots, wait_for_slot
from pallas_kernels.softmax_gradient import gradient_of_scores, weights_of
from pallas_kernels.token_boxes import BoxBuffer, BoxPlace, TokenArray


def key_gradients(
    problem: Problem,
    operands: Operands,
    tiles: Tiles,
    out_cotangent: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """`dK = scale * dS^T Q` and `dV = P^T dO`, `[B, *space, K, H]` in the operands' dtype; dS = P * (dO V^T - delta).

    Args:
      problem, tiles: what `supports` accepts.
      operands: query [B, *space, N, H], key and value [B, *space, K, H].
      out_cotangent: dO [B, *space, N, H], in the operands' dtype.
      lse: [B, *space, N] float32, natural log.
      delta: [B, *space, N] float32, see `row_statistics.delta`.
      interpret: `plgpu.InterpretGPUParams` to run in the interpreter on a CPU, None on a GPU.
    """
    kernel = KeyGradientKernel(key_gradient_plan(problem, tiles), interpret is not None)
    queries, keys, plan = kernel.queries, kernel.keys, kernel.plan
    gradient = jax.ShapeDtypeStruct(keys.shape(problem.batch, problem.key_layout), problem.dtype)
    key_gradient, value_gradient = launch(
        kernel.body,
        plan,
        heads=problem.kv_heads,
        num_warpgroups=kernel.columns.num_workers + 1,
        outputs=[gradient, gradient],
        scratch=kernel.scratch(),
        interpret=interpret,
    )(
        keys.split(operands.key),
        keys.split(operands.value),
        queries.split(operands.query),
        queries.split(out_cotangent),
        to_boxes(plan, lse * LOG2_E),
        to_boxes(plan, delta),
    )
    layout = problem.key_layout
    return keys.merge(key_gradient, layout), keys.merge(value_gradient, layout)


class Memory(NamedTuple):
    """A block's references: arrays in memory, scratch in shared and in tensor memory, barriers."""

    key: Any
    value: Any
    query: Any
    out_cotangent: Any
    lse: Any
    delta: Any
    key_gradient: Any
    value_gradient: Any
    key_slots: Any
    value_slots: Any
    query_slots: Any
    cotangent_slots: Any
    lse_slots: Any
    delta_slots: Any
    score_columns: Any
    product_columns: Any
    key_sums: Any
    value_sums: Any
    own_ready: Any
    query_ready: Any
    cotangent_ready: Any
    rows_ready: Any
    query_free: Any
    cotangent_free: Any
    rows_free: Any
    scores_ready: Any
    products_ready: Any
    weights_ready: Any
    gradients_ready: Any
    sums_ready: Any


@dataclasses.dataclass(frozen=True)
class KeyGradientKernel:
    """The kernel of one plan.

    Args:
      plan: tiles and walk, inverse; one part per block.
      interpreted: whether the interpreter runs it; see `token_boxes` and `ProductColumns`.
    """

    plan: TilePlan
    interpreted: bool

    @property
    def queries(self) -> TokenArray:
        """How query and out's cotangent lie."""
        problem = self.plan.problem
        return TokenArray(self.plan.dilation, problem.query_heads, problem.head_dim)

    @property
    def keys(self) -> TokenArray:
        """How key, value and their gradients lie."""
        problem = self.plan.problem
        return TokenArray(self.plan.dilation, problem.kv_heads, problem.head_dim)

    @property
    def key_buffer(self) -> BoxBuffer:
        """The block's keys, at the end their gradient; and the like for values."""
        return BoxBuffer(self.keys, self.plan.kv_tile, 1, self.interpreted)

    @property
    def query_buffer(self) -> BoxBuffer:
        """One slot per stage."""
        return BoxBuffer(self.queries, self.plan.q_tile, self.plan.stages, self.interpreted)

    @property
    def rows(self) -> RowBoxes:
        """Statistics of visited queries, one slot per stage."""
        return RowBoxes(self.plan, self.plan.stages, self.interpreted)

    @property
    def columns(self) -> VisitedColumns:
        """How the workers share the queries of a visited tile."""
        return VisitedColumns(self.plan)

    @property
    def products(self) -> ProductColumns:
        """S^T, replaced by P^T, and in the same way dP^T, replaced by dS^T."""
        return ProductColumns(self.columns, 1, self.interpreted)

    def scratch(self) -> list[Any]:
        """Shared memory, tensor memory and barriers in the order of `Memory`."""
        plan, dtype, workers = self.plan, self.plan.problem.dtype, self.columns.num_workers
        own, visited = self.key_buffer, self.query_buffer
        sums = plgpu.TMEM((plan.rows, plan.problem.head_dim), jnp.float32)
        slots = functools.partial(plgpu.Barrier, num_barriers=plan.stages)
        ordered = functools.partial(plgpu.Barrier, orders_tensor_core=True)
        return [
            *(own.scratch(dtype) for _ in range(2)),
            *(visited.scratch(dtype) for _ in range(2)),
            *(self.rows.scratch() for _ in range(2)),
            *(self.products.scratch(dtype) for _ in range(2)),
            sums,
            sums,
            plgpu.Barrier(num_arrivals=2 * own.num_copies),
            *(slots(num_arrivals=visited.num_copies) for _ in range(2)),
            slots(num_arrivals=2 * self.rows.num_copies),
            *(slots(orders_tensor_core=True) for _ in range(2)),
            slots(num_arrivals=workers),
            *(ordered() for _ in range(2)),
            *(ordered(num_arrivals=workers) for _ in range(2)),
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

    def _steps(self, walk: TileWalk) -> tuple[Any, Any]:
        """Clean steps, and all steps: every visit once per query head of the group."""
        heads = self.plan.problem.heads_per_kv
        return heads * walk.num_clean, heads * walk.num_visits

    def _visit_of(self, step: Any, num_visits: Any) -> tuple[Any, Any]:
        """Query head of the group, and number of the visit, of a step among heads of `num_visits` each."""
        if self.plan.problem.heads_per_kv == 1:
            return 0, step
        return quotient_and_digit(step, num_visits)

    def _place(self, walk: TileWalk, start: Any, head: Any) -> BoxPlace:
        return BoxPlace(lax.axis_index("batch"), head, walk.residues, tuple(start))

    def _own_place(self, walk: TileWalk) -> BoxPlace:
        return self._place(walk, walk.own_start, lax.axis_index("head"))

    def _slot(self, step: Any) -> Any:
        return lax.rem(step, jnp.int32(self.plan.stages))

    def _produce(self, memory: Memory, walk: TileWalk) -> None:
        """Starts the copies of K and V, and of every visited Q tile as soon as its slot is free."""
        own, stages = self.key_buffer, self.plan.stages
        place, (num_clean, num_steps) = self._own_place(walk), self._steps(walk)
        own.load(memory.key, memory.key_slots, 0, place, memory.own_ready)
        own.load(memory.value, memory.value_slots, 0, place, memory.own_ready)

        def load(step: Any, head: Any, start: Any) -> None:
            first_head = lax.axis_index("head") * self.plan.problem.heads_per_kv
            self._load(memory, step, self._place(walk, start, first_head + head))

        @pl.loop(jnp.int32(0), num_clean)
        def _(step):
            head, visit = self._visit_of(step, walk.num_clean)
            load(step, head, walk.clean_tile(visit))

        @pl.loop(num_clean, num_steps)
        def _(step):
            head, visit = self._visit_of(step - num_clean, walk.num_visits - walk.num_clean)
            load(step, head, walk.shell_tile(visit))

        barriers = memory.query_free, memory.cotangent_free, memory.rows_free
        drain_slots(num_steps, stages, *barriers)

    def _load(self, memory: Memory, step: Any, place: BoxPlace) -> None:
        """Starts the copies of one Q tile: Q, dO, lse and delta."""
        visited, rows, slot = self.query_buffer, self.rows, self._slot(step)
        wait_for = lambda free: wait_for_slot(free, step, self.plan.stages)

        wait_for(memory.query_free)
        visited.load(memory.query, memory.query_slots, slot, place, memory.query_ready.at[slot])
        wait_for(memory.rows_free)
        ready = memory.rows_ready.at[slot]
        rows.load(memory.lse, memory.lse_slots, slot, place, ready)
        rows.load(memory.delta, memory.delta_slots, slot, place, ready)
        wait_for(memory.cotangent_free)
        ready = memory.cotangent_ready.at[slot]
        visited.load(memory.out_cotangent, memory.cotangent_slots, slot, place, ready)

    def _multiply(self, memory: Memory, walk: TileWalk) -> None:
        """Issues all products. Instructions of one warp run in the order of issue.

        Hence S^T of a tile may overwrite P^T of the tile before, once dV of that has been issued, and dP^T likewise dS^T.
        """
        _, num_steps = self._steps(walk)
        plgpu.barrier_wait(memory.own_ready)
        self._multiply_keys(memory, jnp.int32(0))
        self._multiply_values(memory, jnp.int32(0))

        @pl.loop(jnp.int32(1), num_steps)
        def _(step):
            self._add_to_values(memory, step - 1)
            self._multiply_keys(memory, step)
            self._add_to_keys(memory, step - 1)
            self._multiply_values(memory, step)

        self._add_to_values(memory, num_steps - 1)
        self._add_to_keys(memory, num_steps - 1)
        plgpu.tcgen05_commit_arrive(memory.sums_ready)

    def _multiply_keys(self, memory: Memory, step: Any) -> None:
        """S^T = K Q^T of a tile, not scaled."""
        key, query = memory.key_slots, memory.query_slots
        plgpu.barrier_wait(memory.query_ready.at[self._slot(step)])
        self._multiply_own(memory.score_columns, key, query, step)
        plgpu.tcgen05_commit_arrive(memory.scores_ready)

    def _multiply_values(self, memory: Memory, step: Any) -> None:
        """dP^T = V dO^T of a tile."""
        value, cotangent = memory.value_slots, memory.cotangent_slots
        plgpu.barrier_wait(memory.cotangent_ready.at[self._slot(step)])
        self._multiply_own(memory.product_columns, value, cotangent, step)
        plgpu.tcgen05_commit_arrive(memory.products_ready)

    def _multiply_own(self, product: Any, own_slots: Any, visited_slots: Any, step: Any) -> None:
        own, slot = self.key_buffer.operand(own_slots), self._slot(step)
        visited = self.query_buffer.operand(visited_slots)
        warpgroups.multiply_operands(
            self.products.product(product, 0),
            lambda chunk: own.at[0, chunk],
            lambda chunk: visited.at[slot, chunk],
            self.keys.num_chunks,
        )

    def _add_to_values(self, memory: Memory, step: Any) -> None:
        """dV += P^T dO of a tile."""
        plgpu.barrier_wait(memory.weights_ready)
        cotangent = memory.cotangent_slots
        self._add_to_sums(memory.value_sums, memory.score_columns, cotangent, step)
        plgpu.tcgen05_commit_arrive(memory.cotangent_free.at[self._slot(step)])

    def _add_to_keys(self, memory: Memory, step: Any) -> None:
        """dK += dS^T Q of a tile."""
        plgpu.barrier_wait(memory.gradients_ready)
        query = memory.query_slots
        self._add_to_sums(memory.key_sums, memory.product_columns, query, step)
        plgpu.tcgen05_commit_arrive(memory.query_free.at[self._slot(step)])

    def _add_to_sums(self, sums: Any, operands: Any, visited_slots: Any, step: Any) -> None:
        visited, slot = self.query_buffer.operand(visited_slots), self._slot(step)
        warpgroups.add_products(
            lambda chunk: self._sum(sums, chunk),
            lambda worker: self.products.operand_of(operands, 0, worker),
            lambda chunk, rows: visited.at[slot, chunk, rows],
            chunks=self.keys.num_chunks,
            columns=self.columns,
            is_started=step > 0,
        )

    def _sum(self, sums: Any, chunk: int) -> Any:
        width = self.keys.chunk
        return sums.at[:, pl.ds(chunk * width, width)]

    def _work(self, memory: Memory, walk: TileWalk, worker: Any) -> None:
        """A worker: P^T and dS^T of its half of every tile; at the end one of the gradients written out."""
        plan, (num_clean, num_steps) = self.plan, self._steps(walk)
        rows = masks.digits(warpgroups.iota(plan.rows, ROW), plan.kv_tile)
        keys = tuple(first + row for first, row in zip(walk.own_start, rows, strict=True))
        intervals = masks.query_intervals(plan.problem.neighborhood.axes, keys, walk.lengths)

        @pl.loop(jnp.int32(0), num_clean)
        def _(step):
            self._visit(memory, worker, step, lambda: None)

        @pl.loop(num_clean, num_steps)
        def _(step):
            _, visit = self._visit_of(step - num_clean, walk.num_visits - walk.num_clean)
            first = walk.shell_tile(visit)
            self._visit(memory, worker, step, lambda: self.columns.seen(intervals, first, worker))

        place = self._own_place(walk)
        plgpu.barrier_wait(memory.sums_ready)

        @pl.when(worker == 0)
        def _():
            scale = plan.problem.scale
            self._write(memory.key_sums, scale, memory.key_slots, memory.key_gradient, place)

        @pl.when(worker == self.columns.num_workers - 1)
        def _():
            self._write(memory.value_sums, 1.0, memory.value_slots, memory.value_gradient, place)

    def _visit(self, memory: Memory, worker: Any, step: Any, mask: Any) -> None:
        """One Q tile: P^T, then dS^T, of the worker's queries."""
        slot, width = self._slot(step), self.columns.width
        queries = pl.ds(worker * width, width)

        def statistic(slots: Any) -> jax.Array:
            return plgpu.load(self.rows.vectors(slots).at[slot, queries], layout=COLUMN)

        plgpu.barrier_wait(memory.rows_ready.at[slot])
        lse = statistic(memory.lse_slots)
        plgpu.barrier_wait(memory.scores_ready)
        scores = warpgroups.read(self.products.product_of(memory.score_columns, 0, worker))
        weights = weights_of(scores, lse, mask(), scale=self.plan.problem.scale, query_axis=1)
        self.products.replace(memory.score_columns, 0, worker, weights, memory.weights_ready)
        delta = statistic(memory.delta_slots)
        plgpu.barrier_wait(memory.products_ready)
        products = warpgroups.read(self.products.product_of(memory.product_columns, 0, worker))
        gradient = gradient_of_scores(weights, products, delta, query_axis=1)
        self.products.replace(memory.product_columns, 0, worker, gradient, memory.gradients_ready)
        plgpu.commit_smem()  # statistics have been read before copies refill the slot
        plgpu.barrier_arrive(memory.rows_free.at[slot])

    def _write(self, sums: Any, scale: float, slots: Any, memory: Any, place: BoxPlace) -> None:
        """A gradient through the slot of what it is of."""
        operand = self.key_buffer.operand(slots)
        for chunk in range(self.keys.num_chunks):
            gradient = warpgroups.read(self._sum(sums, chunk)) * scale
            operand[0, chunk] = gradient.astype(self.plan.problem.dtype)
        plgpu.commit_smem()
        self.key_buffer.store(slots, 0, memory, place)
        plgpu.wait_smem_to_gmem(0)
