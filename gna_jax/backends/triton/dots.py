"""The precision of products of float32, in Triton's words."""

from typing import Any

import jax

from gna_jax.problem import Problem

EXACT = "ieee"
"""What no `precision` asks for: products of float32 as they are."""

_PRECISIONS: dict[Any, str] = {
    None: EXACT,
    jax.lax.Precision.HIGHEST: EXACT,
    jax.lax.Precision.HIGH: "tf32x3",
    jax.lax.Precision.DEFAULT: "tf32",
    jax.lax.DotAlgorithmPreset.F32_F32_F32: EXACT,
    jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3: "tf32x3",
    jax.lax.DotAlgorithmPreset.TF32_TF32_F32: "tf32",
}


def input_precision(problem: Problem) -> str:
    """Triton's `input_precision`, which says nothing of 16-bit operands.

    Raises:
      NotImplementedError: for a `precision` that Triton has no word for.
    """
    precision = problem.precision
    if isinstance(precision, tuple) and len(set(precision)) == 1:
        precision = precision[0]
    if precision not in _PRECISIONS:
        raise NotImplementedError(
            f"the Triton kernels know precision None, 'default' (TF32), 'high' (three TF32 products) and 'highest';"
            f" got precision={precision!r}: use one of them, or 'xla'"
        )
    return _PRECISIONS[precision]
