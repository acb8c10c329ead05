"""Matrix products of tiles, in Triton."""

import triton
import triton.language as tl


@triton.jit
def product(left, right, sums, plan: tl.constexpr):
    """`left @ right + sums`, float32; `sums` may be None. 16-bit operands and TF32 use the matrix unit."""
    if left.dtype == tl.float32 and plan.precision == "ieee":
        # An exact product is unrolled over all columns. Without the barrier ptxas loads the next one's operands before it is done, and
        # spills hundreds of bytes.
        tl.debug_barrier()
    return tl.dot(left, right, sums, input_precision=plan.precision)
