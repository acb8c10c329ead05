"""`gna-jax build-cuda`: build the CUDA library for `implementation="cutlass"`, into the user's cache."""

import time
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from gna_jax.cli.arguments import plain_errors
from gna_jax.inspection.toolchain import find_tool


def build_cuda(
    force: Annotated[bool, typer.Option("--force", help="build a library anew")] = False,
) -> None:
    """Build the CUDA kernels into this user's cache; minutes, 4 GB of memory for each of two kernels, no GPU.

    Takes nvcc (the machine's, that of pip's nvidia-cuda-nvcc, or $CUDACXX), cmake, ninja and CUTLASS' wheel:
    pip install 'gna-jax[cuda-build]' brings all of them.
    """
    from cuda_ffi import build, library  # not a matter of any other command

    started = time.monotonic()
    with plain_errors():
        path = None if force else build.built()
        if path is not None:
            typer.echo(f"already built: {path}; --force builds it anew")
            return
        toolchain = build.find_toolchain(find_tool)
        with _progress() as progress:
            task = progress.add_task("starting", total=None)

            def report(done: int, steps: int, what: str) -> None:
                # The last word names the file.
                what = f"{done}/{steps} {what.split('/')[-1]}" if steps else what
                progress.update(task, completed=done, total=steps or None, description=what)
                if not progress.console.is_terminal:
                    progress.console.print(what)

            path = build.build(toolchain, report)
        size = path.stat().st_size / 2**20
        library.load()
    typer.echo(f"built in {time.monotonic() - started:.0f} s, {size:.1f} MiB: {path}")


def _progress() -> Progress:
    """One line on a terminal, gone when done."""
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    return Progress(*columns, console=Console(stderr=True), transient=True)
