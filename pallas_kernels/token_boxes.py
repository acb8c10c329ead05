"""Boxes of tokens between memory and shared memory, straight from the user's layout: no permutation pass.

An array `[B, *space, heads, head_dim]` is seen as `[B, Z/dz, dz, Y/dy, dy, X/dx, dx * heads * head_dim]` (a free reshape): the
tokens of one dilation group are then neighbours, its residues are integer indices, and the innermost residue, the head and
the chunk of columns are one column offset. A box of tokens of one head is one tensor copy (TMA) per chunk of at most 64
columns. It may start at any token and run over the upper end of an axis: what lies outside reads as zero, and is not stored.

On the device the copy's destination and the matrix unit's operand are two views of one buffer. The interpreter does not
model two views of a buffer: there the operand's view alone exists, and a box is copied row by row into it (`_copies`, the only
difference between the two forms; both take origin and extents from `TokenArray.index`).

Which boxes to read is the business of `pallas_kernels.plan`.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

WIDEST_CHUNK = 64
"""Columns of a chunk in 16 bits: 128 bytes, the widest swizzle of shared memory."""
SWIZZLE_ROWS = 8
"""Rows of a swizzle pattern: the matrix unit reads operands in groups of 8 rows of a chunk."""


NOWHERE = 1 << 30
"""A place past the end of every axis."""


class BoxPlace(NamedTuple):
    """Where a box lies: batch entry, head, and per axis the residue of its dilation group and its first token there.

    Traced int32; a residue is the Python int 0 on an axis without dilation. Starts are traced even where they are known: a
    box may reach over its axis or be longer than it, which pallas checks, and refuses, where it knows the start.
    """

    batch: Any
    head: Any
    residues: tuple[Any, ...]
    start: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class TokenArray:
    """How the kernels see one of query, key, value and out: its heads, columns per head, and the axes' dilations."""

    dilation: tuple[int, ...]
    heads: int
    head_dim: int

    @property
    def chunk(self) -> int:
        """Columns of one copy."""
        return min(WIDEST_CHUNK, self.head_dim)

    @property
    def num_chunks(self) -> int:
        """Copies per box."""
        return self.head_dim // self.chunk

    def shape(self, batch: int, layout: Sequence[int]) -> tuple[int, ...]:
        """The array as the kernel sees it; an axis that its dilation does not divide is rounded up."""
        shape = [batch]
        for length, d in zip(layout, self.dilation, strict=True):
            shape += [-(-length // d), d] if d > 1 else [length]
        columns = self.heads * self.head_dim
        return (*shape[:-1], shape[-1] * columns) if self.dilation[-1] > 1 else (*shape, columns)

    def index(
        self, place: BoxPlace, start: Sequence[Any], extents: Sequence[int | None], chunk: int
    ) -> tuple[Any, ...]:
        """Index of `extents` tokens from `start` on, one chunk of columns; None: that one token, without its axis."""
        index = [place.batch]
        for first, extent, d, residue in zip(
            start, extents, self.dilation, place.residues, strict=True
        ):
            index.append(first if extent is None else pl.ds(first, extent))
            index += [residue] if d > 1 else []
        group = index.pop() if self.dilation[-1] > 1 else 0
        column = (group * self.heads + place.head) * self.head_dim + chunk * self.chunk
        return (*index, pl.ds(column, self.chunk))

    def split(self, array: jax.Array) -> jax.Array:
        """`[B, *space, heads, head_dim]` as the kernel sees it. Free, but for axes that their dilation does not divide."""
        batch, *layout = array.shape[:-2]
        excess = [-length % d for length, d in zip(layout, self.dilation, strict=True)]
        if any(excess):
            with jax.named_scope("pad_to_dilation"):
                array = jnp.pad(array, [(0, 0), *((0, n) for n in excess), (0, 0), (0, 0)])
        return array.reshape(self.shape(batch, layout))

    def merge(self, array: jax.Array, layout: Sequence[int]) -> jax.Array:
        """The inverse of `split`."""
        whole = [-(-length // d) * d for length, d in zip(layout, self.dilation, strict=True)]
        array = array.reshape(array.shape[0], *whole, self.heads, self.head_dim)
        return array[(slice(None), *(slice(length) for length in layout))]


def row_start(start: Sequence[Any], offsets: Sequence[int]) -> list[Any]:
    """Where a box's row of tokens starts, for the interpreter: it takes a place below 0 for one counted from the end."""
    outer = [first + offset for first, offset in zip(start[:-1], offsets, strict=True)]
    return [*(jnp.where(place < 0, NOWHERE, place) for place in outer), start[-1]]


def operand_transforms(columns: int, dtype: Any) -> tuple[Any, Any]:
    """How rows of at most `WIDEST_CHUNK` columns lie in shared memory for the matrix unit, and without bank conflicts."""
    # jax leaves `transform_array` of these out, which only copies of arrays need.
    width = columns * jnp.dtype(dtype).itemsize
    tiling = plgpu.TilingTransform((SWIZZLE_ROWS, columns))  # pyright: ignore[reportAbstractUsage]
    swizzle = plgpu.SwizzleTransform(width)  # pyright: ignore[reportAbstractUsage]
    return tiling, swizzle


@dataclasses.dataclass(frozen=True)
class BoxBuffer:
    """Shared memory for `slots` boxes of one `TokenArray`, as operands `[slots, chunks, tokens, chunk]`.

    Args:
      array: what the boxes are of.
      box: tokens per axis of a box.
      slots: boxes held at a time.
      interpreted: whether the interpreter runs the kernel, which has the operand's view only.
    """

    array: TokenArray
    box: tuple[int, ...]
    slots: int
    interpreted: bool

    @property
    def num_tokens(self) -> int:
        """Tokens of a box, the rows of an operand."""
        return math.prod(self.box)

    @property
    def num_copies(self) -> int:
        """Copies that fill one slot: arrivals at its barrier."""
        runs = math.prod(self.box[:-1]) if self.interpreted else 1
        return runs * self.array.num_chunks

    def scratch(self, dtype: Any) -> Any:
        """What `scratch_types` asks for."""
        columns, chunks = self.array.chunk, self.array.num_chunks
        rows = (self.slots, chunks, self.num_tokens, columns)
        if self.interpreted:
            return plgpu.SMEM(rows, dtype)
        tiling, swizzle = operand_transforms(columns, dtype)
        boxes = (self.slots, chunks, *self.box, columns)
        return plgpu.RefUnion(
            plgpu.SMEM(rows, dtype, transforms=(tiling, swizzle)),
            plgpu.SMEM(boxes, dtype, transforms=(swizzle,)),
        )

    def operand(self, scratch: Any) -> Any:
        """The view `[slots, chunks, tokens, chunk]` of the scratch, rows in row-major order of the box."""
        return scratch if self.interpreted else scratch[0]

    def load(self, memory: Any, scratch: Any, slot: Any, place: BoxPlace, barrier: Any) -> None:
        """Starts filling a slot; `barrier` gets `num_copies` arrivals."""
        for outside, inside in self._copies(memory, scratch, slot, place):
            plgpu.copy_gmem_to_smem(outside, inside, barrier)

    def store(self, scratch: Any, slot: Any, memory: Any, place: BoxPlace) -> None:
        """Starts writing a slot out; tokens outside the array are dropped. The caller commits before and waits after."""
        for outside, inside in self._copies(memory, scratch, slot, place):
            plgpu.copy_smem_to_gmem(inside, outside)

    def _copies(
        self, memory: Any, scratch: Any, slot: Any, place: BoxPlace
    ) -> Iterator[tuple[Any, Any]]:
        """Pairs of a part of memory and the part of the slot that belongs to it."""
        for chunk in range(self.array.num_chunks):
            if not self.interpreted:
                index = self.array.index(place, place.start, self.box, chunk)
                yield memory.at[index], scratch[1].at[slot, chunk]
                continue
            *outer, run = self.box
            for number, offsets in enumerate(itertools.product(*map(range, outer))):
                start = row_start(place.start, offsets)
                index = self.array.index(place, start, (*(None for _ in outer), run), chunk)
                yield memory.at[index], scratch.at[slot, chunk, pl.ds(number * run, run)]
