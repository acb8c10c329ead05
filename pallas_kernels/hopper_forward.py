"""Forward of neighborhood attention on Hopper: `out` and `lse` by wgmma and TMA in one warp-specialised kernel.

A thread block computes one Q tile of one head. Its last warpgroup (the producer) walks the KV tiles of the tile's key box and
starts their copies; each of the others (the workers) holds a part of 64 queries, and the whole part of scores and output in
registers. Tiles that every query sees whole come first and have no mask; the shell around them has. Softmax is online, in
base 2, in float32. Two workers take turns: while one keeps the matrix unit busy, the other computes its softmax.

Reading order: `plan` (which tiles), `token_boxes` (how they move), `masks`, `tile_kernel`, then here. How arrays reach it:
`calls`. Budget and resources: docs/deep-dives/hopper-forward.md.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper_warpgroups as warpgroups
from pallas_kernels.hopper_warpgroups import COLUMN, ROW, Staging
from pallas_kernels.online_softmax import LEAST, Softmax, exponent_scale, update
from pallas_kernels.plan import TileWalk, part_number
from pallas_kernels.slots import drain_slots, wait_for_slot
from pallas_kernels.tile_kernel import TileKernel
from pallas_kernels.token_boxes import BoxPlace


class Memory(NamedTuple):
    """A block's references: arrays in memory, scratch in shared memory, barriers."""

    query: Any
    key: Any
    value: Any
    out: Any
    lse: Any
    query_slots: Any
    key_slots: Any
    value_slots: Any
    lse_rows: Any
    notes: Any
    query_ready: Any
    key_ready: Any
    value_ready: Any
    key_free: Any
    value_free: Any
    turn: Any
    staging: Any = None


class ForwardKernel(TileKernel):
    """The kernel of one plan."""

    def scratch(self) -> list[Any]:
        """Shared memory and barriers in the order of `Memory`."""
        plan, dtype, workers = self.plan, self.plan.problem.dtype, self.plan.num_workers
        own, visited = self.own, self.visited
        loaded = functools.partial(plgpu.Barrier, num_barriers=plan.stages)
        freed = functools.partial(plgpu.Barrier, num_arrivals=workers, num_barriers=plan.stages)
        scratch = [
            own.scratch(dtype),
            *(visited.scratch(dtype) for _ in range(2)),
            plgpu.SMEM((workers, plan.rows), jnp.float32),
            warpgroups.notes_of(plan),
            plgpu.Barrier(num_arrivals=own.num_copies, num_barriers=workers),
            loaded(num_arrivals=visited.num_copies + 1),  # and the producer's note
            loaded(num_arrivals=visited.num_copies),
            *(freed() for _ in range(2)),
            plgpu.Barrier(num_arrivals=workers),
        ]
        if self.interpreted:
            scratch += Staging(plan, plan.columns, self.interpreted).scratch(dtype)
        return scratch

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
            ready = memory.key_ready.at[slot]
            wait_for_slot(memory.key_free, step, stages)
            buffer.load(memory.key, memory.key_slots, slot, place, ready)
            warpgroups.note(memory.notes, slot, place.start)
            plgpu.barrier_arrive(ready)
            wait_for_slot(memory.value_free, step, stages)
            buffer.load(memory.value, memory.value_slots, slot, place, memory.value_ready.at[slot])

        self.for_each_step(walk, load)
        drain_slots(walk.num_visits, stages, memory.key_free, memory.value_free)

    def _work(self, memory: Memory, worker: Any) -> None:
        """Attention of a worker's part, written out.

        Registers are short: what a later stage needs is noted in shared memory, even the worker's number is asked for anew, and
        what only the shell needs is computed after the clean loop.
        """
        plan = self.plan
        num_clean = self._load_own(memory, worker)
        clean = functools.partial(self._visit, memory, worker, intervals=None)
        self._change_turns(memory, worker == 1)  # the second worker follows half a step behind,
        state = lax.fori_loop(jnp.int32(0), num_clean, clean, self._empty())
        worker = warpgroups.this_worker(plan)
        place = warpgroups.noted_place(plan, memory.notes, plan.stages + worker)
        intervals = self.intervals(place, warpgroups.iota(plan.rows, ROW))
        shell = functools.partial(self._visit, memory, worker, intervals=intervals)
        visits = warpgroups.noted_visits(memory.notes, plan.stages + worker)
        state = lax.fori_loop(*visits, shell, state)
        self._change_turns(memory, worker == 0)  # and the first waits for it at the end
        self._write(memory, state)

    def _load_own(self, memory: Memory, worker: Any) -> Any:
        """Fetches the part's Q to shared memory, notes place and visits; returns the number of clean ones."""
        walk, ready = self.walk(), memory.query_ready.at[worker]
        place = self.own_place(walk, worker)
        self.own.load(memory.query, memory.query_slots, worker, place, ready)
        row = self.plan.stages + worker
        warpgroups.note_part(memory.notes, row, self.steps(walk), place)
        plgpu.barrier_wait(ready)
        return walk.num_clean

    def _change_turns(self, memory: Memory, condition: Any = True) -> None:
        """Both workers meet: the one that multiplied goes on to its softmax, the other from its softmax to multiply."""
        if self.plan.num_workers == 1:
            return

        @pl.when(condition)
        def _():
            plgpu.barrier_arrive(memory.turn)
            plgpu.barrier_wait(memory.turn)

    def _empty(self) -> Softmax:
        rows = self.plan.rows
        zeros = warpgroups.zeros(rows, self.queries.chunk)
        row = lambda x: plgpu.layout_cast(jnp.full((rows,), x, jnp.float32), ROW)
        return Softmax((zeros,) * self.queries.num_chunks, row(LEAST), row(0.0))

    def _visit(
        self, memory: Memory, worker: Any, step: Any, state: Softmax, intervals: Any
    ) -> Softmax:
        """One KV tile: scores, online softmax, weighted sum of values."""
        slot, seen = self.slot(step), None
        plgpu.barrier_wait(memory.key_ready.at[slot])
        scores = self._scores(memory, worker, slot)
        if (
            intervals is not None
        ):  # only now: a mask need not be kept while the scores are on their way
            first = warpgroups.noted(memory.notes, slot, self.plan.problem.rank)
            columns = warpgroups.iota(self.plan.columns, COLUMN)
            seen = self.seen(intervals, first, columns)
        plgpu.barrier_arrive(memory.key_free.at[slot])
        state, weights = update(state, scores, seen, self.plan.problem.scale)
        plgpu.barrier_wait(memory.value_ready.at[slot])
        self._change_turns(memory)
        value = self.visited.operand(memory.value_slots)
        out = warpgroups.add_products(
            state.out,
            weights.astype(self.plan.problem.dtype),
            lambda chunk: value.at[slot, chunk],
            memory.staging.at[worker] if self.interpreted else None,
        )
        plgpu.barrier_arrive(memory.value_free.at[slot])
        return state._replace(out=out)

    def _scores(self, memory: Memory, worker: Any, slot: Any) -> jax.Array:
        """`[rows, columns]` float32: query times key, not scaled."""
        query, key = self.own.operand(memory.query_slots), self.visited.operand(memory.key_slots)
        return warpgroups.product(
            self.keys.num_chunks,
            lambda chunk: query.at[worker, chunk],
            lambda chunk: key.at[slot, chunk].T,
            # The other worker may queue its own multiplications behind these.
            when_queued=lambda: self._change_turns(memory),
        )

    def _write(self, memory: Memory, state: Softmax) -> None:
        """Out through the worker's own slot of queries, lse through its row."""
        plan, scale = self.plan, self.plan.problem.scale
        worker = warpgroups.this_worker(plan)
        operand = self.own.operand(memory.query_slots)
        inverse = 1.0 / jnp.where(state.total == 0.0, 1.0, state.total)
        for chunk, accumulated in enumerate(state.out):
            out = accumulated * lax.broadcast_in_dim(inverse, accumulated.shape, (0,))
            operand[worker, chunk] = out.astype(plan.problem.dtype)
        memory.lse_rows[worker] = exponent_scale(scale) * state.largest + jnp.log2(state.total)
        plgpu.commit_smem()
        place = warpgroups.noted_place(plan, memory.notes, plan.stages + worker)
        self.own.store(memory.query_slots, worker, memory.out, place)
        rows = memory.lse.at[
            place.batch, place.head, part_number(plan, place.residues, place.start)
        ]
        plgpu.copy_smem_to_gmem(memory.lse_rows.at[worker], rows)
        plgpu.wait_smem_to_gmem(0)
