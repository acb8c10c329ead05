"""`gna-jax explain`: what `gna` would run for a shape, and why."""

import dataclasses
import json
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import typer
from rich.console import Console

import gna_jax
from gna_jax.cli import arguments
from gna_jax.cli.arguments import one_or_per_axis, per_axis, plain_errors


def explain(
    layout: arguments.Layout,
    window: arguments.Window,
    stride: arguments.Stride = "1",
    dilation: arguments.Dilation = "1",
    causal: arguments.Causal = "0",
    batch: arguments.Batch = 1,
    heads: arguments.Heads = 1,
    kv_heads: arguments.KvHeads = None,
    dim: arguments.Dim = 64,
    value_dim: Annotated[int | None, typer.Option(help="of the values [default: as --dim]")] = None,
    dtype: arguments.Dtype = "bfloat16",
    device: Annotated[
        str | None, typer.Option(help="a device by name, such as h200 [default: this machine's]")
    ] = None,
    implementation: Annotated[
        str | None, typer.Option(help="ask for one implementation [default: chosen]")
    ] = None,
    as_json: arguments.Json = False,
) -> None:
    """Print which implementation and tiles `gna` would use for LAYOUT, how long it should take, and why not the others.

    No array is made, so any size can be asked about: gna-jax explain 30x48x80 -w 18x24x24 -s 16x8x8 -n 24 -d 128
    """
    with plain_errors():
        space = per_axis("LAYOUT", layout)
        kv_heads = heads if kv_heads is None else kv_heads
        value_dim = dim if value_dim is None else value_dim
        explanation = gna_jax.explain(
            _array(dtype, batch, *space, heads, dim),
            _array(dtype, batch, *space, kv_heads, dim),
            _array(dtype, batch, *space, kv_heads, value_dim),
            window_size=one_or_per_axis("--window", window),
            stride=one_or_per_axis("--stride", stride),
            dilation=one_or_per_axis("--dilation", dilation),
            is_causal=one_or_per_axis("--causal", causal),
            device=device,
            implementation=implementation,
        )
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(explanation), default=str))
    else:
        Console().print(str(explanation), highlight=False, markup=False, soft_wrap=True)


def _array(dtype: str, *shape: int) -> Any:
    """Shape and dtype of an array that is never made."""
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
