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

from gna_jax.problem import Operands, Problem
from gna_jax.tiling import Tiles
from pallas_kernels import hopper_warpgroups as warpgroups
from pallas_kernels import masks
from pallas_kernels.hopper_warpgroups import COLUMN, REGISTERS, ROW
from pallas_kernels.launch import launch
from pallas_kernels.limits import key_gradient_plan
from pallas_kernels.online_softmax import LOG2_E
from pallas_kernels.plan import TilePlan, TileWalk, quotient_and_digit, tile_walk
from pallas_kernels.row_statistics import RowBoxes, to_boxes
from pallas_kernels.slots import drain_slots
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
    """`dK = scale * (P * (dO V^T - delta))^T Q` and `dV = P^T dO`, `[B, *space, K, H]` in the operands' dtype.

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
    shape = keys.shape(problem.batch, problem.key_layout)
    of_key, of_value = launch(
        kernel.body,
        plan,
        heads=problem.kv_heads,
        num_warpgroups=plan.num_workers + 1,
        outputs=[jax.ShapeDtypeStruct(shape, problem.dtype)] * 2,
        scratch=kernel.scratch(),
        interpret=interpret,
    )(
        queries.split(operands.query),
        queries.split(out_cotangent),
        keys.split(operands.key),
        keys.split(operands.value),
        to_boxes(plan, lse * LOG2_E),
        to_boxes(plan, delta),
    )
    return keys.merge(of_key, problem.key_layout), keys.merge(of_value, problem.key_layout)


class Memory(NamedTuple):
    """A block's references: arrays in memory, scratch in shared memory, barriers."""

    query: Any
    out_cotangent: Any
    key: Any
    value: Any
    lse: Any
    delta: Any
    key_gradient: Any
    value_gradient: Any
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
class KeyGradientKernel:
    """The kernel of one inverse plan.

    Args:
      plan: tiles and walk.
      interpreted: whether the interpreter runs it; see `token_boxes` and `hopper_warpgroups.add_products`.
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
        """One slot per worker: its keys, at the end their gradient; and the like for values."""
        return BoxBuffer(self.keys, self.plan.part, self.plan.num_workers, self.interpreted)

    @property
    def query_buffer(self) -> BoxBuffer:
        """One slot per stage."""
        return BoxBuffer(self.queries, self.plan.q_tile, self.plan.stages, self.interpreted)

    @property
    def row_boxes(self) -> RowBoxes:
        """One slot per stage, for lse or delta."""
        return RowBoxes(self.plan, self.plan.stages, self.interpreted)

    def scratch(self) -> list[Any]:
        """Shared memory and barriers in the order of `Memory`."""
        plan, dtype = self.plan, self.plan.problem.dtype
        own, visited, rows = self.key_buffer, self.query_buffer, self.row_boxes
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
        if self.interpreted:
            scratch.append(plgpu.SMEM((plan.num_workers, plan.rows, plan.columns), dtype))
        return scratch

    def body(self, *references: Any) -> None:
        """One block: workers and producer."""
        memory = Memory(*references)
        warpgroups.take_roles(
            self.plan.num_workers,
            self._registers,
            lambda worker: self._work(memory, worker),
            lambda: self._produce(memory, self._walk()),
        )

    @property
    def _registers(self) -> tuple[int, int]:
        """The producer gets along with 40, but not on three axes with dilation and heads that share keys; workers need the rest."""
        problem = self.plan.problem
        is_dilated = any(d > 1 for d in self.plan.dilation)
        is_simple = problem.rank < 3 or problem.heads_per_kv == 1 or not is_dilated
        is_tight = self.plan.num_workers == 2 and is_simple
        return (232, 40) if is_tight else REGISTERS[self.plan.num_workers]

    def _walk(self) -> TileWalk:
        """Computed in each role anew: scalars that lived through the fork of roles would cost both of them registers."""
        return tile_walk(self.plan, lax.axis_index("tile"))

    def _place(self, walk: TileWalk, start: Any, head: Any) -> BoxPlace:
        return BoxPlace(lax.axis_index("batch"), head, walk.residues, tuple(start))

    def _produce(self, memory: Memory, walk: TileWalk) -> None:
        """Starts the copies of every visited Q tile of every query head, as soon as the slot is free."""
        stages, group = self.plan.stages, self.plan.problem.heads_per_kv
        clean, visits = walk.num_clean, walk.num_visits

        def load(slot: Any, start: Any, number: Any) -> None:
            head = lax.axis_index("head") * group + number
            place, ready = self._place(walk, start, head), memory.ready.at[slot]
            buffer, rows = self.query_buffer, self.row_boxes
            buffer.load(memory.query, memory.query_slots, slot, place, ready)
            buffer.load(memory.out_cotangent, memory.cotangent_slots, slot, place, ready)
            rows.load(memory.lse, memory.lse_rows, slot, place, ready)
            rows.load(memory.delta, memory.delta_rows, slot, place, ready)
            warpgroups.note(memory.notes, slot, start)
            plgpu.barrier_arrive(ready)

        def load_clean(step: Any, slot: Any) -> None:
            number, visit = self._head_and_visit(step, clean)
            load(slot, walk.clean_tile(visit), number)

        def load_shell(step: Any, slot: Any) -> None:
            number, visit = self._head_and_visit(step - clean * group, visits - clean)
            load(slot, walk.shell_tile(visit), number)

        fill = functools.partial(warpgroups.fill_slots, stages=stages, free=memory.free)
        fill(jnp.int32(0), clean * group, load=load_clean)
        fill(clean * group, visits * group, load=load_shell)
        drain_slots(visits * group, stages, memory.free)

    def _head_and_visit(self, step: Any, visits: Any) -> tuple[Any, Any]:
        """Which head of the group, and which of its visits, a step is."""
        one_head = self.plan.problem.heads_per_kv == 1
        return (0, step) if one_head else quotient_and_digit(step, visits)

    def _work(self, memory: Memory, worker: Any) -> None:
        """The gradients of a worker's part, written out.

        Sums, scores and their gradient leave some thirty registers for all else. So what a later stage needs is noted in shared
        memory, even the worker's number is asked for anew, and what only the shell needs is computed after the clean loop.
        """
        plan, rank = self.plan, self.plan.problem.rank
        visits = self._load_own(memory, worker)
        clean = functools.partial(self._visit, memory, worker, mask=lambda _: None)
        sums = (warpgroups.zeros(plan.rows, self.keys.chunk),) * self.keys.num_chunks
        state = lax.fori_loop(jnp.int32(0), visits[0], clean, (sums, sums))
        worker = lax.axis_index("warpgroup")
        place = warpgroups.noted_place(plan, memory.notes, plan.stages + worker)
        rows = masks.digits(warpgroups.iota(plan.rows, ROW), plan.part)
        keys = tuple(first + row for first, row in zip(place.start, rows, strict=True))
        lengths = plan.lengths(place.residues)
        intervals = masks.query_intervals(plan.problem.neighborhood.axes, keys, lengths)

        def mask(slot: Any) -> jax.Array:
            queries = masks.digits(warpgroups.iota(plan.columns, COLUMN), plan.q_tile)
            first = warpgroups.noted(memory.notes, slot, rank)
            return masks.seen(intervals, first, queries, (plan.rows, plan.columns))

        shell = functools.partial(self._visit, memory, worker, mask=mask)
        visits = warpgroups.noted_visits(memory.notes, plan.stages + worker)
        self._write(memory, *lax.fori_loop(*visits, shell, state))

    def _load_own(self, memory: Memory, worker: Any) -> tuple[Any, Any]:
        """Fetches the part's K and V to shared memory, notes place and visits; returns the visits: clean ones, and all."""
        plan, walk = self.plan, self._walk()
        start = list(walk.own_start)
        start[plan.split_axis] = start[plan.split_axis] + worker * plan.part[plan.split_axis]
        place = self._place(walk, start, lax.axis_index("head"))
        ready = memory.own_ready.at[worker]
        self.key_buffer.load(memory.key, memory.key_slots, worker, place, ready)
        self.key_buffer.load(memory.value, memory.value_slots, worker, place, ready)
        group = plan.problem.heads_per_kv
        visits = walk.num_clean * group, walk.num_visits * group
        warpgroups.note_part(memory.notes, plan.stages + worker, visits, place)
        plgpu.barrier_wait(ready)
        return visits

    def _write(self, memory: Memory, of_key: tuple[Any, ...], of_value: tuple[Any, ...]) -> None:
        """Both gradients out through the worker's own slots of keys and values."""
        worker, plan, problem = lax.axis_index("warpgroup"), self.plan, self.plan.problem
        of_key = tuple(chunk * problem.scale for chunk in of_key)
        for slots, gradient in ((memory.key_slots, of_key), (memory.value_slots, of_value)):
            for chunk, accumulated in enumerate(gradient):
                operand = self.key_buffer.operand(slots)
                operand[worker, chunk] = accumulated.astype(problem.dtype)
        plgpu.commit_smem()
        place = warpgroups.noted_place(plan, memory.notes, plan.stages + worker)
        self.key_buffer.store(memory.key_slots, worker, memory.key_gradient, place)
        self.key_buffer.store(memory.value_slots, worker, memory.value_gradient, place)
        plgpu.wait_smem_to_gmem(0)

    def _visit(self, memory: Memory, worker: Any, step: Any, state: Any, mask: Any) -> Any:
        """One Q tile of one head: its share of dK and dV added to the sums."""
        plan, chunks = self.plan, self.keys.num_chunks
        of_key, of_value = state
        slot = lax.rem(step, jnp.int32(plan.stages))
        key, value = map(self.key_buffer.operand, (memory.key_slots, memory.value_slots))
        query, cotangent = map(
            self.query_buffer.operand, (memory.query_slots, memory.cotangent_slots)
        )
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
        # dV before dP: fewer registers at a time.
        left = weights.astype(plan.problem.dtype)
        of_value = warpgroups.add_products(of_value, left, visited(cotangent), staging)
        products = warpgroups.product(chunks, own(value), turned(cotangent))
        gradient = gradient_of_scores(weights, products, statistic(memory.delta_rows), query_axis=1)
        left = gradient.astype(plan.problem.dtype)
        of_key = warpgroups.add_products(of_key, left, visited(query), staging)
        plgpu.commit_smem()  # statistics were read by registers and will be refilled by a copy
        plgpu.barrier_arrive(memory.free.at[slot])
        return of_key, of_value
