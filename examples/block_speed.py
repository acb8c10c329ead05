"""One transformer block, dense against neighborhood attention: what the three `*_block_speed.py` beside this file share.

Blocks have their published size and random weights. A whole run is estimated by Amdahl's law from the blocks' times, their
share of the run and the published schedule, and printed beside what arXiv 2504.16922 measured on a B200.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import typer
from compare_with_dense import interleaved_medians
from flax import nnx
from rich.console import Console
from rich.table import Table

from gna_jax import Neighborhood, gna
from gna_jax.models.cosmos_windows import scale_rule
from gna_jax.neighborhood import by
from gna_jax.simulator import PRESETS, Simulation, end_to_end_speedup
from gna_jax.simulator.published import PAPER_TILES

HEAD_DIM = 128

MEASURED = {
    ("flux-4k", (1, 1)): (1.65, 1.37),
    ("flux-4k", (16, 1)): (1.72, 1.40),
    ("flux-4k", (16, 16)): (1.82, 1.45),
    ("cosmos-89", (1, 1, 1)): (1.76, 1.40),
    ("cosmos-89", (1, 8, 16)): (2.05, 1.50),
    ("cosmos-56", (1, 8, 16)): (None, 1.26),
    ("hunyuan-91", (1, 1, 1)): (1.73, 1.42),
    ("hunyuan-91", (16, 8, 8)): (2.23, 1.63),
}
"""Speedups of whole runs that arXiv 2504.16922 measured on a B200, without dense steps and with the preset's (tables 2 to 5)."""


@dataclasses.dataclass(frozen=True)
class Size:
    """What a block is made for.

    Attributes:
      layout: token grid.
      heads: attention heads of `HEAD_DIM`.
      text_tokens: tokens of text.
      dtype: of parameters and tokens.
      implementation: of `gna`.
    """

    layout: tuple[int, ...]
    heads: int
    text_tokens: int
    dtype: Any
    implementation: str | None


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of block: `make(size)` gives the block and its arguments, to be called with `rule=`."""

    name: str
    count: int
    make: Callable[[Size], tuple[nnx.Module, tuple[Any, ...]]]


@dataclasses.dataclass(frozen=True)
class Model:
    """A model and the rules to try.

    Attributes:
      title: for people.
      kinds: its blocks.
      rows: (preset, stride) of each rule.
      block_share: share of a dense run's time that the blocks take (table 1 of the paper).
      text_tokens: of the published model.
      is_joint: whether text takes part in self-attention.
      small_layout: token grid for machines without a GPU.
    """

    title: str
    kinds: tuple[Kind, ...]
    rows: tuple[tuple[str, tuple[int, ...]], ...]
    block_share: float
    text_tokens: int
    is_joint: bool
    small_layout: tuple[int, ...]


def rule_of(preset: str, stride: tuple[int, ...], layout: tuple[int, ...]) -> Neighborhood:
    """The preset's rule with a stride, scaled to the layout where that is not the preset's."""
    (rule,) = (r.neighborhood for r in PRESETS[preset].rules if r.neighborhood.stride == stride)
    return scale_rule(rule, layout, base_size=PRESETS[preset].layout)


def block_seconds(kind: Kind, size: Size, rules: Sequence[Any], rounds: int) -> list[float]:
    """Median seconds of a block under each rule, in turns."""
    block, arguments = kind.make(size)
    graph, state = nnx.split(block)

    def run(rule: Any, state: Any, *arguments: Any) -> Any:
        return nnx.merge(graph, state)(*arguments, rule=rule)

    inputs = [state, *arguments]
    compiled = [jax.jit(functools.partial(run, r)).lower(*inputs).compile() for r in rules]
    for function in compiled:
        jax.block_until_ready(function(*inputs))
    return interleaved_medians(compiled, inputs, rounds)


def dense_attention_seconds(model: Model, size: Size, rounds: int) -> tuple[float, float]:
    """Dense self-attention alone: by gna over the whole grid, and by jax.nn (cuDNN on a GPU)."""
    on_gpu = jax.default_backend() == "gpu"
    tokens = math.prod(size.layout) + (size.text_tokens if model.is_joint else 0)
    q, k, v = (normal((1, tokens, size.heads, HEAD_DIM), size.dtype, seed) for seed in range(3))
    whole = functools.partial(gna, window_size=-1, implementation=size.implementation)
    flat = functools.partial(
        jax.nn.dot_product_attention, implementation="cudnn" if on_gpu else "xla"
    )
    compiled = [jax.jit(function).lower(q, k, v).compile() for function in (whole, flat)]
    for function in compiled:
        jax.block_until_ready(function(q, k, v))
    ours, theirs = interleaved_medians(compiled, [q, k, v], rounds)
    return ours, theirs


def compare(model: Model, size: Size, rounds: int) -> Table:
    """Times of every block under every rule, and what a whole run would gain."""
    rules = [rule_of(preset, stride, size.layout) for preset, stride in model.rows]
    ours, theirs = dense_attention_seconds(model, size, rounds)
    table = Table("attention", *(f"{kind.name} block" for kind in model.kinds), title=model.title)
    for column in ("blocks", "whole run", "paper: simulated", "paper: measured"):
        table.add_column(column)
    # Where jax.nn is the faster one, dense blocks count as if they used it.
    saved = max(ours - theirs, 0.0)
    times = [block_seconds(kind, size, [None, *rules], rounds) for kind in model.kinds]
    dense = [one[0] - saved for one in times]
    total = sum(kind.count * one for kind, one in zip(model.kinds, dense, strict=True))
    table.add_row("dense", *(f"{1e3 * one:.1f} ms" for one in dense), *["1.00x"] * 4)
    for number, ((preset, stride), rule) in enumerate(zip(model.rows, rules, strict=True), start=1):
        mine = [one[number] for one in times]
        speedup = total / sum(k.count * one for k, one in zip(model.kinds, mine, strict=True))
        table.add_row(
            f"window {by(rule.window_size)}, stride {by(rule.stride)}",
            *(f"{1e3 * one:.1f} ms" for one in mine),
            f"{speedup:.2f}x",
            both(whole_run(preset, model.block_share, speedup)),
            both(simulated(preset, stride)),
            both(MEASURED[preset, stride]),
        )
    first = PRESETS[model.rows[0][0]]
    table.caption = (
        f"{jax.devices()[0].device_kind}, {by(size.layout)} tokens, {size.heads} heads x {HEAD_DIM}, {jnp.dtype(size.dtype)}, forward,"
        f" median of {rounds}. Whole run: all steps with windows / the first {first.dense_steps} of {first.steps} dense."
        f" Dense attention alone: {1e3 * ours:.1f} ms by gna, {1e3 * theirs:.1f} ms by jax.nn; dense blocks count with the faster."
        " Paper: B200, full size."
    )
    return table


def whole_run(preset: str, share: float, speedup: float) -> tuple[float, float]:
    """Amdahl's law: all steps with windows, and with the preset's dense steps."""
    schedule = PRESETS[preset]
    steps = {"steps": schedule.steps or 1}
    dense = schedule.dense_steps or 0
    return (
        end_to_end_speedup(share, speedup, **steps),
        end_to_end_speedup(share, speedup, **steps, dense_steps=dense),
    )


def simulated(preset: str, stride: tuple[int, ...]) -> tuple[float, float]:
    """What the paper's simulator says of a whole run at full size, with the paper's tiles."""
    published = PRESETS[preset]
    rule = rule_of(preset, stride, published.layout)
    tiles = Simulation.of(rule, published.layout, PAPER_TILES[preset])
    return whole_run(preset, published.attention_share or 0.0, tiles.worst_tile_speedup)


def both(speedups: tuple[float | None, float]) -> str:
    """Two speedups for a cell."""
    return " / ".join("-" if s is None else f"{s:.2f}x" for s in speedups)


def normal(shape: tuple[int, ...], dtype: Any, seed: int = 0) -> jax.Array:
    """Random tokens."""
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def command(model: Model) -> Callable[..., None]:
    """The command line of an example."""

    def main(
        layout: Annotated[str | None, typer.Option(help="token grid, such as 16x44x80")] = None,
        implementation: Annotated[str | None, typer.Option(help="of gna: xla, mosaic, ..")] = None,
        rounds: Annotated[int, typer.Option(help="timed runs of each")] = 5,
    ) -> None:
        """Time one block, dense against neighborhood attention."""
        published = PRESETS[model.rows[0][0]]
        has_gpu = jax.default_backend() == "gpu"
        grid = published.layout if has_gpu else model.small_layout
        if layout is not None:
            grid = tuple(int(length) for length in layout.split("x"))
        if len(grid) != len(published.layout):
            raise typer.BadParameter(
                f"the layout needs {len(published.layout)} axes, as {by(published.layout)}; got {layout}"
            )
        size = Size(
            layout=grid,
            heads=published.heads if has_gpu else 2,
            text_tokens=model.text_tokens if has_gpu else 32,
            dtype=jnp.bfloat16 if has_gpu else jnp.float32,
            implementation=implementation,
        )
        console = Console(width=150)
        if not has_gpu:
            console.print(
                f"No GPU here: a scaled-down block of {size.heads} heads instead of {published.heads} on {by(grid)} tokens"
                f" instead of {by(published.layout)}, windows scaled alike. Its times say nothing of a GPU's."
            )
        console.print(compare(model, size, rounds))

    return main
