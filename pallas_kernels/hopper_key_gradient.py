"""Gradients of keys and values on Hopper: dK and dV of one KV tile of one head per thread block, by wgmma and TMA.

The walk is turned around: each worker holds 64 keys, and the producer streams the Q tiles that see them, with dO and the
statistics of their queries. K and V stay in shared memory, dK and dV in registers; per visit, all of it with keys as rows,
S^T = K Q^T, dV += P^T dO, dP^T = V dO^T, dK += dS^T Q. The query heads that share a key are visited one after the other in the
same block: nothing is shared between blocks, the sum's order is fixed, and so are the bits.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper_warpgroups as warpgroups
from pallas_kernels import masks
from pallas_kernels.hopper_warpgroups import COLUMN, ROW, Staging
from pallas_kernels.plan import TileWalk
from pallas_kernels.row_statistics import RowBoxes
from pallas_kernels.slots import drain_slots, wait_for_slot
from pallas_kernels.softmax_gradient import less_delta, weights_of
from pallas_kernels.tile_kernel import TileKernel
from pallas_kernels.token_boxes import BoxPlace

INPUTS = 6
"""Arrays read: the first references."""


class Memory(NamedTuple):
    """A block's references: arrays in memory, scratch in shared memory, barriers."""

    query: Any
    out_cotangent: Any
    key: Any
    value: Any
    lse: Any
    delta: Any
    gradients: tuple[Any, ...]
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


@dataclasses.dataclass(frozen=True)
class KeyGradientKernel(TileKernel):
    """The kernel of one inverse plan.

    Args:
      gradients: which of dK and dV it computes.
    """

    gradients: tuple[str, ...]

    @property
    def row_boxes(self) -> RowBoxes:
        """One slot per stage, for lse or delta."""
        return RowBoxes(self.plan, self.plan.stages, self.interpreted)

    @property
    def staging(self) -> Staging:
        """For P^T; every product takes a whole visited tile."""
        return Staging(self.plan, self.plan.columns, self.interpreted)

    def scratch(self) -> list[Any]:
        """Shared memory and barriers in the order of `Memory`."""
        plan, dtype = self.plan, self.plan.problem.dtype
        own, visited, rows = self.own, self.visited, self.row_boxes
        # Query, its cotangent, two statistics, and the producer's note.
        arrivals = 2 * visited.num_copies + 2 * rows.num_copies + 1
        scratch = [
            *(visited.scratch(dtype) for _ in range(2)),
            *(own.scratch(dtype) for _ in range(2)),
            *(rows.scratch() for _ in range(2)),
            warpgroups.notes_of(plan),
            plgpu.Barrier(num_arrivals=2 * own.num_copies, num_barriers=plan.num_workers),
            plgpu.Barrier(num_arrivals=arrivals, num_barriers=plan.stages),
            plgpu.Barrier(num_arrivals=plan.num_workers, num_barriers=plan.stages),
        ]
        return scratch + self.staging.scratch(dtype)

    def body(self, *references: Any) -> None:
        """One block: workers and producer."""
        end = INPUTS + len(self.gradients)
        memory = Memory(*[*references[:INPUTS], references[INPUTS:end], *references[end:]])
        warpgroups.take_roles(
            self.plan,
            lambda worker: self._work(memory, worker),
            lambda: self._produce(memory, self.walk()),
        )

    def _produce(self, memory: Memory, walk: TileWalk) -> None:
        """Starts the copies of every visited Q tile of every query head, as soon as the slot is free."""
        stages, buffer, rows = self.plan.stages, self.visited, self.row_boxes

        def load(step: Any, place: BoxPlace) -> None:
            slot = self.slot(step)
            ready = memory.ready.at[slot]
            wait_for_slot(memory.free, step, stages)
            buffer.load(memory.query, memory.query_slots, slot, place, ready)
            buffer.load(memory.out_cotangent, memory.cotangent_slots, slot, place, ready)
            rows.load(memory.lse, memory.lse_rows, slot, place, ready)
            rows.load(memory.delta, memory.delta_rows, slot, place, ready)
            warpgroups.note(memory.notes, slot, place.start)
            plgpu.barrier_arrive(ready)

        self.for_each_step(walk, load)
        drain_slots(self.steps(walk)[1], stages, memory.free)

    def _work(self, memory: Memory, worker: Any) -> None:
        """The gradients of a worker's part, written out.

        Sums, scores and their gradient leave some thirty registers for all else. So what a later stage needs is noted in shared
        memory, even the worker's number is asked for anew, and what only the shell needs is computed after the clean loop.
        """
        plan = self.plan
        visits = self._load_own(memory, worker)
        clean = functools.partial(self._visit, memory, worker, mask=lambda _: None)
        sums = (warpgroups.zeros(plan.rows, self.keys.chunk),) * self.keys.num_chunks
        state = (sums,) * len(self.gradients)
        state = lax.fori_loop(jnp.int32(0), visits[0], clean, state)
        worker = warpgroups.this_worker(plan)
        row = plan.stages + worker
        place = warpgroups.noted_place(plan, memory.notes, row)
        intervals = self.intervals(place, warpgroups.iota(plan.rows, ROW))

        def mask(slot: Any) -> jax.Array:
            first = warpgroups.noted(memory.notes, slot, plan.problem.rank)
            return self.seen(intervals, first, warpgroups.iota(plan.columns, COLUMN))

        shell = functools.partial(self._visit, memory, worker, mask=mask)
        visits = warpgroups.noted_visits(memory.notes, row)
        self._write(memory, lax.fori_loop(*visits, shell, state), intervals)

    def _load_own(self, memory: Memory, worker: Any) -> tuple[Any, Any]:
        """Fetches the part's K and V to shared memory, notes place and visits; returns the visits: clean ones, and all."""
        plan, walk = self.plan, self.walk()
        place, visits = self.own_place(walk, worker), self.steps(walk)
        ready = memory.own_ready.at[worker]
        self.own.load(memory.key, memory.key_slots, worker, place, ready)
        self.own.load(memory.value, memory.value_slots, worker, place, ready)
        warpgroups.note_part(memory.notes, plan.stages + worker, visits, place)
        plgpu.barrier_wait(ready)
        return visits

    def _write(self, memory: Memory, sums: tuple[Any, ...], intervals: masks.Intervals) -> None:
        """The gradients out through the worker's own slots of keys and values."""
        plan, problem = self.plan, self.plan.problem
        worker = warpgroups.this_worker(plan)
        slots = {"key": memory.key_slots, "value": memory.value_slots}
        for name, chunks in zip(self.gradients, sums, strict=True):
            operand, scale = self.own.operand(slots[name]), problem.scale if name == "key" else 1.0
            for chunk, accumulated in enumerate(chunks):
                gradient = self.hide_lone(intervals, accumulated)
                operand[worker, chunk] = (gradient * scale).astype(problem.dtype)
        plgpu.commit_smem()
        place = warpgroups.noted_place(plan, memory.notes, plan.stages + worker)
        for name, gradient in zip(self.gradients, memory.gradients, strict=True):
            self.own.store(slots[name], worker, gradient, place)
        plgpu.wait_smem_to_gmem(0)

    def _visit(self, memory: Memory, worker: Any, step: Any, state: Any, mask: Any) -> Any:
        """One Q tile of one head: its share of dK and dV added to the sums."""
        plan, chunks = self.plan, self.keys.num_chunks
        sums, slot = dict(zip(self.gradients, state, strict=True)), self.slot(step)
        key, value = map(self.own.operand, (memory.key_slots, memory.value_slots))
        query, cotangent = map(self.visited.operand, (memory.query_slots, memory.cotangent_slots))
        staging = memory.staging.at[worker] if self.interpreted else None
        own = lambda operand: lambda chunk: operand.at[worker, chunk]
        visited = lambda operand: lambda chunk: operand.at[slot, chunk]
        turned = lambda operand: lambda chunk: operand.at[slot, chunk].T
        statistic = lambda rows: plgpu.load(self.row_boxes.vectors(rows).at[slot], layout=COLUMN)
        plgpu.barrier_wait(memory.ready.at[slot])
        scores = warpgroups.product(chunks, own(key), turned(query))
        weights = weights_of(
            scores,
            statistic(memory.lse_rows),
            mask(slot),
            scale=plan.problem.scale,
            query_axis=1,
        )
        if "value" in sums:  # before dP: fewer registers at a time
            left = weights.astype(plan.problem.dtype)
            sums["value"] = warpgroups.add_products(
                sums["value"], left, visited(cotangent), staging
            )
        if "key" in sums:
            kept = self.staging.put(memory.staging, worker, weights)
            products = warpgroups.product_from(
                less_delta(statistic(memory.delta_rows), scores, query_axis=1),
                chunks,
                own(value),
                turned(cotangent),
                interpreted=self.interpreted,
            )
            left = self.staging.take(memory.staging, worker, kept) * products
            left = left.astype(plan.problem.dtype)
            sums["key"] = warpgroups.add_products(sums["key"], left, visited(query), staging)
        plgpu.commit_smem()  # statistics were read by registers and will be refilled by a copy
        plgpu.barrier_arrive(memory.free.at[slot])
        return tuple(sums[name] for name in self.gradients)
