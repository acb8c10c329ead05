"""What `gna-jax simulate --shards` and `--plan` print: which cuts, and their bytes and predicted times as tables."""

import dataclasses
import itertools
import math
from typing import Any

from rich.console import Console
from rich.table import Table

from gna_jax.cli.arguments import per_axis
from gna_jax.neighborhood import Neighborhood, by
from gna_jax.simulator.cost import duration
from gna_jax.simulator.estimate import Setting
from gna_jax.simulator.shard_times import LinkTimes, ShardEstimate, estimate_shards
from gna_jax.simulator.shards import Traffic, shards_of
from gna_jax.tiling import Tiles

MOST_DEVICES = 512
"""Devices of the largest plan."""


@dataclasses.dataclass(frozen=True)
class Volume:
    """What is cut: a rule on a layout, the kernel's tiles, and what surrounds it."""

    neighborhood: Neighborhood
    layout: tuple[int, ...]
    tiles: Tiles
    setting: Setting

    def estimate(self, shards: tuple[int, ...]) -> ShardEstimate:
        """Of one cut."""
        return estimate_shards(self.neighborhood, self.layout, shards, self.tiles, self.setting)


@dataclasses.dataclass(frozen=True)
class ShardReport:
    """What is printed: a heading, and cuts, each with its bytes and times."""

    heading: tuple[str, ...]
    volume: Volume
    cuts: tuple[ShardEstimate, ...]

    def as_dict(self) -> dict[str, Any]:
        """For machines."""
        return {
            "heading": list(self.heading),
            "cuts": [
                dataclasses.asdict(cut)
                | {"links": [dataclasses.asdict(t) | {"seconds": t.seconds} for t in cut.links]}
                for cut in self.cuts
            ],
        }

    def show(self, console: Console, top: int) -> None:
        """For people."""
        for line in self.heading:
            console.print(line, highlight=False, soft_wrap=True)
        if len(self.cuts) == 1:
            notes = self._show_one(console, self.cuts[0])
        else:
            notes = self._show_many(console, self.cuts[:top])
        if len(self.cuts) > top:
            console.print(f"  and {len(self.cuts) - top} more: --top {len(self.cuts)}", style="dim")
        console.print()
        for line in notes:
            console.print(line, highlight=False)

    def _show_one(self, console: Console, cut: ShardEstimate) -> list[str]:
        console.print(
            f"{cut.devices} devices, cut {by(cut.shards)}: each has {by(cut.rows)} tokens, and with its halo {by(cut.slab)} keys:"
            f" {size(cut.key_bytes)} and {size(cut.slab_bytes)} of keys and values",
            highlight=False,
        )
        inside = f"{cut.interior_share:.0%} of its queries are interior"
        if cut.interior_share:
            inside += f": {duration(cut.interior)}, and {duration(cut.border)} for the border"
        console.print(
            f"attention takes it {duration(cut.whole)}, one device {duration(cut.one_device)}; {inside}",
            highlight=False,
        )
        kinds = {"halo exchange": cut.halo, "ring attention": cut.ring, "Ulysses": cut.ulysses}
        console.print()
        console.print(_bytes_table("bytes received for one layer", kinds))
        console.print()
        console.print(_links_table("predicted time of a forward layer", cut.links))
        return [*self._ulysses_notes((cut,)), *_NOTES]

    def _show_many(self, console: Console, cuts: tuple[ShardEstimate, ...]) -> list[str]:
        title = "bytes that a device receives for one forward layer, and the keys it holds"
        console.print()
        console.print(_cuts_table(title, cuts))
        console.print()
        console.print(_times_table("predicted time of a forward layer", cuts))
        notes = [
            f"faster: than one device, {duration(cuts[0].one_device)}. One cut in full: --shards {by(cuts[0].shards)}"
        ]
        return [*self._ulysses_notes(cuts), *notes, *_NOTES]

    def _ulysses_notes(self, cuts: tuple[ShardEstimate, ...]) -> list[str]:
        if all(cut.ulysses for cut in cuts):
            return []
        setting = self.volume.setting
        heads = math.gcd(setting.heads, setting.kv_heads)
        legal = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        return [f"Ulysses shares out the heads: devices must be {legal}"]


_NOTES = (
    "Attention alone: max(interior, exchange) + border, overlapped, or exchange + all queries, in turn; the less counts."
    " Bytes are exact, of the device that receives most. Times are predicted, not measured; links: gna_jax/simulator/links.py",
)


def shard_report(
    heading: tuple[str, ...],
    volume: Volume,
    shards: str | None,
    axis: str | None,
) -> ShardReport:
    """The cuts that `--shards` and `--axis` name; with `--shards` of None those of a plan.

    Raises:
      ValueError: for cuts that are not equal, or texts that are none.
    """
    rank = len(volume.layout)
    axes = tuple(range(rank)) if axis is None else per_axis("--axis", axis)
    if not all(0 <= number < rank for number in axes) or len(set(axes)) < len(axes):
        raise ValueError(
            f"--axis must name different axes from 0 to {rank - 1}; got {axis!r} for layout {by(volume.layout)}"
        )
    heading += (_one_device(volume),)
    items = _doublings(volume, axes) if shards is None else shards.split(",")
    if len(items) == 1:
        return ShardReport(heading, volume, _ranked(volume, items[0], axes))
    best = tuple(_ranked(volume, item, axes)[0] for item in items)
    return ShardReport(heading, volume, best)


def _one_device(volume: Volume) -> str:
    rule = volume.neighborhood
    dilation = f", dilation {by(rule.dilation)}" if set(rule.dilation) != {1} else ""
    causal = f", causal {by(rule.is_causal)}" if any(rule.is_causal) else ""
    return f"window {by(rule.window_size)}, stride {by(rule.stride)}{dilation}{causal}"


def _doublings(volume: Volume, axes: tuple[int, ...]) -> list[str]:
    """2, 4, 8 .. devices, as far as the layout can be cut."""
    counts = [1 << n for n in range(1, MOST_DEVICES.bit_length())]
    legal = [str(n) for n in counts if shards_of(volume.layout, n, axes)]
    if not legal:
        raise ValueError(_no_cut(volume, "2, 4, 8 ..", axes))
    return legal


def _ranked(volume: Volume, item: str, axes: tuple[int, ...]) -> tuple[ShardEstimate, ...]:
    """The cuts that one item of `--shards` names, fastest first: all with so many devices, or one with a number per axis."""
    numbers = per_axis("--shards", item)
    if len(numbers) > 1 or len(axes) == 1:
        if len(numbers) not in (len(axes), len(volume.layout)):
            raise ValueError(
                f"--shards must be a number of devices, or one number per axis; got {item!r}"
                f" for {len(axes)} axes of layout {by(volume.layout)}"
            )
        if len(numbers) == len(axes):
            of_axis = dict(zip(axes, numbers, strict=True))
            numbers = tuple(of_axis.get(n, 1) for n in range(len(volume.layout)))
        return (volume.estimate(numbers),)
    devices = math.prod(numbers)
    ways = shards_of(volume.layout, devices, axes)
    if not ways:
        raise ValueError(_no_cut(volume, item, axes))
    return tuple(sorted(map(volume.estimate, ways), key=lambda cut: cut.links[0].seconds))


def _no_cut(volume: Volume, wanted: str, axes: tuple[int, ...]) -> str:
    lengths = [volume.layout[n] for n in axes]
    divisors = ([n for n in range(1, length + 1) if length % n == 0] for length in lengths)
    products = {math.prod(numbers) for numbers in itertools.product(*divisors)}
    legal = ", ".join(str(n) for n in sorted(products) if n <= MOST_DEVICES)
    of_axes = "" if len(axes) == len(volume.layout) else f" along axis {', '.join(map(str, axes))}"
    return (
        f"shards must be equal; got {wanted} devices for layout {by(volume.layout)}{of_axes};"
        f" devices may be {legal}"
    )


# --- tables ---------------------------------------------------------------------------------------------------


def size(nbytes: int) -> str:
    """Bytes for people, in powers of 1000: three digits.

    >>> size(678_297_600), size(5_426_380_800)
    ('678 MB', '5.43 GB')
    """
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= 0.9995 * scale:
            number = nbytes / scale
            return f"{number:,.0f} {unit}" if number >= 999.5 else f"{number:.3g} {unit}"
    return f"{nbytes} B"


def faster(times: LinkTimes) -> str:
    """The speedup for people."""
    return f"{times.speedup:.{1 if times.speedup >= 1 else 2}f}x"


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)


def _bytes_table(title: str, kinds: dict[str, Traffic | None]) -> Table:
    table = _table(title)
    table.add_column("")
    for name in ("forward\na device", "\nall", "backward\na device", "\nall"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, traffic in kinds.items():
        fields = (
            ()
            if traffic is None
            else (traffic.forward, traffic.forward_total, traffic.backward, traffic.backward_total)
        )
        table.add_row(name, *(map(size, fields) if fields else "––––"))
    return table


def _links_table(title: str, links: tuple[LinkTimes, ...]) -> Table:
    table = _table(title)
    table.add_column("exchange over")
    names = "halo", "ring", "Ulysses", "overlapped", "in turn", "faster"
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for times in links:
        ulysses = "–" if times.ulysses is None else duration(times.ulysses)
        cells = duration(times.exchange), duration(times.ring), ulysses
        ways = duration(times.overlapped), duration(times.in_turn), faster(times)
        table.add_row(times.link, *cells, *ways)
    return table


def _cuts_table(title: str, cuts: tuple[ShardEstimate, ...]) -> Table:
    table = _table(title)
    names = "devices", "cut", "of a device", "halo", "ring", "Ulysses", "keys held", "interior"
    for name in names:
        is_text = name in ("cut", "of a device")
        table.add_column(name, justify="left" if is_text else "right", no_wrap=True)
    for cut in cuts:
        table.add_row(
            str(cut.devices),
            by(cut.shards),
            by(cut.rows),
            size(cut.halo.forward),
            size(cut.ring.forward),
            "–" if cut.ulysses is None else size(cut.ulysses.forward),
            size(cut.slab_bytes),
            f"{cut.interior_share:.0%}",
        )
    return table


def _times_table(title: str, cuts: tuple[ShardEstimate, ...]) -> Table:
    table = _table(title)
    links = [times.link for times in max((cut.links for cut in cuts), key=len)]
    table.add_column("\ncut", no_wrap=True)
    for name in (
        "\nattention",
        *(name for link in links for name in (f"{link}\nexchange", "\nfaster")),
    ):
        table.add_column(name, justify="right", no_wrap=True)
    for cut in cuts:
        cells = [by(cut.shards), duration(cut.whole)]
        of_link = {times.link: times for times in cut.links}
        for link in links:
            times = of_link.get(link)
            cells += ("–", "–") if times is None else (duration(times.exchange), faster(times))
        table.add_row(*cells)
    return table
