"""The compiler's files, read into one record of numbers. Nothing is compiled here, and no number is judged.

Mosaic writes the kernel's PTX, the report of `ptxas` and the memory it asked for; XLA's program shows what runs around the kernel.
"""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gna_jax.inspection.call import predicted_seconds
from gna_jax.inspection.targets import architecture

if TYPE_CHECKING:
    from gna_jax.backends.mosaic.kernels import Kernel

REGISTERS_PER_BLOCK = 1 << 16
MOST_REGISTERS = 255
"""Of one thread: the instructions' limit."""
REGISTER_UNIT = 8
"""Registers are given to threads in multiples of it."""


@dataclasses.dataclass(frozen=True)
class KernelResources:
    """What one compiled kernel takes and holds.

    Attributes:
      kernel, direction: name, and `"forward"` or `"backward"`.
      device, architecture: kind of GPU, and its instruction set, such as `"sm_90a"`.
      layout, window_size, stride, dilation, is_causal, batch, heads, kv_heads, head_dim, dtype: the call, as the kernel sees
        it: `head_dim` is the kernel's, at least the call's.
      q_tile, kv_tile: the kernel's tiles.
      threads: per block.
      registers: per thread, at launch.
      most_registers: what a thread could have at launch: an even share of the SM's, at most 255.
      worker_registers, producer_registers: per thread after the kernel has moved registers from the warpgroup that copies to those
        that compute; equal to `registers` where it does not.
      spill_bytes: stored to and loaded from memory because registers ran out, per thread. 0 in a good kernel.
      stack_bytes: of memory per thread. 0 in a good kernel.
      smem_bytes, smem_limit: shared memory of a block, and what the device allows.
      tmem_columns, tmem_limit: tensor memory of a block and of the device, in columns; 0 on Hopper.
      mma, mma_instruction: instructions on the matrix unit in the program, and which: `"wgmma"` or `"tcgen05.mma"`.
      serialized_wgmma: times that `ptxas` says that it made wgmma wait for each other. 0 in a good kernel.
      tma_loads, tma_load_rank, tma_stores: tensor copies in the program into and out of shared memory, and the axes of the widest.
      memory_passes: what XLA runs around the kernel that reads or writes an array of the operands' dtype, such as padding or a
        permutation of tokens, as "fusion bf16[2,64,64,256] pad_to_dilation/pad"; empty where the kernel takes the arrays as they are.
      copies: what `gna` copies before its kernels, for people: padding for dilation or head dims.
      predicted_seconds: by the cost model, no measurement; None on a device that it does not know.
    """

    kernel: str
    direction: str
    device: str
    architecture: str
    layout: tuple[int, ...]
    window_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    is_causal: tuple[bool, ...]
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    q_tile: tuple[int, ...]
    kv_tile: tuple[int, ...]
    threads: int
    registers: int
    most_registers: int
    worker_registers: int
    producer_registers: int
    spill_bytes: int
    stack_bytes: int
    smem_bytes: int
    smem_limit: int
    tmem_columns: int
    tmem_limit: int
    mma: int
    mma_instruction: str
    serialized_wgmma: int
    tma_loads: int
    tma_load_rank: int
    tma_stores: int
    memory_passes: tuple[str, ...]
    copies: tuple[str, ...]
    predicted_seconds: float | None


@dataclasses.dataclass(frozen=True)
class CompilerFiles:
    """Texts that the compiler wrote for one kernel.

    Attributes:
      ptx: the kernel.
      ptxas: report of the assembler.
      memory: memory that the kernel asks for.
      program: XLA's optimised program around it.
    """

    ptx: str
    ptxas: str
    memory: str
    program: str

    @classmethod
    def of(cls, folder: Path) -> "CompilerFiles":
        """The files of the one Mosaic kernel in the folder.

        Raises:
          RuntimeError: where a file is missing, or there are several kernels.
        """
        texts = {}
        for name, pattern in (
            ("ptx", "*.ptx"),
            ("ptxas", "*.ptxas"),
            ("memory", "*.resources.txt"),
            ("program", cls.program_path(folder).name),
        ):
            found = sorted(folder.glob(pattern))
            if len(found) != 1:
                names = [path.name for path in found] or "none"
                raise RuntimeError(
                    f"the compiler must write one {pattern}, it wrote {names}:"
                    " this version of jax names its files otherwise, or the program has several kernels"
                )
            texts[name] = found[0].read_text()
        return cls(**texts)

    @staticmethod
    def program_path(folder: Path) -> Path:
        """Where XLA's program lies."""
        return folder / "program.hlo"


def read_resources(
    kernel: "Kernel", copies: tuple[str, ...], files: CompilerFiles
) -> KernelResources:
    """The record of a kernel.

    Args:
      kernel: what was compiled.
      copies: `Call.copies` of its call.
      files: what the compiler wrote.

    Raises:
      RuntimeError: where a file does not say what it should.
    """
    plan, problem = kernel.plan, kernel.plan.problem
    rule, device = problem.neighborhood, problem.device
    return KernelResources(
        kernel=kernel.name,
        direction=kernel.direction,
        device=device.kind,
        architecture=architecture(device),
        layout=problem.global_layout,
        window_size=rule.window_size,
        stride=rule.stride,
        dilation=rule.dilation,
        is_causal=rule.is_causal,
        batch=problem.batch,
        heads=problem.query_heads,
        kv_heads=problem.kv_heads,
        head_dim=problem.head_dim,
        dtype=problem.dtype.name,
        q_tile=plan.q_tile,
        kv_tile=plan.kv_tile,
        **_assembled(files),
        **_memory(files.memory),
        smem_limit=device.smem_bytes,
        tmem_limit=device.tmem_columns,
        **_instructions(files),
        memory_passes=tuple(memory_passes(files.program, problem.dtype.name)),
        copies=copies,
        predicted_seconds=predicted_seconds(kernel),
    )


def _assembled(files: CompilerFiles) -> dict[str, int]:
    """What `ptxas` says of registers, and what the PTX asks for."""
    registers = _number(r"Used (\d+) registers", files.ptxas)
    threads = _number(r"\.(?:max|req)ntid (\d+)", files.ptx)
    share = REGISTERS_PER_BLOCK // threads // REGISTER_UNIT * REGISTER_UNIT
    moved = [int(n) for n in re.findall(r"setmaxnreg\.\w+\.sync\.aligned\.u32 (\d+)", files.ptx)]
    return {
        "threads": threads,
        "registers": registers,
        "most_registers": min(share, MOST_REGISTERS),
        "worker_registers": max(moved, default=registers),
        "producer_registers": min(moved, default=registers),
        "spill_bytes": _number(r"(\d+) bytes spill stores", files.ptxas)
        + _number(r"(\d+) bytes spill loads", files.ptxas),
        "stack_bytes": _number(r"(\d+) bytes stack frame", files.ptxas),
        "serialized_wgmma": len(re.findall(r"wgmma.*serialized", files.ptxas)),
    }


def _memory(text: str) -> dict[str, int]:
    of_one, of_pair = (
        _number(rf"tmem_{kind}scratch_cols=(\d+)", text) for kind in ("", "collective_")
    )
    return {
        "smem_bytes": _number(r"smem_scratch_bytes=(\d+)", text),
        "tmem_columns": of_one + of_pair,
    }


def _instructions(files: CompilerFiles) -> dict[str, Any]:
    multiplications = re.findall(r"\b(wgmma\.mma_async|tcgen05\.mma)\.", files.ptx)
    loads = re.findall(r"cp\.async\.bulk\.tensor\.(\d)d\.shared::", files.ptx)
    return {
        "mma": len(multiplications),
        "mma_instruction": multiplications[0].removesuffix(".mma_async")
        if multiplications
        else "none",
        "tma_loads": len(loads),
        "tma_load_rank": max(map(int, loads), default=0),
        "tma_stores": len(re.findall(r"cp\.async\.bulk\.tensor\.\dd\.global", files.ptx)),
    }


def _number(pattern: str, text: str) -> int:
    """The number that the pattern holds, where it is first found."""
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(
            f"the compiler's report has nothing like {pattern!r}: this version of jax or ptxas writes it otherwise;"
            f" the report begins {text[:200]!r}"
        )
    return int(found[1])


FREE = {"parameter", "constant", "bitcast", "get-tuple-element", "tuple"}
"""Instructions of XLA's program that run nothing."""
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?(%[\w.-]+) = (.+?) ([a-z][a-z0-9-]*)\((.*)$")
_HLO_DTYPES = {"bfloat16": "bf16", "float16": "f16"}


def memory_passes(program: str, dtype: str) -> Iterator[str]:
    """The instructions around the kernel that read or write an array of this dtype.

    Args:
      program: XLA's optimised program.
      dtype: of the operands.
    """
    short = _HLO_DTYPES[dtype]
    _, entry, body = program.partition("\nENTRY ")
    if not entry:
        raise RuntimeError(f"XLA's program has no entry: it begins {program[:200]!r}")
    types: dict[str, str] = {}
    for line in body.splitlines():
        found = _INSTRUCTION.match(line)
        if found is None:
            continue
        name, result, opcode, rest = found.groups()
        types[name] = result
        is_kernel = opcode == "custom-call" and 'custom_call_target="mosaic_gpu' in rest
        if opcode in FREE or is_kernel:
            continue
        operands = re.findall(r"%[\w.-]+", rest.partition(")")[0])
        touched = [result, *(types.get(operand, "") for operand in operands)]
        if any(re.search(rf"\b{short}\[", text) for text in touched):
            scope = re.search(r'op_name="(?:jit\([^/]*\)/)*([^"]*)"', rest)
            yield f"{opcode} {result.partition('{')[0]} {scope[1] if scope else ''}".rstrip()
