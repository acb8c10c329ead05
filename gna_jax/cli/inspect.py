"""`gna-jax inspect`: what the GPU compiler makes of the kernels of a call, on a machine without a GPU."""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NamedTuple

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from gna_jax.cli import arguments
from gna_jax.cli.arguments import one_or_per_axis, per_axis, plain_errors
from gna_jax.inspection import Call, CompiledKernel, KernelResources, compile_kernel, toolchain
from gna_jax.neighborhood import by
from gna_jax.simulator.cost import duration

TILE_HELP = f"{arguments.PER_AXIS}, as in 2x8x8 (default: chosen)"


def inspect(
    layout: arguments.Layout,
    window: arguments.Window,
    stride: arguments.Stride = "1",
    dilation: arguments.Dilation = "1",
    causal: arguments.Causal = "0",
    batch: arguments.Batch = 1,
    heads: arguments.Heads = 1,
    kv_heads: arguments.KvHeads = None,
    dim: arguments.Dim = 128,
    dtype: arguments.Dtype = "bfloat16",
    device: Annotated[str, typer.Option(help="GPU to compile for: h100, h200, b200")] = "h200",
    direction: Annotated[str, typer.Option(help="forward, backward or both")] = "both",
    q_tile: Annotated[
        str | None, typer.Option("--q-tile", help=f"queries per tile: {TILE_HELP}")
    ] = None,
    kv_tile: Annotated[
        str | None, typer.Option("--kv-tile", help=f"keys per tile: {TILE_HELP}")
    ] = None,
    backward_q_tile: Annotated[
        str | None, typer.Option(help=f"queries per tile of dK and dV: {TILE_HELP}")
    ] = None,
    backward_kv_tile: Annotated[
        str | None, typer.Option(help=f"keys per tile of dK and dV: {TILE_HELP}")
    ] = None,
    ptx: Annotated[Path | None, typer.Option(help="folder to write each kernel's PTX to")] = None,
    sass: Annotated[
        Path | None, typer.Option(help="folder to write each kernel's SASS to (needs nvdisasm)")
    ] = None,
    as_json: arguments.Json = False,
) -> None:
    """Compile the GPU kernels of a call, here, without a GPU, and print their registers, spills, memory and instructions.

    gna-jax inspect 30x48x80 -w 18x24x24 -s 16x8x8 -n 24 --device b200; gna-jax inspect 256x256 -w 80 --ptx kernels
    """
    with plain_errors():
        call = Call(
            layout=per_axis("LAYOUT", layout),
            window_size=one_or_per_axis("--window", window),
            stride=one_or_per_axis("--stride", stride),
            dilation=one_or_per_axis("--dilation", dilation),
            is_causal=one_or_per_axis("--causal", causal),
            batch=batch,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=dim,
            dtype=dtype,
            device=device,
            q_tile=_tile("--q-tile", q_tile),
            kv_tile=_tile("--kv-tile", kv_tile),
            backward_q_tile=_tile("--backward-q-tile", backward_q_tile),
            backward_kv_tile=_tile("--backward-kv-tile", backward_kv_tile),
        )
        names = [kernel.name for kernel in call.kernels(direction)]
        _check_tools(sass is not None)
        compiled = _compile(call, names)
        files = _write(compiled, ptx, sass)
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(one.resources) for one in compiled]))
    else:
        _show(Console(), [one.resources for one in compiled], files)


def _tile(name: str, text: str | None) -> int | tuple[int, ...] | None:
    return None if text is None else one_or_per_axis(name, text)


def _check_tools(with_sass: bool) -> None:
    """Before the first kernel is compiled, rather than after the last."""
    missing = toolchain.missing() or (toolchain.missing_for_sass() if with_sass else None)
    if missing is not None:
        raise RuntimeError(missing)


def _compile(call: Call, names: list[str]) -> list[CompiledKernel]:
    """One after the other, with a progress bar on stderr."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    compiled = []
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(names))
        for name in names:
            progress.update(task, description=name)
            compiled.append(compile_kernel(call, name))
            progress.advance(task)
    return compiled


def _write(compiled: list[CompiledKernel], ptx: Path | None, sass: Path | None) -> list[Path]:
    """The files that the user asked for, such as hopper_forward.sm_90a.ptx."""
    files = []
    for one in compiled:
        architecture = one.resources.architecture
        stem = f"{one.resources.kernel}.{architecture}"
        if ptx is not None:
            files.append(_write_text(ptx / f"{stem}.ptx", one.ptx))
        if sass is not None:
            text = toolchain.disassemble(one.ptx, architecture)
            files.append(_write_text(sass / f"{stem}.sass", text))
    return files


def _write_text(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


def _show(console: Console, rows: list[KernelResources], files: list[Path]) -> None:
    """For people: what was compiled, a table with a column per kernel, and what XLA runs around them."""
    one = rows[0]
    causal = [axis for axis, flag in enumerate(one.is_causal) if flag]
    say = functools.partial(console.print, highlight=False, markup=False, soft_wrap=True)
    say(
        f"{by(one.layout)} tokens, batch {one.batch}, {one.heads} heads ({one.kv_heads} key/value)"
        f" x {one.head_dim}, {one.dtype}"
    )
    say(
        f"window {by(one.window_size)}, stride {by(one.stride)}, dilation {by(one.dilation)}"
        + (f", causal axes {causal}" if causal else "")
    )
    for copy in one.copies:
        say(f"copied before: {copy}")
    say(f"{one.device}, {one.architecture}: compiled, not run; times are predicted, not measured")
    console.print()
    console.print(_table(rows))
    for row in rows:
        for text in row.memory_passes:
            say(f"around {row.kernel}: {text}")
    for file in files:
        say(str(file))


def _table(rows: list[KernelResources]) -> Table:
    """A column per kernel. What a good kernel has none of is printed in red."""
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for row in rows:
        _, _, job = row.kernel.partition("_")
        table.add_column(job.replace("_", " "), justify="right", no_wrap=True)
    for line in LINES:
        texts = [line.text(row) for row in rows]
        if any(texts):
            styles = ["bold red" if line.alarm(row) else "" for row in rows]
            table.add_row(line.label, *map(Text, texts, styles))
    return table


class Line(NamedTuple):
    """A line of the table: its label, a kernel's text, and whether that is a fault. Left out where all texts are empty."""

    label: str
    text: Callable[[KernelResources], str]
    alarm: Callable[[KernelResources], bool] = lambda row: False


def _moved_registers(row: KernelResources) -> str:
    if row.worker_registers == row.producer_registers:
        return ""
    return f"{row.worker_registers} / {row.producer_registers}"


LINES = (
    Line("Q / KV tile", lambda row: f"{by(row.q_tile)} / {by(row.kv_tile)}"),
    Line("threads per block", lambda row: str(row.threads)),
    Line("registers per thread", lambda row: f"{row.registers} of {row.most_registers}"),
    Line("  worker / producer", _moved_registers),
    Line("  spilled, B", lambda row: str(row.spill_bytes), lambda row: row.spill_bytes > 0),
    Line("  stack, B", lambda row: str(row.stack_bytes), lambda row: row.stack_bytes > 0),
    Line(
        "shared memory, KiB",
        lambda row: f"{row.smem_bytes / 1024:.1f} of {row.smem_limit / 1024:.0f}",
        lambda row: row.smem_bytes > row.smem_limit,
    ),
    Line(
        "tensor memory, columns",
        lambda row: f"{row.tmem_columns} of {row.tmem_limit}" if row.tmem_limit else "",
    ),
    Line("matrix instructions", lambda row: f"{row.mma} {row.mma_instruction}"),
    Line(
        "  serialized",
        lambda row: str(row.serialized_wgmma) if row.serialized_wgmma else "",
        lambda row: row.serialized_wgmma > 0,
    ),
    Line("tensor loads", lambda row: f"{row.tma_loads} of {row.tma_load_rank} axes"),
    Line("tensor stores", lambda row: str(row.tma_stores)),
    Line(
        "memory passes",
        lambda row: str(len(row.memory_passes)),
        lambda row: len(row.memory_passes) > 0,
    ),
    Line(
        "predicted time",
        lambda row: "" if row.predicted_seconds is None else duration(row.predicted_seconds),
    ),
)
