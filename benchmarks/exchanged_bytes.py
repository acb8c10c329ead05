"""Bytes that sharded attention exchanges: predicted, and counted in the programs that XLA compiles for 8 host devices.

    python benchmarks/exchanged_bytes.py hunyuan-91 --cut 1x8x1 --cut 1x1x8 --cut 2x2x2

A minute; nothing runs and no array is made. `gna_sharded` and its gradients are compiled for shapes alone, and the collective
permutes of the HLO are counted: bytes of a permute's result, for every receiver. Any other collective is an error. The CPU's
compiler widens bfloat16, so float16 stands for it: as many bytes. Beside them what ring attention and Ulysses exchange, which is
predicted: neither is implemented here.
"""

import collections
import dataclasses
import sys
from typing import Annotated, Any

import jax
import numpy as np
import typer
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from rich.console import Console
from rich.table import Table

from gna_jax.inspection.collectives import collectives
from gna_jax.neighborhood import Neighborhood, by
from gna_jax.sharding import gna_sharded
from gna_jax.simulator import PRESETS
from gna_jax.simulator.estimate import Setting
from gna_jax.simulator.shards import (
    Cut,
    Traffic,
    cut,
    halo_traffic,
    ring_traffic,
    ulysses_traffic,
)

DEVICES = 8
DTYPE = np.dtype("float16")


@dataclasses.dataclass(frozen=True)
class Exchange:
    """What a compiled program exchanges.

    Attributes:
      received: bytes by device.
      permutes: how many collective permutes bring them.
    """

    received: dict[int, int]
    permutes: int

    @property
    def most(self) -> int:
        """Bytes of the device that receives most."""
        return max(self.received.values(), default=0)

    @property
    def total(self) -> int:
        """Bytes of all devices."""
        return sum(self.received.values())


def exchange_of(hlo: str) -> Exchange:
    """Count the collective permutes of float16 in a compiled program.

    Raises:
      RuntimeError: for any other collective.
    """
    received: dict[int, int] = collections.Counter()
    found = collectives(hlo)
    for operation in found:
        is_float16 = {dtype for dtype, _ in operation.arrays} == {"f16"}
        if operation.kind != "collective-permute" or not is_float16:
            raise RuntimeError(f"the program holds another collective: {operation}")
        for _, receiver in operation.pairs:
            received[receiver] += operation.bytes
    return Exchange(dict(received), len(found))


def compiled(made: Cut, setting: Setting) -> tuple[str, str]:
    """The programs of the forward alone, and of the forward with all gradients."""
    names = tuple(f"axis_{number}" for number in range(len(made.shards)))
    mesh = jax.make_mesh(made.shards, names, axis_types=(AxisType.Auto,) * len(names))
    spec = PartitionSpec(None, *names, None, None)
    rule = made.neighborhood

    def forward(query: Any, key: Any, value: Any) -> Any:
        return gna_sharded(
            query,
            key,
            value,
            spec=spec,
            mesh=mesh,
            window_size=rule.window_size,
            stride=rule.stride,
            dilation=rule.dilation,
            is_causal=rule.is_causal,
        )

    def backward(query: Any, key: Any, value: Any, gradient: Any) -> Any:
        return jax.vjp(forward, query, key, value)[1](gradient)

    def array(heads: int) -> jax.ShapeDtypeStruct:
        shape = setting.batch, *made.layout, heads, setting.head_dim
        return jax.ShapeDtypeStruct(shape, DTYPE, sharding=NamedSharding(mesh, spec))

    query, key = array(setting.heads), array(setting.kv_heads)
    programs = (
        jax.jit(forward).lower(query, key, key),
        jax.jit(backward).lower(query, key, key, query),
    )
    one, both = (program.compile().as_text() for program in programs)
    return one or "", both or ""


def count(made: Cut, setting: Setting) -> tuple[Exchange, Exchange]:
    """What the forward exchanges, and what the backward exchanges in addition."""
    forward, both = map(exchange_of, compiled(made, setting))
    devices = set(forward.received) | set(both.received)
    more = {d: both.received.get(d, 0) - forward.received.get(d, 0) for d in devices}
    return forward, Exchange(more, both.permutes - forward.permutes)


def row(name: str, direction: str, predicted: Traffic, counted: Exchange | None) -> list[str]:
    """Cells of one line of the table, in MB of 10^6 bytes."""
    most, total = (getattr(predicted, f"{direction}{end}") for end in ("", "_total"))
    seen = (None, None) if counted is None else (counted.most, counted.total)
    cells = (most, seen[0], total, seen[1])
    texts = ["" if nbytes is None else f"{nbytes / 1e6:,.1f}" for nbytes in cells]
    return [name, direction, *texts, "" if counted is None else str(counted.permutes)]


def main(
    preset: Annotated[str, typer.Argument(help=", ".join(PRESETS))] = "hunyuan-91",
    cuts: Annotated[
        list[str] | None,
        typer.Option("--cut", help="shards per axis for at most 8 devices, as 1x4x2; repeat"),
    ] = None,
    stride: Annotated[
        str | None, typer.Option(help="of one of the preset's rules, as 16x8x8 [default: the last]")
    ] = None,
) -> None:
    """Print predicted and counted bytes of every cut; exit with 1 where they differ."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    named = PRESETS[preset]
    rules = {by(one.neighborhood.stride): one.neighborhood for one in named.rules}
    rule: Neighborhood = rules[stride] if stride else list(rules.values())[-1]
    setting = dataclasses.replace(Setting.of(named, "b200"), dtype=DTYPE.name)
    table = Table(title="MB received per layer", title_justify="left", box=None, pad_edge=False)
    table.add_column("\ncut")
    table.add_column("")
    for name in ("a device:\npredicted", "\ncounted", "all:\npredicted", "\ncounted", "\npermutes"):
        table.add_column(name, justify="right", no_wrap=True)
    same, others = True, {}
    for text in cuts or ["1x8x1", "1x1x8", "2x4x1", "1x4x2", "1x2x4", "2x2x2"]:
        made = cut(rule, named.layout, tuple(map(int, text.split("x"))))
        halo, (forward, backward) = halo_traffic(made, setting), count(made, setting)
        same &= halo == Traffic(forward.most, backward.most, forward.total, backward.total)
        table.add_row(*row(text, "forward", halo, forward))
        table.add_row(*row("", "backward", halo, backward))
        others[f"ring attention, {made.devices} devices"] = ring_traffic(made, setting)
        others[f"Ulysses, {made.devices} devices"] = ulysses_traffic(made, setting)
    for name, traffic in others.items():
        if traffic is not None:
            table.add_row(*row(name, "forward", traffic, None))
            table.add_row(*row("", "backward", traffic, None))
    console = Console(width=max(90, Console().width))
    console.print(f"{named.title}: {by(named.layout)} tokens,", highlight=False)
    console.print(f"window {by(rule.window_size)}, stride {by(rule.stride)}", highlight=False)
    console.print(table)
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    typer.run(main)
