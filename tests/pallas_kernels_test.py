"""Every Pallas kernel of every generation, by itself, in JAX's interpreter with race detection, against float64."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from attention_suite import Case, case_1d, case_of
from pallas_suite import (
    BFLOAT16,
    FLOAT16,
    FORWARD,
    JOBS,
    KEY_GRADIENT,
    QUERY_GRADIENT,
    call_of,
    check,
    draw,
    interpret,
    plan_of,
)

from gna_jax.tiling import Tiles
from pallas_kernels import blackwell_forward
from pallas_kernels.plan import tile_walk

pytestmark = pytest.mark.kernel

GENERATIONS = ("hopper", "blackwell")
KERNELS = [(generation, job) for generation in GENERATIONS for job in JOBS]


def dtype_of(seed):
    return (BFLOAT16, FLOAT16)[seed % 2]


@pytest.mark.parametrize("seed", range(15))
@pytest.mark.parametrize("generation", GENERATIONS)
def test_forward(generation, seed):
    check(draw(seed, generation, FORWARD, 150), generation, FORWARD, dtype_of(seed))


@pytest.mark.parametrize("seed", range(18))
@pytest.mark.parametrize("generation", GENERATIONS)
def test_backward(generation, seed):
    """Nine calls of every rank and head dim for dK and dV, the others for dQ."""
    job = (QUERY_GRADIENT, KEY_GRADIENT)[seed // 9 % 2]
    check(draw(seed, generation, job, 150), generation, job, dtype_of(seed))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("generation", "job"), KERNELS)
def test_wide_heads(generation, job, seed):
    """Of every rank. Their blocks hold less, and sum dK and dV up one by one."""
    check(draw(seed, generation, job, 600, head_dims=(256,)), generation, job, dtype_of(seed))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40, 88))
@pytest.mark.parametrize(("generation", "job"), KERNELS)
def test_many(generation, job, seed):
    case = draw(seed, generation, job, 2000, head_dims=(32, 64, 128, 256))
    check(case, generation, job, dtype_of(seed))


NARROW = {"batch": 1, "heads_per_kv": 1, "head_dim": 32, "value_dim": 32}
WIDE = NARROW | {"head_dim": 64, "value_dim": 64}


def tiled(case: Case, generation: str) -> Case:
    """The case with small tiles of two workers."""
    wide = generation == "blackwell"
    visited = 64 if case.head_dim > 32 else 32
    own = (128, 256)[wide]
    rank = len(case.layout)
    box = lambda tokens, rows: (1,) * (rank - 2) + (rows, tokens // rows) if rank > 1 else (tokens,)
    tiles = Tiles(
        q=box(own, 4), kv=box(visited, 2), backward_q=box(visited, 2), backward_kv=box(own, 4)
    )
    return dataclasses.replace(case, tiles=tiles)


CHOSEN = {
    "uneven groups": case_of((7, 21), (3, 6), dilation=(2, 3), **NARROW | {"heads_per_kv": 2}),
    "boxes larger than the layout": case_of((3, 2, 5), (2, 2, 3), **WIDE),
    "blocked, causal, ragged": case_1d(290, 24, stride=24, is_causal=True, **NARROW),
    "clean tiles inside the shell": case_of((6, 130), (5, 101), **NARROW),
}


@pytest.mark.parametrize(("generation", "job"), KERNELS)
@pytest.mark.parametrize("name", CHOSEN)
def test_chosen(name, generation, job):
    case = tiled(CHOSEN[name], generation)
    if name.startswith("clean"):
        plan = plan_of(case, generation, job)
        walks = [tile_walk(plan, tile) for tile in range(plan.num_tiles)]
        assert any(0 < walk.num_clean < walk.num_visits for walk in walks)
    check(case, generation, job)


@pytest.mark.parametrize(("generation", "job"), KERNELS)
def test_tiles_without_tokens(generation, job):
    """The last tile of a dilation group that is one token shorter than the longest."""
    own = {"hopper": 64, "blackwell": 128}[generation]
    tiles = Tiles(q=(own,), kv=(32,), backward_q=(32,), backward_kv=(own,))
    case = case_1d(2 * own + 1, 20, dilation=2, **NARROW, tiles=tiles)
    plan = plan_of(case, generation, job)
    assert any(tile_walk(plan, tile).num_visits == 0 for tile in range(plan.num_tiles))
    check(case, generation, job)


@pytest.mark.parametrize(("generation", "job"), KERNELS)
def test_what_no_window_joins_does_not_matter(generation, job):
    """Finite changes of tokens that a token neither sees nor is seen by leave the bits of its results alone. Twice the same bits."""
    case = tiled(case_of((5, 44), (3, 5), **NARROW), generation)
    call, mask = call_of(case), case.neighborhood.mask(case.layout)
    before = interpret(case, call, generation, job)
    far = ~(mask[:, :, 0, 0] if job == KEY_GRADIENT else mask[0, 0])
    change = lambda array: jnp.where(
        far.reshape(1, *far.shape, *(1,) * (array.ndim - 3)), array * 3 + 1, array
    )
    operands = call.operands
    if job == KEY_GRADIENT:
        changed = call._replace(
            operands=operands._replace(query=change(operands.query)),
            out_cotangent=change(call.out_cotangent),
            lse=change(call.lse),
            delta=change(call.delta),
        )
    else:
        others = {"key": change(operands.key), "value": change(operands.value)}
        changed = call._replace(operands=operands._replace(**others))
    after = interpret(case, changed, generation, job)
    for name, array in before.items():
        bits = (x[:, 0, 0].view(np.uint8) for x in (array, after[name]))
        np.testing.assert_array_equal(*bits, err_msg=name)
        assert not np.array_equal(array, after[name]), "something else must change"


@dataclasses.dataclass(frozen=True)
class GrowingCase(Case):
    """Scores grow along the layout: what counts as a row's largest has to move again and again."""

    def inputs(self, dtype):
        arrays = super().inputs(dtype)
        growth = np.linspace(0.01, 1, self.layout[0])[None, :, None, None]
        return arrays | {"key": (arrays["key"].astype(np.float64) * growth).astype(dtype)}


GROWING = GrowingCase((160,), (130,), (1,), (1,), (False,), scale=1.5, **NARROW)


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_scores_that_grow_from_tile_to_tile(generation, dtype):
    check(tiled(GROWING, generation), generation, FORWARD, dtype)


def test_the_output_must_be_rescaled(monkeypatch):
    """Without it the growing scores give a wrong output: the calls above do take that path."""
    monkeypatch.setattr(blackwell_forward.ForwardKernel, "_rescale", lambda *arguments: None)
    with pytest.raises(AssertionError, match="out"):
        check(tiled(GROWING, "blackwell"), "blackwell", FORWARD)
