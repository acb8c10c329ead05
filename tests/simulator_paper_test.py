"""The analytical numbers that arXiv 2504.16922 prints, from the presets, and what is known of the published tiles."""

import doctest
import math

import pytest

from gna_jax.neighborhood import WHOLE_GROUP
from gna_jax.simulator import PRESETS, Simulation, end_to_end, end_to_end_speedup, simulate
from gna_jax.simulator.published import NATTEN_TILES, PAPER_TILES, natten_tiles
from gna_jax.tiling import Tiles

# Figure 4 and the bars of NATTEN's documentation: limit by FLOPs, and what the paper's simulator says of stride 1 and of
# the block-sparse stride. The same for B200 and H100.
OPERATION = {
    "hunyuan-91": ((16, 8, 8), "11.1", "3.3", "11.1"),
    "cosmos-89": ((1, 8, 16), "9.2", "5.2", "9.2"),
    "flux-4k": ((16, 16), "10.2", "6.1", "10.2"),
}

# Tables 2 to 5: per stride the end-to-end speedup that the paper's simulator gives, without dense steps and with the
# preset's; None where it is not printed.
END_TO_END = {
    "flux-4k": {(1, 1): (1.76, 1.42), (16, 1): (1.84, 1.45), (16, 16): (1.88, 1.46)},
    "cosmos-89": {
        (1, 1, 1): (1.90, 1.45),
        (1, 8, 1): (1.96, 1.48),
        (1, 1, 16): (2.05, 1.51),
        (1, 8, 16): (2.10, 1.52),
    },
    "hunyuan-91": {
        (1, 1, 1): (1.73, 1.42),
        (2, 1, 1): (1.78, 1.44),
        (1, 1, 8): (1.99, 1.53),
        (2, 1, 8): (2.02, 1.55),
        (1, 8, 8): (2.17, 1.61),
        (2, 8, 8): (2.20, 1.62),
        (16, 8, 8): (2.23, 1.63),
        (18, 24, 24): (2.06, None),
    },
}
FLOP_WISE = {"flux-4k": (1.88, 1.46), "cosmos-89": (2.10, 1.52), "hunyuan-91": (2.23, 1.63)}
TOLERANCE = 0.015

# Sparsity of each preset's window, in percent, as published.
SPARSITY = {
    "flux-4k": (90.2,),
    "hunyuan-91": (91.0,),
    "hunyuan-58": (58.3,),
    "cosmos-89": (89.1,),
    "cosmos-56": (56.4,),
    "cosmos-predict2-2b": (98.2, 94.5, 91.8, 77.3, 55.5),
    "cosmos-predict2-14b": (98.2, 94.5, 91.8, 77.3, 55.5),
    "1d-32k": (93.75,),
}


def with_stride(preset, stride):
    """The paper's simulation of the preset's rule with a stride."""
    (rule,) = [r.neighborhood for r in preset.rules if r.neighborhood.stride == stride]
    return Simulation.of(rule, preset.layout, PAPER_TILES[preset.name])


@pytest.mark.parametrize("name", OPERATION)
def test_limits_of_the_operation(name):
    block_sparse, flop_wise, sliding_limit, strided_limit = OPERATION[name]
    sliding = with_stride(PRESETS[name], (1,) * len(block_sparse))
    strided = with_stride(PRESETS[name], block_sparse)
    assert f"{sliding.flop_speedup:.1f}" == f"{strided.flop_speedup:.1f}" == flop_wise
    assert f"{sliding.worst_tile_speedup:.1f}" == sliding_limit
    assert f"{strided.worst_tile_speedup:.1f}" == strided_limit
    assert strided.fully_block_sparse and not sliding.fully_block_sparse


@pytest.mark.parametrize("name", END_TO_END)
def test_end_to_end_columns(name):
    preset = PRESETS[name]
    assert {rule.neighborhood.stride for rule in preset.rules} == set(END_TO_END[name])
    for stride, printed in END_TO_END[name].items():
        result = with_stride(preset, stride)
        for dense_steps, ours, limit in zip(
            (0, preset.dense_steps), printed, FLOP_WISE[name], strict=True
        ):
            run = {"steps": preset.steps, "dense_steps": dense_steps}
            speedup = end_to_end_speedup(preset.attention_share, result.worst_tile_speedup, **run)
            most = end_to_end_speedup(preset.attention_share, result.flop_speedup, **run)
            assert most == pytest.approx(limit, abs=TOLERANCE)
            assert speedup <= most + 1e-12
            if ours is not None:
                assert speedup == pytest.approx(ours, abs=TOLERANCE), (stride, dense_steps)


@pytest.mark.parametrize("name", SPARSITY)
def test_sparsity_of_the_presets(name):
    preset = PRESETS[name]
    windows = [rule.neighborhood for rule in preset.rules]
    if len(SPARSITY[name]) == 1:
        windows = windows[:1]
    for rule, published in zip(windows, SPARSITY[name], strict=True):
        result = Simulation.of(rule, preset.layout, Tiles(q=(8,) * rule.rank, kv=(8,) * rule.rank))
        assert 100 * result.sparsity == pytest.approx(published, abs=0.06)


def test_presets_describe_themselves():
    for name, preset in PRESETS.items():
        assert preset.name == name and preset.title and preset.heads % preset.kv_heads == 0
        assert "arXiv" in preset.source or "repository" in preset.source
        sliding = preset.stride_1_rules
        assert len(set(sliding)) == len(sliding) and all(set(r.stride) == {1} for r in sliding)
        for rule in (*sliding, *(r.neighborhood for r in preset.rules)):
            rule.check_layout(preset.layout)
    assert [rule.window_size for rule in PRESETS["hunyuan-91"].stride_1_rules] == [(18, 24, 24)]
    assert [rule.dilation for rule in PRESETS["nat-1"].stride_1_rules] == [(1, 1), (8, 8)]


@pytest.mark.parametrize(
    ("name", "num_layers"), [("cosmos-predict2-2b", 28), ("cosmos-predict2-14b", 36)]
)
def test_rules_per_layer_cover_every_layer_once(name, num_layers):
    preset = PRESETS[name]
    layers = [layer for rule in preset.rules for layer in rule.layers]
    assert sorted((*layers, *preset.dense_layers)) == list(range(num_layers))
    # NVIDIA: "confirmed to be highly or fully block-sparse"; all are, for the default tiles of B200 and of H100.
    for architecture in ("blackwell", "hopper"):
        default = natten_tiles(architecture, 3)[0]
        for rule in preset.rules:
            assert rule.neighborhood.window_size[0] == WHOLE_GROUP
            assert Simulation.of(rule.neighborhood, preset.layout, default).fully_block_sparse


def test_1d_needs_a_stride_of_256():
    problem = {"window_size": 2048, "q_tile": 256, "kv_tile": 128}
    assert simulate(32768, stride=256, **problem).fully_block_sparse
    assert simulate(32768, stride=2048, **problem).fully_block_sparse
    assert not simulate(32768, stride=128, **problem).fully_block_sparse


def test_published_tiles():
    pairs = {
        ("blackwell", False): (256, 128),
        ("blackwell", True): (128, 128),
        ("hopper", False): (128, 128),
        ("hopper", True): (64, 128),
    }
    for (architecture, backward), elements in pairs.items():
        for rank in (1, 2, 3):
            tiles = natten_tiles(architecture, rank, backward=backward)
            assert tiles and len(set(tiles)) == len(tiles)
            for one in tiles:
                assert (math.prod(one.q), math.prod(one.kv)) == elements and one.dynamic is False
    assert [len(natten_tiles("blackwell", rank)) for rank in (1, 2, 3)] == [1, 4, 7]
    assert [len(natten_tiles("blackwell", rank, backward=True)) for rank in (1, 2, 3)] == [1, 4, 9]
    assert natten_tiles("hopper", 1, head_dim=256) == (Tiles(q=128, kv=64, dynamic=False),)
    assert natten_tiles("hopper", 2, head_dim=64)[0].q == (8, 8)
    assert natten_tiles("hopper", 3, head_dim=256, backward=True) == ()
    assert all("NATTEN" in table.source for table in NATTEN_TILES)
    for name, tiles in PAPER_TILES.items():
        assert tiles in natten_tiles("blackwell", len(PRESETS[name].layout))
    with pytest.raises(
        ValueError, match=r"one of \['blackwell', 'hopper'\]; got architecture='b200'"
    ):
        natten_tiles("b200", 3)


def test_end_to_end_speedup():
    assert end_to_end_speedup(0.0, 5.0) == 1.0 and end_to_end_speedup(1.0, 5.0) == 5.0
    assert end_to_end_speedup(0.5, math.inf) == 2.0
    # Ten steps of a second, half of it attention; six of them with attention three times faster.
    assert end_to_end_speedup(0.5, 3.0, steps=10, dense_steps=4) == pytest.approx(
        10 / (4 + 6 * (0.5 + 0.5 / 3))
    )
    assert end_to_end_speedup(0.5, 3.0, steps=10, dense_steps=10) == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1.2, 2.0), r"attention_share must lie between 0 and 1; got attention_share=1.2"),
        ((math.nan, 2.0), r"attention_share must lie between 0 and 1; got attention_share=nan"),
        ((0.5, 0.0), r"attention_speedup must be above 0; got attention_speedup=0.0"),
        ((0.5, math.nan), r"attention_speedup must be above 0; got attention_speedup=nan"),
    ],
)
def test_end_to_end_speedup_rejects(arguments, message):
    with pytest.raises(ValueError, match=message):
        end_to_end_speedup(*arguments)


@pytest.mark.parametrize(("steps", "dense_steps"), [(0, 0), (5, 6), (5, -1)])
def test_end_to_end_speedup_rejects_steps(steps, dense_steps):
    with pytest.raises(ValueError, match=f"got steps={steps}, dense_steps={dense_steps}"):
        end_to_end_speedup(0.5, 2.0, steps=steps, dense_steps=dense_steps)


def test_the_examples_of_the_docstrings_run():
    results = doctest.testmod(end_to_end)
    assert results.attempted and not results.failed
