"""Backend "mosaic": the Pallas kernels of `pallas_kernels` (Mosaic GPU), on Hopper and Blackwell GPUs and in JAX's interpreter.

Here a call becomes what the kernels take, and back: tiles (`tiles`), head dims (`head_dims`), a device's share on a mesh
(`partitioning`), additional keys (`additional_keys`). One kernel by itself: `kernels`.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from gna_jax.backends import slab_tiles
from gna_jax.backends.mosaic import additional_keys, head_dims
from gna_jax.backends.mosaic.kernels import Kernel as Kernel
from gna_jax.backends.mosaic.kernels import interpretation
from gna_jax.backends.mosaic.kernels import kernels as kernels
from gna_jax.backends.mosaic.tiles import complete, origin
from gna_jax.backends.partitioning import (
    QUERY_HEADS,
    operand_axes,
    partitioned,
    row_axes,
    token_axes,
)
from gna_jax.merge import merge_attentions
from gna_jax.problem import Operands, Problem, Workload
from gna_jax.simulator import Simulation, predict
from gna_jax.simulator.devices import is_known
from gna_jax.tiling import Tiles
from pallas_kernels import calls, limits, row_statistics

PLATFORMS = ("cuda",)

Outputs = tuple[jax.Array, jax.Array]


def supports(problem: Problem, tiles: Tiles | None) -> str | None:
    """None, or why no kernel runs the problem with these tiles; the text names the nearest legal choice."""
    reason = limits.supports(problem, None)
    if reason is not None or tiles is None:
        return reason
    return limits.supports(head_dims.pad_problem(problem), tiles)  # the kernels get padded heads


def forward(problem: Problem, operands: Operands, tiles: Tiles | None) -> Outputs:
    """`out [B, *space, N, V]`, `lse [B, *space, N]`."""
    chosen = complete(problem, tiles)

    def run(share: Problem, operands: Operands) -> Outputs:
        return _forward(share, operands, chosen)

    axes = token_axes(problem.rank, QUERY_HEADS), row_axes(problem.rank)
    return partitioned(problem, run, operands, operand_axes(problem, operands), axes)


def _forward(problem: Problem, operands: Operands, tiles: Tiles) -> Outputs:
    padded = head_dims.pad_problem(problem)
    out, lse = calls.forward(
        padded, head_dims.pad_operands(problem, operands), tiles, interpretation(problem)
    )
    out = out[..., : problem.value_dim]
    if not problem.num_additional:
        return out, lse
    more = additional_keys.attend(problem, operands)
    return merge_attentions((out, more[0]), (lse, more[1]))


def backward(
    problem: Problem,
    operands: Operands,
    tiles: Tiles | None,
    saved: Outputs,
    cotangents: Outputs,
) -> Operands:
    """Gradients of the floating operands."""
    chosen = complete(problem, tiles)
    out, row = token_axes(problem.rank, QUERY_HEADS), row_axes(problem.rank)
    axes = operand_axes(problem, operands)

    def run(share: Problem, arguments: Any) -> Operands:
        return _backward(share, chosen, *arguments)

    arguments = operands, saved, cotangents
    argument_axes = axes, (out, row), (out, row)
    integers = dict.fromkeys(("query_origin", "key_origin", "additional_lengths"))
    return partitioned(problem, run, arguments, argument_axes, axes._replace(**integers))


def _backward(
    problem: Problem, tiles: Tiles, operands: Operands, saved: Outputs, cotangents: Outputs
) -> Operands:
    out_cotangent, lse = cotangents[0], saved[1]
    delta = row_statistics.delta(saved[0], *cotangents)
    padded = head_dims.pad_problem(problem)
    arguments = (
        padded,
        head_dims.pad_operands(problem, operands),
        tiles,
        head_dims.pad(out_cotangent, padded.value_dim),
        lse,
        delta,
        interpretation(problem),
    )
    query = calls.query_gradient(*arguments)
    key, value = calls.key_gradients(*arguments)
    query, key = query[..., : problem.head_dim], key[..., : problem.head_dim]
    gradients = Operands(query, key, value[..., : problem.value_dim])
    if not problem.num_additional:
        return gradients
    more, keys, values = additional_keys.gradients(problem, operands, out_cotangent, lse, delta)
    query = (query.astype(jnp.float32) + more).astype(problem.dtype)
    return gradients._replace(query=query, additional_keys=keys, additional_values=values)


def workload(problem: Problem, tiles: Tiles | None) -> Workload:
    """The tiles of the kernels, the pairs their forward computes, and the copies around it.

    A slab's are those of one amid the volume; its time is the volume's, by the share of its pairs.
    """
    tiles_from, tiles = origin(problem, tiles), complete(problem, tiles)
    simulation = Simulation.of(problem.neighborhood, problem.global_layout, tiles)
    counts = simulation.forward
    computed = counts.computed_pairs
    masked = counts.partial * counts.tile_elements * counts.visited_elements
    if problem.is_slab:
        computed, masked = slab_tiles.forward_pairs(head_dims.pad_problem(problem), tiles)
    predicted = None
    if is_known(problem.device):
        predicted = predict(
            simulation,
            batch=problem.batch,
            heads=problem.query_heads,
            kv_heads=problem.kv_heads,
            head_dim=head_dims.padded_head_dim(problem),
            dtype=problem.dtype.name,
            device=problem.device,
        ).seconds
        if problem.is_slab:
            predicted *= computed / counts.computed_pairs
    return Workload(
        tiles=tiles,
        computed_pairs=computed,
        masked_pairs=masked,
        seconds=predicted,
        copies=tuple(_copies(problem)),
        tiles_from=tiles_from,
    )


def _copies(problem: Problem) -> list[str]:
    """What is copied before the kernels because they cannot read it as it lies, for people."""
    copies = []
    for layout, of in ((problem.query_layout, " of queries"), (problem.key_layout, " of keys")):
        for axis, (length, d) in enumerate(zip(layout, problem.neighborhood.dilation, strict=True)):
            if length % d:
                slab = of if problem.is_slab else ""
                rounded = math.ceil(length / d) * d
                copies.append(
                    f"axis {axis}{slab} padded from {length} to {rounded} for dilation {d}"
                )
        if not problem.is_slab:
            break
    if head_dims.is_padded(problem):
        widths = sorted({problem.head_dim, problem.value_dim})
        widths = " and ".join(map(str, widths))
        copies.append(f"heads padded from {widths} to {head_dims.padded_head_dim(problem)} columns")
    return copies
