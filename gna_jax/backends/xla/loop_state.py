"""Initial values of loop carries that may live inside `shard_map`."""

from typing import Any

import jax
import jax.numpy as jnp

from gna_jax.problem import Operands


def zeros_varying(shape: tuple[int, ...], dtype: Any, operands: Operands) -> jax.Array:
    """Zeros that vary over the same manual mesh axes as the query, as a loop's result will.

    A loop's carry must keep its type; under `shard_map(check_vma=True)` the type says over which axes a value differs
    from device to device, and a fresh constant differs over none.
    """
    zeros = jnp.zeros(shape, dtype)
    varying = jax.typeof(operands.query).manual_axis_type.varying
    return jax.lax.pcast(zeros, tuple(varying), to="varying") if varying else zeros
