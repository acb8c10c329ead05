"""What the GPU compiler makes of the kernels of a call, without a GPU: registers, spills, memory, instructions. Public names."""

from gna_jax.inspection.call import Call as Call
from gna_jax.inspection.compile import CompiledKernel as CompiledKernel
from gna_jax.inspection.compile import compile_kernel as compile_kernel
from gna_jax.inspection.report import KernelResources as KernelResources

__all__ = ["Call", "CompiledKernel", "KernelResources", "compile_kernel"]
