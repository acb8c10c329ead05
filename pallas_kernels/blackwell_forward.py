"""Forward of neighborhood attention on Blackwell: `out` and `lse` by tcgen05 and TMA in one warp-specialised kernel.

A thread block computes one Q tile of one head, in parts of 128 queries. A part has a softmax warpgroup (the worker) and one
warp that issues its matrix instructions; one more warp (the producer) walks the KV tiles of the tile's key box and starts
their copies. Scores, weights and output live in tensor memory: a thread of a worker reads one row of scores, writes the
weights over them, and touches the output only where its row's maximum has grown much. Two workers keep the matrix unit busy
in turns by themselves: one part's products run while the other part's softmax does. Tiles that every query sees whole come
first and have no mask; the shell around them has.

Reading order: `plan` (which tiles), `token_boxes` (how they move), `masks`, `online_softmax`, `tile_kernel`, then here. How
arrays reach it: `calls`. Budget and resources: docs/deep-dives/blackwell-forward.md.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import blackwell_warpgroups as warpgroups
from pallas_kernels import masks
from pallas_kernels.online_softmax import (
    LEAST,
    Statistics,
    exponent_scale,
    move_largest,
    signed,
    weigh,
)
from pallas_kernels.plan import TileWalk, part_number
from pallas_kernels.slots import drain_slots, wait_for_slot
from pallas_kernels.tile_kernel import TileKernel
from pallas_kernels.token_boxes import BoxPlace

REGISTERS = {1: (240, 96), 2: (208, 96)}
"""Registers per thread of workers and of the other warps, by number of workers: 64 Ki registers per block at most."""

SCORES = plgpu.Layout.TCGEN05_TMEM_NATIVE
"""A thread holds one row of scores: its maximum and sum need no other thread."""
ROW, COLUMN = SCORES.reduce(1), SCORES.reduce(0)
OUT = plgpu.Layout.TCGEN05
"""The layout in which swizzled shared memory can be written."""
RESCALED_COLUMNS = 32
"""Columns of output that a thread holds at a time while it rescales them."""


class Memory(NamedTuple):
    """A block's references: arrays in memory, scratch in shared and in tensor memory, barriers."""

    query: Any
    key: Any
    value: Any
    out: Any
    lse: Any
    query_slots: Any
    key_slots: Any
    value_slots: Any
    lse_rows: Any
    inverse_rows: Any
    out_columns: Any
    score_columns: Any
    query_ready: Any
    key_ready: Any
    value_ready: Any
    key_free: Any
    value_free: Any
    scores_ready: Any
    weights_ready: Any
    out_ready: Any
    weight_columns: Any = None


class ForwardKernel(TileKernel):
    """The kernel of one plan."""

    def scratch(self) -> list[Any]:
        """Shared memory, tensor memory and barriers in the order of `Memory`."""
        plan, dtype = self.plan, self.plan.problem.dtype
        visited, workers, stages = self.visited, plan.num_workers, plan.stages
        rows = plgpu.SMEM((workers, plan.rows), jnp.float32)
        scores = plgpu.TMEM((plan.rows, workers * plan.columns), jnp.float32)
        # Two 16-bit weights share a column, so the weights of a part lie over the first half of its scores.
        weights = plgpu.TMEM((plan.rows, 2 * workers * plan.columns), dtype, packed=True)
        loaded = functools.partial(plgpu.Barrier, num_barriers=stages)
        ordered = functools.partial(plgpu.Barrier, orders_tensor_core=True)
        scratch = [
            self.own.scratch(dtype),
            *(visited.scratch(dtype) for _ in range(2)),
            rows,
            rows,
            plgpu.TMEM((plan.rows, workers * plan.problem.head_dim), jnp.float32),
            scores if self.interpreted else plgpu.RefUnion(scores, weights),
            plgpu.Barrier(num_arrivals=self.own.num_copies, num_barriers=workers),
            *(loaded(num_arrivals=visited.num_copies) for _ in range(2)),
            *(ordered(num_arrivals=workers, num_barriers=stages) for _ in range(2)),
            *(ordered(num_barriers=workers) for _ in range(3)),
        ]
        return [*scratch, weights] if self.interpreted else scratch

    def body(self, *references: Any) -> None:
        """One block: workers, and a warpgroup of one matrix warp per worker and the producer."""
        memory = Memory(*references)
        warpgroup, workers = lax.axis_index("warpgroup"), self.plan.num_workers
        for_workers, for_warps = REGISTERS[workers]

        @pl.when(warpgroup < workers)
        def _():
            plgpu.set_max_registers(for_workers, action="increase")
            self._work(memory, self.walk(), warpgroup)

        @pl.when(warpgroup == workers)
        def _():
            plgpu.set_max_registers(for_warps, action="decrease")

            @plgpu.warp_map
            def _(warp):
                @pl.when(warp < workers)
                def _():
                    self._multiply(memory, self.walk(), warp)

                @pl.when(warp == workers)
                def _():
                    self._produce(memory, self.walk())

    def _blocks(self) -> list[tuple[int, int]]:
        """First column and size of the blocks in which a row of scores becomes weights: a word of its mask each."""
        size = min(masks.WORD, self.plan.columns)
        return [(first, size) for first in range(0, self.plan.columns, size)]

    def _scores(self, memory: Memory, worker: Any, first: int, size: int) -> Any:
        """`size` columns of a part's scores in tensor memory, `[rows, size]` float32."""
        scores = memory.score_columns if self.interpreted else memory.score_columns[0]
        return scores.at[:, pl.ds(worker * self.plan.columns + first, size)]

    def _weights(self, memory: Memory, worker: Any, first: int, size: int) -> Any:
        """`size` columns of a part's weights in tensor memory, `[rows, size]` in 16 bits, over the scores."""
        weights = memory.weight_columns if self.interpreted else memory.score_columns[1]
        return weights.at[:, pl.ds(worker * (2 * self.plan.columns) + first, size)]

    def _out(self, memory: Memory, worker: Any, first: int, size: int) -> Any:
        """`size` columns of a part's output in tensor memory, `[rows, size]` float32, not normalized."""
        return memory.out_columns.at[:, pl.ds(worker * self.queries.head_dim + first, size)]

    def _produce(self, memory: Memory, walk: TileWalk) -> None:
        """The producer's warp: starts the copies of the queries, and of every visited KV tile as soon as its slot is free."""
        stages, buffer = self.plan.stages, self.visited

        @pl.when(walk.num_visits > 0)
        def _():
            for part in range(self.plan.num_workers):
                place, ready = self.own_place(walk, part), memory.query_ready.at[part]
                self.own.load(memory.query, memory.query_slots, part, place, ready)

        def load(step: Any, place: BoxPlace) -> None:
            slot = self.slot(step)
            wait_for_slot(memory.key_free, step, stages)
            buffer.load(memory.key, memory.key_slots, slot, place, memory.key_ready.at[slot])
            wait_for_slot(memory.value_free, step, stages)
            buffer.load(memory.value, memory.value_slots, slot, place, memory.value_ready.at[slot])

        self.for_each_step(walk, load)
        drain_slots(walk.num_visits, stages, memory.key_free, memory.value_free)

    def _multiply(self, memory: Memory, walk: TileWalk, worker: Any) -> None:
        """A matrix warp: issues the products of one part.

        Instructions of one warp run in the order of issue. Hence the scores of a tile may overwrite the weights of the
        tile before, and a worker that sees new scores knows that the output has all earlier tiles.
        """

        @pl.when(walk.num_visits > 0)
        def _():
            plgpu.barrier_wait(memory.query_ready.at[worker])
            self._multiply_keys(memory, worker, jnp.int32(0))

            @pl.loop(jnp.int32(1), walk.num_visits)
            def _(step):
                self._multiply_values(memory, worker, step - 1)
                self._multiply_keys(memory, worker, step)

            self._multiply_values(memory, worker, walk.num_visits - 1)
            plgpu.tcgen05_commit_arrive(memory.out_ready.at[worker])

    def _multiply_keys(self, memory: Memory, worker: Any, step: Any) -> None:
        """Scores of a tile: query times key, not scaled."""
        slot, scores = self.slot(step), self._scores(memory, worker, 0, self.plan.columns)
        query, key = self.own.operand(memory.query_slots), self.visited.operand(memory.key_slots)
        plgpu.barrier_wait(memory.key_ready.at[slot])
        for chunk in range(self.keys.num_chunks):
            plgpu.tcgen05_mma(
                scores, query.at[worker, chunk], key.at[slot, chunk].T, accumulate=chunk > 0
            )
        plgpu.tcgen05_commit_arrive(memory.scores_ready.at[worker])
        plgpu.tcgen05_commit_arrive(memory.key_free.at[slot])

    def _multiply_values(self, memory: Memory, worker: Any, step: Any) -> None:
        """Adds a tile's weights times values to every chunk of the output."""
        slot, width = self.slot(step), self.keys.chunk
        value = self.visited.operand(memory.value_slots)
        plgpu.barrier_wait(memory.value_ready.at[slot])
        plgpu.barrier_wait(memory.weights_ready.at[worker])
        for chunk in range(self.keys.num_chunks):
            plgpu.tcgen05_mma(
                self._out(memory, worker, chunk * width, width),
                self._weights(memory, worker, 0, self.plan.columns),
                value.at[slot, chunk],
                accumulate=step > 0,
            )
        plgpu.tcgen05_commit_arrive(memory.value_free.at[slot])

    def _work(self, memory: Memory, walk: TileWalk, worker: Any) -> None:
        """A worker: the softmax of its part, and the part written out. A tile without tokens has no work at all."""

        @pl.when(walk.num_visits > 0)
        def _():
            plan, place = self.plan, self.own_place(walk, worker)
            intervals = self.intervals(place, warpgroups.iota(plan.rows, ROW))

            def clean(step: Any, state: Statistics) -> Statistics:
                return self._visit(memory, worker, step, state, None)

            def shell(step: Any, state: Statistics) -> Statistics:
                first = self.shell_place(walk, step).start
                words = masks.words(intervals, first, plan.kv_tile)

                def mask(number: int, scores: jax.Array) -> jax.Array:
                    bits = warpgroups.iota(scores.shape[1], COLUMN)
                    rows, columns = scores.shape
                    return masks.bits_of(words[number], bits, (rows, columns))

                return self._visit(memory, worker, step, state, mask)

            state = lax.fori_loop(jnp.int32(0), walk.num_clean, clean, self._empty())
            state = lax.fori_loop(walk.num_clean, walk.num_visits, shell, state)
            self._write(
                memory, worker, place, part_number(plan, place.residues, place.start), state
            )

    def _empty(self) -> Statistics:
        row = lambda x: plgpu.layout_cast(jnp.full((self.plan.rows,), x, jnp.float32), ROW)
        return Statistics(row(LEAST), row(0.0))

    def _visit(
        self, memory: Memory, worker: Any, step: Any, state: Statistics, mask: Any
    ) -> Statistics:
        """One KV tile: scores to weights, and the output rescaled where it must be."""
        scale, dtype = self.plan.problem.scale, self.plan.problem.dtype
        plgpu.barrier_wait(memory.scores_ready.at[worker])
        scores = []
        for number, block in enumerate(self._blocks()):
            part = plgpu.async_load_tmem(self._scores(memory, worker, *block), layout=SCORES)
            part = signed(part, scale)
            seen = None if mask is None else mask(number, part)
            scores.append(part if seen is None else jnp.where(seen, part, -jnp.inf))
        plgpu.wait_load_tmem()
        state, decay, is_rescaled = move_largest(state, scores, scale)
        for block, part in zip(self._blocks(), scores, strict=True):
            state, weights = weigh(state, part, scale)
            plgpu.async_store_tmem(self._weights(memory, worker, *block), weights.astype(dtype))

        @pl.when(is_rescaled & (step > 0))
        def _():
            self._rescale(memory, worker, decay)

        plgpu.commit_tmem()
        plgpu.barrier_arrive(memory.weights_ready.at[worker])
        return state

    def _rescale(self, memory: Memory, worker: Any, decay: jax.Array) -> None:
        """Output of the earlier tiles times `decay`, a few columns at a time: weights keep most registers."""
        for first in range(0, self.queries.head_dim, RESCALED_COLUMNS):
            part = self._out(memory, worker, first, RESCALED_COLUMNS)
            out = plgpu.async_load_tmem(part, layout=SCORES)
            plgpu.wait_load_tmem()
            plgpu.async_store_tmem(part, out * lax.broadcast_in_dim(decay, out.shape, (0,)))

    def _write(
        self, memory: Memory, worker: Any, place: BoxPlace, part: Any, state: Statistics
    ) -> None:
        """Out through the worker's own slot of queries, lse through its row."""
        operand, width = self.own.operand(memory.query_slots), self.queries.chunk
        factor = exponent_scale(self.plan.problem.scale)
        memory.lse_rows[worker] = factor * state.largest + jnp.log2(state.total)
        memory.inverse_rows[worker] = 1.0 / jnp.where(state.total == 0.0, 1.0, state.total)
        plgpu.commit_smem()
        # Other threads than those of the softmax hold a row here: its factor goes through shared memory.
        inverse = plgpu.load(memory.inverse_rows.at[worker], layout=OUT.reduce(1))
        plgpu.barrier_wait(memory.out_ready.at[worker])
        for chunk in range(self.queries.num_chunks):
            columns = self._out(memory, worker, chunk * width, width)
            out = plgpu.async_load_tmem(columns, layout=OUT)
            out = out * lax.broadcast_in_dim(inverse, out.shape, (0,))
            operand[worker, chunk] = out.astype(self.plan.problem.dtype)
        plgpu.commit_smem()
        self.own.store(memory.query_slots, worker, memory.out, place)
        rows = memory.lse.at[place.batch, place.head, part]
        plgpu.copy_smem_to_gmem(memory.lse_rows.at[worker], rows)
        plgpu.wait_smem_to_gmem(0)
