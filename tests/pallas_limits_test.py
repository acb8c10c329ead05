"""What the Pallas kernels refuse, in words that name the rule, what was got and the way out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_suite import case_of

from gna_jax import gna
from gna_jax.backends import mosaic
from gna_jax.device import KNOWN_DEVICES
from gna_jax.problem import Operands, describe
from gna_jax.tiling import Tiles
from pallas_kernels import limits

TILES = Tiles(q=(8, 16), kv=(4, 16), backward_q=(8, 8), backward_kv=(8, 16))
SHAPE = (1, 16, 16, 2, 64)


def problem_of(shape=SHAPE, dtype=jnp.bfloat16, device="h200", **changes):
    x = jax.ShapeDtypeStruct(shape, dtype)
    rule = case_of(shape[1:-2], (5,) * (len(shape) - 3)).neighborhood
    problem = describe(
        Operands(x, x, x), rule, scale=None, precision=None, device=KNOWN_DEVICES[device]
    )
    return dataclasses.replace(problem, **changes)


@pytest.mark.parametrize("device", ["h100", "h200", "b200"])
def test_takes_what_it_should(device):
    for dtype in (jnp.bfloat16, jnp.float16):
        assert limits.supports(problem_of(dtype=dtype, device=device), None) is None
    for head_dim in (1, 16, 48, 80, 128, 192, 256):
        assert limits.supports(problem_of((1, 16, 16, 2, head_dim), device=device), None) is None
    assert limits.supports(problem_of(num_additional=5), None) is None
    assert limits.supports(problem_of(is_slab=True), None) is None


@pytest.mark.parametrize(
    ("problem", "text"),
    [
        (problem_of(device="a100"), "run on Hopper (9.0), Blackwell (10.0, 10.3); got NVIDIA A100"),
        (problem_of(dtype=jnp.float32), "got float32: cast"),
        (problem_of(dtype=np.float16, head_dim=264), "up to 256; got head_dim=264, value_dim=64"),
        (problem_of(value_dim=257), "up to 256; got head_dim=64, value_dim=257"),
        (problem_of(has_bias=True), "no relative position bias: use 'xla'"),
        (problem_of(batch=1 << 16), "got batch=65536, 2 query heads: split the batch"),
    ],
)
def test_calls_that_are_refused(problem, text):
    assert text in limits.supports(problem, None)


@pytest.mark.parametrize(
    ("change", "text"),
    [  # with head_dim 64
        ({"kv": None}, "tiles.q with tiles.kv"),
        ({"backward_kv": None}, "backward_q with backward_kv"),
        ({"dynamic": False}, "got dynamic=False: pass dynamic=None"),
        ({"q": (8, 12)}, "powers of two up to 256 per axis; got q=(8, 12)"),
        ({"q": (8, 4)}, "on Hopper tiles.q has 64 or 128 tokens, not 32; got"),
        ({"kv": (4, 2)}, "on Hopper tiles.kv has 64 to 128 tokens with head_dim 64, not 8"),
        ({"kv": (16, 16)}, "64 to 128 tokens with head_dim 64, not 256"),
        ({"backward_q": (8, 16)}, "tiles.backward_q has 64 to 64 tokens with head_dim 64, not 128"),
        ({"backward_q": (32, 2)}, "at least 4 queries on the last axis"),
        ({"backward_kv": (4, 8)}, "tiles.backward_kv has 64 or 128 tokens, not 32"),
    ],
)  # fmt: skip
def test_tiles_that_are_refused(change, text):
    assert limits.supports(problem_of(), TILES) is None
    tiles = dataclasses.replace(TILES, **change)
    assert text in limits.supports(problem_of(), tiles)


def test_too_little_shared_memory():
    small = dataclasses.replace(KNOWN_DEVICES["h200"], smem_bytes=16 * 1024)
    text = limits.supports(problem_of(device="h200", **{}), TILES)
    assert text is None
    text = limits.supports(dataclasses.replace(problem_of(), device=small), TILES)
    assert "bytes of shared memory, NVIDIA H200 has 16384" in text


def test_tiles_of_blackwell_are_twice_as_large():
    tiles = Tiles(q=(16, 16), kv=(8, 16), backward_q=(8, 16), backward_kv=(8, 16))
    assert limits.supports(problem_of(device="b200"), tiles) is None
    assert "on Hopper tiles.q has 64 or 128 tokens, not 256" in limits.supports(problem_of(), tiles)


@pytest.mark.parametrize("device", ["h200", "b200"])
@pytest.mark.parametrize(
    "shape", [(1, 40, 1, 32), (1, 9, 20, 1, 128), (1, 5, 6, 7, 1, 64), (1, 6, 30, 1, 256)]
)
def test_chosen_tiles_are_supported(shape, device):
    """Whatever the caller leaves out: everything, or the backward."""
    problem = problem_of(shape, device=device)
    everything = mosaic.complete(problem, None)
    assert limits.supports(problem, everything) is None
    assert None not in (everything.kv, everything.backward_q, everything.backward_kv)
    given = Tiles(q=everything.q, kv=everything.kv)
    assert mosaic.complete(problem, given).q == everything.q
    assert limits.supports(problem, mosaic.complete(problem, given)) is None


@pytest.mark.parametrize("head_dim", [24, 48, 100])
def test_tiles_are_judged_for_the_padded_heads(head_dim):
    problem = problem_of((1, 16, 16, 2, head_dim))
    assert mosaic.supports(problem, TILES) is None
    small = dataclasses.replace(TILES, kv=(1, 16))
    assert "tiles.kv has" in mosaic.supports(problem, small)


def test_gna_raises_the_reason():
    x = jnp.zeros(SHAPE, jnp.float32)
    with pytest.raises(NotImplementedError, match="cannot run this call: .*got float32: cast"):
        gna(x, x, x, window_size=3, implementation="mosaic", device="h200")
    with pytest.raises(NotImplementedError, match="mosaic runs on cuda, the device is cpu"):
        gna(x, x, x, window_size=3, implementation="mosaic", device="cpu")
