"""gna against the attention of jax and torch on this machine's CPU: one command, verified results, one table.

    python benchmarks/cpu.py            about 25 minutes, most of it the peers' dense cases; writes benchmarks/results/
    python benchmarks/cpu.py --quick    the smallest case, three rounds, nothing written

Only the command line lives here. Read on in `cases.py`, `rounds.py` (turns, verification), `workers.py` and `worker.py`
(processes), `peers_jax.py` and `peers_torch.py` (what is timed), `report.py` (tables).
"""

import dataclasses
import datetime
import itertools
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from cases import CASES
from report import Run, cpu_name, rich_tables, usable_cores, write
from rich.console import Console
from rounds import Result, measure, write_inputs
from torch_environment import torch_python
from worker import BOTH, FORWARD, Task
from workers import GNA, PEERS, Workers, total_bytes

RESULTS = Path(__file__).resolve().parent / "results"
SEED = 0

DTYPES = ("fp32", "bf16")
DIRECTIONS = (FORWARD, BOTH)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to time: every case with every dtype in every direction."""

    cases: tuple[str, ...]
    dtypes: tuple[str, ...]
    directions: tuple[str, ...]
    peers: tuple[str, ...]
    rounds: int
    seconds_per_peer: float

    @property
    def command(self) -> str:
        """The command line that takes the same results."""
        choices = {
            "cases": (self.cases, tuple(CASES)),
            "dtype": (self.dtypes, DTYPES),
            "direction": (self.directions, DIRECTIONS),
            "peers": (self.peers[1:], tuple(peer.name for peer in PEERS[1:])),
        }
        parts = ["python benchmarks/cpu.py"]
        for option, (asked, everything) in choices.items():
            if asked != everything:
                parts.append(f'--{option} "{",".join(asked)}"')
        return " ".join([*parts, f"--rounds {self.rounds} --seconds {self.seconds_per_peer:g}"])


def main(
    cases: Annotated[str, typer.Option(help=f"of {', '.join(CASES)}; joined by commas")] = "",
    dtype: Annotated[str, typer.Option(help=f"{', '.join(DTYPES)} [default: both]")] = "",
    direction: Annotated[str, typer.Option(help=f"{', '.join(DIRECTIONS)} [default: both]")] = "",
    peers: Annotated[str, typer.Option(help=f"of {', '.join(p.name for p in PEERS[1:])}")] = "",
    rounds: Annotated[int, typer.Option(min=1, help="repetitions of every peer")] = 11,
    seconds: Annotated[
        float, typer.Option(help="time for a peer's repetitions; slow ones get fewer, at least 3")
    ] = 20.0,
    out: Annotated[Path, typer.Option(help="folder of the results")] = RESULTS,
    torch: Annotated[
        Path | None,
        typer.Option("--torch-python", help="a Python with torch [default: makes .venv-torch]"),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="smallest case, 3 rounds")] = False,
) -> None:
    """Time gna and its peers in turns on this machine's CPU, after comparing their results."""
    plan = Plan(
        cases=chosen("cases", cases, CASES),
        dtypes=chosen("dtype", dtype, DTYPES),
        directions=chosen("direction", direction, DIRECTIONS),
        peers=(GNA.name, *chosen("peers", peers, [peer.name for peer in PEERS[1:]])),
        rounds=rounds,
        seconds_per_peer=seconds,
    )
    if quick:
        plan = dataclasses.replace(
            plan, cases=plan.cases[:1], rounds=min(3, rounds), seconds_per_peer=2.0
        )
    console = Console()
    try:
        python = torch_python(torch, console)
    except RuntimeError as error:
        raise typer.BadParameter(str(error)) from error
    results, versions = run(plan, python, console)
    for table in rich_tables(results):
        console.print(table)
    if not quick:
        about = Run(
            date=datetime.date.today().isoformat(),
            command=plan.command,
            cpu=cpu_name(),
            cores=usable_cores(),
            memory_gib=total_bytes() / 2**30,
            versions=versions,
        )
        console.print(f"written: {write(results, about, out)}")
    defects = [result for result in results if result.is_defect]
    for result in defects:
        console.print(
            f"[red]{result.case} {result.dtype} {result.direction} {result.peer}[/]: {result.note}"
        )
    if defects:
        raise typer.Exit(1)


def run(plan: Plan, python: Path, console: Console) -> tuple[list[Result], dict[str, str]]:
    """Every result of the plan, and the versions that took part."""
    results = []
    peers = [peer for peer in PEERS if peer.name in plan.peers]
    with tempfile.TemporaryDirectory() as folder, Workers(peers, python, Path(folder)) as workers:
        versions = workers.versions()
        console.print(", ".join(f"{name} {version}" for name, version in versions.items()))
        for name in plan.cases:
            write_inputs(CASES[name], Path(folder), SEED)
            for dtype, direction in itertools.product(plan.dtypes, plan.directions):
                case = CASES[name]
                task = Task(folder, case.layout, case.window, dtype, direction)
                title = f"{case.title} {dtype} {direction}"
                with console.status(title) as status:
                    row = measure(
                        workers,
                        task,
                        name,
                        rounds=plan.rounds,
                        seconds_per_peer=plan.seconds_per_peer,
                        report=lambda text, title=title, status=status: status.update(
                            f"{title}: {text}"
                        ),
                    )
                results += row
                console.print(f"{title}: " + ", ".join(summary(result) for result in row))
    return results, versions


def summary(result: Result) -> str:
    """A result in a few words, with its error against gna."""
    if not result.seconds:
        return f"{result.peer} [yellow]{result.note}[/]"
    told = f"{result.peer} {1e3 * result.median:.3g} ms"
    wrong = max(result.errors.values(), default=0.0)
    return f"{told} (error {wrong:.0e})" if result.errors and result.peer != GNA.name else told


def chosen(option: str, text: str, names: Iterable[str]) -> tuple[str, ...]:
    """The names in `text`, in the order of `names`; all of them where it is empty."""
    asked = [name.strip() for name in text.split(",") if name.strip()]
    names = list(names)
    unknown = [name for name in asked if name not in names]
    if unknown:
        raise typer.BadParameter(f"--{option}: got {unknown}; choose from {', '.join(names)}")
    return tuple(name for name in names if not asked or name in asked)


if __name__ == "__main__":
    typer.run(main)
