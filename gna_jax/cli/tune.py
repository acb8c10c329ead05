"""`gna-jax tune`: the fastest tiles of a call, measured on this machine's GPU and kept where calls find them."""

import dataclasses
import datetime
import functools
import importlib.metadata
import json
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn
from rich.table import Table
from rich.text import Text

import gna_jax
from gna_jax import tuning
from gna_jax.cli import arguments
from gna_jax.cli.arguments import one_or_per_axis, per_axis, plain_errors
from gna_jax.device import DeviceSpec, resolve_device
from gna_jax.neighborhood import Neighborhood, by
from gna_jax.problem import Operands, Problem, describe
from gna_jax.simulator import PRESETS
from gna_jax.simulator.cost import duration
from gna_jax.simulator.roofline import Direction
from gna_jax.tuning import Measurement, Tuning


def tune(
    layout: Annotated[
        str | None, typer.Argument(help=arguments.LAYOUT_HELP, metavar="[LAYOUT]")
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option("--preset", "-p", help=f"all rules of one of {', '.join(PRESETS)}"),
    ] = None,
    window: Annotated[
        str | None, typer.Option("--window", "-w", help=arguments.WINDOW_HELP)
    ] = None,
    stride: arguments.Stride = "1",
    dilation: arguments.Dilation = "1",
    causal: arguments.Causal = "0",
    batch: arguments.Batch = 1,
    heads: arguments.Heads = 24,
    kv_heads: arguments.KvHeads = None,
    dim: Annotated[int, typer.Option("--dim", "--head-dim", "-d", help="head dimension")] = 128,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float16")] = "bfloat16",
    candidates: Annotated[
        int, typer.Option(help="tiles per direction to try beside the default", min=1)
    ] = 8,
    rounds: Annotated[int, typer.Option(help="turns of every candidate", min=1)] = 5,
    into: Annotated[
        str, typer.Option(help="table to write: cache (this machine's), package, or a file")
    ] = "cache",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="list the candidates, measure and write nothing")
    ] = False,
    device: Annotated[
        str | None, typer.Option(help="with --dry-run: a GPU by name [default: this machine's]")
    ] = None,
    as_json: arguments.Json = False,
) -> None:
    """Measure the likeliest tiles of a call's kernels on this GPU, and keep the fastest for later calls.

    gna-jax tune 30x48x80 -w 18x24x24 -s 16x8x8; gna-jax tune --preset hunyuan-91 --dry-run --device h200
    """
    with plain_errors():
        spec = _device(device, dry_run)
        if (layout is None) == (preset is None) or (layout is not None and window is None):
            raise ValueError(
                "tune needs a LAYOUT with --window, or a --preset;"
                f" got layout={layout}, window={window}, preset={preset}"
            )
        if layout is None:
            problems = _preset_problems(str(preset), spec)
        else:
            space = per_axis("LAYOUT", layout)
            rule = Neighborhood.of(
                len(space),
                window_size=one_or_per_axis("--window", window or ""),
                stride=one_or_per_axis("--stride", stride),
                dilation=one_or_per_axis("--dilation", dilation),
                is_causal=one_or_per_axis("--causal", causal),
            )
            kv_heads = heads if kv_heads is None else kv_heads
            problems = [_problem(rule, space, batch, (heads, kv_heads), dim, dtype, spec)]
        path = None if dry_run else _table_path(into, spec)
        results = [_tune(problem, candidates, rounds, path, not as_json) for problem in problems]
    if as_json:
        typer.echo(json.dumps(results, default=str))
    elif path is not None:
        Console().print(f"written to {path}", highlight=False, markup=False, soft_wrap=True)


def _device(name: str | None, dry_run: bool) -> DeviceSpec:
    """The GPU that is tuned for."""
    if not dry_run:
        tuning.check_gpu()
        if name is not None:
            raise ValueError(
                f"--device goes with --dry-run; got --device {name}: only this machine's GPU can be measured"
            )
    return resolve_device(name)


def _problem(
    rule: Neighborhood,
    layout: tuple[int, ...],
    batch: int,
    heads: tuple[int, int],
    dim: int,
    dtype: str,
    device: DeviceSpec,
) -> Problem:
    """The call, checked; raises what `gna` raises. `heads` are the queries' and the keys'."""
    query, key = (
        jax.ShapeDtypeStruct((batch, *layout, number, dim), jnp.dtype(dtype)) for number in heads
    )
    operands = Operands(query, key, key)
    return describe(operands, rule, scale=None, precision=None, device=device)


def _preset_problems(name: str, device: DeviceSpec) -> list[Problem]:
    """One per distinct rule of a preset."""
    if name not in PRESETS:
        raise ValueError(f"--preset must be one of {', '.join(PRESETS)}; got {name!r}")
    one = PRESETS[name]
    heads = one.heads, one.kv_heads
    return [
        _problem(rule, one.layout, one.batch, heads, one.head_dim, one.dtype, device)
        for rule in dict.fromkeys(rule.neighborhood for rule in one.rules)
    ]


def _table_path(into: str, device: DeviceSpec) -> Path:
    from gna_jax.backends.mosaic import tuned  # the backend loads the kernels

    if into == "package":
        return tuned.package_table()
    return tuned.machine_table(device) if into == "cache" else Path(into)


def _tune(
    problem: Problem, num_candidates: int, rounds: int, path: Path | None, show: bool
) -> dict[str, Any]:
    """Tune one call and put it into the table at `path`, or without a path list its candidates; returns what JSON holds."""
    columns = SpinnerColumn(), TextColumn("{task.description}")
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=None)
        report = lambda text: progress.update(task, description=text)
        if path is None:
            done = _listed(problem, num_candidates, report)
        else:
            done = tuning.tune(problem, num_candidates=num_candidates, rounds=rounds, report=report)
    if path is not None:
        _write(done, path)
    if show:
        _show(Console(), done)
    return {
        "device": problem.device.kind,
        "layout": problem.global_layout,
        **dataclasses.asdict(problem.neighborhood),
        **{d: [_fields(one, d, done) for one in getattr(done, d)] for d in tuning.DIRECTIONS},
        "table": path,
    }


def _listed(problem: Problem, num_candidates: int, report: tuning.Report) -> Tuning:
    """The candidates of both directions, without times."""
    forward, backward = (
        tuple(map(Measurement, tuning.candidates(problem, direction, num_candidates, report)))
        for direction in tuning.DIRECTIONS
    )
    return Tuning(problem, forward, backward)


def _write(done: Tuning, path: Path) -> None:
    from gna_jax.backends.mosaic import tuned  # the backend loads the kernels

    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    versions = {
        "gna-jax": gna_jax.__version__,
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
    }
    tuned.record(path, done.problem, done.entry(date, versions))


def _fields(one: Measurement, direction: Direction, done: Tuning) -> dict[str, Any]:
    """A row for machines."""
    q, kv = one.candidate.pair(direction)
    return {
        "q": q,
        "kv": kv,
        "is_default": one.candidate.is_default,
        "is_chosen": one is _chosen(getattr(done, direction)),
        "predicted_seconds": one.candidate.predicted_seconds,
        "seconds": one.seconds,
        "failure": one.failure,
    }


def _chosen(measurements: tuple[Measurement, ...]) -> Measurement | None:
    """The winner; None in a list of candidates without times."""
    is_measured = any(one.seconds for one in measurements)
    return tuning.winner(measurements) if is_measured else None


def _show(console: Console, done: Tuning) -> None:
    """For people: the call, and a table per direction."""
    problem, rule = done.problem, done.problem.neighborhood
    say = functools.partial(console.print, highlight=False, markup=False, soft_wrap=True)
    causal = f", causal {by(rule.is_causal)}" if any(rule.is_causal) else ""
    say(
        f"{by(problem.global_layout)} tokens, window {by(rule.window_size)}, stride {by(rule.stride)},"
        f" dilation {by(rule.dilation)}{causal}"
    )
    say(
        f"batch {problem.batch}, {problem.query_heads} heads ({problem.kv_heads} key/value)"
        f" x {problem.head_dim}, {problem.dtype.name} on {problem.device.kind}"
    )
    for direction, title in zip(tuning.DIRECTIONS, ("forward", "backward, dK and dV"), strict=True):
        console.print(_table(title, direction, getattr(done, direction)))
    console.print()


def _table(title: str, direction: Direction, rows: tuple[Measurement, ...]) -> Table:
    """Fastest first: measured, else predicted."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    chosen, default = _chosen(rows), rows[0]
    names = ["Q / KV tile", "predicted", "measured", "spread", "faster", ""]
    for name in names if chosen else [*names[:2], ""]:
        is_text = name in ("Q / KV tile", "")
        table.add_column(name, justify="left" if is_text else "right", no_wrap=name != "")
    order = lambda one: (one.median, one.candidate.predicted_seconds)
    for one in sorted(rows, key=order):
        cells = [" / ".join(map(by, one.candidate.pair(direction)))]
        cells.append(duration(one.candidate.predicted_seconds))
        if chosen and one.seconds:
            faster = f"{default.median / one.median:.2f}x"
            cells += [duration(one.median), duration(one.spread), faster]
        elif chosen:
            cells += ["", "", ""]
        marks = ["default"] * one.candidate.is_default + ["chosen"] * (one is chosen)
        cells.append(one.failure or ", ".join(marks))
        table.add_row(*map(Text, cells), style="bold" if one is chosen else "")
    return table
