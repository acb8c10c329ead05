"""The geometry of neighborhood attention: which keys a query sees, and which queries see a key.

Everything in this package that needs a window rule calls this module; no other file may restate one. It knows
nothing of tensors, heads, tiles or devices (tiles: `gna_jax.tiling`; arrays and their checks: `gna_jax.problem`).

One axis at a time. A token at position `i` of an axis belongs to the dilation group `i % dilation` and is number
`j = i // dilation` of it. All rules below live in that group: `length` is the group's length and `window` counts
keys of the group. On several axes the neighborhood is the product of the axes' intervals, and two tokens meet only
if their residues agree on every axis.

Positions may be Python ints, numpy arrays or traced jax arrays. Formulas: arXiv 2504.16922; identical to NATTEN's
masks, plus `window_size=-1` (every key of the group) and `window_size=1` (only oneself).
"""

import dataclasses
import numbers
import operator
from collections.abc import Iterable, Sequence
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

Sizes = SupportsIndex | Sequence[SupportsIndex]
"""One int (numpy ints too) for all axes, or one per axis."""
Flags = bool | SupportsIndex | Sequence[bool | SupportsIndex]
"""One bool, 0 or 1 for all axes, or one per axis."""
WHOLE_GROUP = -1
"""`window_size` of an axis on which a query sees every key of its dilation group."""


def by(sizes: Iterable[Any]) -> str:
    """Sizes for people: `(30, 48, 80)` as `30x48x80`."""
    return "x".join(str(int(size)) for size in sizes)


def minimum(a: Any, b: Any) -> Any:
    """The smaller of two positions, ints, numpy or traced."""
    if isinstance(a, jax.Array) or isinstance(b, jax.Array):
        return jnp.minimum(a, b)
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        return np.minimum(a, b)
    return min(a, b)


def maximum(a: Any, b: Any) -> Any:
    """The larger of two positions, ints, numpy or traced."""
    if isinstance(a, jax.Array) or isinstance(b, jax.Array):
        return jnp.maximum(a, b)
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        return np.maximum(a, b)
    return max(a, b)


def where(condition: Any, a: Any, b: Any) -> Any:
    """`a` where the condition holds, else `b`: positions, ints, numpy or traced."""
    if isinstance(condition, jax.Array):
        return jnp.where(condition, a, b)
    if isinstance(condition, np.ndarray):
        return np.where(condition, a, b)
    return a if condition else b


def group_length(length: int, dilation: int, residue: Any) -> Any:
    """Tokens of an axis of `length` whose position leaves `residue` when divided by `dilation`."""
    return (length - residue + dilation - 1) // dilation


def equal_groups(length: int, dilation: int) -> tuple[tuple[range, int], ...]:
    """The residues of an axis of `length` tokens by their groups' length, `(residues, tokens)`, longest first.

    Lengths differ by at most one token, so there are at most two kinds. Groups without a token are left out.
    """
    longer, tokens = length % dilation, length // dilation
    kinds = (range(longer), tokens + 1), (range(longer, dilation), tokens)
    return tuple((residues, tokens) for residues, tokens in kinds if residues and tokens)


def leader(query: Any, *, length: Any, stride: int, is_causal: bool) -> Any:
    """The query whose window all queries of the stride group `[g*stride, (g+1)*stride)` share.

    Its middle, `g*stride + stride//2`, or, causal, its last query; at most the last token of the dilation group.
    """
    group_start = (query // stride) * stride
    return minimum(group_start + (stride - 1 if is_causal else stride // 2), length - 1)


def key_interval(
    query: Any, *, length: Any, window: int, stride: int, is_causal: bool
) -> tuple[Any, Any]:
    """Keys `[first, end)` that a query sees on one axis, in positions of its dilation group.

    The queries of one stride group `[g*stride, (g+1)*stride)` share the window of their leader.

    - non-causal: `first = clamp(leader - window//2, 0, length - window)`: at an edge the window slides inside, it never
      shrinks.
    - causal: `first = max(leader - window + 1, 0)`, `end = query + 1`.

    Args:
      query: position in the group: int, numpy array or traced array.
      length: length of the group (may be traced).
      window: keys per window, at most `length`, or `WHOLE_GROUP`.
      stride: queries per stride group.
      is_causal: whether keys after the query are hidden.
    """
    window = length if window == WHOLE_GROUP else window
    centre = leader(query, length=length, stride=stride, is_causal=is_causal)
    if is_causal:
        return maximum(centre - window + 1, 0 * centre), query + 1
    first = minimum(maximum(centre - window // 2, 0 * centre), length - window)
    return first, first + window


def query_interval(
    key: Any, *, length: Any, window: int, stride: int, is_causal: bool
) -> tuple[Any, Any]:
    """Queries `[first, end)` that see a key on one axis: the inverse of `key_interval`, an interval as well.

    It is one because both ends of `key_interval` never decrease with the query. Arguments as `key_interval`.
    """
    window = length if window == WHOLE_GROUP else window
    if is_causal:
        end = ((key + window) // stride) * stride
        return key, where(key + window >= length, length + 0 * end, end)
    left, right = window // 2, window - 1 - window // 2
    offset = stride - stride // 2 - 1
    first = where(key < window, 0 * key, ((key - right + offset) // stride) * stride)
    end = ((key + left + offset + 1) // stride) * stride
    return first, where(key >= length - window, length + 0 * key, end)


@dataclasses.dataclass(frozen=True)
class AxisNeighborhood:
    """The rule of one axis. `window == WHOLE_GROUP` sees the whole dilation group."""

    window: int
    stride: int
    dilation: int
    is_causal: bool

    def keys(self, query: Any, length: Any) -> tuple[Any, Any]:
        """`key_interval` of a query in a dilation group of `length` tokens."""
        return key_interval(
            query,
            length=length,
            window=self.window,
            stride=self.stride,
            is_causal=self.is_causal,
        )

    def queries(self, key: Any, length: Any) -> tuple[Any, Any]:
        """`query_interval` of a key in a dilation group of `length` tokens."""
        return query_interval(
            key, length=length, window=self.window, stride=self.stride, is_causal=self.is_causal
        )

    def leader(self, query: Any, length: Any) -> Any:
        """`leader` of a query's stride group in a dilation group of `length` tokens."""
        return leader(query, length=length, stride=self.stride, is_causal=self.is_causal)

    def window_extent(self, length: int) -> int:
        """Keys of the largest window on an axis of `length` tokens (undilated count)."""
        return -(-length // self.dilation) if self.window == WHOLE_GROUP else self.window

    def longest_outer(self, queries: int, length: int) -> int:
        """Keys of the longest outer interval of `queries` consecutive queries of a dilation group of `length` tokens.

        An upper bound that some run of queries reaches unless the group's ends cut it short.
        """
        if self.window == WHOLE_GROUP:
            return length
        if self.is_causal:
            # From the leader's window of the first query to the last query itself.
            return min(length, self.window + queries - 1)
        stride_groups = -(-(queries + self.stride - 1) // self.stride)
        return min(length, self.window + (stride_groups - 1) * self.stride)

    def sees(self, query: Any, key: Any, length: int) -> Any:
        """Whether a query sees a key, both positions on an axis of `length` tokens, arrays that broadcast.

        False for a query outside the axis: a slab may reach over the volume's end.
        """
        residue = query % self.dilation
        first, end = self.keys(query // self.dilation, group_length(length, self.dilation, residue))
        place = key // self.dilation
        same_group = residue == key % self.dilation
        return same_group & (first <= place) & (place < end) & (query >= 0) & (query < length)

    def mask(self, length: int) -> np.ndarray:
        """`[length, length]` bool, `[i, j]`: does query `i` see key `j` on this axis? Dense: small axes only."""
        position = np.arange(length)
        return self.sees(position[:, None], position[None, :], length)


@dataclasses.dataclass(frozen=True)
class Neighborhood:
    """Window, stride, dilation and causality of every axis: hashable, static under jit.

    Build it with `Neighborhood.of`, which broadcasts ints over the axes and checks them.
    """

    window_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    is_causal: tuple[bool, ...]

    @classmethod
    def of(
        cls,
        rank: int,
        *,
        window_size: Sizes,
        stride: Sizes = 1,
        dilation: Sizes = 1,
        is_causal: Flags = False,
    ) -> "Neighborhood":
        """The neighborhood of a `rank`-dimensional layout from ints, tuples, lists or numpy ints.

        Raises:
          TypeError: for a traced or non-integer value.
          ValueError: for a wrong number of axes, a window below 1 (other than -1), a stride or dilation below 1,
            or a stride above the window.
        """
        neighborhood = cls(
            window_size=per_axis("window_size", window_size, rank),
            stride=per_axis("stride", stride, rank),
            dilation=per_axis("dilation", dilation, rank),
            is_causal=per_axis("is_causal", is_causal, rank, boolean=True),
        )
        neighborhood._check()
        return neighborhood

    @property
    def rank(self) -> int:
        """Number of spatial axes."""
        return len(self.window_size)

    @property
    def axes(self) -> tuple[AxisNeighborhood, ...]:
        """One `AxisNeighborhood` per spatial axis."""
        return tuple(
            AxisNeighborhood(*rule)
            for rule in zip(
                self.window_size, self.stride, self.dilation, self.is_causal, strict=True
            )
        )

    def check_layout(self, layout: Sequence[int]) -> None:
        """Raise ValueError unless every window fits its axis: `window * dilation <= length`, and `stride <= window`."""
        got = (
            f"got window_size={self.window_size}, dilation={self.dilation}, layout {tuple(layout)}"
        )
        for axis, length in zip(self.axes, layout, strict=True):
            if axis.window == WHOLE_GROUP:
                if axis.dilation > length or axis.stride > length // axis.dilation:
                    raise ValueError(
                        f"a dilation group of the layout must hold at least `stride` tokens (stride={self.stride});"
                        f" {got}; use a smaller stride or dilation"
                    )
            elif axis.window > length:
                raise ValueError(
                    f"window_size must not exceed the layout on any axis; {got};"
                    " use a smaller window, or -1 for every key of the axis"
                )
            elif axis.window * axis.dilation > length:
                raise ValueError(
                    f"window_size * dilation must not exceed the layout on any axis; {got};"
                    " use a smaller window or dilation, or pad the layout to window_size * dilation"
                )

    def mask(self, layout: Sequence[int]) -> np.ndarray:
        """`[*layout, *layout]` bool: does the first token see the second? Tokens squared: for references and pictures."""
        self.check_layout(layout)
        rank = self.rank
        mask = np.ones((1,) * (2 * rank), dtype=bool)
        for number, (axis, length) in enumerate(zip(self.axes, layout, strict=True)):
            shape = [1] * (2 * rank)
            shape[number] = shape[rank + number] = length
            mask = mask & axis.mask(length).reshape(shape)
        return mask

    def _check(self) -> None:
        if any(w < 1 and w != WHOLE_GROUP for w in self.window_size):
            raise ValueError(
                f"window_size must be at least 1, or -1 for the whole axis; got window_size={self.window_size}"
            )
        if any(s < 1 for s in self.stride):
            raise ValueError(f"stride must be at least 1; got stride={self.stride}")
        if any(d < 1 for d in self.dilation):
            raise ValueError(f"dilation must be at least 1; got dilation={self.dilation}")
        if any(s > w != WHOLE_GROUP for s, w in zip(self.stride, self.window_size, strict=True)):
            raise ValueError(
                "stride must not exceed window_size on any axis, or some keys would be seen by no query;"
                f" got stride={self.stride}, window_size={self.window_size};"
                " stride = window_size is blocked attention"
            )


def per_axis(name: str, value: Any, rank: int, *, boolean: bool = False) -> tuple[Any, ...]:
    """`value` once per axis, as plain Python ints or bools."""
    one = static_bool if boolean else _static_int
    if isinstance(value, Tracer):
        raise TypeError(_traced(name))
    if isinstance(value, np.ndarray | jax.Array):
        value = value.tolist() if value.ndim else value[()]
    if isinstance(value, str) or not isinstance(value, Sequence):
        return (one(name, value),) * rank
    if len(value) != rank:
        raise ValueError(
            f"{name} must be one value or one per spatial axis; got {name}={tuple(value)} for {rank} spatial axes"
            " (arrays are [batch, *space, heads, head_dim])"
        )
    return tuple(one(name, item) for item in value)


def _static_int(name: str, value: Any) -> int:
    if isinstance(value, Tracer):
        raise TypeError(_traced(name))
    if isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be an integer or a tuple of integers; got {value!r}")
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(
            f"{name} must be an integer or a tuple of integers; got {value!r}"
        ) from None


def static_bool(name: str, value: Any) -> bool:
    """`value` as a bool; TypeError for a traced or other value."""
    if isinstance(value, Tracer):
        raise TypeError(_traced(name))
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, numbers.Integral) and value in (0, 1):
        return bool(value)
    raise TypeError(f"{name} must be a bool or a tuple of bools; got {value!r}")


def _traced(name: str) -> str:
    return (
        f"{name} must be static: it shapes the compiled program; got a traced value. Close over it, or name it in"
        f" jax.jit(..., static_argnames=({name!r},)) and pass a Python int or tuple"
    )
