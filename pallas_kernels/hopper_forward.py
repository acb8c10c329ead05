"""Forward of neighborhood attention on Hopper: `out` and `lse` by wgmma and TMA in one warp-specialised kernel.

A thread block computes one Q tile of one head. Its last warpgroup (the producer) walks the KV tiles of the tile's key box and
starts their copies; each of the others (the workers) holds a part of 64 queries, and the whole part of scores and output in
registers. Tiles that every query sees whole come first and have no mask; the shell around them has. Softmax is online, in
base 2, in float32. Two workers take turns: while one keeps the matrix unit busy, the other computes its softmax.

Reading order: `plan` (which tiles), `token_boxes` (how they move), `masks`, then here. This module neither checks a call's
arguments (`gna_jax.problem`) nor chooses tiles; budget and measured resources: docs/deep-dives/hopper-forward.md.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gna_jax.problem import Operands, Problem
from gna_jax.tiling import Tiles
from pallas_kernels import masks
from pallas_kernels.hopper_warpgroups import COLUMN, REGISTERS, ROW
from pallas_kernels.launch import launch
from pallas_kernels.limits import forward_plan
from pallas_kernels.online_softmax import LEAST, Softmax, exponent_scale, update
from pallas_kernels.plan import TilePlan, TileWalk, part_number, tile_walk
from pallas_kernels.row_statistics import from_parts
from pallas_kernels.slots import drain_slots, wait_for_slot
from pallas_kernels.token_boxes import BoxBuffer, BoxPlace, TokenArray


def forward(
    problem: Problem, operands: Operands, tiles: Tiles, interpret: Any = None
) -> tuple[jax.Array, jax.Array]:
    """`out [B, *space, N, H]` in the operands' dtype and `lse [B, *space, N]` float32, natural log.

    Args:
      problem, tiles: what `supports` accepts.
      operands: query [B, *space, N, H], key and value [B, *space, K, H].
      interpret: `plgpu.InterpretGPUParams` to run in the interpreter on a CPU, None on a GPU.
    """
    kernel = ForwardKernel(forward_plan(problem, tiles), interpret is not None)
    arrays = operands.query, operands.key, operands.value
    views = (kernel.queries, kernel.keys, kernel.keys)
    out, lse = launch(
        kernel.body,
        kernel.plan,
        heads=problem.query_heads,
        num_warpgroups=kernel.plan.num_workers + 1,
        outputs=kernel.outputs(),
        scratch=kernel.scratch(),
        interpret=interpret,
    )(*(view.split(array) for view, array in zip(views, arrays, strict=True)))
    return kernel.queries.merge(out, problem.query_layout), from_parts(
        kernel.plan, lse * math.log(2)
    )


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
    query_ready: Any
    key_ready: Any
    value_ready: Any
    key_free: Any
    value_free: Any
    turn: Any
    weights: Any = None


@dataclasses.dataclass(frozen=True)
class ForwardKernel:
    """The kernel of one plan.

    Args:
      plan: tiles and walk.
      interpreted: whether the interpreter runs it. It lacks two things: two views of one buffer (`token_boxes`), and
        weights as a register operand (`_add_values`).
    """

    plan: TilePlan
    interpreted: bool

    @property
    def queries(self) -> TokenArray:
        """How query and out lie."""
        problem = self.plan.problem
        return TokenArray(self.plan.dilation, problem.query_heads, problem.head_dim)

    @property
    def keys(self) -> TokenArray:
        """How key and value lie."""
        problem = self.plan.problem
        return TokenArray(self.plan.dilation, problem.kv_heads, problem.head_dim)

    @property
    def query_buffer(self) -> BoxBuffer:
        """One slot per worker: its queries, at the end its output."""
        return BoxBuffer(self.queries, self.plan.part, self.plan.num_workers, self.interpreted)

    @property
    def key_buffer(self) -> BoxBuffer:
        """One slot per stage."""
        return BoxBuffer(self.keys, self.plan.kv_tile, self.plan.stages, self.interpreted)

    def outputs(self) -> list[jax.ShapeDtypeStruct]:
        """Out as query lies; lse by parts of 64 queries, since rows of an uneven layout cannot be clipped on the way out."""
        problem = self.plan.problem
        out = self.queries.shape(problem.batch, problem.query_layout)
        lse = problem.batch, problem.query_heads, self.plan.num_parts, self.plan.rows
        return [jax.ShapeDtypeStruct(out, problem.dtype), jax.ShapeDtypeStruct(lse, jnp.float32)]

    def scratch(self) -> list[Any]:
        """Shared memory and barriers in the order of `Memory`."""
        plan, dtype = self.plan, self.plan.problem.dtype
        keys = self.key_buffer
        loaded = functools.partial(plgpu.Barrier, num_arrivals=keys.num_copies)
        freed = functools.partial(plgpu.Barrier, num_arrivals=plan.num_workers)
        scratch = [
            self.query_buffer.scratch(dtype),
            keys.scratch(dtype),
            keys.scratch(dtype),
            plgpu.SMEM((plan.num_workers, plan.rows), jnp.float32),
            plgpu.Barrier(num_arrivals=self.query_buffer.num_copies, num_barriers=plan.num_workers),
            *(loaded(num_barriers=plan.stages) for _ in range(2)),
            *(freed(num_barriers=plan.stages) for _ in range(2)),
            plgpu.Barrier(num_arrivals=plan.num_workers),
        ]
        if self.interpreted:
            scratch.append(plgpu.SMEM((plan.num_workers, plan.rows, plan.columns), dtype))
        return scratch

    def body(self, *references: Any) -> None:
        """One block: workers and producer."""
        memory = Memory(*references)
        warpgroup = lax.axis_index("warpgroup")
        for_workers, for_producer = REGISTERS[self.plan.num_workers]

        @pl.when(warpgroup < self.plan.num_workers)
        def _():
            plgpu.set_max_registers(for_workers, action="increase")
            self._work(memory, self._walk(), warpgroup)

        @pl.when(warpgroup == self.plan.num_workers)
        def _():
            plgpu.set_max_registers(for_producer, action="decrease")
            self._produce(memory, self._walk())

    def _walk(self) -> TileWalk:
        """Computed in each role anew: scalars that lived through the fork of roles would cost both of them registers."""
        return tile_walk(self.plan, lax.axis_index("tile"))

    def _place(self, walk: TileWalk, start: Any, *, is_key: bool) -> BoxPlace:
        head = lax.axis_index("head")
        if is_key and self.plan.problem.heads_per_kv > 1:
            head = lax.div(head, jnp.int32(self.plan.problem.heads_per_kv))
        return BoxPlace(lax.axis_index("batch"), head, walk.residues, tuple(start))

    def _produce(self, memory: Memory, walk: TileWalk) -> None:
        """Starts the copies of every visited KV tile, as soon as the slot is free."""
        stages, keys = self.plan.stages, self.key_buffer

        def load(step: Any, start: Any) -> None:
            slot, place = lax.rem(step, jnp.int32(stages)), self._place(walk, start, is_key=True)

            wait_for_slot(memory.key_free, step, stages)
            keys.load(memory.key, memory.key_slots, slot, place, memory.key_ready.at[slot])
            wait_for_slot(memory.value_free, step, stages)
            keys.load(memory.value, memory.value_slots, slot, place, memory.value_ready.at[slot])

        @pl.loop(jnp.int32(0), walk.num_clean)
        def _(step):
            load(step, walk.clean_tile(step))

        @pl.loop(walk.num_clean, walk.num_visits)
        def _(step):
            load(step, walk.shell_tile(step - walk.num_clean))

        drain_slots(walk.num_visits, stages, memory.key_free, memory.value_free)

    def _work(self, memory: Memory, walk: TileWalk, worker: Any) -> None:
        """Attention of a worker's part, written out."""
        plan, buffer = self.plan, self.query_buffer
        start = list(walk.own_start)
        start[plan.split_axis] = start[plan.split_axis] + worker * plan.part[plan.split_axis]
        place = self._place(walk, start, is_key=False)
        ready = memory.query_ready.at[worker]
        buffer.load(memory.query, memory.query_slots, worker, place, ready)
        rows = masks.digits(self._iota(plan.rows, ROW), plan.part)
        queries = tuple(first + row for first, row in zip(start, rows, strict=True))
        intervals = masks.key_intervals(plan.problem.neighborhood.axes, queries, walk.lengths)
        plgpu.barrier_wait(ready)

        def step(number: Any, state: Softmax, is_masked: bool) -> Softmax:
            if not is_masked:
                return self._visit(memory, worker, number, state, None)
            first = walk.shell_tile(number - walk.num_clean)

            def mask() -> jax.Array:
                keys = masks.digits(self._iota(plan.columns, COLUMN), plan.kv_tile)
                return masks.seen(intervals, first, keys, (plan.rows, plan.columns))

            return self._visit(memory, worker, number, state, mask)

        clean, shell = (functools.partial(step, is_masked=masked) for masked in (False, True))
        self._change_turns(memory, worker == 1)  # the second worker follows half a step behind,
        state = lax.fori_loop(jnp.int32(0), walk.num_clean, clean, self._empty())
        state = lax.fori_loop(walk.num_clean, walk.num_visits, shell, state)
        self._change_turns(memory, worker == 0)  # and the first waits for it at the end
        self._write(memory, worker, place, part_number(plan, walk, start), state)

    def _change_turns(self, memory: Memory, condition: Any = True) -> None:
        """Both workers meet: the one that multiplied goes on to its softmax, the other from its softmax to multiply."""
        if self.plan.num_workers == 1:
            return

        @pl.when(condition)
        def _():
            plgpu.barrier_arrive(memory.turn)
            plgpu.barrier_wait(memory.turn)

    def _empty(self) -> Softmax:
        shape = (self.plan.rows, self.queries.chunk)
        zeros = plgpu.layout_cast(jnp.full(shape, 0.0, jnp.float32), plgpu.Layout.WGMMA)
        largest = plgpu.layout_cast(jnp.full(shape[:1], LEAST, jnp.float32), ROW)
        total = plgpu.layout_cast(jnp.full(shape[:1], 0.0, jnp.float32), ROW)
        return Softmax((zeros,) * self.queries.num_chunks, largest, total)

    def _iota(self, size: int, layout: Any) -> Any:
        return plgpu.broadcasted_iota(jnp.int32, (size,), 0, layout=layout)

    def _visit(self, memory: Memory, worker: Any, step: Any, state: Softmax, mask: Any) -> Softmax:
        """One KV tile: scores, online softmax, weighted sum of values."""
        slot = lax.rem(step, jnp.int32(self.plan.stages))
        plgpu.barrier_wait(memory.key_ready.at[slot])
        scores = self._scores(memory, worker, slot)
        plgpu.barrier_arrive(memory.key_free.at[slot])
        # The mask only now: it need not be kept while the scores are on their way.
        seen = None if mask is None else mask()
        state, weights = update(state, scores, seen, self.plan.problem.scale)
        plgpu.barrier_wait(memory.value_ready.at[slot])
        self._change_turns(memory)
        out = self._add_values(memory, worker, slot, state.out, weights)
        plgpu.barrier_arrive(memory.value_free.at[slot])
        return state._replace(out=out)

    def _scores(self, memory: Memory, worker: Any, slot: Any) -> jax.Array:
        """`[rows, columns]` float32: query times key, not scaled."""
        query = self.query_buffer.operand(memory.query_slots)
        key = self.key_buffer.operand(memory.key_slots)

        def multiply(accumulator: Any) -> jax.Array:
            for chunk in range(self.keys.num_chunks):
                plgpu.wgmma(accumulator, query.at[worker, chunk], key.at[slot, chunk].T)
            # All multiplications are on their way: the other worker may queue its own behind them.
            self._change_turns(memory)
            return accumulator[...]

        shape = (self.plan.rows, self.plan.columns)
        return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))

    def _add_values(
        self, memory: Memory, worker: Any, slot: Any, out: tuple[Any, ...], weights: Any
    ) -> tuple[Any, ...]:
        """Adds weights times values to every chunk of the output.

        On the device the weights stay in registers. The interpreter wants them in shared memory, and a fresh accumulator.
        """
        value = self.key_buffer.operand(memory.value_slots)
        weights = weights.astype(self.plan.problem.dtype)
        if not self.interpreted:

            def accumulate(accumulators: tuple[Any, ...]) -> None:
                for chunk, accumulator in enumerate(accumulators):
                    plgpu.wgmma(accumulator, weights, value.at[slot, chunk])

            return pl.run_state(accumulate)(
                tuple(plgpu.WGMMAAccumulatorRef.init(chunk) for chunk in out)
            )
        memory.weights[worker] = weights
        plgpu.commit_smem()
        added = []
        for chunk, accumulated in enumerate(out):

            def multiply(accumulator: Any, chunk: int = chunk) -> jax.Array:
                plgpu.wgmma(accumulator, memory.weights.at[worker], value.at[slot, chunk])
                return accumulator[...]

            fresh = plgpu.WGMMAAccumulatorRef(accumulated.shape, jnp.float32)
            added.append(accumulated + pl.run_scoped(multiply, fresh))
        return tuple(added)

    def _write(
        self, memory: Memory, worker: Any, place: BoxPlace, part: Any, state: Softmax
    ) -> None:
        """Out through the worker's own slot of queries, lse through its row."""
        scale = self.plan.problem.scale
        operand = self.query_buffer.operand(memory.query_slots)
        inverse = 1.0 / jnp.where(state.total == 0.0, 1.0, state.total)
        for chunk, accumulated in enumerate(state.out):
            out = accumulated * lax.broadcast_in_dim(inverse, accumulated.shape, (0,))
            operand[worker, chunk] = out.astype(self.plan.problem.dtype)
        memory.lse_rows[worker] = exponent_scale(scale) * state.largest + jnp.log2(state.total)
        plgpu.commit_smem()
        self.query_buffer.store(memory.query_slots, worker, memory.out, place)
        rows = memory.lse.at[place.batch, place.head, part]
        plgpu.copy_smem_to_gmem(memory.lse_rows.at[worker], rows)
        plgpu.wait_smem_to_gmem(0)
