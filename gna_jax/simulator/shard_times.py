"""How long a sharded layer takes: attention of a device's queries, the exchange beside it, and what that gains. Predictions.

Attention's times are the cost model's, the exchange's are those of `links`; nothing here was measured on GPUs. A forward layer takes

    max(attention of the interior queries, exchange) + attention of the border queries

where interior queries see keys of their own shard alone; or, where that is less, the exchange and all queries after it.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence

import numpy as np

from gna_jax.device import resolve_device
from gna_jax.halo import AxisHalo, Box, border
from gna_jax.neighborhood import AxisNeighborhood, Neighborhood, group_length
from gna_jax.simulator import roofline
from gna_jax.simulator.cost import FORWARD_PRODUCTS
from gna_jax.simulator.counts import AxisCounts, WalkCounts
from gna_jax.simulator.devices import DeviceRates, device_rates
from gna_jax.simulator.estimate import Setting
from gna_jax.simulator.links import Link, links_of
from gna_jax.simulator.shards import (
    TENSORS,
    Cut,
    Traffic,
    cut,
    halo_traffic,
    ring_traffic,
    token_bytes,
    ulysses_traffic,
)
from gna_jax.tiling import Tiles, key_walk


@dataclasses.dataclass(frozen=True)
class LinkTimes:
    """A forward layer whose exchange goes over one kind of link. All are predicted.

    Attributes:
      link: its name.
      exchange, ring, ulysses: seconds of the halo exchange, and of what ring attention and Ulysses (None where heads do not
        divide) send.
      overlapped: `max(interior, exchange) + border`.
      in_turn: the exchange, then all queries in one kernel.
      speedup: over one device, with the less of the two.
    """

    link: str
    exchange: float
    ring: float
    ulysses: float | None
    overlapped: float
    in_turn: float
    speedup: float

    @property
    def seconds(self) -> float:
        """The less of the two ways."""
        return min(self.overlapped, self.in_turn)


@dataclasses.dataclass(frozen=True)
class ShardEstimate:
    """What one cut amounts to, for one attention layer.

    Attributes:
      devices, shards: how many, and per axis.
      rows, slab: of a shard, and of it with its halo, per axis.
      halo, ring, ulysses: bytes received, exact; `ulysses` is None where heads do not divide by the devices.
      key_bytes, slab_bytes: keys and values of a shard, and with its halo: what a device holds while it attends. Exact.
      interior_share: share of the queries that see keys of their own shard alone. Exact.
      one_device: predicted seconds of the same layer on one device, forward.
      interior, border, whole: predicted seconds of attention, forward: of the interior queries, of the others, of all in one kernel.
      links: predicted times, for every link that connects so many devices.
    """

    devices: int
    shards: tuple[int, ...]
    rows: tuple[int, ...]
    slab: tuple[int, ...]
    halo: Traffic
    ring: Traffic
    ulysses: Traffic | None
    key_bytes: int
    slab_bytes: int
    interior_share: float
    one_device: float
    interior: float
    border: float
    whole: float
    links: tuple[LinkTimes, ...]


def estimate_shards(
    neighborhood: Neighborhood,
    layout: Sequence[int],
    shards: Sequence[int],
    tiles: Tiles,
    setting: Setting,
) -> ShardEstimate:
    """Bytes, memory and predicted times of one cut.

    Args:
      neighborhood, layout: of the whole volume.
      shards: per axis.
      tiles: of queries and keys, here those of one device; kernels may have better ones for a slab.
      setting: device, dtype, batch and heads of one device (batch and heads may be cut besides, without any exchange).

    Raises:
      ValueError: as `cut`, and for a device that is no GPU.
    """
    links = links_of(setting.device)
    on = device_rates(resolve_device(setting.device))
    made = cut(neighborhood, layout, shards)
    one = cut(neighborhood, layout, (1,) * len(layout))
    rows, slab = (tuple(getattr(axis, name) for axis in made.axes) for name in ("rows", "slab"))

    def seconds(of: Cut, boxes: Iterable[Box], keys: Sequence[int]) -> float:
        return sum(attention_seconds(of, box, keys, tiles, setting, on) for box in boxes)

    inside = interior_box(made)
    one_device = seconds(one, [_whole(one)], layout)
    interior = seconds(made, [] if inside is None else [inside], rows)
    border = seconds(made, border_boxes(made), slab)
    whole = seconds(made, [_whole(made)], slab)
    of_links = []
    for link in links:
        if link.connects(made.devices):
            exchange = exchange_seconds(made, setting, link)
            overlapped, in_turn = max(interior, exchange) + border, exchange + whole
            times = LinkTimes(
                link.name,
                exchange,
                ring_seconds(made, setting, link),
                ulysses_seconds(made, setting, link),
                overlapped,
                in_turn,
                one_device / min(overlapped, in_turn),
            )
            of_links.append(times)
    _, pair = token_bytes(setting)
    return ShardEstimate(
        devices=made.devices,
        shards=made.shards,
        rows=rows,
        slab=slab,
        halo=halo_traffic(made, setting),
        ring=ring_traffic(made, setting),
        ulysses=ulysses_traffic(made, setting),
        key_bytes=made.tokens * pair,
        slab_bytes=made.slab_tokens * pair,
        interior_share=made.interior_share,
        one_device=one_device,
        interior=interior,
        border=border,
        whole=whole,
        links=tuple(of_links),
    )


def exchange_seconds(made: Cut, setting: Setting, link: Link) -> float:
    """Predicted time of the forward's halo exchange: its permutes one after the other, all over the link."""
    _, pair = token_bytes(setting)
    return sum(
        link.seconds(TENSORS * len(axis.pieces), others * (axis.before + axis.after) * pair)
        for axis, others in made.exchanges()
    )


def ring_seconds(made: Cut, setting: Setting, link: Link) -> float:
    """The same of ring attention's steps."""
    steps = made.devices - 1
    return link.seconds(TENSORS * steps, ring_traffic(made, setting).forward)


def ulysses_seconds(made: Cut, setting: Setting, link: Link) -> float | None:
    """The same of Ulysses' four all-to-alls; None where there are none."""
    traffic = ulysses_traffic(made, setting)
    return None if traffic is None else link.seconds(4 if made.devices > 1 else 0, traffic.forward)


def interior_box(made: Cut) -> Box | None:
    """The queries that see keys of their own shard alone; None where there are none."""
    box = tuple(axis.interior for axis in made.axes)
    return box if all(first < end for first, end in box) else None


def border_boxes(made: Cut) -> list[Box]:
    """The other queries, in disjoint boxes."""
    if interior_box(made) is None:
        return [_whole(made)]
    return [box for pair in border(made.axes) for box in pair if box is not None]


def _whole(made: Cut) -> Box:
    return tuple((0, axis.rows) for axis in made.axes)


def attention_seconds(
    made: Cut, box: Box, keys: Sequence[int], tiles: Tiles, setting: Setting, on: DeviceRates
) -> float:
    """Predicted time of a forward kernel for a box of a shard's queries, of the shard whose windows cost most.

    Args:
      made: the shards.
      box: the queries.
      keys: rows of keys that the kernel is given, per axis.
      tiles: of queries and keys, here those of one device; kernels may have better ones for a slab.
      setting: heads, batch and dtype of a device; additional keys, which every device holds.
      on: the device's rates.
    """
    kernel = _kernel(made, box, keys, tiles, setting.additional_keys, on.forward_efficiency)
    shape = setting.batch, setting.heads, setting.kv_heads, setting.head_dim, setting.dtype
    call = roofline.Call.of(*shape, "forward")
    parts, per_tile = roofline.kernel_parts(kernel, call, on, "shell")
    weight, count = roofline.merged_kinds(per_tile, kernel.kinds[:, 2] * call.batch * call.heads)
    busiest = roofline.busiest_sm(weight, count, on.spec.num_sms)
    return roofline.LAUNCH_SECONDS + max(busiest, parts["l2"], parts["hbm"])


def _kernel(
    made: Cut, box: Box, keys: Sequence[int], tiles: Tiles, additional: int, efficiency: float
) -> roofline.Kernel:
    """What `cost.predict` makes of a whole layout, of a box of a shard's queries."""
    kv_tile = tiles.kv or (1,) * len(box)
    axes = zip(made.axes, box, tiles.q, kv_tile, strict=True)
    counts = WalkCounts(
        axes=tuple(_most_visits(*axis, bool(tiles.dynamic)) for axis in axes),
        tile_elements=math.prod(tiles.q),
        visited_elements=math.prod(kv_tile),
    )
    extra = -(-additional // counts.visited_elements)
    histogram = counts.histogram().items()
    dilations = zip(keys, made.neighborhood.dilation, strict=True)
    first, *others = (-(-rows // dilation) for rows, dilation in dilations)
    span = min(first, counts.axes[0].worst * kv_tile[0])
    return roofline.Kernel(
        kinds=np.array([(n + extra, n - full, count) for (n, full), count in histogram]),
        rows=counts.tile_elements,
        columns=counts.visited_elements,
        products=FORWARD_PRODUCTS,
        efficiency=efficiency,
        queries=math.prod(end - begin for begin, end in box),
        keys=math.prod(keys) + additional,
        query_tensors=2,  # Q, O
        key_tensors=2,  # K, V
        reused=span * math.prod(others) + additional,
    )


def _most_visits(
    axis: AxisHalo, rows: tuple[int, int], q_tile: int, kv_tile: int, dynamic: bool
) -> AxisCounts:
    """Counts of some rows of the shard of an axis where they visit most tiles."""
    places = {
        (shard * axis.rows + rows[0], shard * axis.rows + rows[1]) for shard in range(axis.shards)
    }
    of_shards = (
        _row_counts(axis.rule, axis.length, *place, q_tile, kv_tile, dynamic)
        for place in sorted(places)
    )
    return max(of_shards, key=lambda counts: (counts.visits, -counts.full))


@functools.lru_cache(maxsize=1 << 15)
def _row_counts(
    rule: AxisNeighborhood,
    length: int,
    first: int,
    end: int,
    q_tile: int,
    kv_tile: int,
    dynamic: bool,
) -> AxisCounts:
    """`counts.axis_counts` of the queries `[first, end)` alone, whose tiles start at the first of each dilation group."""
    kinds: dict[tuple[int, int], int] = {}
    real_pairs = 0
    for residue in range(rule.dilation):
        tokens = group_length(length, rule.dilation, residue)
        begin, stop = (-(-(place - residue) // rule.dilation) for place in (first, end))
        start = np.arange(begin, stop, q_tile)
        if not len(start):
            continue
        real_rows = np.minimum(q_tile, stop - start)
        walk = key_walk(rule, tokens, start, q_tile=real_rows, kv_tile=kv_tile, dynamic=dynamic)
        real_pairs += int(np.sum(real_rows * (walk.num_visits * kv_tile - walk.padding)))
        for kind in zip(walk.num_visits.tolist(), walk.num_full.tolist(), strict=True):
            kinds[kind] = kinds.get(kind, 0) + 1
    return AxisCounts(
        kinds=tuple((*kind, tiles) for kind, tiles in sorted(kinds.items())), real_pairs=real_pairs
    )
