"""What every kernel has: its arrays as boxes of tokens, where its own tile and the visited ones lie, and what its rows see.

A thread block owns one tile of one head and walks the tiles that its rows see, or that see them: Q tile and KV tiles in the forward
and dQ, KV tile and Q tiles in dK and dV (`TilePlan.is_inverse`). A kernel adds the roles of its warps and what they compute;
how arrays reach it is the business of `calls`.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import masks
from pallas_kernels.plan import TilePlan, TileWalk, quotient_and_digit, tile_walk
from pallas_kernels.slabs import Origin
from pallas_kernels.token_boxes import BoxBuffer, BoxPlace, TokenArray


@dataclasses.dataclass(frozen=True)
class TileKernel(abc.ABC):
    """The kernel of one plan.

    Args:
      plan: tiles and walk.
      interpreted: whether the interpreter runs it, which lacks what README.md lists.
      origins: of slabs, `slabs.origin_table` in memory; None for whole volumes, which have no such array.
    """

    plan: TilePlan
    interpreted: bool
    _: dataclasses.KW_ONLY
    origins: Any = None

    @property
    def num_warpgroups(self) -> int:
        """Warpgroups of a thread block: the workers, and one for all other roles."""
        return self.plan.num_workers + 1

    @abc.abstractmethod
    def scratch(self) -> list[Any]:
        """Shared memory, tensor memory and barriers, in the order in which `body` gets them."""

    @abc.abstractmethod
    def body(self, *references: Any) -> None:
        """One thread block: references are the arrays read, those written, and `scratch`."""

    @property
    def queries(self) -> TokenArray:
        """How query, out, and their cotangents lie."""
        problem = self.plan.problem
        return TokenArray(self.plan.dilation, problem.query_heads, problem.head_dim)

    @property
    def keys(self) -> TokenArray:
        """How key, value and their gradients lie."""
        problem = self.plan.problem
        return TokenArray(self.plan.dilation, problem.kv_heads, problem.head_dim)

    @property
    def own(self) -> BoxBuffer:
        """One slot per worker for its part of an own array, and at the end for the result in its place."""
        array = self.keys if self.plan.is_inverse else self.queries
        return BoxBuffer(array, self.plan.part, self.plan.num_workers, self.interpreted)

    @property
    def visited(self) -> BoxBuffer:
        """One slot per stage for tiles of K, or of Q in an inverse plan; and of V or dO where `value_stages` are as many."""
        array = self.queries if self.plan.is_inverse else self.keys
        return BoxBuffer(array, self.plan.visited, self.plan.stages, self.interpreted)

    @property
    def visited_values(self) -> BoxBuffer:
        """One slot per stage for tiles of V, or of dO in an inverse plan."""
        return dataclasses.replace(self.visited, slots=self.plan.value_stages)

    def slab_body(self, origins: Any, *references: Any) -> None:
        """`body` of a kernel of slabs, whose first reference is the table of their origins."""
        dataclasses.replace(self, origins=origins).body(*references)

    def walk(self) -> TileWalk:
        """The block's. Every role computes it anew: scalars that lived through the fork of roles would cost all of them registers."""
        axes = range(self.plan.problem.rank)
        # The interpreter reads no place below 0 of a run of tokens: there a walk may reach over the volume's end instead.
        moves_back = tuple(not self.interpreted or axis < axes[-1] for axis in axes)
        tile = lax.axis_index("tile")
        return tile_walk(self.plan, tile, self._origins(), moves_back=moves_back)

    def _origins(self) -> tuple[Origin, ...] | None:
        """The slabs' origins, read anew: scalars that are kept cost registers. None for whole volumes."""
        table = self.origins
        if table is None:
            return None
        # Without dilation there are no residues to read.
        return tuple(
            Origin(table[axis, 0], 0, table[axis, 2], 0)
            if dilation == 1
            else Origin(*(table[axis, number] for number in range(4)))
            for axis, dilation in enumerate(self.plan.dilation)
        )

    def slot(self, step: Any) -> Any:
        """Slot of `visited` of a step."""
        return lax.rem(step, jnp.int32(self.plan.stages))

    def value_slot(self, step: Any) -> Any:
        """Slot of `visited_values` of a step."""
        return lax.rem(step, jnp.int32(self.plan.value_stages))

    def steps(self, walk: TileWalk) -> tuple[Any, Any]:
        """Clean steps, and all steps: a step is a visit for one head that the block visits."""
        heads = self.plan.visited_heads
        if heads == 1:
            return walk.num_clean, walk.num_visits
        return walk.num_clean * heads, walk.num_visits * heads

    def for_each_step(self, walk: TileWalk, visit: Callable[[Any, BoxPlace], None]) -> None:
        """Calls `visit(step, place of the visited tile)` for every step, clean ones first."""
        clean, steps = self.steps(walk)

        @pl.loop(jnp.int32(0), clean)
        def _(step):
            head, number = self._head_and_visit(step, walk.num_clean)
            visit(step, self._visited_place(walk, head, walk.clean_tile(number)))

        if self.origins is not None:
            # Anew: a producer's registers do not hold all of a slab's walk through the clean loop.
            walk = self.walk()
            clean, steps = self.steps(walk)

        @pl.loop(clean, steps)
        def _(step):
            visit(step, self.shell_place(walk, step))

    def shell_place(self, walk: TileWalk, step: Any) -> BoxPlace:
        """The visited tile of a step after the clean ones."""
        clean, _ = self.steps(walk)
        visits = walk.num_visits - walk.num_clean
        head, number = self._head_and_visit(step - clean, visits)
        return self._visited_place(walk, head, walk.shell_tile(number))

    def own_place(self, walk: TileWalk, worker: Any = 0) -> BoxPlace:
        """A worker's part of the own tile."""
        plan, start = self.plan, list(walk.own_start)
        if plan.num_workers > 1:
            start[plan.split_axis] += worker * plan.part[plan.split_axis]
        head = lax.axis_index("head")
        return BoxPlace(lax.axis_index("batch"), head, walk.residues, tuple(start))

    def intervals(self, place: BoxPlace, rows: Any) -> masks.Intervals:
        """Per axis, which tokens the part's rows see, or which see them; `rows` numbers them in a layout of registers."""
        plan = self.plan
        places = masks.digits(rows, plan.part)
        tokens = [first + row for first, row in zip(place.start, places, strict=True)]
        intervals = masks.query_intervals if plan.is_inverse else masks.key_intervals
        axes = plan.group_axes(place.residues, self._origins())
        rules, lengths = zip(*((axis.rule, axis.visited_length) for axis in axes), strict=True)
        return intervals(rules, tokens, lengths)

    def hide_lone(self, intervals: masks.Intervals, gradient: Any) -> Any:
        """A part's gradient `[rows, columns]` with zeros for tokens of a slab that see, or are seen by, nothing.

        Where a slab reaches over the volume's edge its memory may hold NaN, which weights of 0 do not hide. A whole volume has no
        such token.
        """
        if self.origins is None:
            return gradient
        for first, end in intervals:
            tokens = lax.broadcast_in_dim(end - first, gradient.shape, (0,))
            gradient = jnp.where(tokens > 0, gradient, 0.0)
        return gradient

    def seen(self, intervals: masks.Intervals, start: Any, columns: Any) -> Any:
        """`[rows, columns]` bool: the mask of a visited tile whose first token is `start`; `columns` numbers tokens of it."""
        places = masks.digits(columns, self.plan.visited)
        return masks.seen(intervals, start, places, (self.plan.rows, columns.shape[0]))

    def _head_and_visit(self, step: Any, visits: Any) -> tuple[Any, Any]:
        """Which of the visited heads, and which of its visits, a step is."""
        one_head = self.plan.visited_heads == 1
        return (0, step) if one_head else quotient_and_digit(step, visits)

    def _visited_place(self, walk: TileWalk, number: Any, start: tuple[Any, ...]) -> BoxPlace:
        head, group = lax.axis_index("head"), self.plan.problem.heads_per_kv
        if self.plan.is_inverse:
            head = head * group + number
        elif group > 1:
            head = lax.div(head, jnp.int32(group))
        return BoxPlace(lax.axis_index("batch"), head, walk.visited_residues, start)
