"""One Triton kernel on arrays: through jax-triton on a GPU, or in Triton's interpreter on the CPU."""

import contextlib
import importlib
import threading
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gna_jax.backends.triton import toolchain
from gna_jax.backends.triton.plan import KernelPlan
from gna_jax.device import DeviceSpec

_INTERPRETER = threading.Lock()
"""XLA may run independent callbacks at one time; the interpreter keeps the number of its program in a global."""


def launch(
    kernel: Any,
    arguments: tuple[jax.Array | None, ...],
    results: tuple[jax.ShapeDtypeStruct, ...],
    *,
    programs: int,
    plan: KernelPlan,
    device: DeviceSpec,
    num_warps: int,
    num_stages: int,
) -> tuple[jax.Array, ...]:
    """The results of `kernel(*arguments, *results, plan=plan)` in this many programs."""
    if device.is_interpreted:
        return _interpret(kernel, arguments, results, programs, plan)
    major, minor = device.compute_capability or (0, 0)
    return toolchain.triton_call()(
        *arguments,
        kernel=kernel,
        out_type=results,
        grid=(programs,),
        name=kernel.__name__,
        compute_capability=10 * major + minor,
        num_warps=num_warps,
        num_stages=num_stages,
        backend_options=toolchain.OPTIONS,
        plan=plan,
    )


def _interpret(
    kernel: Any,
    arguments: tuple[jax.Array | None, ...],
    results: tuple[jax.ShapeDtypeStruct, ...],
    programs: int,
    plan: KernelPlan,
) -> tuple[jax.Array, ...]:
    present = [array for array in arguments if array is not None]

    def run(*arrays: Any) -> tuple[np.ndarray, ...]:
        copies = iter(arrays)
        operands = [None if a is None else Memory(next(copies)) for a in arguments]
        # What no program writes stays NaN.
        outputs = [Memory(np.full(r.shape, np.nan, r.dtype)) for r in results]
        with _INTERPRETER, _true_bfloat16():
            kernel[(programs,)](*operands, *outputs, plan=plan)
        return tuple(output.array for output in outputs)

    return jax.pure_callback(run, results, *present)


@contextlib.contextmanager
def _true_bfloat16() -> Iterator[None]:
    """In the interpreter, products and rounding of bfloat16 as a GPU has them.

    Triton 3.9 holds bfloat16 as integers. It multiplies those, and cuts a float32 off where it should round (2026-11).
    """
    interpreter = importlib.import_module("triton.runtime.interpreter")
    tl, builder, bits = interpreter.tl, interpreter.interpreter_builder, np.dtype(np.uint16)
    dot, cast = builder.create_dot, builder.cast_impl

    def wide(operand: Any) -> Any:
        if operand.dtype.scalar != tl.bfloat16 or operand.data.dtype != bits:
            return operand
        data = operand.data.view(jnp.bfloat16).astype(np.float32)
        return interpreter.TensorHandle(data, tl.float32)

    def create_dot(left: Any, right: Any, *rest: Any) -> Any:
        return dot(wide(left), wide(right), *rest)

    def cast_impl(source: Any, target: Any) -> Any:
        if source.dtype.scalar != tl.float32 or target.scalar != tl.bfloat16:
            return cast(source, target)
        return interpreter.TensorHandle(source.data.astype(jnp.bfloat16).view(bits), tl.bfloat16)

    builder.create_dot, builder.cast_impl = create_dot, cast_impl
    try:
        yield
    finally:
        del builder.create_dot, builder.cast_impl


class Memory:
    """An array of numpy as Triton's interpreter expects tensors: by address, dtype and storage."""

    def __init__(self, array: Any):
        self.array = np.ascontiguousarray(array)
        self.dtype = toolchain.type_name(self.array.dtype)

    def data_ptr(self) -> int:
        """Its address."""
        return self.array.ctypes.data

    def untyped_storage(self) -> "Memory":
        """The memory behind it: itself."""
        return self

    def cpu(self) -> "Memory":
        """A copy on the host: itself, it is there."""
        return self

    def new_empty(self, size: int, device: str) -> "Memory":
        """Another view of it."""
        del size, device
        return self

    def set_(self, *place: Any) -> None:
        """The interpreter's copy on the host is this memory itself."""

    def storage_offset(self) -> int:
        """First element in the storage."""
        return 0

    def size(self) -> tuple[int, ...]:
        """Its shape."""
        return self.array.shape

    def stride(self) -> tuple[int, ...]:
        """Bytes between neighbours per axis."""
        return self.array.strides

    def copy_(self, other: "Memory") -> None:
        """Back from the host: nothing to do."""
