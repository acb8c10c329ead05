"""What the Hopper kernels share: the roles of warpgroups, layouts in registers, notes and weights in shared memory, products.

A block has one or two workers, a warpgroup of 64 own rows each, and behind them a producer. Nothing here knows attention.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.limits import WIDEST_NARROW_HEAD
from pallas_kernels.plan import TilePlan
from pallas_kernels.token_boxes import BoxPlace, operand_transforms

REGISTERS = {1: (256, 240), 2: (232, 40)}
"""Registers per thread of workers and of the producer, by number of workers: 64 Ki registers per block at most."""

ROW = plgpu.Layout.WGMMA.reduce(1)
COLUMN = plgpu.Layout.WGMMA.reduce(0)


def take_roles(plan: TilePlan, work: Callable[[Any], None], produce: Callable[[], None]) -> None:
    """Runs `work(worker)` in the workers and `produce()` in the producer, with the registers of their role."""
    warpgroup = lax.axis_index("warpgroup")
    for_workers, for_producer = REGISTERS[plan.num_workers]

    @pl.when(warpgroup < plan.num_workers)
    def _():
        plgpu.set_max_registers(for_workers, action="increase")
        work(this_worker(plan))

    @pl.when(warpgroup == plan.num_workers)
    def _():
        plgpu.set_max_registers(for_producer, action="decrease")
        produce()


def this_worker(plan: TilePlan) -> Any:
    """The number of the worker that asks: to be asked anew costs less than a register."""
    return lax.axis_index("warpgroup") if plan.num_workers > 1 else 0


def iota(size: int, layout: Any) -> Any:
    """`0..size` in the registers of a row or column vector."""
    return plgpu.broadcasted_iota(jnp.int32, (size,), 0, layout=layout)


def zeros(rows: int, columns: int) -> Any:
    """A matrix of zeros in the registers of a sum of products."""
    return plgpu.layout_cast(jnp.full((rows, columns), 0.0, jnp.float32), plgpu.Layout.WGMMA)


def note(notes: Any, row: Any, numbers: Sequence[Any]) -> None:
    """Writes scalars down in a row of shared memory.

    What lives through a loop of products costs a register there, and what the producer decodes no worker needs to decode
    again.
    """
    for column, number in enumerate(numbers):
        notes[row, column] = number


def noted(notes: Any, row: Any, count: int, first: int = 0) -> tuple[Any, ...]:
    """Reads `count` scalars of a row, from column `first` on."""
    return tuple(notes[row, first + column] for column in range(count))


def note_part(notes: Any, row: Any, visits: tuple[Any, Any], place: BoxPlace) -> None:
    """A worker's own note: how many visits are clean, how many there are, and where its part lies."""
    note(notes, row, (*visits, place.batch, place.head, *place.start, *place.residues))


def noted_visits(notes: Any, row: Any) -> tuple[Any, Any]:
    """Clean visits and all visits, from `note_part`."""
    clean, visits = noted(notes, row, 2)
    return clean, visits


def noted_place(plan: TilePlan, notes: Any, row: Any) -> BoxPlace:
    """The part's place, from `note_part`."""
    rank = plan.problem.rank
    batch, head, *numbers = noted(notes, row, 2 + 2 * rank, 2)
    pairs = zip(plan.dilation, numbers[rank:], strict=True)
    residues = tuple(0 if d == 1 else residue for d, residue in pairs)
    return BoxPlace(batch, head, residues, tuple(numbers[:rank]))


def notes_of(plan: TilePlan) -> Any:
    """Room for notes: a row per slot, where its box starts, and then a row per worker, see `note_part`."""
    return plgpu.SMEM((plan.stages + plan.num_workers, 4 + 2 * plan.problem.rank), jnp.int32)


@dataclasses.dataclass(frozen=True)
class Staging:
    """Shared memory for 16-bit `[rows, columns]` of every worker: weights that wait while a product takes their registers.

    The interpreter also wants the left operand of `add_products` there.

    Args:
      plan: the kernel's.
      columns: of a visited tile, or of a slice of it.
      interpreted: whether the interpreter runs the kernel.
    """

    plan: TilePlan
    columns: int
    interpreted: bool

    @property
    def holds_weights(self) -> bool:
        """Whether registers are so short: sums of 256 columns take half of them."""
        return self.plan.problem.head_dim > WIDEST_NARROW_HEAD

    def scratch(self, dtype: Any) -> list[Any]:
        """What `scratch_types` asks for; nothing where nothing needs it."""
        shape = (self.plan.num_workers, self.plan.rows, self.columns)
        if self.interpreted:
            return [plgpu.SMEM(shape, dtype)]
        transforms = operand_transforms(self.columns, dtype)
        return [plgpu.SMEM(shape, dtype, transforms=transforms)] if self.holds_weights else []

    def put(self, staging: Any, worker: Any, weights: jax.Array) -> jax.Array | None:
        """The weights, or None once they are in shared memory."""
        if not self.holds_weights:
            return weights
        staging[worker] = weights.astype(staging.dtype)
        plgpu.commit_smem()
        return None

    def take(self, staging: Any, worker: Any, weights: jax.Array | None) -> jax.Array:
        """What `put` was given, in float32."""
        if weights is not None:
            return weights
        return plgpu.load(staging.at[worker], layout=plgpu.Layout.WGMMA).astype(jnp.float32)


def product(
    chunks: int,
    left: Callable[[int], Any],
    right: Callable[[int], Any],
    when_queued: Callable[[], None] = lambda: None,
) -> jax.Array:
    """Float32 sum over chunks of `left(chunk) @ right(chunk)`, references to shared memory.

    `when_queued()` runs when all multiplications are on their way, none of them done.
    """

    def multiply(accumulator: Any) -> jax.Array:
        for chunk in range(chunks):
            plgpu.wgmma(accumulator, left(chunk), right(chunk))
        when_queued()
        return accumulator[...]

    shape = left(0).shape[0], right(0).shape[1]
    return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))


def product_from(
    start: jax.Array,
    chunks: int,
    left: Callable[[int], Any],
    right: Callable[[int], Any],
    *,
    interpreted: bool,
) -> jax.Array:
    """`start` plus `product`: the sum begins there, so that no register holds `start` beside it. The interpreter adds it."""
    if interpreted:
        return start + product(chunks, left, right)

    def accumulate(accumulator: Any) -> None:
        for chunk in range(chunks):
            plgpu.wgmma(accumulator, left(chunk), right(chunk))

    accumulator: Any = plgpu.WGMMAAccumulatorRef.init(start)
    return pl.run_state(accumulate)(accumulator)


def add_products(
    sums: Sequence[Any], left: jax.Array, right: Callable[[int], Any], staging: Any
) -> tuple[Any, ...]:
    """`sum + left @ right(chunk)` for every chunk's sum: sums and `left` in registers, `right` in shared memory.

    The interpreter wants `left` in shared memory, and a fresh accumulator: `staging` is its room there, None on a GPU.
    """
    if staging is None:

        def accumulate(accumulators: tuple[Any, ...]) -> None:
            for chunk, accumulator in enumerate(accumulators):
                # Sliced in here: `run_state` takes no constants from outside.
                plgpu.wgmma(accumulator, left, right(chunk))

        return pl.run_state(accumulate)(tuple(map(plgpu.WGMMAAccumulatorRef.init, sums)))
    staging[...] = left
    plgpu.commit_smem()
    of_chunk = lambda chunk: product(1, lambda _: staging, lambda _: right(chunk))
    return tuple(added + of_chunk(chunk) for chunk, added in enumerate(sums))
