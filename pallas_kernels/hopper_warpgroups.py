"""What the Hopper kernels share: the roles of warpgroups, layouts in registers, the producer's loop, products from registers.

A block has one or two workers, a warpgroup of 64 own rows each, and behind them a producer. Nothing here knows attention.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.plan import TilePlan
from pallas_kernels.slots import wait_for_slot
from pallas_kernels.token_boxes import BoxPlace

REGISTERS = {1: (240, 56), 2: (224, 56)}
"""Registers per thread of workers and of the producer, by number of workers: 64 Ki registers per block at most."""

ROW = plgpu.Layout.WGMMA.reduce(1)
COLUMN = plgpu.Layout.WGMMA.reduce(0)


def take_roles(
    num_workers: int,
    registers: tuple[int, int],
    work: Callable[[Any], None],
    produce: Callable[[], None],
) -> None:
    """Runs `work(worker)` in the workers and `produce()` in the producer, with the registers of their role."""
    warpgroup = lax.axis_index("warpgroup")
    for_workers, for_producer = registers

    @pl.when(warpgroup < num_workers)
    def _():
        plgpu.set_max_registers(for_workers, action="increase")
        work(warpgroup)

    @pl.when(warpgroup == num_workers)
    def _():
        plgpu.set_max_registers(for_producer, action="decrease")
        produce()


def iota(size: int, layout: Any) -> Any:
    """`0..size` in the registers of a row or column vector."""
    return plgpu.broadcasted_iota(jnp.int32, (size,), 0, layout=layout)


def zeros(rows: int, columns: int) -> Any:
    """A matrix of zeros in the registers of a sum of products."""
    return plgpu.layout_cast(jnp.full((rows, columns), 0.0, jnp.float32), plgpu.Layout.WGMMA)


def fill_slots(
    first: Any, last: Any, stages: int, free: Any, load: Callable[[Any, Any], None]
) -> None:
    """Calls `load(step, slot)` for the steps `first..last`, each as soon as the workers have freed its slot."""

    @pl.loop(first, last)
    def _(step):
        wait_for_slot(free, step, stages)
        load(step, lax.rem(step, jnp.int32(stages)))


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
