"""Boxes of tokens in and out of shared memory, in both forms: the device's one copy per chunk, and the interpreter's rows.

The device form cannot run a whole kernel in the interpreter, which has no two views of one buffer. Box in, box out needs one view.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from gna_jax import interpret_gpu
from gna_jax.neighborhood import group_length
from pallas_kernels.token_boxes import BoxBuffer, BoxPlace, TokenArray

pytestmark = pytest.mark.kernel

HEADS, BATCH = 2, 2


def through_shared_memory(tokens, dilation, box, places, *, interpreted):
    """Every box of `places` (batch, head, residues, start per row) loaded and stored back, into zeros, at the same place."""
    head_dim = tokens.shape[-1]
    array = TokenArray(dilation, HEADS, head_dim)
    buffer = BoxBuffer(array, box, 1, interpreted)
    rank = len(box)

    def body(source, numbers, out, slots, ready):
        block = lax.axis_index("block")
        number = lambda column: numbers[block, column]
        residues = tuple(number(2 + n) if d > 1 else 0 for n, d in enumerate(dilation))
        start = tuple(number(2 + rank + n) for n in range(rank))
        place = BoxPlace(number(0), number(1), residues, start)
        buffer.load(source, slots, jnp.int32(0), place, ready)
        plgpu.barrier_wait(ready)
        plgpu.commit_smem()
        buffer.store(slots, jnp.int32(0), out, place)
        plgpu.wait_smem_to_gmem(0)

    layout = tokens.shape[1:-2]
    shape = array.shape(BATCH, layout)
    scratch = [buffer.scratch(tokens.dtype), plgpu.Barrier(num_arrivals=buffer.num_copies)]
    with interpret_gpu("h200"):
        out = plgpu.kernel(
            body,
            out_type=[jax.ShapeDtypeStruct(shape, tokens.dtype)],
            scratch_types=scratch,
            grid=(len(places),),
            grid_names=("block",),
            num_threads=1,
            thread_name="warpgroup",
        )(array.split(tokens), jnp.asarray(places, jnp.int32))[0]
        return np.asarray(array.merge(out, layout).astype(jnp.float32))


def expected(tokens, dilation, box, places):
    """The boxes' tokens, and NaN (what the interpreter fills memory with) everywhere else."""
    tokens = np.asarray(tokens.astype(jnp.float32))
    out = np.full(tokens.shape, np.nan, np.float32)
    rank = len(box)
    for batch, head, *rest in places:
        axes = []
        sizes = zip(tokens.shape[1:-2], dilation, rest[:rank], rest[rank:], box, strict=True)
        for length, d, residue, start, extent in sizes:
            tokens_there = np.arange(start, min(start + extent, group_length(length, d, residue)))
            axes.append(residue + d * tokens_there)
        index = np.ix_([batch], *axes, [head], np.arange(tokens.shape[-1]))
        out[index] = tokens[index]
    return out


CASES = (
    # layout, dilation, box, (batch, head, residues.., start..)
    ((21,), (1,), (8,), [(0, 0, 0, 0), (1, 1, 0, 5), (0, 1, 0, 16), (1, 0, 0, 20)]),
    ((23,), (3,), (8,), [(0, 0, 0, 0), (1, 1, 2, 3), (0, 1, 1, 6)]),
    ((7, 12), (1, 1), (4, 8), [(0, 1, 0, 0, 0, 0), (1, 0, 0, 0, 5, 9), (0, 0, 0, 0, 6, 3)]),
    ((7, 13), (2, 3), (2, 4), [(0, 1, 1, 2, 0, 0), (1, 0, 0, 0, 3, 3), (0, 0, 1, 1, 1, 2)]),
    ((3, 2, 5), (1, 1, 1), (4, 4, 8), [(0, 1, 0, 0, 0, 0, 0, 0), (1, 1, 0, 0, 0, 2, 1, 3)]),
    ((4, 6, 9), (2, 1, 2), (2, 2, 4), [(1, 0, 1, 0, 1, 0, 3, 0), (0, 1, 0, 0, 0, 1, 5, 4)]),
)


@pytest.mark.parametrize("interpreted", [False, True], ids=["device form", "interpreter's form"])
@pytest.mark.parametrize("head_dim", [32, 128])
@pytest.mark.parametrize(("layout", "dilation", "box", "places"), CASES)
def test_box_in_box_out(layout, dilation, box, places, head_dim, interpreted):
    """From any start and over the end of any axis: past the end nothing is read into the array, nor stored."""
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.standard_normal((BATCH, *layout, HEADS, head_dim)), jnp.bfloat16)
    got = through_shared_memory(tokens, dilation, box, places, interpreted=interpreted)
    np.testing.assert_array_equal(got, expected(tokens, dilation, box, places))
