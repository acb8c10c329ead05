"""Backend "cutlass": the CUDA kernels of `cuda_ffi` through XLA's FFI, forward only; gradients are the Pallas kernels' ("mosaic").

Here a call becomes what XLA's handler takes, and back: tiles, head dims, a device's share on a mesh and additional keys are those of
`gna_jax.backends.mosaic`. Both forwards return the same lse, which is all that the backward needs. Finding, checking and loading
the built library: `cuda_ffi.library`.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from cuda_ffi import library
from gna_jax.backends import mosaic
from gna_jax.backends.mosaic import additional_keys, head_dims
from gna_jax.backends.mosaic.tiles import counted
from gna_jax.backends.partitioning import (
    QUERY_HEADS,
    operand_axes,
    partitioned,
    row_axes,
    token_axes,
)
from gna_jax.merge import merge_attentions
from gna_jax.problem import Operands, Problem, Workload, check_gradients, without_float8
from gna_jax.tiling import Tiles

PLATFORMS = ("cuda",)
HEAD_DIMS = (64, 128)
Q_TILE_TOKENS = {(9, 0): 128, (10, 0): 256}
"""Queries of a tile by compute capability: Hopper, Blackwell. Machine code is for these two alone."""
KV_TILE_TOKENS = 128
FLOAT8_CAPABILITIES = ((10, 0),)
"""Hopper's matrix unit takes 8-bit operands only with the summed axis innermost, which of values would be the keys'."""

Outputs = tuple[jax.Array, jax.Array]


def supports(problem: Problem, tiles: Tiles | None) -> str | None:
    """None, or why these kernels do not run the problem with these tiles; the text names the way out.

    The library is looked for last: a call that no build would run says so on every machine.
    """
    reason = _refused_call(problem)
    if reason is not None:
        return reason
    # A call in float8 has no gradients; what else the Pallas kernels ask for holds for it too.
    reason = mosaic.supports(_in_16_bits(problem), tiles)
    if reason is not None:
        return f"cutlass takes its gradients from the Pallas kernels; {reason}"
    reason = None if tiles is None else _refused_tiles(problem, tiles)
    if reason is not None:
        return reason
    try:
        library.load()
    except RuntimeError as error:
        return str(error)
    return None


def _refused_call(problem: Problem) -> str | None:
    device = problem.device
    if device.compute_capability not in Q_TILE_TOKENS:
        return (
            "the CUTLASS kernels run on compute capability 9.0 (Hopper) and 10.0 (Blackwell);"
            f" got {device.kind}: name such a device, or use 'triton' (Ampere and later) or 'xla'"
        )
    if device.is_interpreted:
        return f"the CUTLASS kernels are machine code, and {device.kind} is interpreted here: use 'mosaic', which can be"
    if max(problem.head_dim, problem.value_dim) > HEAD_DIMS[-1]:
        return (
            f"the CUTLASS kernels take head dims up to {HEAD_DIMS[-1]};"
            f" got head_dim={problem.head_dim}, value_dim={problem.value_dim}: use 'mosaic', or more and narrower heads"
        )
    if problem.is_float8 and device.compute_capability not in FLOAT8_CAPABILITIES:
        return (
            f"the CUTLASS kernel of {device.kind} takes bfloat16 and float16, that of Blackwell {problem.dtype.name} too:"
            " cast the operands, or use 'xla'"
        )
    if problem.scale <= 0:
        return (
            f"the CUTLASS kernels take a positive scale; got scale={problem.scale}:"
            " scale the query instead, or use 'mosaic'"
        )
    if problem.is_slab:
        return (
            "the CUTLASS kernels take whole volumes only, this call is a slab of one: use 'mosaic'"
        )
    return None


def _refused_tiles(problem: Problem, tiles: Tiles) -> str | None:
    q_tokens = _q_tile_tokens(problem)
    if math.prod(tiles.q) == q_tokens and math.prod(tiles.kv or ()) == KV_TILE_TOKENS:
        return None
    return (
        f"on {problem.device.kind} the CUTLASS kernels take {q_tokens} queries and {KV_TILE_TOKENS} keys per tile;"
        f" got q={tiles.q}, kv={tiles.kv}: use such tiles, or leave them out"
    )


def _q_tile_tokens(problem: Problem) -> int:
    capability = problem.device.compute_capability
    if capability not in Q_TILE_TOKENS:
        raise NotImplementedError(_refused_call(problem))
    return Q_TILE_TOKENS[capability]


def forward(problem: Problem, operands: Operands, tiles: Tiles | None) -> Outputs:
    """`out [B, *space, N, V]`, `lse [B, *space, N]`."""
    library.register()
    chosen = complete(problem, tiles)

    def run(share: Problem, operands: Operands) -> Outputs:
        return _forward(share, operands, chosen)

    axes = token_axes(problem.rank, QUERY_HEADS), row_axes(problem.rank)
    return partitioned(problem, run, operands, operand_axes(problem, operands), axes)


def _forward(problem: Problem, operands: Operands, tiles: Tiles) -> Outputs:
    out, lse = call_handler(problem, operands, tiles)
    if not problem.num_additional:
        return out, lse
    more = additional_keys.attend(*without_float8(problem, operands))
    return merge_attentions((out, more[0]), (lse, more[1]))


def call_handler(problem: Problem, operands: Operands, tiles: Tiles) -> Outputs:
    """The kernel: out and lse of the window's keys alone. It reads arrays as they lie, but for head dims and uneven dilation."""
    width = padded_head_dim(problem)
    query, key, value = (_stored(problem, head_dims.pad(array, width)) for array in operands[:3])
    results = (
        jax.ShapeDtypeStruct(query.shape, problem.out_dtype),
        jax.ShapeDtypeStruct(query.shape[:-1], jnp.float32),
    )
    rule = problem.neighborhood
    sizes = {
        "layout": problem.global_layout,
        "window_size": rule.window_size,
        "stride": rule.stride,
        "dilation": rule.dilation,
        "is_causal": rule.is_causal,
        "q_tile": tiles.q,
        "kv_tile": tiles.kv,
        "compute_capability": problem.device.compute_capability,
    }
    # XLA's FFI has attributes of these two types for lists and floats of Python.
    attributes = {name: np.array(values, np.int64) for name, values in sizes.items()}
    call = jax.ffi.ffi_call(library.TARGET, results, vmap_method="broadcast_all")
    out, lse = call(query, key, value, scale=np.float32(problem.scale), **attributes)
    tokens = (slice(None), *map(slice, problem.global_layout))
    return out[(*tokens, slice(None), slice(problem.value_dim))], lse[tokens]


def _stored(problem: Problem, array: jax.Array) -> jax.Array:
    """`[B, *space, N, H]` with zeros after an axis that its dilation does not divide."""
    axes = zip(problem.global_layout, problem.neighborhood.dilation, strict=True)
    excess = [(0, -length % dilation) for length, dilation in axes]
    if not any(after for _, after in excess):
        return array
    with jax.named_scope("pad_to_dilation"):
        return jnp.pad(array, [(0, 0), *excess, (0, 0), (0, 0)])


def padded_head_dim(problem: Problem) -> int:
    """The kernels' head dim that holds the problem's head and value dims."""
    return next(dim for dim in HEAD_DIMS if dim >= max(problem.head_dim, problem.value_dim))


def complete(problem: Problem, tiles: Tiles | None) -> Tiles:
    """All four shapes: what the caller left out is chosen by count. Measured tables are of other kernels."""
    if tiles is not None and tiles.backward_q is not None:
        return tiles
    return counted(_in_16_bits(problem), tiles)


def _in_16_bits(problem: Problem) -> Problem:
    return dataclasses.replace(problem, dtype=problem.out_dtype) if problem.is_float8 else problem


def backward(
    problem: Problem,
    operands: Operands,
    tiles: Tiles | None,
    saved: Outputs,
    cotangents: Outputs,
) -> Operands:
    """Gradients of the floating operands, by the Pallas kernels from the saved out and lse."""
    check_gradients(problem)
    return mosaic.backward(problem, operands, tiles, saved, cotangents)


def workload(problem: Problem, tiles: Tiles | None) -> Workload:
    """The tiles of the kernel, the pairs that its forward computes, and the copies before it."""
    width = padded_head_dim(problem)
    padded = dataclasses.replace(_in_16_bits(problem), head_dim=width, value_dim=width)
    # The same walk as the Pallas kernels', and the same costs as far as the model knows.
    same = mosaic.workload(padded, complete(problem, tiles))
    if {problem.head_dim, problem.value_dim} == {width}:
        return same
    widths = " and ".join(map(str, sorted({problem.head_dim, problem.value_dim})))
    copy = f"heads padded from {widths} to {width} columns"
    return dataclasses.replace(same, copies=(*same.copies, copy))
