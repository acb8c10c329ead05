"""`gna-jax draw`: pictures of masks, windows, tiles and speedups, into a file or straight to the terminal."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from gna_jax import pictures
from gna_jax.cli import arguments
from gna_jax.cli.arguments import one_or_per_axis, per_axis, plain_errors
from gna_jax.neighborhood import by
from gna_jax.pictures.gallery import write_gallery

draw = typer.Typer(
    help="Draw a mask, a window, tiles or speedups; in the terminal, or with --out into a .png or .svg.",
    no_args_is_help=True,
)

Out = Annotated[
    list[Path] | None,
    typer.Option(
        "--out", "-o", help="file to write, .png or .svg; may be repeated [default: show]"
    ),
]
Strides = Annotated[
    list[str],
    typer.Option("--stride", "-s", help=f"a stride to compare, repeated: {arguments.PER_AXIS}"),
]
QTile = Annotated[str, typer.Option("--q-tile", help="queries per tile and axis, as in 4x8x8")]
KvTile = Annotated[str, typer.Option("--kv-tile", help="keys per tile and axis, as in 2x8x8")]


@draw.command(no_args_is_help=True)
def mask(
    layout: arguments.Layout,
    window: arguments.Window,
    stride: arguments.Stride = "1",
    dilation: arguments.Dilation = "1",
    causal: arguments.Causal = "0",
    out: Out = None,
) -> None:
    """The attention mask of one axis, queries by keys: gna-jax draw mask 32 -w 8 -s 4."""
    with plain_errors():
        sizes = per_axis("LAYOUT", layout)
        if len(sizes) != 1:
            raise ValueError(
                f"a mask is drawn of one axis; got layout {sizes}; gna-jax draw window shows more axes"
            )
        rule = _rule(window, dilation, causal, stride=stride)
        _show(pictures.mask_1d(sizes[0], **rule), out)


@draw.command(no_args_is_help=True)
def window(
    layout: arguments.Layout,
    window: arguments.Window,
    stride: arguments.Stride = "1",
    dilation: arguments.Dilation = "1",
    causal: arguments.Causal = "0",
    query: Annotated[
        str | None, typer.Option(help="position of the query [default: the middle]")
    ] = None,
    out: Out = None,
) -> None:
    """What one query sees: gna-jax draw window 24x24 -w 8 -s 4 --query 5x9."""
    with plain_errors():
        rule = _rule(window, dilation, causal, stride=stride)
        place = None if query is None else one_or_per_axis("--query", query)
        _show(pictures.window(per_axis("LAYOUT", layout), query=place, **rule), out)


@draw.command(no_args_is_help=True)
def strides(
    layout: arguments.Layout,
    window: arguments.Window,
    stride: Strides,
    dilation: arguments.Dilation = "1",
    causal: arguments.Causal = "0",
    out: Out = None,
) -> None:
    """One window at several strides, side by side: gna-jax draw strides 24x24 -w 8 -s 1 -s 2 -s 4 -s 8."""
    with plain_errors():
        rule = _rule(window, dilation, causal)
        each = [one_or_per_axis("--stride", one) for one in stride]
        _show(pictures.strides(per_axis("LAYOUT", layout), strides=each, **rule), out)


@draw.command(no_args_is_help=True)
def tiles(
    layout: arguments.Layout,
    window: arguments.Window,
    q_tile: QTile,
    kv_tile: KvTile,
    stride: arguments.Stride = "1",
    dilation: arguments.Dilation = "1",
    causal: arguments.Causal = "0",
    out: Out = None,
) -> None:
    """The KV tiles that one Q tile visits: gna-jax draw tiles 64x64 -w 24 --q-tile 8x8 --kv-tile 8x8."""
    with plain_errors():
        rule = _rule(window, dilation, causal, stride=stride, q_tile=q_tile, kv_tile=kv_tile)
        _show(pictures.tile_map(per_axis("LAYOUT", layout), **rule), out)


@draw.command(no_args_is_help=True)
def work(
    layout: arguments.Layout,
    window: arguments.Window,
    q_tile: QTile,
    kv_tile: KvTile,
    stride: arguments.Stride = "1",
    dilation: arguments.Dilation = "1",
    causal: arguments.Causal = "0",
    out: Out = None,
) -> None:
    """KV tiles visited by every Q tile: gna-jax draw work 96x128 -w 40 --q-tile 8x8 --kv-tile 8x8."""
    with plain_errors():
        rule = _rule(window, dilation, causal, stride=stride, q_tile=q_tile, kv_tile=kv_tile)
        _show(pictures.work_map(per_axis("LAYOUT", layout), **rule), out)


@draw.command(no_args_is_help=True)
def speedup(
    layout: arguments.Layout,
    window: arguments.Window,
    stride: Strides,
    q_tile: QTile,
    kv_tile: KvTile,
    dilation: arguments.Dilation = "1",
    causal: arguments.Causal = "0",
    dynamic: Annotated[
        bool, typer.Option("--dynamic/--static", help="where KV tiles start")
    ] = False,
    out: Out = None,
) -> None:
    """Simulated speedup against stride: gna-jax draw speedup 256x256 -w 80 -s 1 -s 16x1 -s 16 --q-tile 16x16 --kv-tile 16x8."""
    with plain_errors():
        rule = _rule(window, dilation, causal, q_tile=q_tile, kv_tile=kv_tile)
        sizes = per_axis("LAYOUT", layout)
        each = [one_or_per_axis("--stride", one) for one in stride]
        points = pictures.simulated_speedups(sizes, strides=each, dynamic=dynamic, **rule)
        kind = "dynamic" if dynamic else "static"
        title = f"{by(sizes)} tokens, window {window}, Q tile {q_tile}, {kind} KV tiles {kv_tile}"
        _show(pictures.speedup_curve(points, title), out)


@draw.command()
def gallery(
    folder: Annotated[Path, typer.Argument(help="folder to write to, made if missing")],
    suffix: Annotated[str, typer.Option(help=".png or .svg")] = ".png",
) -> None:
    """All pictures of the documentation: gna-jax draw gallery docs/pictures."""
    with plain_errors():
        for file in write_gallery(folder, suffix):
            typer.echo(str(file))


def _rule(window: str, dilation: str, causal: str, **others: str) -> dict[str, Any]:
    """Keyword arguments of a picture from the options' texts; `others` by the names of the options."""
    rule = {
        "window_size": one_or_per_axis("--window", window),
        "dilation": one_or_per_axis("--dilation", dilation),
        "is_causal": one_or_per_axis("--causal", causal),
    }
    for name, text in others.items():
        rule[name] = one_or_per_axis(f"--{name.replace('_', '-')}", text)
    return rule


def _show(picture: pictures.Picture, out: list[Path] | None) -> None:
    """Write the picture to every file, or print it where there is none."""
    if not out:
        console = Console()
        console.print(picture.text(console.width), end="")
    for file in out or ():
        picture.save(file)
        typer.echo(str(file))
