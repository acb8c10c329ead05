"""What it costs to cut a layout over devices, in bytes: of the halo exchange, beside ring attention and Ulysses' all-to-all.

All numbers are exact: which rows are exchanged is `gna_jax.halo`'s. How long it takes is predicted in `shard_times`.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from gna_jax.halo import (
    AxisHalo,
    axis_halo,
    exchange_order,
    exchanged_tokens,
    halos,
    interior_share,
)
from gna_jax.neighborhood import AxisNeighborhood, Neighborhood, by
from gna_jax.simulator.estimate import Setting

TENSORS = 2
"""Keys and values: each is moved by permutes of its own."""


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes that devices receive for one attention layer.

    Attributes:
      forward, backward: of the device that receives most.
      forward_total, backward_total: of all devices together.
    """

    forward: int
    backward: int
    forward_total: int
    backward_total: int


@dataclasses.dataclass(frozen=True)
class Cut:
    """A layout in equal shards. Made by `cut`, which checks.

    Attributes:
      neighborhood: window rule of every axis.
      layout: tokens per axis.
      shards: number of shards per axis; 1 where an axis is not cut.
    """

    neighborhood: Neighborhood
    layout: tuple[int, ...]
    shards: tuple[int, ...]

    @functools.cached_property
    def axes(self) -> tuple[AxisHalo, ...]:
        """The halo of every axis."""
        rules = zip(self.neighborhood.axes, self.layout, self.shards, strict=True)
        return tuple(_axis_halo(*rule) for rule in rules)

    @property
    def devices(self) -> int:
        """Shards of the whole layout."""
        return math.prod(self.shards)

    @property
    def tokens(self) -> int:
        """Tokens of a shard."""
        return math.prod(axis.rows for axis in self.axes)

    @property
    def slab_tokens(self) -> int:
        """Keys that a device holds while it attends: its own and its halo."""
        return math.prod(axis.slab for axis in self.axes)

    @property
    def interior_share(self) -> float:
        """Share of a shard's queries that see keys of their own shard alone, whichever shard it is."""
        return interior_share(self.axes)

    def exchanges(self) -> list[tuple[AxisHalo, int]]:
        """The axes in the order of their exchanges, each with the tokens that one of its rows holds by then on a device."""
        held = [axis.rows for axis in self.axes]
        steps = []
        for number in exchange_order(self.axes):
            others = math.prod(rows for other, rows in enumerate(held) if other != number)
            steps.append((self.axes[number], others))
            held[number] = self.axes[number].slab
        return steps


@functools.lru_cache(maxsize=1 << 10)
def _axis_halo(rule: AxisNeighborhood, length: int, shards: int) -> AxisHalo:
    """One per axis of all cuts, because an axis keeps what it has computed."""
    return axis_halo(rule, length, shards)


def cut(neighborhood: Neighborhood, layout: Sequence[int], shards: Sequence[int]) -> Cut:
    """A layout in so many equal shards per axis.

    Raises:
      ValueError: for a layout too small for its windows, shards that are not equal, or not one number per axis.
    """
    if len(shards) != len(layout):
        raise ValueError(
            f"shards must be one number per axis of the layout; got shards {by(shards)}, layout {by(layout)};"
            " write 1 for an axis that is not cut"
        )
    if min(shards) < 1:
        raise ValueError(f"shards must be at least 1 on every axis; got shards {by(shards)}")
    made = Cut(neighborhood, tuple(layout), tuple(shards))
    halos(neighborhood, made.layout, made.shards)  # checks
    return made


def shards_of(
    layout: Sequence[int], devices: int, axes: Sequence[int] | None = None
) -> tuple[tuple[int, ...], ...]:
    """Every way to cut a layout into equal shards for so many devices, along some of its axes (None: all).

    >>> shards_of((30, 48, 80), 8, axes=(0, 1))
    ((1, 8, 1), (2, 4, 1))
    """
    allowed = range(len(layout)) if axes is None else axes
    choices = [
        [n for n in range(1, devices + 1) if devices % n == 0 and length % n == 0]
        if number in allowed
        else [1]
        for number, length in enumerate(layout)
    ]
    ways = itertools.product(*choices)
    return tuple(shards for shards in ways if math.prod(shards) == devices)


def token_bytes(setting: Setting) -> tuple[int, int]:
    """Bytes of one token's query, and of its key and value together; batch and heads are a device's."""
    size = jnp.dtype(setting.dtype).itemsize * setting.batch * setting.head_dim
    return setting.heads * size, TENSORS * setting.kv_heads * size


def halo_traffic(made: Cut, setting: Setting) -> Traffic:
    """Of the halo exchange: keys and values forward; backward their gradients, back to where they came from."""
    _, pair = token_bytes(setting)
    received = sent = 0
    for axis, others in made.exchanges():
        rows_in, rows_out = np.zeros((2, axis.shards), np.int64)
        for piece in axis.pieces:
            for sender, receiver in piece.pairs:
                rows_in[receiver] += piece.rows[1] - piece.rows[0]
                rows_out[sender] += piece.rows[1] - piece.rows[0]
        received += others * int(rows_in.max())
        sent += others * int(rows_out.max())
    total = exchanged_tokens(made.axes) * pair
    return Traffic(received * pair, sent * pair, total, total)


def ring_traffic(made: Cut, setting: Setting) -> Traffic:
    """Of ring attention: keys and values of all other shards pass every device; backward they do again, and with them goes
    their gradient, of the same dtype, one step further, home."""
    _, pair = token_bytes(setting)
    steps = made.devices - 1
    forward = steps * made.tokens * pair
    backward = (steps + (steps + 1 if steps else 0)) * made.tokens * pair
    return Traffic(forward, backward, made.devices * forward, made.devices * backward)


def ulysses_traffic(made: Cut, setting: Setting) -> Traffic | None:
    """Of Ulysses: Q, K, V and the output go from tokens to heads and back; backward their gradients do. None where heads do
    not divide by the devices."""
    if setting.heads % made.devices or setting.kv_heads % made.devices:
        return None
    query, pair = token_bytes(setting)
    # Of every tensor a device keeps its own share of heads of its own tokens.
    held = made.tokens * (2 * query + pair)
    received = held * (made.devices - 1) // made.devices
    total = made.devices * received
    return Traffic(received, received, total, total)
