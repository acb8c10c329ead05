"""The committed resources of the CUTLASS kernels, `cuda_resources.json`: how a kernel is compiled for it, and how it is written.

`python tests/cuda_resources.py` compiles every kernel anew and rewrites the table (ten minutes on a CPU; needs nvcc, nvdisasm and
CUTLASS' headers, no GPU); with names of kernels it rewrites their rows alone. A rewritten row that got worse is a decision: say
why in the commit.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from gna_jax.inspection.toolchain import find_tool

TABLE = Path(__file__).with_suffix(".json")
CUDA_FFI = Path(__file__).parents[1] / "cuda_ffi"
COMPILE_SECONDS = 550
"""Of one kernel: half a minute of CPU time on an idle machine."""
FLAGS = ("-std=c++17", "-O3", "-DNDEBUG", "--use_fast_math", "--expt-relaxed-constexpr")
FLAGS += ("--extended-lambda",)
"""As in `cuda_ffi/CMakeLists.txt`."""


class Kernel(NamedTuple):
    """One instantiation of a kernel."""

    architecture: str
    dtype: str
    head_dim: int

    @property
    def name(self) -> str:
        """As rows and tests are called."""
        return f"{self.architecture}-{self.dtype}-{self.head_dim}"


ELEMENTS = {"bfloat16": "cutlass::bfloat16_t", "float16": "cutlass::half_t"}
KERNELS = tuple(
    Kernel(architecture, dtype, head_dim)
    for architecture in ("sm90", "sm100")
    for dtype in ELEMENTS
    for head_dim in (128, 64)
)
QUICK = (Kernel("sm90", "bfloat16", 128), Kernel("sm100", "bfloat16", 128))
"""Compiled by default, the others with the slow tests."""

INSTRUCTIONS = {
    "mma": r"\b(?:HGMMA|UTCHMMA)\b",
    "box_loads": r"\bUTMALDG\.5D\b",
    "box_stores": r"\bUTMASTG\.5D\b",
    "tensor_memory_loads": r"\bLDTM\b",
}
"""SASS instructions of each kind: products, tensor copies of five dimensions in and out, reads of tensor memory."""
SMALL_IS_GOOD = ("registers", "spill_bytes", "stack_bytes")
"""Of these a fresh compile may not have more than its row. Instructions may not become fewer: they would be others then."""

SOURCE = """
#include "{architecture}_forward.h"
using Kernel = gna::{architecture}::Kernel<{element}, {head_dim}>;
template __global__ void cutlass::device_kernel<Kernel>(__grid_constant__ const Kernel::Params);
"""


def cutlass() -> Path:
    """The folder with CUTLASS' `include` and `examples`: `$GNA_JAX_CUTLASS`, else inside its wheel.

    Raises:
      RuntimeError: where there is neither.
    """
    if folder := os.environ.get("GNA_JAX_CUTLASS"):
        return Path(folder)
    spec = importlib.util.find_spec("cutlass_library")
    if spec is None or spec.origin is None:
        raise RuntimeError(
            "compiling the CUTLASS kernels takes CUTLASS' headers: pip install --no-deps nvidia-cutlass==4.2.0.0,"
            " or set GNA_JAX_CUTLASS to a folder with its include and examples"
        )
    return Path(spec.origin).parent / "source"


def compiled(kernel: Kernel) -> dict[str, Any]:
    """The row of a kernel, compiled now.

    Raises:
      RuntimeError: without nvcc, nvdisasm or the headers, or where a program fails.
    """
    headers = cutlass()
    includes = [CUDA_FFI / "include", CUDA_FFI / "kernels", headers / "include"]
    includes += [headers / "tools/util/include", headers / "examples"]
    includes += [headers / "examples/77_blackwell_fmha"]
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder, "kernel.cu"), Path(folder, "kernel.cubin")
        element = ELEMENTS[kernel.dtype]
        source.write_text(SOURCE.format(**kernel._asdict(), element=element))
        command = [_tool("nvcc"), "-cubin", f"-arch={kernel.architecture.replace('sm', 'sm_')}a"]
        command += [*FLAGS, "-Xptxas=-v", *(f"-I{path}" for path in includes)]
        report = _run([*command, "-o", str(binary), str(source)])
        sass = _run([_tool("nvdisasm"), "-c", str(binary)])
    return row_of(kernel, report, sass)


def row_of(kernel: Kernel, report: str, sass: str) -> dict[str, Any]:
    """A row from what ptxas reports and the kernel's SASS."""
    frame = r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    # The last function is the kernel.
    stack, stores, loads = map(int, re.findall(frame, report)[-1])
    registers = int(re.findall(r"Used (\d+) registers", report)[-1])
    counts = {name: len(re.findall(pattern, sass)) for name, pattern in INSTRUCTIONS.items()}
    numbers = {"registers": registers, "spill_bytes": stores + loads, "stack_bytes": stack}
    # wgmma that waits for itself: the compiler says so, and it costs half the speed.
    serialized = {"serialized_wgmma": len(re.findall(r"are serialized", report))}
    return {"kernel": kernel.name, **numbers, **counts, **serialized}


def read() -> dict[str, dict[str, Any]]:
    """The table's rows by kernel."""
    rows = json.loads(TABLE.read_text()) if TABLE.exists() else []
    return {row["kernel"]: row for row in rows}


def worse(row: dict[str, Any], fresh: dict[str, Any]) -> list[str]:
    """What a fresh row has worse than the table's, for people."""
    return [
        f"{field}: {fresh[field]}, was {row[field]}"
        for field in row
        if (field in (*SMALL_IS_GOOD, "serialized_wgmma") and fresh[field] > row[field])
        or (field in INSTRUCTIONS and fresh[field] < row[field])
    ]


def write(names: list[str]) -> None:
    """Compile and rewrite the table, after every kernel: every row, or those of some kernels."""
    for kernel in KERNELS:
        if names and kernel.name not in names:
            continue
        row = compiled(kernel)
        print(json.dumps(row), file=sys.stderr)
        rows = read() | {kernel.name: row}
        lines = ",\n".join(json.dumps(rows[k.name]) for k in KERNELS if k.name in rows)
        TABLE.write_text(f"[\n{lines}\n]\n")


def _tool(name: str) -> str:
    path = find_tool(name)
    if path is None:
        raise RuntimeError(
            f"compiling the CUTLASS kernels takes {name}: CUDA's bin folder on PATH, or pip install --no-deps"
            " nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-crt nvidia-cuda-runtime nvidia-cuda-cccl nvidia-cuda-nvdisasm"
        )
    return path


def _run(command: list[str]) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=COMPILE_SECONDS, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name} failed: {done.stderr[-3000:]}")
    return done.stdout + done.stderr


if __name__ == "__main__":
    write(sys.argv[1:])
