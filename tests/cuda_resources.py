"""The committed resources of the CUTLASS kernels, `cuda_resources.json`: how a kernel is compiled for it, and how it is written.

`python tests/cuda_resources.py` compiles every kernel anew and rewrites the table (twenty minutes on a CPU; needs nvcc, nvdisasm
and CUTLASS' headers, no GPU); with names of kernels it rewrites their rows alone. A rewritten row that got worse is a decision: say
why in the commit. CUTLASS's examples as they are have rows too, compiled with the same flags, to compare with.
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

    @property
    def source(self) -> str:
        """The program that is compiled."""
        return SOURCE.format(**self._asdict(), element=ELEMENTS[self.dtype]) + ENTRY

    @property
    def example(self) -> str:
        """The example that it derives from, of the same width of operands and head dim: that row's name."""
        operands = "float8_e4m3fn" if self.dtype == "float8_e4m3fn" else "bfloat16"
        return f"example77-forward-{operands}-{self.head_dim}"


class Example(NamedTuple):
    """CUTLASS's example 77 as it is, without masks."""

    direction: str
    dtype: str
    head_dim: int

    @property
    def name(self) -> str:
        """As its row is called."""
        return f"example77-{self.direction}-{self.dtype}-{self.head_dim}"

    @property
    def architecture(self) -> str:
        """What it is compiled for."""
        return "sm100"

    @property
    def source(self) -> str:
        """The program that is compiled."""
        text = EXAMPLE_SOURCES[self.direction]
        return text.format(element=ELEMENTS[self.dtype], head_dim=self.head_dim) + ENTRY


ELEMENTS = {
    "bfloat16": "cutlass::bfloat16_t",
    "float16": "cutlass::half_t",
    "float8_e4m3fn": "cutlass::float_e4m3_t",
}
KERNELS = tuple(
    Kernel(architecture, dtype, head_dim)
    for architecture, dtypes in (("sm90", ("bfloat16", "float16")), ("sm100", tuple(ELEMENTS)))
    for dtype in dtypes
    for head_dim in (128, 64)
)
EXAMPLES = (
    *(Example("forward", dtype, dim) for dtype in ("bfloat16", "float8_e4m3fn") for dim in (128, 64)),
    *(Example("backward", "bfloat16", dim) for dim in (128, 64)),
)  # fmt: skip
QUICK = (Kernel("sm90", "bfloat16", 128), Kernel("sm100", "bfloat16", 128))
"""Compiled by default, the others with the slow tests."""

INSTRUCTIONS = {
    "mma": r"\b(?:HGMMA|UTCHMMA|UTCQMMA)\b",
    "box_loads": r"\bUTMALDG\.5D\b",
    "box_stores": r"\bUTMASTG\.5D\b",
    "tensor_memory_loads": r"\bLDTM\b",
}
"""SASS instructions of each kind: products, tensor copies of five dimensions in and out, reads of tensor memory."""
SOFTMAX_EXPONENTIALS = 32
"""A loop with so many is one over visits."""
LOCAL = r"\b(?:LDL|STL)\b"
"""Accesses of local memory: of what is spilled, and of arrays that are indexed at run time."""
SMALL_IS_GOOD = (
    "registers",
    "spill_bytes",
    "stack_bytes",
    "local_accesses",
    "local_accesses_per_visit",
)
"""Of these a fresh compile may not have more than its row. Instructions may not become fewer: they would be others then."""

SOURCE = """
#include "{architecture}_forward.h"
using Kernel = gna::{architecture}::Kernel<{element}, {head_dim}>;
"""
_EXAMPLE = """
#include "cute/tensor.hpp"
#include "cutlass/kernel_hardware_info.h"
#include "cutlass/device_kernel.h"
#include "collective/fmha_fusion.hpp"
namespace fmha = cutlass::fmha;
using Heads = cute::tuple<cute::tuple<int, int>, int>;
"""
EXAMPLE_SOURCES = {
    "forward": _EXAMPLE
    + """
#include "collective/sm100_fmha_fwd_mainloop_tma_warpspecialized.hpp"
#include "collective/sm100_fmha_fwd_epilogue_tma_warpspecialized.hpp"
#include "kernel/fmha_tile_scheduler.hpp"
#include "kernel/sm100_fmha_fwd_kernel_tma_warpspecialized.hpp"
using Query = cute::tuple<int, cute::_1, Heads>;
using Key = cute::tuple<int, cute::_1, cute::tuple<cute::tuple<cute::_0, int>, int>>;
using Block = cute::Shape<cute::_256, cute::_128, cute::Int<{head_dim}>>;
using Mainloop = fmha::collective::Sm100FmhaFwdMainloopTmaWarpspecialized<
    {element}, float, float, Block, Query, Key, Key, fmha::collective::NoMask>;
using Epilogue = fmha::collective::Sm100FmhaFwdEpilogueTmaWarpspecialized<
    cutlass::bfloat16_t, float, Mainloop::TileShapePV, Query, cute::tuple<cute::_1, Heads>>;
using Kernel = fmha::kernel::Sm100FmhaFwdKernelTmaWarpspecialized<
    cute::tuple<int, int, int, Heads>, Mainloop, Epilogue, fmha::kernel::PersistentTileScheduler>;
""",
    "backward": _EXAMPLE
    + """
#include "kernel/sm100_fmha_bwd_kernel_tma_warpspecialized.hpp"
using Kernel = fmha::kernel::Sm100FmhaBwdKernelTmaWarpSpecialized<
    cute::tuple<int, int, int, int, Heads>, {element}, float,
    cute::Shape<cute::_128, cute::_128, cute::Int<{head_dim}>, cute::Int<{head_dim}>>,
    fmha::collective::NoMask>;
""",
}
ENTRY = """
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


def compiled(kernel: Kernel | Example) -> dict[str, Any]:
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
        source.write_text(kernel.source)
        command = [_tool("nvcc"), "-cubin", f"-arch={kernel.architecture.replace('sm', 'sm_')}a"]
        command += [*FLAGS, "-Xptxas=-v", *(f"-I{path}" for path in includes)]
        report = _run([*command, "-o", str(binary), str(source)])
        sass = _run([_tool("nvdisasm"), "-c", str(binary)])
    return row_of(kernel, report, sass)


def row_of(kernel: Kernel | Example, report: str, sass: str) -> dict[str, Any]:
    """A row from what ptxas reports and the kernel's SASS."""
    frame = r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    # The last function is the kernel.
    stack, stores, loads = map(int, re.findall(frame, report)[-1])
    registers = int(re.findall(r"Used (\d+) registers", report)[-1])
    counts = {name: len(re.findall(pattern, sass)) for name, pattern in INSTRUCTIONS.items()}
    numbers = {"registers": registers, "spill_bytes": stores + loads, "stack_bytes": stack}
    visits = visit_loops(sass)
    local = {
        "local_accesses": len(re.findall(LOCAL, sass)),
        "local_accesses_per_visit": len(re.findall(LOCAL, "".join(visits))),
        "visit_instructions": [visit.count(";") for visit in visits],
    }
    # wgmma that waits for itself: the compiler says so, and it costs half the speed.
    serialized = {"serialized_wgmma": len(re.findall(r"are serialized", report))}
    return {"kernel": kernel.name, **numbers, **local, **counts, **serialized}


def visit_loops(sass: str) -> list[str]:
    """The loops over visits in a kernel's SASS, each as text: the shortest ones that hold a softmax of many scores."""
    lines = sass.splitlines(keepends=True)
    labels = {
        line.strip()[:-1]: n for n, line in enumerate(lines) if re.match(r"\s*\.L_\S+:", line)
    }
    jumps = ((n, re.search(r"\bBRA\b.*`\((\.L_\S+)\)", line)) for n, line in enumerate(lines))
    loops = [(labels.get(jump[1], n), n) for n, jump in jumps if jump]
    found: list[range] = []
    for first, last in sorted(loops, key=lambda loop: loop[1] - loop[0]):
        loop = range(first, last)
        is_inner = not any(max(first, one.start) < min(last, one.stop) for one in found)
        if is_inner and "".join(lines[first:last]).count("MUFU.EX2") >= SOFTMAX_EXPONENTIALS:
            found.append(loop)
    found.sort(key=lambda loop: loop.start)
    return ["".join(lines[loop.start : loop.stop + 1]) for loop in found]


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
    for kernel in (*KERNELS, *EXAMPLES):
        if names and kernel.name not in names:
            continue
        row = compiled(kernel)
        print(json.dumps(row), file=sys.stderr)
        rows = read() | {kernel.name: row}
        lines = ",\n".join(
            json.dumps(rows[k.name]) for k in (*KERNELS, *EXAMPLES) if k.name in rows
        )
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
