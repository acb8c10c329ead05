"""One kernel of a call compiled for its device, in a process of its own. What the compiler wrote is read in `report`.

A process per kernel, because Mosaic's cache of kernels does not tell GPUs apart, because the folder for its files is read once
from the environment, and because LLVM ends the whole process where it cannot compile.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from gna_jax.device import DeviceSpec
from gna_jax.inspection import toolchain
from gna_jax.inspection.call import Call
from gna_jax.inspection.report import CompilerFiles, KernelResources, read_resources
from gna_jax.inspection.targets import target_config

COMPILE_SECONDS = 300
"""Time for one kernel; on an idle core they take 5 to 20."""
ERROR_LINES = 15
"""Last lines of a failed compiler's messages that are shown."""


@dataclasses.dataclass(frozen=True)
class CompiledKernel:
    """A kernel's resources, and its PTX."""

    resources: KernelResources
    ptx: str


def compile_kernel(call: Call, name: str, seconds: float = COMPILE_SECONDS) -> CompiledKernel:
    """Compile the kernel `name` of `call.kernels()` in a new process.

    Raises:
      ValueError: for what is never legal, and for a name that the call has no kernel of.
      NotImplementedError: where the mosaic backend cannot run the call.
      RuntimeError: without jax's CUDA compiler or `ptxas` (the text says how to install them), where compiling fails, or
        where it takes longer than `seconds`.
    """
    kernel = next((one for one in call.kernels() if one.name == name), None)
    if kernel is None:
        names = [one.name for one in call.kernels()]
        raise ValueError(f"the call has the kernels {names}; got name={name!r}")
    missing = toolchain.missing()
    if missing is not None:
        raise RuntimeError(missing)
    with tempfile.TemporaryDirectory() as folder:
        _run_compiler(call, name, folder, seconds)
        files = CompilerFiles.of(Path(folder))
    return CompiledKernel(read_resources(kernel, call.copies(), files), files.ptx)


def _run_compiler(call: Call, name: str, folder: str, seconds: float) -> None:
    request = json.dumps({"call": dataclasses.asdict(call), "kernel": name, "folder": folder})
    root = str(Path(__file__).parents[2])
    environment = os.environ | {
        "PATH": toolchain.search_path(),
        "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "JAX_PLATFORMS": "cpu",  # the compiler is asked for by name: jax need not look for a GPU
        "JAX_ENABLE_COMPILATION_CACHE": "0",  # what comes out of a cache leaves no files
        "MOSAIC_GPU_DUMP_TO": folder,
    }
    try:
        done = subprocess.run(
            [sys.executable, "-m", "gna_jax.inspection", request],
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(
            f"compiling {name} for {call.device} took longer than {seconds:g} s, where 20 are usual:"
            " try again when the machine is less busy"
        ) from None
    if done.returncode:
        said = "\n".join(done.stderr.strip().splitlines()[-ERROR_LINES:])
        raise RuntimeError(
            f"compiling {name} for {call.device} failed, exit code {done.returncode}:\n{said}"
        )


def compile_here(call: Call, name: str, folder: Path) -> None:
    """Compile in this process; Mosaic's files go where `MOSAIC_GPU_DUMP_TO` says, XLA's program to `folder`."""
    (kernel,) = (one for one in call.kernels() if one.name == name)
    program = compile_program(kernel.call, kernel.arguments, kernel.plan.problem.device)
    CompilerFiles.program_path(folder).write_text(program)


def compile_program(
    function: Callable[..., Any], arguments: tuple[Any, ...], device: DeviceSpec
) -> str:
    """XLA's optimised program of `function(*arguments)` for a GPU that need not be there. One GPU per process.

    Args:
      function: what to compile.
      arguments: trees of `jax.ShapeDtypeStruct`.
      device: GPU to compile for.
    """
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=target_config(device), topology="1x1x1"
    )
    mesh = topologies.make_mesh(topology, (1,), ("device",))
    whole = NamedSharding(mesh, PartitionSpec())
    placed = jax.tree.map(
        lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=whole), arguments
    )
    return jax.jit(function).trace(*placed).lower().compile().as_text() or ""
