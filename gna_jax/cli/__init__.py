"""The command line `gna-jax`: what would run for a shape and why, what a window costs, what a GPU kernel takes, whether
it is right on this machine, and pictures.

Only argument parsing and printing live here, a module per command; every answer comes from the package's public functions.
"""

from typing import Annotated

import jax
import typer

import gna_jax
from gna_jax.cli.build_cuda import build_cuda
from gna_jax.cli.draw import draw
from gna_jax.cli.explain import explain
from gna_jax.cli.inspect import inspect
from gna_jax.cli.selfcheck import selfcheck
from gna_jax.cli.simulate import simulate
from gna_jax.cli.tune import tune
from gna_jax.cli.verify import verify

app = typer.Typer(
    help="Neighborhood attention (GNA) for JAX.", no_args_is_help=True, add_completion=False
)
"""The command, installed as `gna-jax`; also `python -m gna_jax`."""

app.command()(build_cuda)
app.command(no_args_is_help=True)(explain)
app.command(no_args_is_help=True)(inspect)
app.command()(selfcheck)
app.command(no_args_is_help=True)(simulate)
app.command(no_args_is_help=True)(tune)
app.command()(verify)
app.add_typer(draw, name="draw")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"gna-jax {gna_jax.__version__}, jax {jax.__version__}")
        raise typer.Exit()


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="print versions"),
    ] = False,
) -> None:
    """Neighborhood attention (GNA) for JAX."""
