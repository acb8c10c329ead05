"""Kernels that write down a walk: what `gna_jax.backends.triton.kernels.geometry` says of every own tile."""

import triton
import triton.language as tl

from gna_jax.backends.triton.kernels.geometry import clean_start, own_place, shell_start, walk
from gna_jax.backends.triton.kernels.scores import num_visits


@triton.jit
def _write(origins, heads, visits, plan: tl.constexpr, IS_INVERSE: tl.constexpr):
    tile = tl.program_id(0)
    own, visited, lengths, is_real = own_place(tile, origins, plan, IS_INVERSE)
    box = walk(own, visited, lengths, plan, IS_INVERSE)
    clean, shell = num_visits(box, is_real)
    head = heads + tile * 20
    for i in tl.static_range(3):
        for kind in tl.static_range(3):
            tl.store(head + 3 * kind + i, own[kind][i])
        tl.store(head + 9 + i, visited[0][i])
        tl.store(head + 12 + i, box[0][i])
        tl.store(head + 15 + i, box[1][i])
    tl.store(head + 18, clean)
    tl.store(head + 19, clean + shell)
    for step in range(0, clean):
        _write_visit(visits, step, clean_start(step, box, plan, IS_INVERSE))
    for step in range(0, shell):
        _write_visit(visits, clean + step, shell_start(step, box, plan, IS_INVERSE))


@triton.jit
def _write_visit(row, step, starts):
    tl.store(row + step * 4, 0)
    for i in tl.static_range(3):
        tl.store(row + step * 4 + 1 + i, starts[i])


@triton.jit
def walk_kernel(query_origin, key_origin, heads, visits, plan: tl.constexpr, MOST: tl.constexpr):
    """Of Q tiles. `heads [tiles, 20]`: own offset, start, end, visited offset, first and end of the box, each per axis; clean visits and visits.
    `visits [tiles, most, 4]`: 0 and a first token."""
    _write((query_origin, key_origin), heads, visits + tl.program_id(0) * MOST * 4, plan, False)


@triton.jit
def walk_kernel_inverse(
    query_origin, key_origin, heads, visits, plan: tl.constexpr, MOST: tl.constexpr
):
    """Of KV tiles."""
    _write((query_origin, key_origin), heads, visits + tl.program_id(0) * MOST * 4, plan, True)
