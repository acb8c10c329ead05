"""Head dims that the kernels have, and the columns of zeros that bring other head dims there."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from gna_jax.problem import Operands, Problem
from pallas_kernels.limits import HEAD_DIMS


def padded_head_dim(problem: Problem) -> int:
    """The kernels' head dim that holds the problem's head and value dims."""
    return next(dim for dim in HEAD_DIMS if dim >= max(problem.head_dim, problem.value_dim))


def is_padded(problem: Problem) -> bool:
    """Whether any operand gets columns of zeros."""
    return {problem.head_dim, problem.value_dim} != {padded_head_dim(problem)}


def pad_problem(problem: Problem) -> Problem:
    """The problem that the kernels get; its scale is that of the call."""
    width = padded_head_dim(problem)
    return dataclasses.replace(problem, head_dim=width, value_dim=width)


def pad_operands(problem: Problem, operands: Operands) -> Operands:
    """Query, key and value with zeros up to the kernels' head dim: no score and no sum changes."""
    width = padded_head_dim(problem)
    names = ("query", "key", "value")
    return operands._replace(**{name: pad(getattr(operands, name), width) for name in names})


def pad(array: Any, width: int) -> jax.Array:
    """`[.., H]` with zeros up to `width` columns."""
    missing = width - array.shape[-1]
    if not missing:
        return array
    with jax.named_scope("pad_head_dim"):
        return jnp.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, missing)])
