"""The command line `gna-jax`: what would run for a shape and why, without allocating it.

Only argument parsing and printing live here; every answer comes from the package's public functions.
"""

import dataclasses
import json
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import typer
from rich.console import Console

import gna_jax

app = typer.Typer(
    help="Neighborhood attention (GNA) for JAX.", no_args_is_help=True, add_completion=False
)
"""The command, installed as `gna-jax`; also `python -m gna_jax`."""

PER_AXIS = "one value, or one per axis joined by x"


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


@app.command(no_args_is_help=True)
def explain(
    layout: Annotated[
        str, typer.Argument(help="tokens per axis joined by x, as in 30x48x80", metavar="LAYOUT")
    ],
    window: Annotated[
        str,
        typer.Option(
            "--window", "-w", help=f"window_size: {PER_AXIS}, as in 18x24x24; -1: the whole axis"
        ),
    ],
    stride: Annotated[str, typer.Option("--stride", "-s", help=f"stride: {PER_AXIS}")] = "1",
    dilation: Annotated[str, typer.Option(help=f"dilation: {PER_AXIS}")] = "1",
    causal: Annotated[
        str, typer.Option("--causal", "-c", help="is_causal: 0 or 1, or one per axis as in 1x0x0")
    ] = "0",
    batch: Annotated[int, typer.Option("--batch", "-b", help="samples")] = 1,
    heads: Annotated[int, typer.Option("--heads", "-n", help="query heads")] = 1,
    kv_heads: Annotated[
        int | None, typer.Option(help="key and value heads [default: as --heads]")
    ] = None,
    dim: Annotated[int, typer.Option("--dim", "-d", help="head dimension")] = 64,
    value_dim: Annotated[int | None, typer.Option(help="of the values [default: as --dim]")] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16, float32 or float64")] = "bfloat16",
    device: Annotated[
        str | None, typer.Option(help="a device by name, such as h200 [default: this machine's]")
    ] = None,
    implementation: Annotated[
        str | None, typer.Option(help="ask for one implementation [default: chosen]")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Print which implementation and tiles `gna` would use for LAYOUT, and why not the others.

    No array is made, so any size can be asked about: gna-jax explain 30x48x80 -w 18x24x24 -s 16x8x8 -n 24 -d 128
    """
    try:
        space = _per_axis("LAYOUT", layout)
        kv_heads = heads if kv_heads is None else kv_heads
        value_dim = dim if value_dim is None else value_dim
        explanation = gna_jax.explain(
            _array(dtype, batch, *space, heads, dim),
            _array(dtype, batch, *space, kv_heads, dim),
            _array(dtype, batch, *space, kv_heads, value_dim),
            window_size=_one_or_per_axis("--window", window),
            stride=_one_or_per_axis("--stride", stride),
            dilation=_one_or_per_axis("--dilation", dilation),
            is_causal=_one_or_per_axis("--causal", causal),
            device=device,
            implementation=implementation,
        )
    except (ValueError, TypeError) as error:  # bad input: the library's message says the way out
        raise typer.BadParameter(str(error)) from error
    except NotImplementedError as error:  # legal, but the implementation that was asked for cannot
        typer.echo(f"gna-jax: {error}", err=True)
        raise typer.Exit(1) from error
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(explanation), default=str))
    else:
        Console().print(str(explanation), highlight=False, markup=False, soft_wrap=True)


def _per_axis(name: str, text: str) -> tuple[int, ...]:
    """`"30x48x80"` (or `"30,48,80"`) as `(30, 48, 80)`."""
    try:
        return tuple(int(item) for item in text.replace(",", "x").split("x"))
    except ValueError:
        raise ValueError(
            f"{name} must be integers joined by x, as in 30x48x80; got {text!r}"
        ) from None


def _one_or_per_axis(name: str, text: str) -> int | tuple[int, ...]:
    """As `_per_axis`, but a single value stays one: the library uses it for every axis."""
    values = _per_axis(name, text)
    return values[0] if len(values) == 1 else values


def _array(dtype: str, *shape: int) -> Any:
    """Shape and dtype of an array that is never made."""
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
