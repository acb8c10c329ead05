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
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import blackwell_warpgroups as warpgroups
from pallas_kernels import masks
from pallas_kernels.blackwell_warpgroups import COLUMN, ROW, ProductColumns, VisitedColumns
from pallas_kernels.plan import TileWalk
from pallas_kernels.row_statistics import RowBoxes
from pallas_kernels.slots import drain_slots, wait_for_slot
from pallas_kernels.softmax_gradient import less_delta, weights_of
from pallas_kernels.tile_kernel import TileKernel
from pallas_kernels.token_boxes import BoxPlace

INPUTS = 6
"""Arrays read: the first references."""


class Memory(NamedTuple):
    """A block's references: arrays in memory, scratch in shared and in tensor memory, barriers."""

    query: Any
    out_cotangent: Any
    key: Any
    value: Any
    lse: Any
    delta: Any
    gradients: tuple[Any, ...]
    sums: tuple[Any, ...]
    key_slots: Any
    value_slots: Any
    query_slots: Any
    cotangent_slots: Any
    lse_slots: Any
    delta_slots: Any
    score_columns: Any
    product_columns: Any
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
class KeyGradientKernel(TileKernel):
    """The kernel of one inverse plan, of one part per block.

    Args:
      gradients: which of dK and dV it computes.
    """

    gradients: tuple[str, ...]

    @property
    def num_warpgroups(self) -> int:
        """Workers share the columns of a visited tile, not the rows of the own one."""
        return self.columns.num_workers + 1

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
        """Tensor memory for the gradients, then what is left in the order of `Memory`."""
        plan, dtype, workers = self.plan, self.plan.problem.dtype, self.columns.num_workers
        own, visited, values = self.own, self.visited, self.visited_values
        sums = plgpu.TMEM((plan.rows, plan.problem.head_dim), jnp.float32)
        slots = functools.partial(plgpu.Barrier, num_barriers=plan.stages)
        loaded = functools.partial(plgpu.Barrier, num_arrivals=visited.num_copies)
        ordered = functools.partial(plgpu.Barrier, orders_tensor_core=True)
        return [
            *(sums for _ in self.gradients),
            *(own.scratch(dtype) for _ in range(2)),
            visited.scratch(dtype),
            values.scratch(dtype),
            *(self.rows.scratch() for _ in range(2)),
            *(self.products.scratch(dtype) for _ in range(2)),
            plgpu.Barrier(num_arrivals=2 * own.num_copies),
            *(loaded(num_barriers=buffer.slots) for buffer in (visited, values)),
            slots(num_arrivals=2 * self.rows.num_copies),
            *(ordered(num_barriers=buffer.slots) for buffer in (visited, values)),
            slots(num_arrivals=workers),
            *(ordered() for _ in range(2)),
            *(ordered(num_arrivals=workers) for _ in range(2)),
            ordered(),
        ]

    def body(self, *references: Any) -> None:
        """One block. A tile without tokens has no work at all."""
        sums = INPUTS + len(self.gradients)
        rest = sums + len(self.gradients)
        gradients = references[INPUTS:sums]
        memory = Memory(
            *[*references[:INPUTS], gradients, references[sums:rest], *references[rest:]]
        )

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
        """Starts the copies of K and V, and of every visited Q tile as soon as its slot is free."""
        own, place, (_, num_steps) = self.own, self.own_place(walk), self.steps(walk)
        own.load(memory.key, memory.key_slots, 0, place, memory.own_ready)
        own.load(memory.value, memory.value_slots, 0, place, memory.own_ready)
        self.for_each_step(walk, functools.partial(self._load, memory))
        stages, value_stages = self.plan.stages, self.plan.value_stages
        drain_slots(num_steps, stages, memory.query_free, memory.rows_free)
        drain_slots(num_steps, value_stages, memory.cotangent_free)

    def _load(self, memory: Memory, step: Any, place: BoxPlace) -> None:
        """Starts the copies of one Q tile: Q, lse and delta, dO."""
        visited, values, rows, slot = self.visited, self.visited_values, self.rows, self.slot(step)
        wait_for_slot(memory.query_free, step, visited.slots)
        visited.load(memory.query, memory.query_slots, slot, place, memory.query_ready.at[slot])
        wait_for_slot(memory.rows_free, step, rows.slots)
        ready = memory.rows_ready.at[slot]
        rows.load(memory.lse, memory.lse_slots, slot, place, ready)
        rows.load(memory.delta, memory.delta_slots, slot, place, ready)
        slot = self.value_slot(step)
        wait_for_slot(memory.cotangent_free, step, values.slots)
        ready = memory.cotangent_ready.at[slot]
        values.load(memory.out_cotangent, memory.cotangent_slots, slot, place, ready)

    def _multiply(self, memory: Memory, walk: TileWalk) -> None:
        """Issues all products. Instructions of one warp run in the order of issue.

        Hence S^T of a tile may overwrite P^T of the tile before, once dV of that has been issued, and dP^T likewise dS^T. Without
        dV, S^T waits for dK of the tile before, whose dS^T came of the S^T that it overwrites.
        """
        _, num_steps = self.steps(walk)
        adds = {"value": self._add_to_values, "key": self._add_to_keys}
        first, *second = [add for name, add in adds.items() if name in self.gradients]
        plgpu.barrier_wait(memory.own_ready)
        self._multiply_keys(memory, jnp.int32(0))
        self._multiply_values(memory, jnp.int32(0))

        @pl.loop(jnp.int32(1), num_steps)
        def _(step):
            first(memory, step - 1)
            self._multiply_keys(memory, step)
            for add in second:
                add(memory, step - 1)
            self._multiply_values(memory, step)

        for add in (first, *second):
            add(memory, num_steps - 1)
        plgpu.tcgen05_commit_arrive(memory.sums_ready)

    def _multiply_keys(self, memory: Memory, step: Any) -> None:
        """S^T = K Q^T of a tile, not scaled."""
        slot, key = self.slot(step), self.own.operand(memory.key_slots)
        query = self.visited.operand(memory.query_slots)
        plgpu.barrier_wait(memory.query_ready.at[slot])
        self._multiply_own(memory.score_columns, key, query, slot)
        plgpu.tcgen05_commit_arrive(memory.scores_ready)
        if "key" not in self.gradients:
            plgpu.tcgen05_commit_arrive(memory.query_free.at[slot])

    def _multiply_values(self, memory: Memory, step: Any) -> None:
        """dP^T = V dO^T of a tile, which dK alone needs."""
        if "key" not in self.gradients:
            return
        slot = self.value_slot(step)
        value = self.own.operand(memory.value_slots)
        cotangent = self.visited_values.operand(memory.cotangent_slots)
        plgpu.barrier_wait(memory.cotangent_ready.at[slot])
        self._multiply_own(memory.product_columns, value, cotangent, slot)
        plgpu.tcgen05_commit_arrive(memory.products_ready)
        if "value" not in self.gradients:
            plgpu.tcgen05_commit_arrive(memory.cotangent_free.at[slot])

    def _multiply_own(self, product: Any, own: Any, visited: Any, slot: Any) -> None:
        warpgroups.multiply_operands(
            self.products.product(product, 0),
            lambda chunk: own.at[0, chunk],
            lambda chunk: visited.at[slot, chunk],
            self.keys.num_chunks,
        )

    def _add_to_values(self, memory: Memory, step: Any) -> None:
        """dV += P^T dO of a tile."""
        slot, cotangent = self.value_slot(step), self.visited_values.operand(memory.cotangent_slots)
        if "key" not in self.gradients:
            plgpu.barrier_wait(memory.cotangent_ready.at[slot])
        plgpu.barrier_wait(memory.weights_ready)
        self._add_to_sums(memory, "value", memory.score_columns, cotangent, slot, step)
        plgpu.tcgen05_commit_arrive(memory.cotangent_free.at[slot])

    def _add_to_keys(self, memory: Memory, step: Any) -> None:
        """dK += dS^T Q of a tile."""
        slot, query = self.slot(step), self.visited.operand(memory.query_slots)
        plgpu.barrier_wait(memory.gradients_ready)
        self._add_to_sums(memory, "key", memory.product_columns, query, slot, step)
        plgpu.tcgen05_commit_arrive(memory.query_free.at[slot])

    def _add_to_sums(
        self, memory: Memory, name: str, operands: Any, visited: Any, slot: Any, step: Any
    ) -> None:
        sums = memory.sums[self.gradients.index(name)]
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
        """A worker: P^T and dS^T of its share of every tile; at the end a gradient written out."""
        (num_clean, num_steps), place = self.steps(walk), self.own_place(walk)
        intervals = self.intervals(place, warpgroups.iota(self.plan.rows, ROW))

        @pl.loop(jnp.int32(0), num_clean)
        def _(step):
            self._visit(memory, worker, step, lambda: None)

        @pl.loop(num_clean, num_steps)
        def _(step):
            first = self.shell_place(walk, step).start
            self._visit(memory, worker, step, lambda: self.columns.seen(intervals, first, worker))

        plgpu.barrier_wait(memory.sums_ready)
        for number in range(len(self.gradients)):

            @pl.when(worker == min(number, self.columns.num_workers - 1))
            def _(number: int = number):
                self._write(memory, number, place, intervals)

    def _visit(self, memory: Memory, worker: Any, step: Any, mask: Any) -> None:
        """One Q tile: P^T, then dS^T, of the worker's queries."""
        slot, width = self.slot(step), self.columns.width
        queries = pl.ds(worker * width, width)

        def statistic(slots: Any) -> jax.Array:
            return plgpu.load(self.rows.vectors(slots).at[slot, queries], layout=COLUMN)

        plgpu.barrier_wait(memory.rows_ready.at[slot])
        lse = statistic(memory.lse_slots)
        plgpu.barrier_wait(memory.scores_ready)
        scores = warpgroups.read(self.products.product_of(memory.score_columns, 0, worker))
        weights = weights_of(scores, lse, mask(), scale=self.plan.problem.scale, query_axis=1)
        if "value" in self.gradients:
            self.products.replace(memory.score_columns, 0, worker, weights, memory.weights_ready)
        if "key" in self.gradients:
            delta = statistic(memory.delta_slots)
            plgpu.barrier_wait(memory.products_ready)
            products = warpgroups.read(self.products.product_of(memory.product_columns, 0, worker))
            gradient = weights * (products + less_delta(delta, weights, query_axis=1))
            ready = memory.gradients_ready
            self.products.replace(memory.product_columns, 0, worker, gradient, ready)
        plgpu.commit_smem()  # statistics have been read before copies refill the slot
        plgpu.barrier_arrive(memory.rows_free.at[slot])

    def _write(
        self, memory: Memory, number: int, place: BoxPlace, intervals: masks.Intervals
    ) -> None:
        """A gradient through the slot of what it is of."""
        is_key = self.gradients[number] == "key"
        slots, scale = (
            (memory.key_slots, self.plan.problem.scale) if is_key else (memory.value_slots, 1.0)
        )
        operand = self.own.operand(slots)
        for chunk in range(self.keys.num_chunks):
            gradient = warpgroups.read(self._sum(memory.sums[number], chunk))
            gradient = self.hide_lone(intervals, gradient) * scale
            operand[0, chunk] = gradient.astype(self.plan.problem.dtype)
        plgpu.commit_smem()
        self.own.store(slots, 0, memory.gradients[number], place)
        plgpu.wait_smem_to_gmem(0)
