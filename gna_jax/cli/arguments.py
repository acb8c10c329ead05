"""What the commands' arguments have in common: sizes such as 30x48x80, options that every command spells alike, errors."""

import contextlib
from collections.abc import Iterator
from typing import Annotated

import typer

PER_AXIS = "one value, or one per axis joined by x"

LAYOUT_HELP = "tokens per axis joined by x, as in 30x48x80"
Layout = Annotated[str, typer.Argument(help=LAYOUT_HELP, metavar="LAYOUT")]
WINDOW_HELP = f"window_size: {PER_AXIS}, as in 18x24x24; -1: the whole axis"
Window = Annotated[str, typer.Option("--window", "-w", help=WINDOW_HELP)]
Stride = Annotated[str, typer.Option("--stride", "-s", help=f"stride: {PER_AXIS}")]
Dilation = Annotated[str, typer.Option(help=f"dilation: {PER_AXIS}")]
Causal = Annotated[
    str, typer.Option("--causal", "-c", help="is_causal: 0 or 1, or one per axis as in 1x0x0")
]
Batch = Annotated[int, typer.Option("--batch", "-b", help="samples")]
Heads = Annotated[int, typer.Option("--heads", "-n", help="query heads")]
KvHeads = Annotated[int | None, typer.Option(help="key and value heads [default: as --heads]")]
Dim = Annotated[int, typer.Option("--dim", "-d", help="head dimension")]
Dtype = Annotated[str, typer.Option(help="bfloat16, float16, float32 or float64")]
Json = Annotated[bool, typer.Option("--json", help="print JSON")]


def per_axis(name: str, text: str) -> tuple[int, ...]:
    """`"30x48x80"` (or `"30,48,80"`) as `(30, 48, 80)`.

    Raises:
      ValueError: for anything else than integers.
    """
    try:
        return tuple(int(item) for item in text.replace(",", "x").split("x"))
    except ValueError:
        raise ValueError(
            f"{name} must be integers joined by x, as in 30x48x80; got {text!r}"
        ) from None


def one_or_per_axis(name: str, text: str) -> int | tuple[int, ...]:
    """As `per_axis`, but a single value stays one: the library uses it for every axis."""
    values = per_axis(name, text)
    return values[0] if len(values) == 1 else values


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """The library's messages without a traceback: exit code 2 for bad input, 1 for what is legal and cannot be done here."""
    try:
        yield
    except (ValueError, TypeError) as error:  # the message says the way out
        raise typer.BadParameter(str(error)) from error
    except (NotImplementedError, RuntimeError) as error:
        typer.echo(f"gna-jax: {error}", err=True)
        raise typer.Exit(1) from error
