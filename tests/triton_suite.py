"""Shared by the tests of the Triton kernels: the interpreter on numpy arrays, made quicker, and kernels compiled without a GPU.

Triton decides at its import whether it interprets, so values and compiled code are tested in processes of their own (make test-triton).
"""

import contextlib
import dataclasses
import inspect
import math
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from gna_jax.backends.triton import toolchain
from gna_jax.backends.triton.plan import KernelPlan
from gna_jax.backends.triton.tiles import Job, complete, settings
from gna_jax.device import KNOWN_DEVICES, DeviceSpec
from gna_jax.neighborhood import Neighborhood
from gna_jax.problem import Operands, Problem, describe
from gna_jax.tiling import Tiles

GPUS = {
    80: DeviceSpec("NVIDIA A100", "cuda", (8, 0)),
    89: DeviceSpec("NVIDIA L40", "cuda", (8, 9)),
    90: DeviceSpec("NVIDIA H200", "cuda", (9, 0)),
    120: DeviceSpec("NVIDIA GeForce RTX 5090", "cuda", (12, 0)),
}
INTERPRETED = dataclasses.replace(KNOWN_DEVICES["a100"], is_interpreted=True)
SHARED_MEMORY = {80: 99 << 10, 89: 99 << 10, 90: 227 << 10, 120: 99 << 10}
"""Of a program. What is compiled for 8.0 runs on 8.6 too, which has less than an A100."""


@contextlib.contextmanager
def quick_interpreter():
    """The interpreter, three times as quick: it patches Triton's language once per kernel and not per call inside it, and
    does not repeat all integer arithmetic in 64 bits."""
    import triton.language as tl
    from triton.runtime import interpreter

    patch, execute = interpreter._patch_lang, interpreter.GridExecutor.__call__
    options = interpreter.interpreter_builder.options
    patched: set[str] = set()

    def patch_once(function: Any) -> Any:
        modules = [x for x in function.__globals__.values() if inspect.ismodule(x)]
        languages = {x.__name__ for x in modules if x in (tl, tl.core)}
        if languages and languages <= patched:
            return interpreter._LangPatchScope()
        patched.update(languages)
        return patch(function)

    def execute_afresh(self: Any, *arguments: Any, **named: Any) -> Any:
        patched.clear()
        try:
            return execute(self, *arguments, **named)
        finally:
            patched.clear()

    interpreter._patch_lang = patch_once
    interpreter.GridExecutor.__call__ = execute_afresh
    interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)
    try:
        yield
    finally:
        interpreter._patch_lang = patch
        interpreter.GridExecutor.__call__ = execute
        interpreter.interpreter_builder.options = options


def run(
    kernel: Any, plan: Any, arrays: list[np.ndarray | None], programs: int, **constants: Any
) -> list[np.ndarray]:
    """A kernel of any plan in the interpreter, on copies of numpy arrays; what it wrote to them."""
    from gna_jax.backends.triton.launch import Memory

    memories = [None if array is None else Memory(array.copy()) for array in arrays]
    kernel[(programs,)](*memories, plan=plan, **constants)
    return [memory.array for memory in memories if memory is not None]


def problem_of(
    layout: tuple[int, ...],
    rule: dict[str, Any],
    dim: int,
    dtype: Any,
    *,
    heads: tuple[int, int] = (4, 2),
    num_additional: int = 0,
    has_bias: bool = False,
    device: DeviceSpec = GPUS[80],
    precision: Any = None,
    slabs: tuple[tuple[int, ...], tuple[int, ...]] | None = None,
) -> Problem:
    """A problem by its shapes alone; `slabs` are layouts of queries and of keys."""
    shape = lambda *sizes: jax.ShapeDtypeStruct((2, *sizes, dim), dtype)
    queries, keys = slabs or (layout, layout)
    neighborhood = Neighborhood.of(len(layout), **rule)
    operands = Operands(shape(*queries, heads[0]), *(shape(*keys, heads[1]),) * 2)
    if slabs:
        origin = jax.ShapeDtypeStruct((len(layout),), np.int32)
        operands = operands._replace(query_origin=origin, key_origin=origin)
    if num_additional:
        more = shape(num_additional, heads[1])
        operands = operands._replace(additional_keys=more, additional_values=more)
    if has_bias:
        table = (heads[0], *(2 * size - 1 for size in neighborhood.window_size))
        operands = operands._replace(bias=jax.ShapeDtypeStruct(table, np.float32))
    return describe(
        operands,
        neighborhood,
        scale=None,
        precision=precision,
        device=device,
        global_layout=layout if slabs else None,
    )


def kernel_of(job: str) -> Any:
    """The kernel of a job."""
    from gna_jax.backends.triton.kernels import bias_gradient, forward, key_gradient, query_gradient

    return {
        "forward": forward.forward_kernel,
        "query_gradient": query_gradient.query_gradient_kernel,
        "key_gradient": key_gradient.key_gradient_kernel,
        "additional_gradient": key_gradient.additional_gradient_kernel,
        "bias_gradient": bias_gradient.bias_gradient_kernel,
    }[job]


class Compiled(NamedTuple):
    """What a kernel takes of a multiprocessor, and its PTX."""

    registers: int
    spilled: int
    shared_memory: int
    ptx: str


def compiled(
    job: Job | str, problem: Problem, capability: int, tiles: Tiles | None = None
) -> Compiled:
    """A kernel with its default tiles and settings, compiled for a GPU that need not be there."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    name: Job = "key_gradient" if job == "additional_gradient" else job  # type: ignore[assignment]
    chosen = settings(problem, name)
    q, kv = (tiles.q, tiles.kv) if tiles else _shapes(problem, name)
    kernel, plan = kernel_of(job), KernelPlan.of(problem, q, kv or ())
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {"plan": plan}
    attributes = {}
    for number, argument in enumerate(kernel.arg_names):
        if argument == "plan" or _is_absent(argument, problem):
            signature[argument] = "constexpr"
            constants.setdefault(argument, None)
            continue
        signature[argument] = "*" + toolchain.type_name(np.dtype(_dtype(argument, job, problem)))
        attributes[(number,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": chosen.num_warps, "num_stages": chosen.num_stages} | toolchain.OPTIONS
    program = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, spilled = _usage(program.asm["cubin"], Path(triton.__file__).parent)
    return Compiled(registers, spilled, program.metadata.shared, program.asm["ptx"])


def _shapes(problem: Problem, job: Job) -> tuple[Any, Any]:
    tiles = complete(problem, None, job)
    return (tiles.backward_q, tiles.backward_kv) if job == "key_gradient" else (tiles.q, tiles.kv)


def _is_absent(argument: str, problem: Problem) -> bool:
    if argument == "bias":
        return not problem.has_bias
    if argument.endswith("_origin"):
        return not problem.is_slab
    if argument == "additional_lengths":
        return not problem.has_additional_lengths
    return argument.startswith("additional_") and not problem.num_additional


def _dtype(argument: str, job: str, problem: Problem) -> Any:
    sums = job == "additional_gradient" and argument.endswith("change")
    if sums or argument in ("lse", "delta", "bias", "bias_change", "scratch"):
        return np.float32
    return np.int32 if argument.endswith("_origin") else problem.dtype


def _usage(cubin: bytes, package: Path) -> tuple[int, int]:
    """Registers per thread, and bytes of memory that each spills to."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(package / "backends/nvidia/bin/cuobjdump"), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    assert found, text
    return int(found[1]), int(found[2]) + int(found[3])


def tile_count(plan: KernelPlan, is_inverse: bool) -> int:
    """Own tiles of all groups."""
    return plan.kv_tiles if is_inverse else plan.q_tiles


def visits_at_most(layout: tuple[int, ...], tile: tuple[int, ...]) -> int:
    """More visits than any walk has."""
    return math.prod(-(-n // t) + 1 for n, t in zip(layout, tile, strict=True))
