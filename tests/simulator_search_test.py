"""The search over tiles, strides and windows against trying everything, and the committed table of best tiles."""

import doctest
import itertools
import math
import pathlib
import sys
import time
from fractions import Fraction

import numpy as np
import pytest
from random_rules import random_rule

from gna_jax.device import KNOWN_DEVICES, DeviceSpec
from gna_jax.neighborhood import Neighborhood
from gna_jax.simulator import (
    PRESETS,
    Simulation,
    best_tiles,
    closeness,
    recommend,
    search,
    simulate,
    tile_budget,
)
from gna_jax.simulator.published import natten_tiles
from gna_jax.simulator.tables import ARCHITECTURES, tile_tables
from gna_jax.simulator.tile_shapes import power_of_two_shapes
from gna_jax.simulator.windows import STRETCH, even_windows
from gna_jax.tiling import Tiles

LARGEST = {1: 60, 2: 14, 3: 7}
HUNYUAN = (30, 48, 80)
SLIDING = Neighborhood.of(3, window_size=(18, 24, 24))


def all_shapes(elements, rank):
    sizes = [size for size in range(1, elements + 1) if math.log2(size).is_integer()]
    shapes = itertools.product(sizes, repeat=rank)
    return {shape for shape in shapes if math.prod(shape) == elements}


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_shapes_are_all_powers_of_two_compact_first(rank):
    for elements in (1, 2, 16, 64):
        shapes = power_of_two_shapes(elements, rank)
        assert set(shapes) == all_shapes(elements, rank) and len(set(shapes)) == len(shapes)
        assert [sum(shape) for shape in shapes] == sorted(sum(shape) for shape in shapes)
    assert power_of_two_shapes(128, 3)[0] == (4, 4, 8)
    for elements in (0, -4, 96):
        with pytest.raises(ValueError, match=f"a power of two of elements; got {elements}"):
            power_of_two_shapes(elements, rank)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_best_tiles_equal_trying_all(rank, backward):
    random = np.random.default_rng([6, rank, backward])
    for _ in range(12):
        neighborhood, layout = random_rule(random, LARGEST[rank], rank)
        q_elements, kv_elements = (2 ** int(n) for n in random.integers(0, 5, 2))
        dynamic, extra = bool(random.integers(2)), int(random.choice([0, 30]))

        def cost(q, kv, neighborhood=neighborhood, layout=layout, dynamic=dynamic, extra=extra):
            result = Simulation.of(neighborhood, layout, Tiles(q=q, kv=kv, dynamic=dynamic), extra)
            speedup = result.backward_total_work_speedup if backward else result.total_work_speedup
            return -speedup, (result.backward if backward else result.forward).partial

        chosen = best_tiles(
            neighborhood,
            layout,
            q_elements,
            kv_elements,
            dynamic,
            backward=backward,
            additional_keys=extra,
        )
        assert chosen.dynamic is dynamic
        shapes = itertools.product(all_shapes(q_elements, rank), all_shapes(kv_elements, rank))
        least = min(cost(q, kv) for q, kv in shapes)
        assert cost(chosen.q, chosen.kv) == least, (neighborhood, layout, chosen)


def test_best_tiles_rejects():
    with pytest.raises(ValueError, match="window_size must not exceed the layout"):
        best_tiles(Neighborhood.of(2, window_size=9), (8, 16), 64, 64)
    with pytest.raises(ValueError, match="a power of two of elements; got 100"):
        best_tiles(Neighborhood.of(2, window_size=3), (8, 16), 100, 64)


@pytest.mark.parametrize(
    ("elements", "dynamic", "total_work"),
    [
        ((128, 128), False, 6.26),
        ((128, 128), True, 6.99),
        ((128, 64), False, 6.85),
        ((128, 64), True, 7.20),
        ((64, 64), False, 7.39),
        ((256, 128), False, 5.67),
    ],
)
def test_hunyuan_sliding(elements, dynamic, total_work):
    tiles = best_tiles(SLIDING, HUNYUAN, *elements, dynamic)
    result = Simulation.of(SLIDING, HUNYUAN, tiles)
    assert result.total_work_speedup == pytest.approx(total_work, abs=0.005)


def test_nattens_tables_on_hunyuan_sliding():
    best = {
        architecture: max(
            Simulation.of(SLIDING, HUNYUAN, tiles).total_work_speedup
            for tiles in natten_tiles(architecture, 3)
        )
        for architecture in ARCHITECTURES
    }
    assert best == pytest.approx({"blackwell": 5.22, "hopper": 5.49}, abs=0.005)
    # The pair that the paper's simulator prefers, by its worst Q tile, does more work.
    default = simulate(HUNYUAN, window_size=(18, 24, 24), q_tile=(8, 4, 8), kv_tile=(4, 4, 8))
    assert default.total_work_speedup == pytest.approx(5.13, abs=0.005)


@pytest.mark.parametrize("name", PRESETS)
def test_free_shapes_beat_nattens_tables_on_every_preset(name):
    preset = PRESETS[name]
    gains = []
    for rule, architecture in itertools.product(preset.stride_1_rules, ARCHITECTURES):
        published = natten_tiles(architecture, rule.rank, head_dim=preset.head_dim)
        theirs = max(
            Simulation.of(rule, preset.layout, tiles).total_work_speedup for tiles in published
        )
        elements = math.prod(published[0].q), math.prod(published[0].kv)
        static, dynamic = (
            Simulation.of(
                rule, preset.layout, best_tiles(rule, preset.layout, *elements, dynamic)
            ).total_work_speedup
            for dynamic in (False, True)
        )
        assert theirs <= static <= dynamic
        gains.append(dynamic / theirs)
    # On one axis there is one shape.
    assert max(gains) > 1.04 or len(preset.layout) == 1


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_closeness_is_the_share_of_the_sliding_windows_pairs(rank):
    random = np.random.default_rng([8, rank])
    seen = set()
    for _ in range(60):
        neighborhood, layout = random_rule(random, LARGEST[rank], rank)
        sliding = Neighborhood(
            neighborhood.window_size, (1,) * rank, neighborhood.dilation, neighborhood.is_causal
        )
        ours, theirs = neighborhood.mask(layout), sliding.mask(layout)
        value = closeness(neighborhood, layout)
        assert value == pytest.approx((ours & theirs).sum() / theirs.sum())
        assert closeness(sliding, layout) == 1.0 and 0 < value <= 1
        if not any(neighborhood.is_causal):
            # All windows of the rule are as large: the mean overlap of the two windows of a query.
            tokens = math.prod(layout)
            overlaps, sizes = (
                pairs.reshape(tokens, tokens).sum(axis=1) for pairs in (ours & theirs, theirs)
            )
            if len(set(sizes)) == 1:
                assert value == pytest.approx((overlaps / sizes).mean())
        seen.add(value < 1)
    assert seen == {False, True}
    with pytest.raises(ValueError, match="window_size must not exceed"):
        closeness(Neighborhood.of(1, window_size=9), (8,))


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_proposed_windows_attend_what_is_wanted(rank):
    random = np.random.default_rng([9, rank])
    number = 0
    for _ in range(60):
        layout = tuple(int(n) for n in random.integers(1, 90, rank))
        dilation = tuple(int(random.integers(1, min(n, 3) + 1)) for n in layout)
        is_causal = tuple(bool(random.random() < 0.3) for _ in layout)

        def rule_of(window_size, dilation=dilation, is_causal=is_causal):
            return Neighborhood.of(
                rank, window_size=window_size, dilation=dilation, is_causal=is_causal
            )

        most = Fraction(1, int(random.choice([2, 10, 50])))
        least = most * Fraction(9, 10)
        rules = even_windows(layout, rule_of, least=least, most=most)
        dense = math.prod(layout) ** 2
        shares = [
            1 - Simulation.of(rule, layout, Tiles(q=layout, kv=layout)).sparsity for rule in rules
        ]
        assert shares == sorted(shares, reverse=True) and len(set(rules)) == len(rules)
        assert all(share <= most + 1e-12 for share in shares)
        assert len(rules) <= 1 or shares[-1] >= least
        number += len(rules)
        if not rules:
            smallest = Simulation.of(rule_of(1), layout, Tiles(q=layout, kv=layout))
            assert smallest.attended_pairs > most * dense
        groups = np.array(layout) // np.array(dilation)
        for rule in rules:
            shares_of_axes = np.array(rule.window_size) / groups
            # Sizes are whole: allow a key either way.
            slack = (np.array(rule.window_size) + 1) / np.maximum(
                np.array(rule.window_size) - 1, 0.5
            )
            ratio = shares_of_axes.max() / shares_of_axes.min()
            assert ratio <= STRETCH**2 * slack.max() ** 2
    assert number > 40


def test_proposed_windows_are_multiples_of_a_power_of_two_or_the_axis():
    # The even window is 21 x 70: steps of 4 and of 16 around it; 16 x 96 is too large, 28 x 48 and 20 x 64 too small.
    rules = even_windows(
        (30, 100),
        lambda window_size: Neighborhood.of(2, window_size=window_size),
        least=Fraction(45, 100),
        most=Fraction(1, 2),
    )
    assert {rule.window_size for rule in rules} == {(30, 48)}


def brute_search(layout, windows, strides, elements, dynamic):
    """`{(window, stride): total-work speedup with the best tiles}`."""
    speedups = {}
    for window, stride in itertools.product(windows, strides):
        if all(s <= w for s, w in zip(stride, window, strict=True)):
            speedups[window, stride] = max(
                simulate(
                    layout, window_size=window, stride=stride, q_tile=q, kv_tile=kv, dynamic=dynamic
                ).total_work_speedup
                for q in all_shapes(elements[0], len(layout))
                for kv in all_shapes(elements[1], len(layout))
            )
    return speedups


@pytest.mark.parametrize("dynamic", [False, True])
def test_search_keeps_what_gains_and_ranks_it(dynamic):
    layout, elements = (20, 26), (16, 8)
    windows = [(8, 12), (9, 8), (20, 6)]
    strides = list(itertools.product((1, 2, 3, 4, 8), (1, 4, 6)))
    speedups = brute_search(layout, windows, strides, elements, dynamic)
    expected = {
        (window, stride)
        for (window, stride), speedup in speedups.items()
        if not any(
            other == window
            and smaller != stride
            and all(a <= b for a, b in zip(smaller, stride, strict=True))
            and gain >= speedup
            for (other, smaller), gain in speedups.items()
        )
    }
    assert len(windows) < len(expected) < len(speedups)
    calls = []
    result = search(
        layout,
        windows=[*windows, windows[0]],
        strides=strides,
        q_tile_elements=elements[0],
        kv_tile_elements=elements[1],
        dynamic=dynamic,
        progress=lambda *numbers: calls.append(numbers),
    )
    assert calls == [(1, 3), (2, 3), (3, 3)]
    found = {(one.window_size, one.stride): one for one in result.candidates}
    assert set(found) == expected and len(result.candidates) == len(expected)
    for key, one in found.items():
        assert one.total_work_speedup == pytest.approx(speedups[key])
        assert one.closeness == closeness(one.simulation.neighborhood, layout)
        assert one.tiles.dynamic is dynamic and one.sparsity == one.simulation.sparsity
    ranked = [one.total_work_speedup for one in result.candidates]
    assert ranked == sorted(ranked, reverse=True)
    front = {
        one
        for one in result.candidates
        if not any(
            other.total_work_speedup >= one.total_work_speedup
            and other.closeness >= one.closeness
            and (other.total_work_speedup, other.closeness)
            != (one.total_work_speedup, one.closeness)
            for other in result.candidates
        )
    }
    assert set(result.pareto) <= front
    assert {(one.total_work_speedup, one.closeness) for one in result.pareto} == {
        (one.total_work_speedup, one.closeness) for one in front
    }
    assert result.pareto[-1].closeness == 1.0


def test_search_tries_powers_of_two_and_the_window_itself():
    result = search((64,), windows=[24, -1], q_tile_elements=8, kv_tile_elements=8)
    assert {one.stride[0] for one in result.candidates} <= {1, 2, 4, 8, 16, 24}
    whole = [one for one in result.candidates if one.window_size == (-1,)]
    assert [one.stride for one in whole] == [(1,)] and whole[0].total_work_speedup == 1.0


@pytest.mark.parametrize(("q_elements", "stride"), [(256, (16, 8, 8)), (128, (2, 8, 8))])
def test_smaller_tiles_are_block_sparse_at_smaller_strides(q_elements, stride):
    # The paper's kernel for Hunyuan has 256 queries per tile and needs the first.
    result = search(HUNYUAN, windows=[(18, 24, 24)], q_tile_elements=q_elements)
    block_sparse = [one for one in result.candidates if one.simulation.fully_block_sparse]
    assert [one.stride for one in block_sparse] == [stride]
    assert block_sparse[0] == result.candidates[0]


def test_search_for_a_sparsity():
    result = search(HUNYUAN, sparsity=0.9)
    assert all(0.9 <= one.sparsity <= 0.91 + 1e-9 for one in result.candidates)
    assert {one.closeness == 1.0 for one in result.candidates} == {False, True}
    assert result.candidates[0].total_work_speedup > 10
    named = search(HUNYUAN, sparsity=0.9, windows=[(18, 24, 24), (30, 40, 40)])
    assert {one.window_size for one in named.candidates} == {(18, 24, 24)}
    # A window of exactly a tenth is sparse enough, though 1 - 0.9 is below a tenth in floats.
    assert {one.window_size for one in search(100, sparsity=0.9, windows=[10]).candidates} == {
        (10,)
    }
    assert {one.window_size for one in search(100, sparsity=0.9).candidates} == {(10,)}
    keys = search(HUNYUAN, sparsity=0.9, additional_keys=256).candidates[0]
    assert keys.simulation.additional_keys == 256
    assert keys.total_work_speedup < result.candidates[0].total_work_speedup


def test_search_for_a_speedup():
    for layout, speedup in (((128, 128), 6.0), ((32768,), 12.0)):
        found = search(layout, speedup=speedup).candidates
        assert all(speedup <= one.total_work_speedup <= 1.1 * speedup for one in found)
    named = search((128, 128), speedup=6.0, windows=[32, 48, 80]).candidates
    assert {one.window_size for one in named} == {(32, 32), (48, 48)}
    assert all(one.total_work_speedup >= 6 for one in named)


def test_search_for_a_speedup_goes_on_to_sparser_windows():
    # Here tiles waste more than half, so no window that attends a twelfth or more is six times as fast.
    rounds = []
    found = search(
        (56, 56), speedup=6.0, progress=lambda done, total: rounds.append(done)
    ).candidates
    assert rounds.count(1) == 2
    assert min(one.simulation.flop_speedup for one in found) > 2 * 6
    assert all(one.total_work_speedup >= 6 for one in found)


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({}, r"needs a sparsity, a speedup or windows"),
        ({"sparsity": 0.9, "speedup": 3.0}, r"not both; got sparsity=0.9, speedup=3.0"),
        ({"sparsity": 1.0}, r"sparsity must be at least 0 and below 1; got sparsity=1.0"),
        ({"sparsity": math.nan}, r"got sparsity=nan"),
        ({"speedup": 0.5}, r"speedup must be at least 1; got speedup=0.5"),
        ({"speedup": math.inf}, r"got speedup=inf"),
        ({"speedup": 1e4}, r"no window and stride meets the wish; got .*speedup=10000.0"),
        ({"sparsity": 0.9999}, r"no window and stride meets the wish; got sparsity=0.9999"),
        ({"windows": [(9, 3)]}, r"window_size must not exceed the layout"),
        ({"windows": [3], "strides": [(4, 4)]}, r"no window and stride meets the wish"),
        ({"windows": []}, r"no window and stride meets the wish"),
        ({"windows": [3], "strides": [(1, 1, 1)]}, r"strides must be one value or one per"),
        ({"sparsity": 0.5, "dilation": 9}, r"window_size \* dilation must not exceed"),
        ({"sparsity": 0.5, "q_tile_elements": 48}, r"a power of two of elements; got 48"),
    ],
)
def test_search_rejects(wish, message):
    with pytest.raises(ValueError, match=message):
        search((8, 8), **wish)


@pytest.mark.parametrize("device", ["b200", "h100", "a100", "l40", "cpu"])
def test_recommend(device):
    budget = tile_budget(device)
    for layout in ((30, 48, 80), (256, 256), (4096,)):
        chosen = recommend(layout, device=device)
        assert chosen.sparsity >= 0.9
        elements = math.prod(chosen.tiles.q), math.prod(chosen.tiles.kv)
        assert elements == (budget.q_elements, budget.kv_elements)
        everything = search(
            layout,
            sparsity=0.9,
            q_tile_elements=budget.q_elements,
            kv_tile_elements=budget.kv_elements,
            dynamic=budget.dynamic,
        ).candidates
        fastest = everything[0].total_work_speedup
        enough = [one for one in everything if one.total_work_speedup >= 0.98 * min(fastest, 10)]
        assert chosen in enough
        assert unevenness(chosen) == min(map(unevenness, enough))
        as_even = [one for one in enough if unevenness(one) == unevenness(chosen)]
        assert chosen.closeness == max(one.closeness for one in as_even)


def unevenness(candidate):
    """Largest over smallest share of an axis that the window takes."""
    sizes = zip(candidate.window_size, candidate.simulation.layout, strict=True)
    shares = [window / length for window, length in sizes]
    return max(shares) / min(shares)


def test_recommended_windows_of_a_square_are_square():
    for device in ("b200", "h100", "l40"):
        chosen = recommend((256, 256), device=device)
        assert chosen.window_size == (80, 80) and chosen.total_work_speedup > 9.8


def test_recommend_is_fast():
    start = time.process_time()
    recommend((30, 46, 78))  # no other test has warmed the caches for it
    assert time.process_time() - start < 1


def test_recommend_passes_the_rule_on():
    chosen = recommend((64, 64), 0.95, "h100", dilation=2, is_causal=(True, False))
    rule = chosen.simulation.neighborhood
    assert rule.dilation == (2, 2) and rule.is_causal == (True, False) and chosen.sparsity >= 0.95
    with pytest.raises(ValueError, match="device must be one of"):
        recommend((64, 64), device="abacus")


def test_every_device_has_a_budget_that_says_why():
    for name, spec in KNOWN_DEVICES.items():
        budget = tile_budget(name)
        assert budget == tile_budget(spec) and budget.reason
        assert power_of_two_shapes(budget.q_elements, 3) and power_of_two_shapes(
            budget.kv_elements, 3
        )
    names = {name: tile_budget(name).name for name in KNOWN_DEVICES}
    assert names["h100"] == names["h200"] == "hopper" and names["b200"] == "blackwell"
    assert names["cpu"] == names["tpu"] == "xla"
    assert tile_budget(DeviceSpec("unheard of", "cuda", (99, 0))).name == "xla"
    assert tile_budget().name == "xla"  # tests run on the CPU


def test_tiles_of_the_xla_budget_count_its_box_exactly():
    # With KV tiles of one key, placed where the box starts, a Q tile computes its rows times its box.
    budget = tile_budget("cpu")
    neighborhood = Neighborhood.of(2, window_size=(5, 8))
    tiles = best_tiles(
        neighborhood, (24, 40), budget.q_elements, budget.kv_elements, budget.dynamic
    )
    result = Simulation.of(neighborhood, (24, 40), tiles)
    boxes = 0
    for y, x in itertools.product(range(0, 24, tiles.q[0]), range(0, 40, tiles.q[1])):
        rows = neighborhood.mask((24, 40))[y : y + tiles.q[0], x : x + tiles.q[1]]
        boxes += rows.any(axis=(0, 1)).sum()
    assert result.computed_pairs == 64 * boxes


def test_committed_table_is_what_the_code_makes():
    page = pathlib.Path(__file__).parents[1] / "docs/tile-tables.md"
    table = tile_tables()
    assert page.read_text() == table, (
        "make it anew: python -m gna_jax.simulator.tables > docs/tile-tables.md"
    )
    for name in PRESETS:
        assert name in table
    (static,) = [line for line in table.splitlines() if "4x4x8 / 4x4x8 | 5.49" in line]
    assert "| 6.26 |" in static and "| 6.99 |" in static


@pytest.mark.parametrize("name", ["search", "tile_shapes"])
def test_the_examples_of_the_docstrings_run(name):
    results = doctest.testmod(sys.modules[f"gna_jax.simulator.{name}"])
    assert results.attempted and not results.failed
