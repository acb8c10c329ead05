"""What the Blackwell gradients share: the roles of warps, products in tensor memory, the loops over slots.

A block owns 128 rows of one tile. One warp issues all matrix instructions, one starts all copies; the workers, a warpgroup
each, share the columns of a visited tile. Nothing here knows attention.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import masks
from pallas_kernels.plan import TilePlan

MOST_WORKERS = 2
"""A warpgroup reads all rows of tensor memory, so two of them take half of the columns each."""

LAYOUT = plgpu.Layout.TCGEN05
"""A thread holds 4 rows, and 2 of every 8 columns of them: a vector of columns costs it a quarter of its length."""
ROW, COLUMN = LAYOUT.reduce(1), LAYOUT.reduce(0)


def take_roles(
    num_workers: int,
    work: Callable[[Any], None],
    multiply: Callable[[], None],
    produce: Callable[[], None],
) -> None:
    """Runs `work(worker)` in the workers, and in the warpgroup behind them `multiply()` and `produce()`, a warp each."""
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup < num_workers)
    def _():
        work(warpgroup)

    @pl.when(warpgroup == num_workers)
    def _():
        @plgpu.warp_map
        def _(warp):
            @pl.when(warp == 0)
            def _():
                multiply()

            @pl.when(warp == 1)
            def _():
                produce()


@dataclasses.dataclass(frozen=True)
class VisitedColumns:
    """How workers share the columns of a visited tile: each takes a box of its tokens.

    Args:
      plan: the kernel's.
    """

    plan: TilePlan

    @property
    def num_workers(self) -> int:
        """As many as find columns: an operand has a multiple of a chunk's columns along the axis that is summed over."""
        chunk = min(64, self.plan.problem.head_dim)
        return max(1, min(MOST_WORKERS, self.plan.columns // chunk))

    @property
    def width(self) -> int:
        """Columns of one worker."""
        return self.plan.columns // self.num_workers

    @property
    def axis(self) -> int:
        """The visited tile's first axis that can be shared: a worker's tokens are then neighbours in row-major order."""
        return next(a for a, size in enumerate(self.plan.visited) if size % self.num_workers == 0)

    @property
    def box(self) -> tuple[int, ...]:
        """Visited tokens per axis of one worker."""
        box = list(self.plan.visited)
        box[self.axis] //= self.num_workers
        return tuple(box)

    def seen(self, intervals: masks.Intervals, start: Any, worker: Any) -> Any:
        """`[rows, width]` bool: the worker's columns of the mask of a visited tile whose first token is `start`."""
        first = list(start)
        first[self.axis] = first[self.axis] + worker * self.box[self.axis]
        places = masks.digits(iota(self.width, COLUMN), self.box)
        return masks.seen(intervals, first, places, (self.plan.rows, self.width))


@dataclasses.dataclass(frozen=True)
class ProductColumns:
    """Tensor memory for `slots` float32 products `[rows, columns]` that workers read, and replace by 16-bit operands.

    A worker's operand lies over the first half of the columns of the product that this very worker has read. The
    interpreter does not model two views of a buffer: there the operands lie apart.

    Args:
      columns: of one product, shared by workers.
      slots: products held at a time.
      interpreted: whether the interpreter runs the kernel.
    """

    columns: VisitedColumns
    slots: int
    interpreted: bool

    def scratch(self, dtype: Any) -> Any:
        """What `scratch_types` asks for."""
        plan = self.columns.plan
        products = plgpu.TMEM((plan.rows, self.slots * plan.columns), jnp.float32)
        # Two 16-bit numbers share a column.
        operands = plgpu.TMEM((plan.rows, 2 * self.slots * plan.columns), dtype, packed=True)
        return (products, operands) if self.interpreted else plgpu.RefUnion(products, operands)

    def product(self, scratch: Any, slot: Any) -> Any:
        """A whole product, where the matrix instruction writes it."""
        columns = self.columns.plan.columns
        return scratch[0].at[:, pl.ds(slot * columns, columns)]

    def product_of(self, scratch: Any, slot: Any, worker: Any) -> Any:
        """A worker's columns of a product."""
        first = slot * self.columns.plan.columns + worker * self.columns.width
        return scratch[0].at[:, pl.ds(first, self.columns.width)]

    def operand_of(self, scratch: Any, slot: Any, worker: Any) -> Any:
        """What replaces a worker's columns, as the left operand `[rows, width]` of a matrix instruction."""
        first = 2 * (slot * self.columns.plan.columns + worker * self.columns.width)
        return scratch[1].at[:, pl.ds(first, self.columns.width)]

    def replace(self, scratch: Any, slot: Any, worker: Any, values: Any, ready: Any) -> None:
        """Writes a worker's operand, once all that the worker has read so far has arrived, and says so to `ready`."""
        plgpu.wait_load_tmem()
        operand = self.operand_of(scratch, slot, worker)
        plgpu.async_store_tmem(operand, values.astype(operand.dtype))
        plgpu.commit_tmem()
        plgpu.barrier_arrive(ready)


def read(columns: Any) -> Any:
    """Float32 columns of tensor memory in registers."""
    return plgpu.async_load_tmem(columns, layout=LAYOUT)


def iota(size: int, layout: Any) -> Any:
    """`0..size` in the registers of a row or column vector."""
    return plgpu.broadcasted_iota(jnp.int32, (size,), 0, layout=layout)


def multiply_operands(
    product: Any, left: Callable[[int], Any], right: Callable[[int], Any], chunks: int
) -> None:
    """Product of two operands in shared memory: the sum over chunks of `left(chunk) @ right(chunk).T`."""
    for chunk in range(chunks):
        plgpu.tcgen05_mma(product, left(chunk), right(chunk).T, accumulate=chunk > 0)


def add_products(
    sums: Callable[[int], Any],
    left: Callable[[int], Any],
    right: Callable[[int, Any], Any],
    *,
    chunks: int,
    columns: VisitedColumns,
    is_started: Any,
) -> None:
    """Adds to every chunk of a sum the workers' operands in tensor memory times visited rows, or starts the sum with them."""
    for chunk in range(chunks):
        for worker in range(columns.num_workers):
            rows = pl.ds(worker * columns.width, columns.width)
            accumulate = is_started if worker == 0 else True
            plgpu.tcgen05_mma(sums(chunk), left(worker), right(chunk, rows), accumulate=accumulate)
