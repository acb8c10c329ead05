"""`gna-jax selfcheck`: check and time everything that runs on this machine, and print a report for an issue."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from gna_jax import selfcheck as library
from gna_jax.cli.arguments import plain_errors
from gna_jax.selfcheck import report


def selfcheck(
    minutes: Annotated[float, typer.Option(help="for all of it")] = 5.0,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="write the report there, too")
    ] = None,
    interpret: Annotated[
        str | None,
        typer.Option(
            metavar="DEVICE",
            help="on a machine without a GPU: small calls, in JAX's interpreter as this GPU (h100, h200, b200); no times, no stamp",
        ),
    ] = None,
) -> None:
    """Check and time every GPU implementation on this machine, and print a report for an issue.

    Results and gradients are compared with float32, as `gna-jax verify` does, then published sizes are timed beside cuDNN's dense
    attention. A kernel that crashes or hangs hides nothing of the others. The exit status is 1 if anything is wrong.
    """
    console = Console(stderr=True)
    with plain_errors():
        if out is not None:
            _check_place(out)
        with console.status("starting") as status:
            found = library.selfcheck(minutes, interpret=interpret, report=status.update)
        text = report.markdown(found)
        typer.echo(text, nl=False)
        if out is not None:
            _write(out, text)
        if found.problems:
            more = len(found.problems) - 1
            others = f"; and {more} more at the head of the report" if more else ""
            raise RuntimeError(found.problems[0] + others)


def _check_place(out: Path) -> None:
    """Raise ValueError where the report could not be written, before minutes are spent on it."""
    try:
        with out.open("a"):
            pass
    except OSError as error:
        raise ValueError(
            f"--out must name a file that can be written; got {out}: {error.strerror}"
        ) from error


def _write(out: Path, text: str) -> None:
    try:
        out.write_text(text)
    except OSError as error:
        raise RuntimeError(f"the report could not be written: {error}; it is printed above") from error  # fmt: skip
    typer.echo(f"written to {out}", err=True)
