"""The Blackwell forward in JAX's interpreter with race detection, against float64: what its own structure makes special.

Random calls of every kernel: `pallas_kernels_test.py`.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from attention_suite import Case, case_1d, case_of
from pallas_suite import (
    BFLOAT16,
    FLOAT16,
    FORWARD,
    call_of,
    check,
    draw,
    interpret,
    plan_of,
    random_shape,
)

from gna_jax.tiling import Tiles
from pallas_kernels import blackwell_forward, masks
from pallas_kernels.online_softmax import (
    LARGEST_WEIGHT_LOG2,
    LEAST,
    LOG2_E,
    Statistics,
    exponent_scale,
    move_largest,
    signed,
    weigh,
)
from pallas_kernels.plan import tile_walk

pytestmark = pytest.mark.kernel

SMALL = {"batch": 1, "heads_per_kv": 1, "head_dim": 64, "value_dim": 64}
WIDE = {"batch": 1, "heads_per_kv": 1, "head_dim": 128, "value_dim": 128}
NARROW = {"batch": 1, "heads_per_kv": 1, "head_dim": 32, "value_dim": 32}


def walks_of(case):
    plan = plan_of(case, "blackwell", FORWARD)
    return plan, [tile_walk(plan, tile) for tile in range(plan.num_tiles)]


@pytest.mark.parametrize("seed", range(200, 212))
def test_random_cases(seed):
    check(
        draw(seed, "blackwell", FORWARD, 400), "blackwell", FORWARD, (BFLOAT16, FLOAT16)[seed % 2]
    )


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(212, 272))
def test_many_random_cases(seed):
    dtype = (BFLOAT16, FLOAT16)[seed % 2]
    check(draw(seed, "blackwell", FORWARD, 1800), "blackwell", FORWARD, dtype)


@pytest.mark.parametrize(
    "case",
    [
        # Two workers, a dilation that divides no axis, the innermost one too.
        case_of((7, 41), (3, 6), dilation=(2, 3), **SMALL, tiles=Tiles(q=(8, 32), kv=(2, 16))),
        # Boxes larger than the layout.
        case_of((3, 2, 5), (2, 2, 3), **WIDE, tiles=Tiles(q=(4, 4, 8), kv=(4, 2, 8))),
        # Blocked causal attention, ragged; the fewest keys per tile.
        case_1d(200, 24, stride=24, is_causal=True, **NARROW, tiles=Tiles(q=(256,), kv=(16,))),
        # Query heads that share keys, one worker.
        case_1d(150, 60, batch=2, kv_heads=2, heads_per_kv=2, head_dim=32, value_dim=32,
                tiles=Tiles(q=(128,), kv=(128,))),
    ],
    ids=str,
)  # fmt: skip
def test_chosen_cases(case):
    check(case, "blackwell", FORWARD)


def test_tiles_without_tokens():
    """The last Q tile of a dilation group that is one token shorter than the longest."""
    case = case_1d(257, 40, dilation=2, **NARROW, tiles=Tiles(q=(128,), kv=(64,)))
    assert any(walk.num_visits == 0 for walk in walks_of(case)[1])
    check(case, "blackwell", FORWARD)


def test_clean_tiles_between_parts_of_the_shell():
    case = case_of((22, 23), (15, 15), **SMALL, tiles=Tiles(q=(16, 8), kv=(2, 8)))
    plan, walks = walks_of(case)
    assert any(plan.stages < walk.num_clean < walk.num_visits for walk in walks)
    check(case, "blackwell", FORWARD)


@dataclasses.dataclass(frozen=True)
class GrowingCase(Case):
    """Scores grow along the layout: what counts as a row's largest has to move again and again."""

    def inputs(self, dtype):
        arrays = super().inputs(dtype)
        growth = np.linspace(0.01, 1, self.layout[0])[None, :, None, None]
        return arrays | {"key": (arrays["key"].astype(np.float64) * growth).astype(dtype)}


GROWING = GrowingCase(
    (160,), (130,), (1,), (1,), (False,), scale=1.5, **SMALL, tiles=Tiles(q=(128,), kv=(16,))
)


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16])
def test_scores_that_grow_from_tile_to_tile(dtype):
    check(GROWING, "blackwell", FORWARD, dtype)


def test_the_output_must_be_rescaled(monkeypatch):
    """Without it the growing scores give a wrong output: the calls above do take that path."""
    monkeypatch.setattr(blackwell_forward.ForwardKernel, "_rescale", lambda *arguments: None)
    with pytest.raises(AssertionError, match="out"):
        check(GROWING, "blackwell", FORWARD)


def test_keys_outside_the_window_do_not_matter():
    """Finite changes of keys and values that a query does not see leave its bits alone."""
    case = case_of((9, 20), (3, 5), **SMALL, tiles=Tiles(q=(8, 16), kv=(4, 8)))
    call = call_of(case)
    seen = case.neighborhood.mask(case.layout)[0, 0]
    far = jnp.asarray(~seen)[None, :, :, None, None]
    change = lambda array: jnp.where(far, array * 3 + 1, array)
    operands = call.operands
    changed = operands._replace(key=change(operands.key), value=change(operands.value))
    runs = [
        interpret(case, call._replace(operands=arrays), "blackwell", FORWARD)
        for arrays in (operands, changed)
    ]
    for name in ("out", "lse"):
        a, b = (run[name][:, 0, 0].view(np.uint8) for run in runs)
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("seed", range(12))
def test_words_are_the_mask(seed):
    rng = np.random.default_rng([18, seed])
    rank = 1 + seed % 3
    box = random_shape(rng, int(2 ** rng.integers(4, 8)), rank)
    start = rng.integers(-5, 5, rank).tolist()
    intervals = []
    for origin, size in zip(start, box, strict=True):
        first = origin + rng.integers(-size, size, 64)
        end = first + rng.integers(0, 2 * size + 1, 64)
        intervals.append((jnp.asarray(first), jnp.asarray(end)))
    columns = int(np.prod(box))
    places = masks.digits(jnp.arange(columns), box)
    want = masks.seen(intervals, start, places, (64, columns))
    words = masks.words(intervals, start, box)
    size = min(columns, masks.WORD)
    got = [masks.bits_of(word, jnp.arange(size), (64, size)) for word in words]
    np.testing.assert_array_equal(np.concatenate(got, axis=1), want)
    assert want.any()


@pytest.mark.parametrize("scale", [0.3, 3.0, -1.0, 0.0])
def test_lazy_softmax(scale):
    """Tiles of scores, some hidden, against float64; the output is rescaled by whoever keeps it."""
    rng = np.random.default_rng([17, int(10 * scale) + 50])
    rows, columns, tiles = 32, 16, 6
    scores = rng.normal(0, np.linspace(1, 20, tiles)[:, None, None], (tiles, rows, columns))
    hidden = rng.random((tiles, rows, columns)) < 0.5
    hidden[:3, :8] = True  # rows without a key at first
    hidden[:, 0] = True  # and to the end
    values = rng.normal(size=(tiles, columns, 4))
    state = Statistics(jnp.full(rows, LEAST), jnp.zeros(rows))
    out = np.zeros((rows, 4))
    for tile in range(tiles):
        shown = jnp.asarray(np.where(hidden[tile], 0, scores[tile]), jnp.float32)
        block = jnp.where(hidden[tile], -jnp.inf, signed(shown, scale))
        state, decay, is_rescaled = move_largest(state, jnp.split(block, 2, axis=1), scale)
        blocks = []
        for half in jnp.split(block, 2, axis=1):
            state, weights = weigh(state, half, scale)
            blocks.append(weights)
        weights = jnp.concatenate(blocks, axis=1)
        assert bool(is_rescaled) == bool((decay < 1).any())
        assert float(weights.max()) <= 2**LARGEST_WEIGHT_LOG2
        out = out * np.asarray(decay)[:, None] + np.asarray(weights) @ values[tile]
    wide = np.where(hidden, -np.inf, scores * scale)
    peak = np.maximum(wide.max((0, 2)), -1e300)[None, :, None]
    exact = np.exp(wide - peak)
    total = exact.sum((0, 2))
    want = np.einsum("trc,tcv->rv", exact, values) / np.where(total, total, 1)[:, None]
    got = out / np.where(np.asarray(state.total), np.asarray(state.total), 1)[:, None]
    np.testing.assert_allclose(got, want, atol=2e-5)
    lse = exponent_scale(scale) * state.largest[1:] + jnp.log2(state.total[1:])
    want_lse = (peak[0, 1:, 0] + np.log(total[1:])) * LOG2_E
    np.testing.assert_allclose(lse, want_lse, rtol=2e-6, atol=2e-5)
    assert not got[0].any()
