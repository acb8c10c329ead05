"""Backend "triton": Triton kernels through jax-triton, for NVIDIA GPUs from Ampere on and for Triton's interpreter.

The kernels are in `kernels`, which is not imported before one is wanted (`toolchain`); `calls` runs them on arrays, `plan` holds their
constants, `tiles` chooses sizes.
"""

import math

import jax
import jax.numpy as jnp

from gna_jax.backends.partitioning import (
    QUERY_HEADS,
    operand_axes,
    partitioned,
    row_axes,
    token_axes,
)
from gna_jax.backends.triton import toolchain
from gna_jax.backends.triton.dots import input_precision
from gna_jax.backends.triton.tiles import complete, forward_pairs, refused
from gna_jax.problem import Operands, Problem, Workload
from gna_jax.tiling import Tiles

PLATFORMS = ("cuda",)
DTYPES = ("bfloat16", "float16", "float32")
MOST_COLUMNS = 256
OLDEST = (8, 0)
"""Ampere: the first GPU with bfloat16 and asynchronous copies."""

Outputs = tuple[jax.Array, jax.Array]


def supports(problem: Problem, tiles: Tiles | None) -> str | None:
    """None, or why no kernel runs the problem with these tiles; the text names the way out.

    Triton is looked for last: a call that no version runs says so on every machine.
    """
    reason = _refused_call(problem) or refused(problem, tiles)
    if reason is not None:
        return reason
    try:
        input_precision(problem)
        toolchain.check(problem.device.is_interpreted)
    except (NotImplementedError, RuntimeError) as error:
        return str(error)
    return None


def _refused_call(problem: Problem) -> str | None:
    device = problem.device
    if device.compute_capability is None or device.compute_capability < OLDEST:
        return (
            "the Triton kernels run on NVIDIA GPUs from compute capability 8.0 (Ampere) on;"
            f" got {device.kind}: name such a device, or use 'xla'"
        )
    if problem.dtype.name not in DTYPES:
        return f"the Triton kernels take {', '.join(DTYPES)}; got {problem.dtype.name}: cast the operands, or use 'xla'"
    if max(problem.head_dim, problem.value_dim) > MOST_COLUMNS:
        return (
            f"the Triton kernels take head dims up to {MOST_COLUMNS};"
            f" got head_dim={problem.head_dim}, value_dim={problem.value_dim}: use more and narrower heads, or 'xla'"
        )
    widest = max(problem.query_heads * problem.head_dim, problem.query_heads * problem.value_dim)
    tokens = max(math.prod(problem.query_layout), math.prod(problem.key_layout))
    if tokens * widest >= 1 << 31:
        return (
            "the Triton kernels number the elements of a sample in 32 bits;"
            f" got {tokens} tokens of {widest}: split the heads over calls, or use 'xla'"
        )
    return None


def forward(problem: Problem, operands: Operands, tiles: Tiles | None) -> Outputs:
    """`out [B, *space, N, V]`, `lse [B, *space, N]`."""
    from gna_jax.backends.triton import calls

    chosen = complete(problem, tiles)

    def run(share: Problem, operands: Operands) -> Outputs:
        return calls.forward(share, operands, chosen)

    axes = token_axes(problem.rank, QUERY_HEADS), row_axes(problem.rank)
    return partitioned(problem, run, operands, _operand_axes(problem, operands), axes)


def backward(
    problem: Problem,
    operands: Operands,
    tiles: Tiles | None,
    saved: Outputs,
    cotangents: Outputs,
) -> Operands:
    """Gradients of the floating operands; that of the bias per sample, `[B, N, ..]` float32."""
    job = "bias_gradient" if problem.has_bias else "query_gradient"
    of_queries, of_keys = complete(problem, tiles, job), complete(problem, tiles)
    out, row = token_axes(problem.rank, QUERY_HEADS), row_axes(problem.rank)
    axes = _operand_axes(problem, operands)
    results = axes._replace(query_origin=None, key_origin=None, additional_lengths=None)
    if operands.bias is not None:
        results = results._replace(bias=("batch", *(axes.bias)))

    def run(share: Problem, arguments: tuple[Operands, Outputs, Outputs]) -> Operands:
        return _backward(share, of_queries, of_keys, *arguments)

    arguments = operands, saved, cotangents
    return partitioned(problem, run, arguments, (axes, (out, row), (out, row)), results)


def _backward(
    problem: Problem,
    of_queries: Tiles,
    of_keys: Tiles,
    operands: Operands,
    saved: Outputs,
    cotangents: Outputs,
) -> Operands:
    from gna_jax.backends.triton import calls

    out, lse = saved
    out_cotangent, lse_cotangent = cotangents
    wide = out.astype(jnp.float32) * out_cotangent.astype(jnp.float32)
    rows = calls.Saved(out_cotangent, lse, wide.sum(axis=-1) - lse_cotangent)
    bias = None
    if operands.bias is None:
        query = calls.query_gradient(problem, operands, of_queries, rows)
    else:
        query, bias = calls.biased_query_gradient(problem, operands, of_queries, rows)
    gradients = Operands(query, *calls.key_gradients(problem, operands, of_keys, rows))
    if operands.additional_keys is not None:
        keys, values = calls.additional_gradients(problem, operands, of_keys, rows)
        gradients = gradients._replace(additional_keys=keys, additional_values=values)
    return gradients._replace(bias=bias)


def _operand_axes(problem: Problem, operands: Operands) -> Operands:
    """Which axes of the operands may be split: the bias goes with the query heads."""
    axes = operand_axes(problem, operands._replace(bias=None))
    if operands.bias is None:
        return axes
    return axes._replace(bias=(QUERY_HEADS, *(None,) * problem.rank))


def workload(problem: Problem, tiles: Tiles | None) -> Workload:
    """The tiles of the kernels and the pairs that their forward computes; its time is not predicted."""
    tiles = complete(problem, tiles)
    computed, masked = forward_pairs(problem, tiles)
    return Workload(tiles=tiles, computed_pairs=computed, masked_pairs=masked, seconds=None)
