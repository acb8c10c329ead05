"""Gradient of the queries on Hopper: dQ of one Q tile of one head per thread block, by wgmma and TMA.

Walk and roles are the forward's: a producer streams KV tiles, each worker holds 64 queries. Their Q and dO stay in shared
memory, dQ in registers; per visit S = Q K^T, dP = dO V^T, and dQ += dS K. Nothing is shared between blocks: the sum's order
is fixed, and so are the bits.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper_warpgroups as warpgroups
from pallas_kernels import masks
from pallas_kernels.hopper_warpgroups import COLUMN, ROW, Staging
from pallas_kernels.plan import TileWalk, part_number
from pallas_kernels.slots import drain_slots, wait_for_slot
from pallas_kernels.softmax_gradient import less_delta, weights_of
from pallas_kernels.tile_kernel import TileKernel
from pallas_kernels.token_boxes import BoxPlace

COLUMNS = 64
"""Keys whose scores a worker holds at a time: 32 registers of S and 32 of dP beside 64 of dQ."""


class Memory(NamedTuple):
    """A block's references: arrays in memory, scratch in shared memory, barriers."""

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
    lse_rows: Any
    delta_rows: Any
    notes: Any
    own_ready: Any
    ready: Any
    free: Any
    staging: Any = None


class QueryGradientKernel(TileKernel):
    """The kernel of one plan."""

    @property
    def width(self) -> int:
        """Keys of a slice of a visited tile."""
        return min(COLUMNS, self.plan.columns)

    @property
    def staging(self) -> Staging:
        """For P of a slice."""
        return Staging(self.plan, self.width, self.interpreted)

    def scratch(self) -> list[Any]:
        """Shared memory and barriers in the order of `Memory`."""
        plan, dtype = self.plan, self.plan.problem.dtype
        own, visited = self.own, self.visited
        rows = plgpu.SMEM((plan.num_workers, plan.rows), jnp.float32)
        scratch = [
            *(own.scratch(dtype) for _ in range(2)),
            *(visited.scratch(dtype) for _ in range(2)),
            rows,
            rows,
            warpgroups.notes_of(plan),
            plgpu.Barrier(num_arrivals=2 * own.num_copies + 2, num_barriers=plan.num_workers),
            plgpu.Barrier(num_arrivals=2 * visited.num_copies + 1, num_barriers=plan.stages),
            plgpu.Barrier(num_arrivals=plan.num_workers, num_barriers=plan.stages),
        ]
        return scratch + self.staging.scratch(dtype)

    def body(self, *references: Any) -> None:
        """One block: workers and producer."""
        memory = Memory(*references)
        warpgroups.take_roles(
            self.plan,
            lambda worker: self._work(memory, worker),
            lambda: self._produce(memory, self.walk()),
        )

    def _produce(self, memory: Memory, walk: TileWalk) -> None:
        """Starts the copies of every visited KV tile, as soon as the slot is free."""
        stages, buffer = self.plan.stages, self.visited

        def load(step: Any, place: BoxPlace) -> None:
            slot = self.slot(step)
            ready = memory.ready.at[slot]
            wait_for_slot(memory.free, step, stages)
            buffer.load(memory.key, memory.key_slots, slot, place, ready)
            buffer.load(memory.value, memory.value_slots, slot, place, ready)
            warpgroups.note(memory.notes, slot, place.start)
            plgpu.barrier_arrive(ready)

        self.for_each_step(walk, load)
        drain_slots(walk.num_visits, stages, memory.free)

    def _work(self, memory: Memory, worker: Any) -> None:
        """The gradient of a worker's part, written out.

        Registers are short: what a later stage needs is noted in shared memory, even the worker's number is asked for anew, and
        what only the shell needs is computed after the clean loop.
        """
        plan = self.plan
        visits = self._load_own(memory, worker)
        clean = functools.partial(self._visit, memory, worker, mask=lambda *_: None)
        sums = (warpgroups.zeros(plan.rows, self.queries.chunk),) * self.queries.num_chunks
        sums = lax.fori_loop(jnp.int32(0), visits[0], clean, sums)
        worker = warpgroups.this_worker(plan)
        row = plan.stages + worker
        place = warpgroups.noted_place(plan, memory.notes, row)
        intervals = self.intervals(place, warpgroups.iota(plan.rows, ROW))

        def mask(slot: Any, column: int) -> jax.Array:
            first = warpgroups.noted(memory.notes, slot, plan.problem.rank)
            return self.seen(intervals, first, warpgroups.iota(self.width, COLUMN) + column)

        shell = functools.partial(self._visit, memory, worker, mask=mask)
        visits = warpgroups.noted_visits(memory.notes, row)
        self._write(memory, lax.fori_loop(*visits, shell, sums), intervals)

    def _load_own(self, memory: Memory, worker: Any) -> tuple[Any, Any]:
        """Fetches the part's Q, dO, lse and delta to shared memory, notes place and visits; returns the visits."""
        plan, walk, buffer = self.plan, self.walk(), self.own
        place = self.own_place(walk, worker)
        ready = memory.own_ready.at[worker]
        buffer.load(memory.query, memory.query_slots, worker, place, ready)
        buffer.load(memory.out_cotangent, memory.cotangent_slots, worker, place, ready)
        part = part_number(plan, place.residues, place.start)
        rows = (memory.lse, memory.lse_rows), (memory.delta, memory.delta_rows)
        for outside, inside in rows:
            source = outside.at[place.batch, place.head, part]
            plgpu.copy_gmem_to_smem(source, inside.at[worker], ready)
        visits = self.steps(walk)
        warpgroups.note_part(memory.notes, plan.stages + worker, visits, place)
        plgpu.barrier_wait(ready)
        return visits

    def _write(self, memory: Memory, sums: tuple[Any, ...], intervals: masks.Intervals) -> None:
        """The gradient out through the worker's own slot of queries."""
        plan, problem = self.plan, self.plan.problem
        worker = warpgroups.this_worker(plan)
        operand = self.own.operand(memory.query_slots)
        for chunk, accumulated in enumerate(sums):
            gradient = self.hide_lone(intervals, accumulated)
            operand[worker, chunk] = (gradient * problem.scale).astype(problem.dtype)
        plgpu.commit_smem()
        place = warpgroups.noted_place(plan, memory.notes, plan.stages + worker)
        self.own.store(memory.query_slots, worker, memory.gradient, place)
        plgpu.wait_smem_to_gmem(0)

    def _visit(
        self,
        memory: Memory,
        worker: Any,
        step: Any,
        sums: tuple[Any, ...],
        mask: Any,
    ) -> tuple[Any, ...]:
        """One KV tile, by slices of its keys: dQ of the slice added to the sums."""
        plan, chunks = self.plan, self.queries.num_chunks
        slot = self.slot(step)
        query, cotangent = map(self.own.operand, (memory.query_slots, memory.cotangent_slots))
        key, value = map(self.visited.operand, (memory.key_slots, memory.value_slots))
        staging = memory.staging.at[worker] if self.interpreted else None
        statistic = lambda rows: plgpu.load(rows.at[worker], layout=ROW)
        plgpu.barrier_wait(memory.ready.at[slot])
        for column in range(0, plan.columns, self.width):
            columns = pl.ds(column, self.width)
            own = lambda operand: lambda chunk: operand.at[worker, chunk]
            visited = lambda operand, columns=columns: (
                lambda chunk: operand.at[slot, chunk, columns]
            )
            turned = lambda operand, columns=columns: (
                lambda chunk: operand.at[slot, chunk, columns].T
            )
            scores = warpgroups.product(chunks, own(query), turned(key))
            weights = weights_of(
                scores,
                statistic(memory.lse_rows),
                mask(slot, column),
                scale=plan.problem.scale,
                query_axis=0,
            )
            kept = self.staging.put(memory.staging, worker, weights)
            products = warpgroups.product_from(
                less_delta(statistic(memory.delta_rows), scores, query_axis=0),
                chunks,
                own(cotangent),
                turned(value),
                interpreted=self.interpreted,
            )
            gradient = self.staging.take(memory.staging, worker, kept) * products
            left = gradient.astype(plan.problem.dtype)
            sums = warpgroups.add_products(sums, left, visited(key), staging)
        plgpu.barrier_arrive(memory.free.at[slot])
        return sums
