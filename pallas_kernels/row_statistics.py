"""One float32 per query (lse, delta) between the user's `[B, *space, N]` and what kernels read and write.

Two forms, both a pass outside the kernels over 1/64 of the bytes of Q or less:

- **by parts** `[B, N, parts, rows]`: the queries of one worker's part lie side by side. For own Q tiles (forward, dQ); rows of an
  uneven layout cannot be clipped on their way out, parts can be cut outside.
- **by boxes** `[B * N * groups, *group layout]`: a box of queries from any start is one tensor copy. For visited Q tiles (dK, dV).
  Rows of memory are multiples of 16 bytes there, and so are the box's: its innermost side is a multiple of 4.
"""

import dataclasses
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.plan import TilePlan
from pallas_kernels.token_boxes import BoxPlace, row_start

ALIGNED_FLOATS = 4
"""Floats in 16 bytes, the unit of tensor copies."""


def delta(out: jax.Array, out_cotangent: jax.Array, lse_cotangent: jax.Array) -> jax.Array:
    """`[B, *space, N]` float32: sum of out times its cotangent, less the cotangent of lse.

    dS = P * (dO V^T - delta): the one number per query that the softmax's derivative needs.
    """
    wide = out.astype(jnp.float32) * out_cotangent.astype(jnp.float32)
    return wide.sum(axis=-1) - lse_cotangent


def to_parts(plan: TilePlan, rows: jax.Array) -> jax.Array:
    """`[B, *space, N]` -> by parts; queries past an axis's end are 0."""
    rank, layout = plan.problem.rank, rows.shape[1:-1]
    excess = [size - length for size, length in zip(_whole(plan), layout, strict=True)]
    rows = jnp.pad(rows, [(0, 0), *((0, n) for n in excess), (0, 0)])
    split = [n for size in zip(plan.parts, plan.part, plan.dilation, strict=True) for n in size]
    rows = rows.reshape(rows.shape[0], *split, rows.shape[-1])
    # Per axis (part, token, residue) -> residues, parts, tokens.
    order = [3 * axis + kind + 1 for kind in (2, 0, 1) for axis in range(rank)]
    rows = rows.transpose(0, rows.ndim - 1, *order)
    return rows.reshape(*rows.shape[:2], plan.num_parts, plan.rows)


def from_parts(plan: TilePlan, parts: jax.Array) -> jax.Array:
    """By parts -> `[B, *space, N]`: the inverse of `to_parts`."""
    rank = plan.problem.rank
    parts = parts.reshape(*parts.shape[:2], *plan.dilation, *plan.parts, *plan.part)
    order = [axis + rank * kind + 2 for axis in range(rank) for kind in (1, 2, 0)]
    rows = parts.transpose(0, *order, 1).reshape(parts.shape[0], *_whole(plan), -1)
    return rows[(slice(None), *(slice(length) for length in plan.problem.query_layout))]


def _whole(plan: TilePlan) -> list[int]:
    """Tokens per axis of all parts of all groups."""
    axes = zip(plan.dilation, plan.parts, plan.part, strict=True)
    return [math.prod(sizes) for sizes in axes]


def to_boxes(plan: TilePlan, rows: jax.Array) -> jax.Array:
    """`[B, *space, N]` -> by boxes; rows of memory and groups are padded with 0."""
    rank, dilation, layout = plan.problem.rank, plan.dilation, rows.shape[1:-1]
    groups = [-(-length // d) for length, d in zip(layout, dilation, strict=True)]
    groups[-1] = -(-groups[-1] // ALIGNED_FLOATS) * ALIGNED_FLOATS
    axes = zip(groups, dilation, layout, strict=True)
    excess = [(0, group * d - length) for group, d, length in axes]
    rows = jnp.pad(rows, [(0, 0), *excess, (0, 0)])
    split = [n for size in zip(groups, dilation, strict=True) for n in size]
    rows = rows.reshape(rows.shape[0], *split, rows.shape[-1])
    order = [2 * axis + kind + 1 for kind in (1, 0) for axis in range(rank)]
    return rows.transpose(0, rows.ndim - 1, *order).reshape(-1, *groups)


@dataclasses.dataclass(frozen=True)
class RowBoxes:
    """Shared memory for `slots` boxes of visited queries' statistics, as vectors `[slots, columns]`.

    Args:
      plan: an inverse plan: its visited tile is the box.
      slots: boxes held at a time.
      interpreted: whether the interpreter runs the kernel; see `token_boxes`.
    """

    plan: TilePlan
    slots: int
    interpreted: bool

    @property
    def num_copies(self) -> int:
        """Copies that fill one slot: arrivals at its barrier."""
        return math.prod(self.plan.visited[:-1]) if self.interpreted else 1

    def scratch(self) -> Any:
        """What `scratch_types` asks for."""
        vectors = plgpu.SMEM((self.slots, self.plan.columns), jnp.float32)
        if self.interpreted:
            return vectors
        return plgpu.RefUnion(vectors, plgpu.SMEM((self.slots, *self.plan.visited), jnp.float32))

    def vectors(self, scratch: Any) -> Any:
        """The view `[slots, columns]` of the scratch, in row-major order of the box."""
        return scratch if self.interpreted else scratch[0]

    def load(self, memory: Any, scratch: Any, slot: Any, place: BoxPlace, barrier: Any) -> None:
        """Starts filling a slot; `barrier` gets `num_copies` arrivals. Queries outside the array read as 0."""
        group = place.batch * self.plan.problem.query_heads + place.head
        for residue, d in zip(place.residues, self.plan.dilation, strict=True):
            group = group * d + residue
        box = self.plan.visited
        if not self.interpreted:
            index = (group, *(pl.ds(a, n) for a, n in zip(place.start, box, strict=True)))
            plgpu.copy_gmem_to_smem(memory.at[index], scratch[1].at[slot], barrier)
            return
        *outer, run = box
        for number, offsets in enumerate(itertools.product(*map(range, outer))):
            start = row_start(place.start, offsets)
            index = (group, *start[:-1], pl.ds(start[-1], run))
            inside = scratch.at[slot, pl.ds(number * run, run)]
            plgpu.copy_gmem_to_smem(memory.at[index], inside, barrier)
