"""What cutting a layout costs: bytes against exchanges played through token by token, times against the unsharded prediction."""

import dataclasses
import doctest
import itertools
import math
import pathlib
import sys

import numpy as np
import pytest
from random_rules import random_rule

from gna_jax.device import KNOWN_DEVICES
from gna_jax.halo import exchange_order
from gna_jax.neighborhood import Neighborhood
from gna_jax.simulator import PRESETS, Simulation, best_tiles, predict, tile_budget
from gna_jax.simulator import shards as shards_module
from gna_jax.simulator.devices import RATES, device_rates
from gna_jax.simulator.estimate import Setting
from gna_jax.simulator.links import LINKS, Link, links_of
from gna_jax.simulator.shard_times import (
    attention_seconds,
    border_boxes,
    estimate_shards,
    exchange_seconds,
    interior_box,
)
from gna_jax.simulator.shards import (
    TENSORS,
    cut,
    halo_traffic,
    ring_traffic,
    shards_of,
    ulysses_traffic,
)
from gna_jax.tiling import Tiles

BENCHMARKS = pathlib.Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import exchanged_bytes  # noqa: E402

sys.path.remove(str(BENCHMARKS))

TINY = Setting("h100", batch=2, heads=6, kv_heads=3, head_dim=8, dtype="float16")
PAIR_BYTES = 2 * 3 * 8 * TENSORS * 2
"""Of one token's key and value in `TINY`."""


def random_cuts(number, rank, longest=6, seed=0):
    """Random rules on layouts of at most four shards of `longest` tokens per axis."""
    random = np.random.default_rng([seed, rank])
    while number:
        shards = tuple(random.integers(1, 5, rank).tolist())
        rows = random.integers(1, longest + 1, rank)
        layout = tuple((rows * shards).tolist())
        rule, _ = random_rule(random, longest, rank)
        try:
            rule.check_layout(layout)
        except ValueError:
            continue
        yield cut(rule, layout, shards)
        number -= 1


CUTS = [*random_cuts(25, 1, 12), *random_cuts(25, 2), *random_cuts(12, 3, 3)]


def places(made):
    """The number of every device, one per axis."""
    return list(itertools.product(*map(range, made.shards)))


def own_tokens(made, place):
    """`[*rows]`: numbers of a device's tokens in the whole layout."""
    box = tuple(
        slice(n * axis.rows, (n + 1) * axis.rows) for n, axis in zip(place, made.axes, strict=True)
    )
    return np.arange(math.prod(made.layout)).reshape(made.layout)[box]


def played(made):
    """The exchange, token by token: what devices hold at the end (-1: nothing), and how many they received and sent."""
    held = {place: own_tokens(made, place) for place in places(made)}
    received, sent = (dict.fromkeys(held, 0) for _ in range(2))
    for number in exchange_order(made.axes):
        before, after = ({place: [] for place in held} for _ in range(2))
        for piece in made.axes[number].pieces:
            pairs = {receiver: sender for sender, receiver in piece.pairs}
            for place, tokens in held.items():
                rows = np.full_like(np.take(tokens, range(*piece.rows), number), -1)
                if place[number] in pairs:
                    other = (*place[:number], pairs[place[number]], *place[number + 1 :])
                    rows = np.take(held[other], range(*piece.rows), number)
                    received[place] += rows.size
                    sent[other] += rows.size
                (before if piece.shift > 0 else after)[place].append(rows)
        held = {
            place: np.concatenate([*before[place], tokens, *after[place]], number)
            for place, tokens in held.items()
        }
    return held, received, sent


# --- bytes ----------------------------------------------------------------------------------------------------


def test_halo_traffic_is_what_an_exchange_moves():
    for made in CUTS:
        held, received, sent = played(made)
        traffic = halo_traffic(made, TINY)
        assert traffic.forward == max(received.values()) * PAIR_BYTES, made
        assert traffic.backward == max(sent.values()) * PAIR_BYTES, made
        assert traffic.forward_total == sum(received.values()) * PAIR_BYTES, made
        assert traffic.backward_total == sum(sent.values()) * PAIR_BYTES, made
        assert {tokens.size for tokens in held.values()} == {made.slab_tokens}


def test_after_the_exchange_devices_hold_every_key_they_see():
    for made in CUTS:
        size = math.prod(made.layout)
        mask = made.neighborhood.mask(made.layout).reshape(size, size)
        held, _, _ = played(made)
        for place in places(made):
            seen = np.flatnonzero(mask[own_tokens(made, place).ravel()].any(axis=0))
            assert set(seen) <= set(held[place].ravel()), made


def test_interior_queries_see_their_own_shard_alone_and_boxes_are_the_rest():
    some = 0
    for made in CUTS:
        size = math.prod(made.layout)
        mask = made.neighborhood.mask(made.layout).reshape(size, size)
        inside, times = interior_box(made), np.zeros([axis.rows for axis in made.axes], int)
        for box in [*border_boxes(made), *([] if inside is None else [inside])]:
            times[tuple(slice(*rows) for rows in box)] += 1
        assert (times == 1).all()
        if inside is None:
            assert made.interior_share == 0
            continue
        rows = tuple(slice(*rows) for rows in inside)
        assert made.interior_share == pytest.approx(times[rows].size / times.size)
        for place in places(made):
            own = own_tokens(made, place)
            seen = np.flatnonzero(mask[own[rows].ravel()].any(axis=0))
            assert set(seen) <= set(own.ravel()), made
        some += made.devices > 1
    assert some > 5


def test_ring_attention_passes_all_other_keys():
    for made in CUTS[::4]:
        devices, block = made.devices, made.tokens * PAIR_BYTES
        owner = list(range(devices))  # whose keys and values a device holds
        gradients = 0
        received = [0] * devices
        for _ in range(devices - 1):
            owner = owner[-1:] + owner[:-1]
            received = [nbytes + block for nbytes in received]
            gradients += block
        assert owner == [(n + 1) % devices for n in range(devices)]
        home = block if devices > 1 else 0  # the gradients' last step
        traffic = ring_traffic(made, TINY)
        assert {traffic.forward} == set(received)
        assert traffic.backward == traffic.forward + gradients + home
        assert traffic.forward_total == devices * traffic.forward
        assert traffic.backward_total == devices * traffic.backward


def test_ulysses_moves_what_other_devices_hold_of_a_devices_heads():
    rule = Neighborhood.of(1, window_size=3)
    for devices in range(1, 9):
        made = cut(rule, (devices * 4,), (devices,))
        setting = dataclasses.replace(TINY, heads=24, kv_heads=8)
        traffic = ulysses_traffic(made, setting)
        if 8 % devices:
            assert traffic is None
            continue
        total = 0
        # Q and out, K and V: every token and head goes from the device of the token to that of the head.
        for heads, tensors in ((24, 2), (8, 2)):
            for token, head in itertools.product(range(devices * 4), range(heads)):
                total += tensors * (token // 4 != head // (heads // devices))
        total *= setting.batch * setting.head_dim * 2
        assert (traffic.forward_total, traffic.forward) == (total, total // devices)
        assert (traffic.backward_total, traffic.backward) == (total, total // devices)


@pytest.mark.slow
def test_compiled_program_exchanges_the_predicted_bytes():
    """A small call through `benchmarks/exchanged_bytes.py`, which makes the table of docs/sharding.md."""
    made = cut(Neighborhood.of(2, window_size=(3, 4), stride=(1, 2)), (8, 8), (4, 2))
    forward, backward = exchanged_bytes.count(made, TINY)
    traffic = halo_traffic(made, TINY)
    assert (forward.most, forward.total) == (traffic.forward, traffic.forward_total)
    assert (backward.most, backward.total) == (traffic.backward, traffic.backward_total)
    pieces = sum(len(axis.pieces) for axis in made.axes)
    assert forward.permutes == backward.permutes == TENSORS * pieces


def test_another_collective_is_an_error():
    hlo = "  %a = f16[2,3]{1,0} collective-permute(%b), source_target_pairs={{0,1},{2,3}}, x={}\n"
    assert exchanged_bytes.exchange_of(hlo).received == {1: 12, 3: 12}
    for other in ("f16[8]{0} all-gather(%c)", "f32[2,3]{1,0} collective-permute(%c)"):
        with pytest.raises(RuntimeError, match="another collective"):
            exchanged_bytes.exchange_of(f"{hlo}  %d = {other}, dimensions={{0}}\n")


def test_shards_of_are_all_products():
    for layout in ((30, 48, 80), (12,), (7, 5)):
        for devices in (1, 2, 6, 8, 35):
            divisors = [[n for n in range(1, size + 1) if size % n == 0] for size in layout]
            ways = [w for w in itertools.product(*divisors) if math.prod(w) == devices]
            assert list(shards_of(layout, devices)) == ways
    assert shards_of((4, 4), 8, axes=(1,)) == ()
    assert doctest.testmod(shards_module).failed == 0


# --- times ----------------------------------------------------------------------------------------------------


def volume(name, device, stride=None):
    """A preset's rule with the best tiles, and its setting."""
    preset, budget = PRESETS[name], tile_budget(device)
    rule = preset.rules[-1].neighborhood
    if stride is not None:
        rule = dataclasses.replace(rule, stride=stride)
    tiles = best_tiles(rule, preset.layout, budget.q_elements, budget.kv_elements, budget.dynamic)
    return rule, preset.layout, tiles, Setting.of(preset, device)


@pytest.mark.parametrize("device", sorted(RATES))
def test_one_shard_takes_as_long_as_the_unsharded_call(device):
    for name, extra in (("hunyuan-91", 256), ("nat-1", 0), ("cosmos-predict2-2b", 0)):
        rule, layout, tiles, setting = volume(name, device)
        setting = dataclasses.replace(setting, additional_keys=extra)
        one = estimate_shards(rule, layout, (1,) * len(layout), tiles, setting)
        expected = predict(
            Simulation.of(rule, layout, tiles, extra),
            batch=setting.batch,
            heads=setting.heads,
            kv_heads=setting.kv_heads,
            head_dim=setting.head_dim,
            dtype=setting.dtype,
            device=device,
        )
        assert one.whole == one.one_device == expected.seconds
        assert one.interior == one.one_device and one.border == 0 and one.slab == layout
        assert [times.exchange for times in one.links] == [0] * len(one.links)
        assert {times.speedup for times in one.links} == {1.0}


def test_shards_of_whole_tiles_share_the_work_of_one_device():
    """Where shards end with tiles, tiles are those of one device, and many to an SM: between the mean shard and the worst one."""
    rule, layout = Neighborhood.of(2, window_size=(33, 32), stride=(2, 8)), (128, 128)
    tiles = Tiles(q=(8, 16), kv=(8, 16), dynamic=True)
    setting, on = Setting("h100", heads=64, kv_heads=64), device_rates(KNOWN_DEVICES["h100"])

    def seconds(shards):
        made = cut(rule, layout, shards)
        box = tuple((0, axis.rows) for axis in made.axes)
        keys = [axis.slab for axis in made.axes]
        return attention_seconds(made, box, keys, tiles, setting, on)

    counts = Simulation.of(rule, layout, tiles).forward
    worst = counts.worst / counts.mean
    assert worst < 1.2
    for shards in ((2, 2), (4, 1), (1, 4)):
        assert 0.99 < 4 * seconds(shards) / seconds((1, 1)) < 1.1 * worst


def test_a_layer_takes_the_less_of_overlapped_and_in_turn():
    rule, layout = Neighborhood.of(2, window_size=33), (1024, 1024)
    tiles, setting = best_tiles(rule, layout, 256, 128, True), Setting("b200")
    overlap = set()
    for shards in ((8, 1), (2, 4), (8, 8), (64, 1)):
        made, one = cut(rule, layout, shards), estimate_shards(rule, layout, shards, tiles, setting)
        assert one.slab_bytes / one.key_bytes == made.slab_tokens / made.tokens
        for times in one.links:
            link = next(link for link in links_of("b200") if link.name == times.link)
            assert times.exchange == exchange_seconds(made, setting, link)
            assert times.overlapped == max(one.interior, times.exchange) + one.border
            assert times.in_turn == times.exchange + one.whole
            assert times.speedup == one.one_device / times.seconds <= one.devices
            overlap.add(times.seconds < times.in_turn)
    assert overlap == {True, False}


def test_an_exchange_takes_its_permutes_one_after_the_other():
    made = cut(Neighborhood.of(2, window_size=5), (16, 16), (2, 4))
    link = Link("test", nominal=2e9, sustained=1e9, latency=1e-6)
    # One axis after the other: the second moves the halo of the first, 2 rows on each side.
    rows = {8: 4, 4: 4}
    tokens = min(4 * 4 + 4 * (8 + 4), 4 * 8 + 4 * (4 + 4))
    assert [axis.slab - axis.rows for axis in made.axes] == list(rows.values())
    expected = tokens * PAIR_BYTES / 1e9 + TENSORS * 4 * 1e-6
    assert exchange_seconds(made, TINY, link) == pytest.approx(expected)


def test_links_are_the_vendors_numbers_and_what_large_transfers_reach():
    assert set(LINKS) == set(RATES)
    both_ways = {link.name: 2 * link.nominal for links in LINKS.values() for link in links}
    assert [both_ways[f"NVLink {n}"] for n in (3, 4, 5)] == [600e9, 900e9, 1800e9]
    gigabits = {name: 4e-9 * size for name, size in both_ways.items() if "Gb/s" in name}
    assert all(name.split()[1] == f"{size:.0f}" for name, size in gigabits.items())
    for link in itertools.chain(*LINKS.values()):
        assert 0.75 < link.sustained / link.nominal < 1
        assert 5e-6 < link.latency < 50e-6
    # NVLink ends at its switches, InfiniBand does not.
    assert [link.name for link in links_of("H100") if link.connects(16)] == ["NDR 400 Gb/s"]


# --- what cannot be cut ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda rule: cut(rule, (30, 16), (8, 1)), "cut it into 1, 2, 3, 5, 6, 10, 15, 30"),
        (lambda rule: cut(rule, (30, 16), (8,)), "one number per axis of the layout; got shards 8"),
        (lambda rule: cut(rule, (30, 16), (0, 1)), "at least 1 on every axis; got shards 0x1"),
        (lambda rule: cut(rule, (4, 16), (1, 1)), "window_size must not exceed the layout"),
        (lambda rule: links_of("cpu"), "shards are planned for the devices .*got device='cpu'"),
    ],
)
def test_what_cannot_be_cut_says_why(make, message):
    with pytest.raises(ValueError, match=message):
        make(Neighborhood.of(2, window_size=5))
