"""`gna-jax verify`: does a GPU kernel give right results on this machine? If so, the default takes it here."""

from typing import Annotated

import jax
import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from gna_jax import verification
from gna_jax.backends import RUNGS
from gna_jax.cli.arguments import plain_errors
from gna_jax.device import DeviceSpec, resolve_device
from gna_jax.selfcheck.machine import interpreted, optional
from gna_jax.selfcheck.stamp import record_success, versions
from gna_jax.verification import Outcome, Trial

COLUMNS = {
    "out": "out",
    "lse": "lse",
    "dQ": "d query",
    "dK": "d key",
    "dV": "d value",
    "d more": "d additional_",
    "d bias": "d relative_position_bias",
}
"""Of the table, and how the names of their arrays begin."""


def verify(
    implementation: Annotated[str, typer.Option(help="the kernels to run")] = "mosaic",
    interpret: Annotated[
        str | None,
        typer.Option(
            metavar="DEVICE",
            help="run only the small calls, in JAX's interpreter as this GPU (h100, h200, b200), or in Triton's (a100, with TRITON_INTERPRET=1); writes no stamp",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="of the data")] = 0,
) -> None:
    """Compare a kernel's results and gradients with float32 attention on this machine's GPU; under two minutes.

    Where all are right, a stamp is written and `gna` takes the kernel here by default. Else the exit status is 1. All kernels at
    once, with times and a report: gna-jax selfcheck.
    """
    console = Console()
    with plain_errors():
        with interpreted(interpret):
            device = verification.this_gpu() if interpret is None else None
            more = _optional(implementation, device or resolve_device(None))
            trials = verification.trials_with(more, interpret is not None)
            outcomes = _run(implementation, trials, seed)
        where = device.kind if device is not None else f"{interpret}, interpreted"
        console.print(_table(outcomes, implementation, where))
        if not all(outcome.is_right for outcome in outcomes):
            raise RuntimeError(_failed(implementation, outcomes))
    say = f"{implementation} is right in {len(outcomes)} calls, forward and backward"
    if device is None:
        typer.echo(f"{say}, interpreted as {interpret}: no stamp is written")
        return
    path = record_success(implementation, device, outcomes, seed)
    typer.echo(f"{say}: gna takes it on {device.kind} by default from now on\nstamp: {path}")


def _optional(implementation: str, device: DeviceSpec) -> tuple[Trial, ...]:
    """What it takes of the optional calls; none of a name that is no implementation's: `gna` says so."""
    return next((optional(rung, device) for rung in RUNGS if rung.name == implementation), ())


def _run(implementation: str, trials: tuple[Trial, ...], seed: int) -> tuple[Outcome, ...]:
    """Every trial, with a progress bar on stderr."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(implementation, total=len(trials))
        return verification.verify(
            implementation, trials, seed=seed, report=lambda outcome: progress.advance(task)
        )


def _table(outcomes: tuple[Outcome, ...], implementation: str, where: str) -> Table:
    """A row per trial; what is wrong in red."""
    table = Table(
        title=f"{implementation} on {where}: error against float32, share of the largest entry",
        title_justify="left",
        box=box.SIMPLE_HEAD,  # seven errors in a terminal of 80 columns
        padding=(0, 1, 0, 0),
    )
    told = {name for outcome in outcomes for name in outcome.errors}
    names = [c for c, start in COLUMNS.items() if any(name.startswith(start) for name in told)]
    for column in ("call", "dtype", *names, "same"):
        table.add_column(
            column, justify="left" if column == "call" else "right", no_wrap=column != "call"
        )
    for outcome in outcomes:
        if outcome.failure:
            failure = Text(outcome.failure[:200], "bold red")
            table.add_row(Text(str(outcome.trial)), outcome.trial.arithmetic, failure)
            continue
        cells = [_error(outcome, name) for name in names]
        same = Text("yes") if outcome.is_repeatable else Text("NO", "bold red")
        table.add_row(Text(str(outcome.trial)), outcome.trial.arithmetic, *cells, same)
    return table


def _error(outcome: Outcome, column: str) -> Text:
    """The largest error of the arrays that a column stands for."""
    wrong, largest = False, None
    for name, error in outcome.errors.items():
        if name.startswith(COLUMNS[column]):
            wrong |= not error <= verification.tolerance(name, outcome.trial.arithmetic)
            largest = error if largest is None or not error <= largest else largest
    return Text("" if largest is None else f"{largest:.0e}", "bold red" if wrong else "")


def _failed(implementation: str, outcomes: tuple[Outcome, ...]) -> str:
    wrong = [outcome for outcome in outcomes if not outcome.is_right]
    of = ", ".join(f"{name} {version}" for name, version in versions().items())
    first = wrong[0]
    return (
        f"{implementation} is wrong in {len(wrong)} of {len(outcomes)} calls on {jax.devices()[0].device_kind}; no stamp is"
        " written, and gna's default runs 'xla' as before. Please report the table above and this line: "
        f"{of}, {first.trial.arithmetic} {first.trial}: {first.failure[:300] or first.errors}"
    )
