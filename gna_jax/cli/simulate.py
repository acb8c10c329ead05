"""`gna-jax simulate`: what windows, strides and tiles cost, for a preset, for one window, or for a wanted sparsity or speedup;
and what it costs to cut the layout over devices (`shard_report`).
"""

import dataclasses
import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from gna_jax.cli import arguments
from gna_jax.cli.arguments import one_or_per_axis, per_axis, plain_errors
from gna_jax.cli.shard_report import ShardReport, Volume, shard_report
from gna_jax.neighborhood import Neighborhood, by
from gna_jax.simulator import PRESETS, Candidate, Preset, best_tiles, search
from gna_jax.simulator.budgets import TileBudget, tile_budget
from gna_jax.simulator.cost import duration
from gna_jax.simulator.estimate import Estimate, Setting, estimate
from gna_jax.simulator.simulation import Simulation

DEFAULT_SPARSITY = 0.9
"""What is searched for where the user names no window and no wish."""


def simulate(
    layout: Annotated[
        str | None, typer.Argument(help=arguments.LAYOUT_HELP, metavar="[LAYOUT]")
    ] = None,
    preset: Annotated[
        str | None, typer.Option("--preset", "-p", help=f"instead of LAYOUT: {', '.join(PRESETS)}")
    ] = None,
    window: Annotated[
        str | None, typer.Option("--window", "-w", help=arguments.WINDOW_HELP)
    ] = None,
    stride: Annotated[
        list[str] | None,
        typer.Option(
            "--stride", "-s", help=f"{arguments.PER_AXIS}; may be repeated [default: all]"
        ),
    ] = None,
    dilation: arguments.Dilation = "1",
    causal: arguments.Causal = "0",
    sparsity: Annotated[
        float | None, typer.Option(help="propose windows this sparse, as 0.9 [default without -w]")
    ] = None,
    speedup: Annotated[
        float | None, typer.Option(help="propose windows with this total-work speedup")
    ] = None,
    device: Annotated[str, typer.Option(help="a device by name, or cpu")] = "b200",
    tiles: Annotated[
        str | None,
        typer.Option(help="elements of Q and KV tiles, as 128/128 [default: the device's]"),
    ] = None,
    dynamic: Annotated[
        bool | None,
        typer.Option("--dynamic/--static", help="where KV tiles start [default: the device's]"),
    ] = None,
    additional_keys: Annotated[int, typer.Option(help="text tokens that every query sees")] = 0,
    batch: arguments.Batch = 1,
    heads: arguments.Heads = 24,
    kv_heads: arguments.KvHeads = None,
    dim: arguments.Dim = 128,
    dtype: arguments.Dtype = "bfloat16",
    attention_share: Annotated[
        float | None, typer.Option(help="share of a dense run's time that is attention")
    ] = None,
    steps: Annotated[int, typer.Option(help="sampling steps of a run")] = 1,
    dense_steps: Annotated[int, typer.Option(help="of these, steps that stay dense")] = 0,
    shards: Annotated[
        str | None,
        typer.Option(
            help="cut the layout over devices: how many, as 8, or per axis, as 1x4x2; several: 2,4,8"
        ),
    ] = None,
    axis: Annotated[
        str | None,
        typer.Option(help="axes that --shards and --plan may cut, as 0 or 0,1; else all"),
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="cut over 2, 4, 8 .. 512 devices")] = False,
    top: Annotated[int, typer.Option(help="rows to print of a table", min=1)] = 12,
    as_json: arguments.Json = False,
) -> None:
    """Print speedups of windows and strides with their best tiles, from fastest to closest to a sliding window.

    gna-jax simulate --preset hunyuan-91; gna-jax simulate 30x48x80 -w 18x24x24; gna-jax simulate 256x256 --sparsity 0.9

    Over several devices, bytes exchanged and predicted times: gna-jax simulate --preset flux-4k --shards 8 --axis 0, or --plan
    """
    with plain_errors():
        if (layout is None) == (preset is None):
            raise ValueError(
                "simulate needs a LAYOUT or a --preset, not both;"
                f" got layout={layout}, preset={preset}; presets: {', '.join(PRESETS)}"
            )
        budget = _budget(device, tiles, dynamic)
        named = None if preset is None else _preset(preset)
        wish = _Wish(window, stride or [], dilation, causal, sparsity, speedup)
        if named is not None:
            setting = Setting.of(named, device, additional_keys)
        else:
            setting = Setting(
                device=device,
                batch=batch,
                heads=heads,
                kv_heads=heads if kv_heads is None else kv_heads,
                head_dim=dim,
                dtype=dtype,
                additional_keys=additional_keys,
                attention_share=attention_share,
                steps=steps,
                dense_steps=dense_steps,
            )
        sizes = named.layout if named is not None else per_axis("LAYOUT", layout or "")
        if plan or shards is not None:
            cuts = _Cuts(shards, axis, plan)
            report = _shard_report(named, sizes, wish, setting, budget, cuts)
        elif axis is not None:
            raise ValueError(f"--axis says what --shards or --plan cut; got --axis {axis} alone")
        elif named is not None:
            report = _preset_report(named, setting, budget)
        else:
            report = _search_report(sizes, wish, setting, budget)
    if as_json:
        typer.echo(json.dumps(report.as_dict(), default=str))
    else:
        report.show(Console(), top)


@dataclasses.dataclass(frozen=True)
class _Wish:
    """What the user asked to find, as options' texts."""

    window: str | None
    strides: list[str]
    dilation: str
    causal: str
    sparsity: float | None
    speedup: float | None


@dataclasses.dataclass(frozen=True)
class _Cuts:
    """How the user cuts the layout, as options' texts."""

    shards: str | None
    axis: str | None
    plan: bool


@dataclasses.dataclass(frozen=True)
class _Report:
    """What is printed: a heading, and titled lists of estimates."""

    heading: tuple[str, ...]
    sections: tuple[tuple[str, tuple[Estimate, ...]], ...]

    def as_dict(self) -> dict[str, Any]:
        """For machines: every row of every section."""
        return {
            "heading": list(self.heading),
            "sections": [
                {"title": title, "rows": [dataclasses.asdict(row) for row in rows]}
                for title, rows in self.sections
            ],
        }

    def show(self, console: Console, top: int) -> None:
        """For people."""
        for line in self.heading:
            console.print(line, highlight=False, soft_wrap=True)
        for title, rows in self.sections:
            console.print()
            console.print(_table(title, rows[:top]))
            if len(rows) > top:
                console.print(f"  and {len(rows) - top} more: --top {len(rows)}", style="dim")


def _budget(device: str, tiles: str | None, dynamic: bool | None) -> TileBudget:
    """The device's tiles, changed as the user asked."""
    budget = tile_budget(device)
    if tiles is not None:
        try:
            q_elements, kv_elements = (int(part) for part in tiles.split("/"))
        except ValueError:
            raise ValueError(
                f"--tiles must be elements of the Q and the KV tile, as 128/128; got {tiles!r}"
            ) from None
        budget = dataclasses.replace(budget, q_elements=q_elements, kv_elements=kv_elements)
    return budget if dynamic is None else dataclasses.replace(budget, dynamic=dynamic)


def _preset(name: str) -> Preset:
    if name not in PRESETS:
        raise ValueError(f"--preset must be one of {', '.join(PRESETS)}; got {name!r}")
    return PRESETS[name]


def _preset_report(preset: Preset, setting: Setting, budget: TileBudget) -> _Report:
    """The published rules with the best tiles, and what else there is at the same windows."""
    published = []
    for rule in dict.fromkeys(one.neighborhood for one in preset.rules):
        tiles = best_tiles(
            rule, preset.layout, budget.q_elements, budget.kv_elements, budget.dynamic
        )
        simulation = Simulation.of(rule, preset.layout, tiles, setting.additional_keys)
        published.append(estimate(simulation, setting))
    sections = [("published rules, best tiles", tuple(published))]
    sliding = {rule for rule in preset.stride_1_rules if set(rule.dilation) == {1}}
    if len(sliding) == 1:
        windows = [rule.window_size for rule in sliding]
        front = _search(preset.layout, budget, setting.additional_keys, windows=windows)
        title = "Pareto front over all strides: speedup against closeness to the sliding window"
        sections.append((title, tuple(estimate(one.simulation, setting) for one in front)))
    heading = (
        f"{preset.title}: {_call(preset.layout, setting)}",
        f"source: {preset.source}",
        *_model_lines(setting),
        _tiles_line(setting, budget),
    )
    return _Report(heading, tuple(sections))


def _shard_report(
    preset: Preset | None,
    layout: tuple[int, ...],
    wish: _Wish,
    setting: Setting,
    budget: TileBudget,
    cuts: _Cuts,
) -> ShardReport:
    """Cuts of one rule: the user's, or the preset's that most layers use, and of these the fastest on one device."""
    if cuts.plan and cuts.shards is not None:
        raise ValueError(
            f"--plan chooses the numbers of devices itself; got --shards {cuts.shards} too"
        )
    rules = _rules(preset, layout, wish)
    elements = budget.q_elements, budget.kv_elements
    volumes = [
        Volume(rule, layout, best_tiles(rule, layout, *elements, budget.dynamic), setting)
        for rule in rules
    ]
    one = (1,) * len(layout)
    volume = min(volumes, key=lambda volume: volume.estimate(one).one_device)
    title = "" if preset is None else f"{preset.title}: "
    heading = (f"{title}{_call(layout, setting)}", _tiles_line(setting, budget))
    return shard_report(heading, volume, cuts.shards, cuts.axis)


def _rules(preset: Preset | None, layout: tuple[int, ...], wish: _Wish) -> tuple[Neighborhood, ...]:
    """The rule that the options name, or those of the preset that most layers use."""
    if preset is not None and wish.window is None and not wish.strides:
        most = max(len(one.layers) for one in preset.rules)
        of_most = (one.neighborhood for one in preset.rules if len(one.layers) == most)
        return tuple(dict.fromkeys(of_most))
    windows = set() if preset is None else {one.neighborhood.window_size for one in preset.rules}
    if (wish.window is None and len(windows) != 1) or len(wish.strides) > 1:
        raise ValueError(
            "--shards and --plan take one rule: name its --window, and at most one --stride;"
            f" got --window {wish.window}, --stride {', '.join(wish.strides) or None}"
        )
    size = one_or_per_axis("--window", wish.window) if wish.window is not None else windows.pop()
    rule = Neighborhood.of(
        len(layout),
        window_size=size,
        stride=one_or_per_axis("--stride", wish.strides[0] if wish.strides else "1"),
        dilation=one_or_per_axis("--dilation", wish.dilation),
        is_causal=one_or_per_axis("--causal", wish.causal),
    )
    rule.check_layout(layout)
    return (rule,)


def _search_report(
    layout: tuple[int, ...], wish: _Wish, setting: Setting, budget: TileBudget
) -> _Report:
    """The Pareto front of what was asked for; one named window with one named stride is a front of one row."""
    sparsity = wish.sparsity
    if wish.window is None and wish.speedup is None and sparsity is None:
        sparsity = DEFAULT_SPARSITY
    windows = None if wish.window is None else [one_or_per_axis("--window", wish.window)]
    strides = [one_or_per_axis("--stride", one) for one in wish.strides] or None
    front = _search(
        layout,
        budget,
        setting.additional_keys,
        windows=windows,
        strides=strides,
        sparsity=sparsity,
        speedup=wish.speedup,
        dilation=one_or_per_axis("--dilation", wish.dilation),
        is_causal=one_or_per_axis("--causal", wish.causal),
    )
    rows = tuple(estimate(one.simulation, setting) for one in front)
    title = "Pareto front: speedup against closeness to the sliding window"
    heading = (_call(layout, setting), *_model_lines(setting), _tiles_line(setting, budget))
    return _Report(heading, ((title, rows),))


def _search(
    layout: tuple[int, ...], budget: TileBudget, additional_keys: int, **wish: Any
) -> tuple[Candidate, ...]:
    """The Pareto front, with a progress bar on stderr for searches that take a while."""
    columns = TextColumn("windows"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("windows", total=None)
        result = search(
            layout,
            q_tile_elements=budget.q_elements,
            kv_tile_elements=budget.kv_elements,
            dynamic=budget.dynamic,
            additional_keys=additional_keys,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
            **wish,
        )
    return result.pareto


def _call(layout: tuple[int, ...], setting: Setting) -> str:
    text = f" + {setting.additional_keys} text tokens" if setting.additional_keys else ""
    heads = f"{setting.heads} heads x {setting.head_dim}"
    return f"{by(layout)} tokens{text}, batch {setting.batch}, {heads}, {setting.dtype}"


def _model_lines(setting: Setting) -> tuple[str, ...]:
    if setting.attention_share is None:
        return ()
    return (
        f"run: attention is {setting.attention_share:.1%} of its dense time;"
        f" {setting.dense_steps} of {setting.steps} steps stay dense",
    )


def _tiles_line(setting: Setting, budget: TileBudget) -> str:
    kind = "dynamic" if budget.dynamic else "static"
    return (
        f"{setting.device}: tiles of {budget.q_elements} queries and {budget.kv_elements} keys, {kind};"
        " times are predicted, not measured"
    )


def _table(title: str, rows: tuple[Estimate, ...]) -> Table:
    """Estimates for people; columns that say nothing are left out."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    columns: dict[str, list[str]] = {
        "window": [by(row.window_size) for row in rows],
        "stride": [by(row.stride) for row in rows],
    }
    if any(set(row.dilation) != {1} for row in rows):
        columns["dilation"] = [by(row.dilation) for row in rows]
    columns |= {
        "Q / KV tile": [f"{by(row.q_tile)} / {by(row.kv_tile)}" for row in rows],
        "sparse": [f"{row.sparsity:.1%}" for row in rows],
        "close": [f"{row.closeness:.2f}" for row in rows],
        "limit": [f"{row.flop_speedup:.2f}x" for row in rows],
        "work": [f"{row.total_work_speedup:.2f}x" for row in rows],
        "worst": [f"{row.worst_tile_speedup:.2f}x" for row in rows],
        "masked": [f"{row.masked_tile_share:.0%}" for row in rows],
        "padding": [f"{row.padded_share:.0%}" for row in rows],
        "time": [duration(row.seconds) for row in rows],
        "dense": [duration(row.dense_seconds) for row in rows],
        "faster": [f"{row.predicted_speedup:.2f}x" for row in rows],
        "binds": [row.bound for row in rows],
    }
    if all(row.end_to_end is not None for row in rows):
        columns["run"] = [f"{row.end_to_end:.2f}x" for row in rows]
    for name in columns:
        is_text = name in ("window", "stride", "dilation", "Q / KV tile", "binds")
        table.add_column(name, justify="left" if is_text else "right", no_wrap=True)
    for cells in zip(*columns.values(), strict=True):
        table.add_row(*cells)
    return table
