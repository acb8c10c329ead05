"""The static side of a Triton kernel: plain numbers, frozen and hashable, which the kernels' sources read as compile-time constants.

Layouts of one and two axes get leading axes of one token, so that one kernel serves every rank. What is not in a plan (batch,
addresses) is an argument of the kernel at run time. Window rules are `gna_jax.neighborhood`'s, mirrored in `geometry`.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

from gna_jax.backends.triton.dots import input_precision
from gna_jax.neighborhood import WHOLE_GROUP
from gna_jax.problem import Problem

RANK = 3
"""Axes of every plan."""


@dataclasses.dataclass(frozen=True)
class Axis:
    """One axis: its tokens, its rule, and the tiles on it.

    Args:
      length: tokens of the volume's layout.
      query_tokens, key_tokens: tokens of the arrays: `length`, but for slabs.
      is_slab: whether the arrays are parts of the volume, whose origins are known at run time.
      window, stride, dilation, is_causal: the rule; `is_whole` where every key of the group is seen (then `window` says nothing).
      is_whole: whether the window is the whole dilation group.
      extent: keys of the largest window.
      q_tile, kv_tile: tokens per tile, powers of two.
    """

    length: int
    query_tokens: int
    key_tokens: int
    is_slab: bool
    window: int
    stride: int
    dilation: int
    is_causal: bool
    is_whole: bool
    extent: int
    q_tile: int
    kv_tile: int

    @property
    def is_flat(self) -> bool:
        """Whether the axis has one token, in tiles of one: then nothing needs to be computed on it."""
        return not self.is_slab and self.length == self.q_tile == self.kv_tile == 1

    @property
    def is_even(self) -> bool:
        """Whether all dilation groups are of one length."""
        return self.length % self.dilation == 0

    @property
    def q_tiles(self) -> int:
        """Q tiles of the longest dilation group of the queries."""
        return -(-self.query_tokens // (self.dilation * self.q_tile))

    @property
    def kv_tiles(self) -> int:
        """KV tiles of the longest dilation group of the keys."""
        return -(-self.key_tokens // (self.dilation * self.kv_tile))

    @property
    def offsets(self) -> int:
        """Entries of the bias table."""
        return 2 * self.extent - 1


_FLAT = Axis(1, 1, 1, False, 1, 1, 1, False, False, 1, 1, 1)


@dataclasses.dataclass(frozen=True)
class KernelPlan:
    """One kernel's constants. `q_tile` and `kv_tile` of `axes` are those of the kernel's direction.

    Args:
      axes: three axes, the last the innermost.
      query_heads, kv_heads: heads of the arrays.
      head_dim, value_dim: columns of Q and K, and of V and out.
      num_additional: tokens of the additional keys.
      scale: of the scores.
      precision: of products of float32, in Triton's words.
      runs: parts into which a sum over all queries is split.
    """

    axes: tuple[Axis, Axis, Axis]
    query_heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    num_additional: int
    scale: float
    precision: str
    runs: int = 1

    @classmethod
    def of(
        cls, problem: Problem, q_tile: Sequence[int], kv_tile: Sequence[int], runs: int = 1
    ) -> "KernelPlan":
        """The plan of a problem with these tiles."""
        rules = zip(
            problem.neighborhood.axes,
            problem.global_layout,
            problem.query_layout,
            problem.key_layout,
            problem.window_extent,
            q_tile,
            kv_tile,
            strict=True,
        )
        axes = [
            Axis(
                length,
                queries,
                keys,
                problem.is_slab,
                rule.window,
                rule.stride,
                rule.dilation,
                rule.is_causal,
                rule.window == WHOLE_GROUP,
                extent,
                q,
                kv,
            )
            for rule, length, queries, keys, extent, q, kv in rules
        ]
        first, second, third = (*(_FLAT,) * (RANK - len(axes)), *axes)
        return cls(
            axes=(first, second, third),
            query_heads=problem.query_heads,
            kv_heads=problem.kv_heads,
            head_dim=problem.head_dim,
            value_dim=problem.value_dim,
            num_additional=problem.num_additional,
            scale=problem.scale,
            precision=input_precision(problem),
            runs=runs,
        )

    @property
    def heads_per_kv(self) -> int:
        """Query heads that share one key/value head."""
        return self.query_heads // self.kv_heads

    @property
    def scale_log2(self) -> float:
        """The scale of scores in powers of two."""
        return self.scale * self.log2_e

    @property
    def log2_e(self) -> float:
        """Natural to binary logarithms."""
        return math.log2(math.e)

    @functools.cached_property
    def head_columns(self) -> int:
        """Columns of a tile of Q or K: the power of two that holds the head dim, at least what a product takes."""
        return max(16, power_of_two(self.head_dim))

    @functools.cached_property
    def value_columns(self) -> int:
        """Columns of a tile of V or out."""
        return max(16, power_of_two(self.value_dim))

    @property
    def is_slab(self) -> bool:
        """Whether queries and keys are slabs of the volume."""
        return any(axis.is_slab for axis in self.axes)

    @property
    def leading_axes(self) -> int:
        """Axes before the first that the arrays of a slab have."""
        return sum(not axis.is_slab for axis in self.axes)

    @property
    def query_tokens(self) -> int:
        """Tokens of the queries' array."""
        return math.prod(axis.query_tokens for axis in self.axes)

    @property
    def key_tokens(self) -> int:
        """Tokens of the keys' array."""
        return math.prod(axis.key_tokens for axis in self.axes)

    @property
    def groups(self) -> int:
        """Dilation groups."""
        return math.prod(axis.dilation for axis in self.axes)

    @property
    def q_rows(self) -> int:
        """Queries of a tile."""
        return math.prod(axis.q_tile for axis in self.axes)

    @property
    def kv_rows(self) -> int:
        """Keys of a tile."""
        return math.prod(axis.kv_tile for axis in self.axes)

    @property
    def q_tiles(self) -> int:
        """Q tiles of all dilation groups of one head."""
        return self.groups * math.prod(axis.q_tiles for axis in self.axes)

    @property
    def kv_tiles(self) -> int:
        """KV tiles of all dilation groups of one head."""
        return self.groups * math.prod(axis.kv_tiles for axis in self.axes)

    @property
    def run_tiles(self) -> int:
        """Q tiles of a run."""
        return -(-self.q_tiles // self.runs)

    @property
    def run_tokens(self) -> int:
        """Tokens of a run, in the order of the layout."""
        return -(-self.query_tokens // (self.q_rows * self.runs)) * self.q_rows

    @property
    def additional_tiles(self) -> int:
        """Tiles of additional keys."""
        return -(-self.num_additional // self.kv_rows)

    @property
    def bias_block(self) -> int:
        """Bias entries that are summed at a time."""
        return min(1024, power_of_two(self.bias_entries))

    @property
    def bias_blocks(self) -> int:
        """Times that `bias_block` entries make one head's bias table."""
        return -(-self.bias_entries // self.bias_block)

    @property
    def bias_strides(self) -> tuple[int, int, int]:
        """Entries of the bias table between neighbours on each axis."""
        second, third = self.axes[1].offsets, self.axes[2].offsets
        return second * third, third, 1

    @property
    def bias_entries(self) -> int:
        """Entries of one head's bias table."""
        return math.prod(axis.offsets for axis in self.axes)

    @property
    def slot_strides(self) -> tuple[int, int, int]:
        """Window slots between neighbours on each axis: a query's keys by their number in its window."""
        second, third = self.axes[1].extent, self.axes[2].extent
        return second * third, third, 1

    @property
    def slots(self) -> int:
        """Keys of the largest window."""
        return math.prod(axis.extent for axis in self.axes)


def power_of_two(number: int) -> int:
    """The smallest power of two that is not below `number`."""
    return 1 << (number - 1).bit_length()
