"""Gradient of the queries on Blackwell: dQ by tcgen05 and TMA in one warp-specialised kernel, deterministic.

A thread block computes dQ of 128 queries of one head, which stays in tensor memory. One warp (the producer) walks the KV tiles
of the queries' key box, as the forward does; one warp issues the products S = Q K^T, dP = dO V^T and dQ += dS K; two
warpgroups (the workers) turn S and dP into dS, half of a tile's keys each. Scores have two slots: the next tile's are
computed while the workers are at this one's.

Reading order: `plan`, `token_boxes`, `masks`, `softmax_gradient`, `tile_kernel`, `blackwell_warpgroups`, then here. The gradients of keys and
values: `blackwell_key_gradient`. Budget and resources: docs/deep-dives/blackwell-backward.md.
"""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import blackwell_warpgroups as warpgroups
from pallas_kernels import masks
from pallas_kernels.blackwell_warpgroups import ROW, ProductColumns, VisitedColumns
from pallas_kernels.plan import TileWalk, part_number
from pallas_kernels.slots import drain_slots, wait_for_slot
from pallas_kernels.softmax_gradient import less_delta, weights_of
from pallas_kernels.tile_kernel import TileKernel
from pallas_kernels.token_boxes import BoxPlace

SCORE_SLOTS = 2


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


class QueryGradientKernel(TileKernel):
    """The kernel of one plan, of one part per block."""

    @property
    def num_warpgroups(self) -> int:
        """Workers share the columns of a visited tile, not the rows of the own one."""
        return self.columns.num_workers + 1

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
        own, visited, values = self.own, self.visited, self.visited_values
        loaded = functools.partial(plgpu.Barrier, num_arrivals=visited.num_copies)
        ordered = functools.partial(plgpu.Barrier, orders_tensor_core=True)
        return [
            *(own.scratch(dtype) for _ in range(2)),
            visited.scratch(dtype),
            values.scratch(dtype),
            self.scores.scratch(dtype),
            plgpu.TMEM((plan.rows, plan.columns), jnp.float32),
            plgpu.TMEM((plan.rows, plan.problem.head_dim), jnp.float32),
            plgpu.Barrier(num_arrivals=2 * own.num_copies),
            *(loaded(num_barriers=buffer.slots) for buffer in (visited, values)),
            *(ordered(num_barriers=buffer.slots) for buffer in (visited, values)),
            ordered(num_barriers=SCORE_SLOTS),
            ordered(),
            ordered(num_arrivals=workers),
            ordered(),
        ]

    def body(self, *references: Any) -> None:
        """One block. A tile without tokens has no work at all."""
        memory = Memory(*references)

        def with_walk(role: Any) -> None:
            walk = self.walk()
            pl.when(walk.num_visits > 0)(lambda: role(memory, walk))

        warpgroups.take_roles(
            self.columns.num_workers,
            lambda worker: with_walk(functools.partial(self._work, worker=worker)),
            lambda: with_walk(self._multiply),
            lambda: with_walk(self._produce),
        )

    def _produce(self, memory: Memory, walk: TileWalk) -> None:
        """Starts the copies of Q and dO, and of every visited KV tile as soon as its slot is free."""
        own, visited, values = self.own, self.visited, self.visited_values
        place = self.own_place(walk)
        own.load(memory.query, memory.query_slots, 0, place, memory.own_ready)
        own.load(memory.out_cotangent, memory.cotangent_slots, 0, place, memory.own_ready)

        def load(step: Any, place: BoxPlace) -> None:
            slot = self.slot(step)
            wait_for_slot(memory.key_free, step, visited.slots)
            visited.load(memory.key, memory.key_slots, slot, place, memory.key_ready.at[slot])
            slot = self.value_slot(step)
            wait_for_slot(memory.value_free, step, values.slots)
            values.load(memory.value, memory.value_slots, slot, place, memory.value_ready.at[slot])

        self.for_each_step(walk, load)
        drain_slots(walk.num_visits, visited.slots, memory.key_free)
        drain_slots(walk.num_visits, values.slots, memory.value_free)

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
        slot, score_slot = self.slot(step), lax.rem(step, jnp.int32(SCORE_SLOTS))
        query, key = self.own.operand(memory.query_slots), self.visited.operand(memory.key_slots)
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
        slot = self.value_slot(step)
        cotangent = self.own.operand(memory.cotangent_slots)
        value = self.visited_values.operand(memory.value_slots)
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
        slot, score_slot = self.slot(step), lax.rem(step, jnp.int32(SCORE_SLOTS))
        key = self.visited.operand(memory.key_slots)
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
        place = self.own_place(walk)
        part = part_number(plan, place.residues, place.start)
        lse, delta = (
            plgpu.load(rows.at[place.batch, place.head, part], layout=ROW, optimized=False)
            for rows in (memory.lse, memory.delta)
        )
        intervals = self.intervals(place, warpgroups.iota(plan.rows, ROW))

        def visit(step: Any, mask: Any) -> None:
            slot = lax.rem(step, jnp.int32(SCORE_SLOTS))
            plgpu.barrier_wait(memory.scores_ready.at[slot])
            scores = warpgroups.read(self.scores.product_of(memory.score_columns, slot, worker))
            weights = weights_of(scores, lse, mask(), scale=plan.problem.scale, query_axis=0)
            plgpu.barrier_wait(memory.products_ready)
            width = self.columns.width
            products = warpgroups.read(memory.product_columns.at[:, pl.ds(worker * width, width)])
            gradient = weights * (products + less_delta(delta, weights, query_axis=0))
            self.scores.replace(
                memory.score_columns, slot, worker, gradient, memory.gradients_ready
            )

        @pl.loop(jnp.int32(0), walk.num_clean)
        def _(step):
            visit(step, lambda: None)

        @pl.loop(walk.num_clean, walk.num_visits)
        def _(step):
            first = self.shell_place(walk, step).start
            visit(step, lambda: self.columns.seen(intervals, first, worker))

        @pl.when(worker == 0)
        def _():
            self._write(memory, place, intervals)

    def _write(self, memory: Memory, place: BoxPlace, intervals: masks.Intervals) -> None:
        """The gradient through the slot of the queries."""
        problem = self.plan.problem
        gradient = self.own.operand(memory.query_slots)
        plgpu.barrier_wait(memory.sums_ready)
        for chunk in range(self.queries.num_chunks):
            sums = self.hide_lone(intervals, warpgroups.read(self._sum(memory, chunk)))
            gradient[0, chunk] = (sums * problem.scale).astype(problem.dtype)
        plgpu.commit_smem()
        self.own.store(memory.query_slots, 0, memory.gradient, place)
        plgpu.wait_smem_to_gmem(0)
