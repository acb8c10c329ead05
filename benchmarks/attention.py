"""gna at the sizes that others have published, on this machine's GPU, against dense and sparse attention of others: one command.

    python benchmarks/attention.py --suite published                 all of it in 8 minutes, most important cases first
    python benchmarks/attention.py --cases hunyuan-s1 --direction forward --minutes 2 --torch-python PATH

Only the command line lives here. Read on in `published/`. Every result is compared with float32 attention of some of its queries
before it is timed; a wrong one of gna's ends the run with exit status 1. Results are written after every case.
"""

import dataclasses
import datetime
import math
import os
import re
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

# Another process, torch's, needs memory of the same GPU.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import typer
from published import report
from published.cases import DIRECTIONS, FORWARD, SUITES, Case
from published.contestants import (
    CudnnDense,
    Gna,
    Tokamax,
    copied_bytes_per_second,
    empty_call_seconds,
)
from published.report import Facts, Row
from published.rounds import MIN_SECONDS, Budget, Contestant, measure
from published.torch_process import TorchFlex
from rich.console import Console
from rich.table import Table

from gna_jax.backends import RUNGS
from gna_jax.device import DeviceSpec, resolve_device
from gna_jax.selfcheck.machine import gpu_state, installed

RESULTS = Path(__file__).resolve().parent / "results"
PEERS = ("dense", "flex", "tokamax")
STATE = "clocks.sm,clocks.mem,power.draw,temperature.gpu"
VERSIONS = {"python": sys.version.split()[0]}
PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "nvidia-cudnn-cu13", "tokamax")


@dataclasses.dataclass
class Found:
    """What a run has found so far."""

    rows: list[Row] = dataclasses.field(default_factory=list)
    clocks: dict[str, str] = dataclasses.field(default_factory=dict)
    not_reached: list[str] = dataclasses.field(default_factory=list)


def main(
    suite: Annotated[str, typer.Option(help=f"of {', '.join(SUITES)}")] = "published",
    direction: Annotated[str, typer.Option(help="forward, backward or both")] = "both",
    cases: Annotated[str, typer.Option(help="names joined by commas [default: all]")] = "",
    implementations: Annotated[
        str, typer.Option(help="of gna, joined by commas")
    ] = "mosaic,cutlass,triton",
    peers: Annotated[str, typer.Option(help="joined by commas, or none")] = ",".join(PEERS),
    rounds: Annotated[int, typer.Option(min=1, help="repetitions of every contestant")] = 9,
    minutes: Annotated[float, typer.Option(help="for all of it")] = 8.0,
    out: Annotated[
        Path | None, typer.Option(help="FILE.md or .json [default: results/<date>-<device>]")
    ] = None,
    torch_python: Annotated[Path | None, typer.Option(help="a Python with torch for CUDA")] = None,
) -> None:
    """Time gna and others at published sizes, in turns, and say which targets are met."""
    console = Console(width=None if sys.stdout.isatty() else 200)
    budget = Budget(60 * minutes)
    if suite not in SUITES:
        raise typer.BadParameter(f"--suite must be one of {', '.join(SUITES)}; got {suite!r}")
    chosen = {name: SUITES[suite][name] for name in names("cases", cases, SUITES[suite])}
    directions = names("direction", "" if direction == "both" else direction, DIRECTIONS)
    flex = TorchFlex(torch_python, "cuda" if jax.default_backend() == "gpu" else "cpu")
    wanted = () if peers == "none" else names("peers", peers, PEERS)
    others = {"dense": CudnnDense(), "flex": flex, "tokamax": Tokamax()}
    known = [rung.name for rung in RUNGS]
    contestants = [Gna(name) for name in names("implementations", implementations, known)]
    contestants += [others[peer] for peer in wanted]
    device = resolve_device(None)
    found = Found()
    started = time.monotonic()
    empty, copied = empty_call_seconds(), copied_bytes_per_second()

    def save() -> tuple[Path, Path]:
        run = report.Run(
            date=datetime.date.today().isoformat(),
            command=shlex.join(["python", "benchmarks/attention.py", *sys.argv[1:]]),
            device=device.kind,
            driver=gpu_state("driver_version") or "unknown",
            versions=VERSIONS | installed(PACKAGES) | flex.versions,
            empty_call_seconds=empty,
            clocks=found.clocks,
            not_reached=tuple(found.not_reached),
            seconds=time.monotonic() - started,
            copied_bytes_per_second=copied,
        )
        kind = re.sub(r"[^a-z0-9]+", "-", device.kind.lower())
        return report.write(found.rows, run, chosen, out or RESULTS / f"{run.date}-{kind}")

    try:
        files = save()
        for case in chosen.values():
            for way in directions:
                known = facts(case, way, contestants, device, copied)
                attend(case, way, contestants, rounds, budget, found, known, console)
                files = save()
    finally:
        flex.stop()
    console.print(f"{time.monotonic() - started:.0f} s, written: {files[0]}, {files[1]}")
    conclude(found, chosen, console)


def conclude(found: Found, cases: dict[str, Case], console: Console) -> None:
    """Print targets and what was not reached; exit status 1 where gna is wrong or was not timed at all."""
    for line in report.verdicts(found.rows, cases):
        console.print(line, style="red" if line.endswith("MISSED") else "green", highlight=False)
    for line in found.not_reached:
        console.print(f"not reached: {line}")
    defects = [row.result for row in found.rows if row.result.is_defect and row.result.is_ours]
    for result in defects:
        told = (
            f"{result.case} {result.direction} {result.contestant}: {result.note} {result.errors}"
        )
        console.print(told, style="red", markup=False)
    if defects or not any(row.result.is_ours and row.result.seconds for row in found.rows):
        raise typer.Exit(1)


def attend(
    case: Case,
    direction: str,
    contestants: Sequence[Contestant],
    rounds: int,
    budget: Budget,
    found: Found,
    known: dict[str, Facts],
    console: Console,
) -> None:
    """Measure one case in one direction and print its table; say so where the time is up."""
    name = f"{case.name} {direction}"
    if budget.left < MIN_SECONDS:
        found.not_reached.append(name)
        return
    with console.status(name) as status:
        update = lambda text: status.update(f"{name}: {text}, {budget.left:.0f} s left")
        results = measure(case, direction, contestants, rounds, budget, update)
    found.clocks[name] = gpu_state(STATE) or "not told"
    rows = report.rows_of(case, results, known)
    found.rows += rows
    found.not_reached += [
        f"{name}: {row.result.contestant}" for row in rows if row.result.note == "not reached"
    ]
    table = Table(title=f"{case.title} {direction}", title_justify="left")
    for column in report.HEADER[1:]:
        table.add_column(column, justify="right")
    for cells in report.table(rows, {case.name: case}):
        table.add_row(*cells[1:])
    console.print(table, markup=False)


def facts(
    case: Case,
    direction: str,
    contestants: Sequence[Contestant],
    device: DeviceSpec,
    bytes_per_second: float,
) -> dict[str, Facts]:
    """What the simulator says of every contestant that it knows, and what memory says of gna's forward."""
    floor = case.forward_bytes / bytes_per_second if direction == FORWARD else math.nan
    told = {}
    for contestant in contestants:
        predicted, share = None, math.nan
        if isinstance(contestant, Gna):
            try:
                explained = case.explain(contestant.implementation)
            except NotImplementedError:
                continue
            if explained.predicted is not None:  # the simulator knows this implementation
                predicted = case.predicted_seconds(explained.tiles, direction, device)
            share = explained.useful_share if direction == FORWARD else math.nan
        elif contestant.is_dense:
            predicted = case.predicted_dense_seconds(direction, device)
        seconds = math.nan if predicted is None else predicted
        told[contestant.name] = Facts(seconds, share, floor if contestant.is_ours else math.nan)
    return told


def names(option: str, text: str, known: Sequence[str] | dict) -> tuple[str, ...]:
    """The names in `text`, in the order of `known`; all of them where it is empty."""
    asked = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in asked if name not in known]
    if unknown:
        raise typer.BadParameter(f"--{option}: got {unknown}; choose from {', '.join(known)}")
    return tuple(name for name in known if not asked or name in asked)


if __name__ == "__main__":
    typer.run(main)
