"""The cost model: hand-computed cases, what must and must not make a call slower, what binds where, published times."""

import dataclasses
import doctest
import heapq
import itertools
import math
import pathlib
import sys
import time

import numpy as np
import pytest

from gna_jax.device import KNOWN_DEVICES, DeviceSpec
from gna_jax.simulator import PRESETS, Simulation, best_tiles, simulate, tile_budget
from gna_jax.simulator.cost import predict, predict_dense
from gna_jax.simulator.devices import RATES, device_rates
from gna_jax.simulator.predictions import PUBLISHED, predict_published, predictions_page
from gna_jax.simulator.roofline import (
    ELEMENT_SELECTS,
    HBM_SHARE,
    LAUNCH_SECONDS,
    MAX_KINDS,
    SHELL_SELECTS,
    TILE_CYCLES,
    busiest_sm,
    merged_kinds,
)
from gna_jax.tiling import Tiles
from pallas_kernels import limits

GPUS = sorted(RATES)
H100 = RATES["h100"]


def one_dense_tile(**changes):
    """A Q tile of 128 rows that sees one KV tile of 128 keys."""
    arguments = {"heads": 1, "head_dim": 128, "device": "h100"} | changes
    simulation = simulate(128, window_size=-1, q_tile=128, kv_tile=128)
    return predict(simulation, **arguments)


def preset_simulation(name, device, stride=None):
    """The first rule of a preset, or that with another stride, with the best tiles of the device's budget."""
    preset, budget = PRESETS[name], tile_budget(device)
    rule = preset.rules[0].neighborhood
    if stride is not None:
        rule = dataclasses.replace(rule, stride=stride)
    elements = budget.q_elements, budget.kv_elements
    tiles = best_tiles(rule, preset.layout, *elements, budget.dynamic)
    return Simulation.of(rule, preset.layout, tiles)


def shapes_of(preset):
    names = ("batch", "heads", "kv_heads", "head_dim", "dtype")
    return {name: getattr(preset, name) for name in names}


def test_one_tile_by_hand():
    one, device = one_dense_tile(), 132 * 1.83e9
    flops = 4 * 128 * 128 * 128
    assert one.useful_flops == one.computed_flops == flops
    assert one.resources == pytest.approx(
        {
            "mma": flops / (device * 4096 * H100.forward_efficiency),
            "exp": 128 * 128 / (device * 16),
            "mask": 0.0,
            "l2": 2 * 128 * 128 * 2 / 5.6e12,
            "hbm": (4 * 128 * 128 * 2 + 4 * 128) / (3.35e12 * HBM_SHARE),
            "launch": LAUNCH_SECONDS + TILE_CYCLES / device,
        }
    )
    # One SM does everything, all others wait.
    on_an_sm = 132 * one.resources["mma"] + TILE_CYCLES / 1.83e9
    assert one.seconds == pytest.approx(LAUNCH_SECONDS + on_an_sm)
    assert one.waves == pytest.approx(1 / 132) and one.wave_loss == pytest.approx(131 / 132)
    assert one.useful_tflops == pytest.approx(flops / one.seconds / 1e12)


@pytest.mark.parametrize("name", GPUS)
def test_rates_give_the_vendors_peak(name):
    peak = {"a100": 312e12, "l40": 181e12, "h100": 989e12, "h200": 989e12, "b200": 2250e12}[name]
    rates = RATES[name]
    assert rates.spec is KNOWN_DEVICES[name]
    assert rates.spec.num_sms * rates.clock * rates.mma_16bit == pytest.approx(peak, rel=0.01)
    assert rates.mma_tf32 * 2 == rates.mma_16bit
    assert 0.5 <= rates.backward_efficiency < rates.forward_efficiency < 0.8


def test_float32_runs_at_the_rate_of_tf32_and_moves_twice_the_bytes():
    half, single = one_dense_tile(), one_dense_tile(dtype="float32")
    assert single.resources["mma"] == pytest.approx(2 * half.resources["mma"])
    assert single.resources["l2"] == pytest.approx(2 * half.resources["l2"])
    assert single.resources["exp"] == half.resources["exp"]


def test_fewer_rows_than_an_instruction_computes_cost_the_same():
    def mma(rows, device):
        simulation = simulate(256, window_size=-1, q_tile=rows, kv_tile=128)
        return predict(simulation, heads=1, head_dim=64, device=device).resources["mma"]

    assert mma(64, "b200") == pytest.approx(2 * mma(128, "b200"))
    assert mma(64, "h100") == pytest.approx(mma(128, "h100"))
    assert mma(16, "a100") == pytest.approx(mma(128, "a100"))


def test_masks_are_charged_where_they_are():
    call = {"heads": 2, "head_dim": 128, "device": "h100"}
    blocked = simulate(1024, window_size=256, stride=256, q_tile=128, kv_tile=128)
    sliding = simulate(1024, window_size=256, q_tile=128, kv_tile=128)
    assert blocked.fully_block_sparse and 0 < sliding.forward.partial < sliding.forward.visits
    assert predict(blocked, **call).resources["mask"] == 0
    assert predict(blocked, masks="all", **call) == predict(blocked, **call)
    per_select = 2 * 128 * 128 / (64 * 132 * 1.83e9)
    for masks, visits, selects in (
        ("shell", sliding.forward.partial, SHELL_SELECTS),
        ("all", sliding.forward.visits, ELEMENT_SELECTS),
    ):
        prediction = predict(sliding, masks=masks, **call)
        assert prediction.resources["mask"] == pytest.approx(visits * selects * per_select)
    assert predict(sliding, masks="all", **call).seconds > predict(sliding, **call).seconds


def test_the_busiest_sm_is_that_of_a_queue():
    random = np.random.default_rng(11)
    for _ in range(300):
        sms, kinds = (int(n) for n in random.integers(1, 12, 2))
        # Whole numbers, so that sums are exact and ties are ties.
        weight = np.sort(random.choice(np.arange(1, 60), kinds, replace=False))[::-1].astype(float)
        count = random.integers(1, 40, kinds)
        ends = [0.0] * sms
        for tile in np.repeat(weight, count).tolist():
            heapq.heapreplace(ends, ends[0] + tile)
        assert busiest_sm(weight, count, sms) == max(ends)


def test_merging_kinds_keeps_tiles_weight_and_order():
    random = np.random.default_rng(12)
    weight, count = random.random(5000), random.integers(1, 9, 5000)
    merged, number = merged_kinds(weight, count)
    assert len(merged) == MAX_KINDS and number.sum() == count.sum()
    assert merged @ number == pytest.approx(weight @ count)
    assert (np.diff(merged) < 0).all()
    few, same = merged_kinds(weight[:9], count[:9])
    assert few.tolist() == sorted(weight[:9], reverse=True) and same.sum() == count[:9].sum()


def test_one_tile_more_than_there_are_sms_takes_another_wave():
    # One tile per query head; the heads share keys, so that memory does not bind.
    simulation = simulate(128, window_size=-1, q_tile=128, kv_tile=128, additional_keys=4096)
    of = {
        heads: predict(simulation, heads=heads, kv_heads=1, head_dim=128, device="h100")
        for heads in (1, 132, 133, 264)
    }
    assert of[1].seconds == pytest.approx(of[132].seconds)
    work = of[132].seconds - LAUNCH_SECONDS
    for heads in (133, 264):
        assert of[heads].seconds == pytest.approx(LAUNCH_SECONDS + 2 * work)
    losses = [of[heads].wave_loss for heads in (1, 132, 133, 264)]
    assert losses == pytest.approx([131 / 132, 0, 131 / 264, 0])
    assert [of[heads].waves for heads in (132, 264)] == [1, 2]


def test_shared_keys_are_read_from_memory_once():
    every, shared = (
        predict_dense(4096, heads=8, kv_heads=kv_heads, head_dim=64, device="h200")
        for kv_heads in (8, 1)
    )
    assert {
        name for name in every.resources if every.resources[name] != shared.resources[name]
    } == {"hbm"}
    saved = 7 * 2 * 4096 * 64 * 2 / (4.8e12 * HBM_SHARE)
    assert every.resources["hbm"] - shared.resources["hbm"] == pytest.approx(saved)


def test_memory_is_read_again_where_the_cache_is_too_small():
    def gigabytes(layout, device):
        call = predict_dense(layout, heads=1, head_dim=128, device=device)
        return call.resources["hbm"] * RATES[device].hbm_bandwidth * HBM_SHARE / 1e9

    tokens = 115_200  # K and V of a head: 59 MB
    once = tokens * (4 * 128 * 2 + 4) / 1e9
    assert gigabytes(tokens, "b200") == gigabytes(tokens, "l40") == pytest.approx(once)
    waves = math.ceil(tokens / 128 / 132)
    again = (waves - 1) * tokens * 2 * 128 * 2 / 1e9
    assert gigabytes(tokens, "h100") == pytest.approx(once + again)
    # A window that spans little of the first axis comes back soon to what it has read.
    thin = simulate((30, 48, 80), window_size=(6, 24, 24), q_tile=(2, 8, 8), kv_tile=(2, 8, 8))
    prediction = predict(thin, heads=1, head_dim=128, device="h100")
    assert prediction.resources["hbm"] == pytest.approx(once * 1e9 / (3.35e12 * HBM_SHARE))


def test_the_backward_is_two_kernels_of_seven_products():
    blocked = simulate(
        (64, 64), window_size=(16, 16), stride=(16, 16), q_tile=(8, 16), kv_tile=(8, 16)
    )
    call = {"heads": 4, "head_dim": 128, "device": "h200"}
    forward, backward = (predict(blocked, direction=d, **call) for d in ("forward", "backward"))
    ratios = {
        name: backward.resources[name] / forward.resources[name] for name in ("mma", "exp", "l2")
    }
    assert ratios == pytest.approx({"mma": 3.5, "exp": 2, "l2": 2})
    assert backward.computed_flops * 2 == forward.computed_flops * 7
    assert backward.useful_flops * 2 == forward.useful_flops * 5
    assert backward.waves == 2 * forward.waves
    # dQ: 5 tensors and lse, delta; dK, dV: 6 and both; delta: O, dO and delta.
    tokens = 64 * 64 * 4
    expected = tokens * (13 * 128 * 2 + 3 * 4) / (4.8e12 * HBM_SHARE)
    assert backward.resources["hbm"] == pytest.approx(expected)
    dense = predict_dense((64, 64), direction="backward", **call)
    assert dense.useful_flops == dense.computed_flops == 10 * 4096**2 * 128 * 4


@pytest.mark.parametrize("device", ["h200", "b200"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_wide_heads_have_a_kernel_more(head_dim, device):
    """As many as the Pallas kernels take passes, and eight products instead of seven."""
    blocked = simulate((64, 64), window_size=16, stride=16, q_tile=(8, 8), kv_tile=(8, 8))
    call = {"heads": 4, "head_dim": head_dim, "device": device}
    forward, backward = (predict(blocked, direction=d, **call) for d in ("forward", "backward"))
    generation = {"h200": limits.HOPPER, "b200": limits.BLACKWELL}[device]
    capacity = generation.wide if head_dim > limits.WIDEST_NARROW_HEAD else generation.narrow
    passes = capacity.key_gradient_passes
    assert len(backward.kernel_seconds) == 1 + len(passes)
    assert backward.computed_flops * 2 == forward.computed_flops * (6 + len(passes))


def test_useful_and_computed_work_are_apart():
    simulation = preset_simulation("hunyuan-91", "h100")
    prediction = predict(simulation, heads=24, head_dim=128, device="h100")
    assert prediction.useful_flops == 4 * simulation.attended_pairs * 24 * 128
    assert prediction.computed_flops == 4 * simulation.computed_pairs * 24 * 128
    assert prediction.useful_flops < 0.8 * prediction.computed_flops


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("device", [*GPUS, "cpu"])
def test_more_visits_or_keys_are_never_faster(device, direction):
    call = {"heads": 3, "head_dim": 64, "device": device, "direction": direction}
    tiles = {"q_tile": (8, 16), "kv_tile": (8, 8)}
    for dilation in (1, 2):
        # Every visit is masked here: where only some are, a larger window may need fewer masks (the next test).
        times = [
            predict(
                simulate((96, 80), window_size=window, dilation=dilation, **tiles),
                masks="all",
                **call,
            ).seconds
            for window in (8, 13, 20, 32, 40)
        ]
        assert times == sorted(times) and times[0] < times[-1]
    extra = [
        predict(simulate((96, 80), window_size=8, additional_keys=n, **tiles), **call).seconds
        for n in (0, 1, 256, 4096)
    ]
    assert extra == sorted(extra) and extra[0] < extra[-1]
    grown = [predict_dense(n, **call).seconds for n in (256, 1000, 4096, 20_000)]
    assert grown == sorted(grown)


def test_a_larger_window_may_be_faster_if_it_needs_fewer_masks():
    tiles = {"q_tile": (8, 16), "kv_tile": (8, 8)}
    ragged, aligned = (simulate((96, 80), window_size=window, **tiles) for window in (20, 32))
    assert aligned.forward.visits > ragged.forward.visits
    assert aligned.forward.partial < 0.7 * ragged.forward.partial
    call = {"heads": 48, "head_dim": 64, "device": "b200"}
    assert predict(aligned, **call).seconds < predict(ragged, **call).seconds


@pytest.mark.parametrize("device", GPUS)
@pytest.mark.parametrize("name", ["flux-4k", "hunyuan-91", "cosmos-89"])
def test_larger_strides_in_the_papers_order_are_never_slower_at_equal_tiles(name, device):
    preset = PRESETS[name]
    tiles = {
        "flux-4k": Tiles(q=(16, 16), kv=(16, 8)),
        "hunyuan-91": Tiles(q=(4, 8, 8), kv=(2, 8, 8)),
        "cosmos-89": Tiles(q=(8, 4, 8), kv=(4, 4, 8)),
    }[name]
    strides = {
        "flux-4k": [(1, 1), (16, 1), (16, 16)],
        "hunyuan-91": [(1, 1, 1), (2, 1, 1), (2, 1, 8), (2, 8, 8), (16, 8, 8)],
        "cosmos-89": [(1, 1, 1), (1, 8, 1), (1, 8, 16)],
    }[name]
    rule = preset.rules[0].neighborhood
    for masks in ("shell", "all"):
        times = []
        for stride in strides:
            strided = dataclasses.replace(rule, stride=stride)
            simulation = Simulation.of(strided, preset.layout, tiles)
            times.append(
                predict(simulation, device=device, masks=masks, **shapes_of(preset)).seconds
            )
        assert times == sorted(times, reverse=True) and times[-1] < 0.75 * times[0]


@pytest.mark.parametrize("device", GPUS)
@pytest.mark.parametrize("name", ["flux-4k", "hunyuan-91", "hunyuan-58", "cosmos-89", "cosmos-56"])
def test_products_bind_large_windows_of_head_dim_128(name, device):
    prediction = predict(preset_simulation(name, device), device=device, **shapes_of(PRESETS[name]))
    assert prediction.bound == "mma"
    assert prediction.wave_loss < 0.02


@pytest.mark.parametrize(
    ("device", "bounds"),
    [("a100", "hbm"), ("l40", "hbm"), ("h100", "hbm"), ("h200", "l2"), ("b200", "exp")],
)
def test_small_windows_are_bound_by_memory_or_by_exponentials(device, bounds):
    # NAT's first level, 49 keys per query and head dim 32, with tiles small enough for it.
    preset = PRESETS["nat-1"]
    rule = preset.rules[0].neighborhood
    small = Simulation.of(rule, preset.layout, Tiles(q=(8, 8), kv=(4, 8), dynamic=True))
    prediction = predict(small, device=device, **shapes_of(preset))
    assert prediction.bound == bounds
    # The floor by hand: Q, K, V, O in 16 bits and lse; 0.417 GB.
    floor = 128 * 56 * 56 * 4 * (4 * 32 * 2 + 4) / (RATES[device].hbm_bandwidth * HBM_SHARE)
    assert prediction.resources["hbm"] == pytest.approx(floor)
    # Tiles made for large windows compute so much in vain that memory no longer matters on Hopper.
    if device in ("h100", "h200", "b200"):
        large = Simulation.of(rule, preset.layout, Tiles(q=(8, 16), kv=(16, 8), dynamic=True))
        assert predict(large, device=device, **shapes_of(preset)).bound == "exp"


def test_exponentials_bind_head_dim_64_on_b200_alone():
    bounds = {
        (device, dim): predict_dense(65536, heads=16, head_dim=dim, device=device).bound
        for device, dim in itertools.product(("h100", "b200"), (64, 128))
    }
    assert bounds.pop(("b200", 64)) == "exp"
    assert set(bounds.values()) == {"mma"}


@pytest.mark.parametrize("run", [run for run in PUBLISHED if run.tiles is None], ids=str)
def test_dense_predictions_are_within_15_percent_of_what_they_come_from(run):
    assert predict_published(run).seconds == pytest.approx(run.seconds, rel=0.15)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_dense_h200_predictions_are_near_cudnns_tables(direction):
    # cuDNN 9.19, bf16, batch 1, 64 heads with 8 for keys, head dim 128, no mask: TFLOP/s.
    published = {
        "forward": {32768: 693, 16384: 702, 8192: 691, 4096: 671, 2048: 633},
        "backward": {32768: 572, 16384: 612, 8192: 594, 4096: 560, 2048: 504},
    }[direction]
    for tokens, rate in published.items():
        call = {"heads": 64, "kv_heads": 8, "head_dim": 128, "device": "h200"}
        prediction = predict_dense(tokens, direction=direction, **call)
        assert prediction.useful_tflops == pytest.approx(rate, rel=0.15)


def test_predictions_of_sparse_runs_are_within_20_percent():
    sparse = [run for run in PUBLISHED if run.tiles is not None]
    assert len(sparse) == 14
    for run in sparse:
        assert predict_published(run).seconds == pytest.approx(run.seconds, rel=0.2), run


def test_the_committed_page_is_what_the_code_makes():
    page = pathlib.Path(__file__).parents[1] / "docs/predictions.md"
    assert page.read_text() == predictions_page(), (
        "make it anew: python -m gna_jax.simulator.cost > docs/predictions.md"
    )


def test_the_cpu_is_predicted_by_the_xla_backends_model():
    # Forward in fp32 on the machine whose rates these are (benchmarks/results, 2-core AVX-512); tiles are near the backend's.
    for layout, window, tile, heads, dim, milliseconds in (
        ((56, 56), 7, (7, 7), 8, 32, 34.1),
        ((128, 128), 13, (8, 8), 2, 64, 73.9),
        ((16, 32, 32), (8, 16, 16), (4, 8, 8), 2, 64, 535.0),
        ((16384,), 512, (256,), 2, 64, 137.0),
    ):
        simulation = simulate(layout, window_size=window, q_tile=tile, kv_tile=1, dynamic=True)
        call = {"heads": heads, "head_dim": dim, "dtype": "float32", "device": "cpu"}
        forward = predict(simulation, **call)
        assert 0.5 < forward.seconds * 1e3 / milliseconds < 2
        assert sum(forward.resources.values()) == pytest.approx(forward.seconds)
        backward = predict(simulation, direction="backward", **call)
        assert 1.5 < backward.seconds / forward.seconds < 4
        assert predict_dense(layout, **call).seconds > forward.seconds


def test_predictions_print_and_hash():
    prediction = one_dense_tile()
    text = str(prediction)
    assert "forward on NVIDIA H100" in text and "predicted, bound by" in text
    assert all(name in text for name in prediction.resources) and "tiles per SM" in text
    assert hash(prediction) == hash(one_dense_tile())
    simulation = simulate(256, window_size=32, q_tile=64, kv_tile=1, dynamic=True)
    assert "tiles per SM" not in str(predict(simulation, heads=1, head_dim=32, device="cpu"))


def test_kinds_of_devices():
    sxm = DeviceSpec("NVIDIA H100 80GB HBM3", "cuda", (9, 0))
    assert device_rates(sxm) == dataclasses.replace(
        H100, spec=dataclasses.replace(H100.spec, kind=sxm.kind)
    )
    fewer = DeviceSpec("NVIDIA H100 PCIe", "cuda", (9, 0), num_sms=114)
    assert device_rates(fewer).spec.num_sms == 114
    assert one_dense_tile(device=fewer).waves == pytest.approx(1 / 114)


@pytest.mark.parametrize("kind", ["NVIDIA GB200", "NVIDIA L4", "NVIDIA H1000", "tpu", "Radeon"])
def test_unknown_kinds_name_the_known(kind):
    message = rf"knows the devices \['a100', 'b200', 'cpu', 'h100', 'h200', 'l40'\]; got .*'{kind}'"
    with pytest.raises(ValueError, match=message):
        one_dense_tile(device=DeviceSpec(kind, "cuda"))
    with pytest.raises(ValueError, match=message):
        predict_dense(64, heads=1, head_dim=32, device=DeviceSpec(kind, "cuda"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "h300"}, "device must be one of .*; got device='h300'"),
        ({"heads": 0}, "heads must be at least 1; got heads=0"),
        ({"batch": -1}, "batch must be at least 1; got batch=-1"),
        ({"heads": 6, "kv_heads": 4}, "must divide heads; got heads=6, kv_heads=4"),
        ({"dtype": "int8"}, "dtype must be one of bfloat16, .*; got dtype='int8'"),
        ({"dtype": "float64"}, "GPU kernels take .*; got dtype='float64'; device='cpu' has it"),
        ({"direction": "up"}, "direction must be one of forward, backward; got direction='up'"),
        ({"masks": "none"}, "masks must be one of shell, all; got masks='none'"),
    ],
)
def test_errors_say_what_is_legal(changes, message):
    with pytest.raises(ValueError, match=message):
        one_dense_tile(**changes)


def test_dense_errors():
    with pytest.raises(ValueError, match="must not be negative; got additional_keys=-1"):
        predict_dense(64, additional_keys=-1, heads=1, head_dim=32, device="h100")


def test_a_million_tokens_take_milliseconds():
    simulations = [
        simulate((100, 100, 100), window_size=(31, 41, 37), q_tile=(4, 8, 8), kv_tile=(2, 8, 8)),
        # A causal sequence has a kind of tile per tile.
        simulate(1 << 20, window_size=-1, is_causal=True, q_tile=256, kv_tile=128),
    ]
    for simulation in simulations:
        assert simulation.forward.visits and simulation.attended_pairs  # counting is not predicting
        start = time.process_time()
        predict(simulation, heads=24, head_dim=128, device="b200")
        assert time.process_time() - start < 0.05


@pytest.mark.parametrize("name", ["cost", "devices"])
def test_the_examples_of_the_docstrings_run(name):
    results = doctest.testmod(sys.modules[f"gna_jax.simulator.{name}"])
    assert results.attempted and not results.failed
