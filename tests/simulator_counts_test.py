"""Counts and speedups of the simulator against walks over the dense mask, token pair by token pair."""

import doctest
import itertools
import math
import subprocess
import sys
import time

import numpy as np
import pytest
from random_rules import random_rule

from gna_jax.neighborhood import Neighborhood
from gna_jax.simulator import Simulation, simulate, simulation
from gna_jax.simulator.counts import attended_pairs, walk_counts
from gna_jax.tiling import Tiles

PROBLEMS_PER_SEED = 150
LARGEST = {1: 24, 2: 8, 3: 5}


def random_tile(random, rank):
    return tuple(int(n) for n in random.integers(1, 6 if rank < 3 else 4, rank))


def walk_of_every_tile(neighborhood, layout, tile, visited_tile, dynamic, backward):
    """`(visits, full, real pairs)` of every tile of every dilation group, from the dense mask and slices alone."""
    mask = neighborhood.mask(layout)
    rank = len(layout)
    if backward:
        mask = np.moveaxis(mask, range(rank), range(rank, 2 * rank))
    for group in np.ndindex(neighborhood.dilation):
        steps = tuple(slice(r, None, d) for r, d in zip(group, neighborhood.dilation, strict=True))
        of_group = mask[steps + steps]
        lengths = of_group.shape[:rank]
        corners = (range(0, n, size) for n, size in zip(lengths, tile, strict=True))
        for corner in itertools.product(*corners):
            box = tuple(slice(i, i + size) for i, size in zip(corner, tile, strict=True))
            rows = of_group[box].reshape(-1, *lengths)
            yield walk_of_rows(rows, lengths, visited_tile, dynamic)


def walk_of_rows(rows, lengths, visited_tile, dynamic):
    needed, unmasked = rows.any(axis=0), rows.all(axis=0)
    first = np.argwhere(needed).min(axis=0) if dynamic else (0,) * len(lengths)
    corners = (range(i, n, size) for i, n, size in zip(first, lengths, visited_tile, strict=True))
    visits = full = columns = 0
    for corner in itertools.product(*corners):
        box = tuple(slice(i, i + size) for i, size in zip(corner, visited_tile, strict=True))
        if needed[box].any():
            visits += 1
            full += bool(unmasked[box].all())
            columns += needed[box].size
    return visits, full, len(rows) * columns


def check_walk(neighborhood, layout, q_tile, kv_tile, dynamic, backward):
    problem = neighborhood, layout, q_tile, kv_tile, dynamic, backward
    tile, visited = (kv_tile, q_tile) if backward else (q_tile, kv_tile)
    walks = list(walk_of_every_tile(neighborhood, layout, tile, visited, dynamic, backward))
    visits, full, real = (sum(column) for column in zip(*walks, strict=True))
    counts = walk_counts(
        neighborhood, layout, q_tile=q_tile, kv_tile=kv_tile, dynamic=dynamic, backward=backward
    )
    assert (counts.tiles, counts.visits, counts.full) == (len(walks), visits, full), problem
    assert counts.worst == max(walk[0] for walk in walks), problem
    assert counts.partial == sum(walk[0] - walk[1] for walk in walks), problem
    assert counts.fully_block_sparse == all(walk[0] == walk[1] for walk in walks), problem
    assert counts.real_pairs == real, problem
    computed = math.prod(tile) * math.prod(visited) * visits
    assert counts.computed_pairs == computed, problem
    assert counts.padded_pairs == computed - real >= 0, problem
    histogram = {}
    for kind in (walk[:2] for walk in walks):
        histogram[kind] = histogram.get(kind, 0) + 1
    assert counts.histogram() == dict(sorted(histogram.items())), problem
    assert counts.mean == visits / len(walks)
    assert counts.masked_tile_share == pytest.approx(1 - full / visits)
    assert counts.padded_share == pytest.approx(1 - real / computed)
    assert counts.load_imbalance == pytest.approx(counts.worst / counts.mean)
    return counts


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("seed", range(8))
def test_counts_equal_a_walk_over_token_pairs(rank, seed):
    random = np.random.default_rng([3, rank, seed])
    block_sparse = set()
    for _ in range(PROBLEMS_PER_SEED):
        neighborhood, layout = random_rule(random, LARGEST[rank], rank)
        q_tile, kv_tile = random_tile(random, rank), random_tile(random, rank)
        problem = neighborhood, layout, q_tile, kv_tile
        dynamic, backward = (bool(flag) for flag in random.integers(0, 2, 2))
        counts = check_walk(*problem, dynamic, backward)
        block_sparse.add(counts.fully_block_sparse)
        assert attended_pairs(neighborhood, layout) == neighborhood.mask(layout).sum(), problem
    assert block_sparse == {False, True}


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_relations_between_walks(rank):
    random = np.random.default_rng([4, rank])
    gains = 0
    for _ in range(500):
        neighborhood, layout = random_rule(random, LARGEST[rank], rank)
        tiles = Tiles(q=random_tile(random, rank), kv=random_tile(random, rank))
        static = Simulation.of(neighborhood, layout, tiles)
        dynamic = Simulation.of(neighborhood, layout, Tiles(q=tiles.q, kv=tiles.kv, dynamic=True))
        # Starting where the box starts never takes a tile more, of no Q tile and in neither walk.
        for walk in ("forward", "backward"):
            ours, theirs = getattr(dynamic, walk), getattr(static, walk)
            assert ours.visits <= theirs.visits and ours.worst <= theirs.worst
            gains += ours.visits < theirs.visits
        # A static Q tile visits a KV tile exactly where that KV tile visits it.
        assert static.forward.visits == static.backward.visits
        assert static.forward.full == static.backward.full
        assert static.forward.padded_pairs == static.backward.padded_pairs
        for result in (static, dynamic):
            assert result.fully_block_sparse == (result.forward.partial == 0)
            assert result.fully_block_sparse == (result.masked_tile_share == 0.0)
            assert result.attended_pairs <= result.forward.real_pairs
            assert result.total_work_speedup <= result.flop_speedup * (1 + 1e-12)
            assert result.worst_tile_speedup <= result.mean_tile_speedup * (1 + 1e-12)
            assert result.sparsity == pytest.approx(1 - 1 / result.flop_speedup)
    assert gains > 30


def scan_speedups(result, num_additional):
    """Flop, worst, mean and total-work speedup, by adding up Q tiles that walk over layout and additional keys."""
    neighborhood, layout, tiles = result.neighborhood, result.layout, result.tiles
    shapes = tiles.q, tiles.kv, tiles.dynamic
    walks = list(walk_of_every_tile(neighborhood, layout, *shapes, backward=False))
    elements = math.prod(tiles.q) * math.prod(tiles.kv)
    extra = len(range(0, num_additional, math.prod(tiles.kv)))
    dense_tiles = extra + math.prod(
        len(range(0, n, k)) for n, k in zip(layout, tiles.kv, strict=True)
    )
    visits = [walk[0] + extra for walk in walks]
    real = sum(walk[2] for walk in walks) + math.prod(layout) * num_additional
    dense = math.prod(layout) * (math.prod(layout) + num_additional)
    attended = neighborhood.mask(layout).sum() + math.prod(layout) * num_additional
    return {
        "flop_speedup": dense / attended,
        "sparsity": 1 - attended / dense,
        "worst_tile_speedup": dense_tiles / max(visits),
        "mean_tile_speedup": dense_tiles / np.mean(visits),
        "total_work_speedup": dense / (elements * sum(visits)),
        "masked_tile_share": sum(walk[0] - walk[1] for walk in walks) / sum(visits),
        "padded_share": 1 - real / (elements * sum(visits)),
        "load_imbalance": max(visits) / np.mean(visits),
    }


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_figures_follow_from_the_walks_with_and_without_additional_keys(rank):
    random = np.random.default_rng([5, rank])
    for number in range(100):
        neighborhood, layout = random_rule(random, LARGEST[rank], rank)
        extra = int(random.integers(0, 40)) if number % 2 else 0
        result = simulate(
            layout,
            window_size=neighborhood.window_size,
            stride=neighborhood.stride,
            dilation=neighborhood.dilation,
            is_causal=neighborhood.is_causal,
            q_tile=random_tile(random, rank),
            kv_tile=random_tile(random, rank),
            dynamic=bool(number % 3),
            additional_keys=extra,
        )
        for name, expected in scan_speedups(result, extra).items():
            assert getattr(result, name) == pytest.approx(expected, abs=1e-12), (name, result)
        assert result.visits == result.forward.visits + result.forward.tiles * (
            result.additional_tiles
        )
        assert result.mean_visits == pytest.approx(result.visits / result.forward.tiles)
        assert result == result.with_additional_keys(0).with_additional_keys(extra)


def test_the_backward_with_additional_keys_adds_a_visit_of_every_pair_of_tiles():
    result = simulate((16, 16), window_size=5, q_tile=4, kv_tile=(4, 2), additional_keys=17)
    q_tiles, additional_tiles = 16, 3  # ceil(17 / 8)
    work = 16 * 8 * (result.backward.visits + q_tiles * additional_tiles)
    assert result.backward_total_work_speedup == 256 * (256 + 17) / work
    alone = result.with_additional_keys(0)
    assert alone.backward_total_work_speedup == alone.total_work_speedup


def test_dense_attention_gains_nothing():
    for is_causal, expected in ((False, 1.0), (True, 16 * 16 / (16 * 17 / 2))):
        result = simulate(16, window_size=-1, is_causal=is_causal, q_tile=1, kv_tile=1)
        assert result.flop_speedup == result.total_work_speedup == expected
        assert result.worst_tile_speedup == 1.0 and result.fully_block_sparse


def test_counts_beyond_64_bits_are_exact():
    # 2**50 tokens; a causal window over the whole axis sees n (n + 1) / 2 pairs of each axis of n tokens.
    layout, n = (2**25, 2**25), 2**25
    result = simulate(layout, window_size=-1, is_causal=True, q_tile=2**8, kv_tile=2**7)
    axis_tiles = n // 2**8
    # Q tile number t ends at 2 (t + 1) KV tiles of half its size, all needed.
    assert result.forward.visits == (axis_tiles * (axis_tiles + 1)) ** 2
    assert result.forward.computed_pairs == 2**30 * result.forward.visits > 2**64
    assert result.forward.real_pairs == result.forward.computed_pairs
    assert result.dense_pairs == 2**100
    assert result.total_work_speedup == 2**100 / result.forward.computed_pairs


def test_a_million_tokens_and_twenty_tile_pairs_take_under_a_second():
    q_tiles = [(4, 8, 8), (8, 4, 4), (16, 4, 4), (2, 8, 8), (4, 4, 8)]
    kv_tiles = [(2, 8, 8), (4, 4, 8), (4, 8, 4), (8, 4, 4)]
    start = time.process_time()
    for q_tile, kv_tile in itertools.product(q_tiles, kv_tiles):
        result = simulate(
            (64, 128, 128),
            window_size=(31, 41, 59),
            stride=(2, 3, 1),
            dilation=(1, 3, 2),
            is_causal=(True, False, False),
            q_tile=q_tile,
            kv_tile=kv_tile,
        )
        assert 1 < result.worst_tile_speedup <= result.mean_tile_speedup
        assert 0 < result.masked_tile_share < 1 and result.total_work_speedup > 1
    for exponent in range(20):
        line = simulate(1 << 20, window_size=4001, q_tile=64 << exponent % 5, kv_tile=64 + exponent)
        assert 0 < line.total_work_speedup < line.flop_speedup
    assert time.process_time() - start < 1


def test_numpy_sizes_and_single_ints_are_taken():
    layout = np.array([30, 48, 80])
    result = simulate(layout, window_size=np.array([18, 24, 24]), q_tile=[4, 8, 8], kv_tile=8)
    assert result.layout == (30, 48, 80) and result.tiles == Tiles(
        q=(4, 8, 8), kv=(8, 8, 8), dynamic=False
    )
    assert hash(result) == hash(result.with_additional_keys(0))
    assert simulate(64, window_size=7, q_tile=8, kv_tile=8).layout == (64,)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q_tile": (0, 4)}, ValueError, r"must be at least 1 on every axis; got q_tile=\(0, 4\)"),
        ({"kv_tile": (4, 4, 4)}, ValueError, r"kv_tile must be one value or one per spatial axis"),
        ({"window_size": 9}, ValueError, r"window_size must not exceed the layout"),
        ({"stride": 6}, ValueError, r"stride must not exceed window_size"),
        (
            {"additional_keys": -1},
            ValueError,
            r"additional_keys must not .* got additional_keys=-1",
        ),
        ({"additional_keys": 1.5}, TypeError, r"additional_keys must be an integer"),
        ({"layout": ()}, ValueError, r"layout must have 1 to 3 axes; got layout=\(\)"),
        ({"layout": (8, 0)}, ValueError, r"window_size must not exceed the layout"),
        ({"layout": "8"}, TypeError, r"layout must be an integer"),
        ({"dynamic": 2}, TypeError, r"tiles.dynamic must be a bool"),
    ],
)
def test_simulate_rejects(changes, error, message):
    arguments = {"layout": (8, 8), "window_size": 5, "q_tile": 4, "kv_tile": 4} | changes
    layout = arguments.pop("layout")
    if isinstance(layout, str):
        arguments |= {"window_size": 1, "q_tile": 1, "kv_tile": 1}
    with pytest.raises(error, match=message):
        simulate(layout, **arguments)


def test_a_simulation_needs_both_tiles_of_the_layouts_rank():
    neighborhood = Neighborhood.of(2, window_size=3)
    for tiles in (Tiles(q=(4, 4), kv=None), Tiles(q=(4,), kv=(4,))):
        with pytest.raises(ValueError, match=r"tiles must hold a Q and a KV tile .* got Tiles"):
            Simulation.of(neighborhood, (8, 8), tiles)


def test_the_examples_of_the_docstrings_run():
    results = doctest.testmod(simulation)
    assert results.attempted and not results.failed


def test_the_simulator_loads_no_pictures_and_no_command_line():
    code = "import sys, gna_jax.simulator; print({name.split('.')[0] for name in sys.modules})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "gna_jax" in run.stdout
    assert not [name for name in ("matplotlib", "rich", "typer") if f"'{name}'" in run.stdout]
