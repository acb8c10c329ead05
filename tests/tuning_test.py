"""Tuned tiles: candidates against brute force, timing with a clock of the test's, tables on disk, and the call that finds them.

No kernel runs here: what a GPU would say is given.
"""

import dataclasses
import itertools
import json
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gna_jax
from gna_jax import Tiles, interpret_gpu, tuning
from gna_jax.backends.mosaic import tiles as mosaic_tiles
from gna_jax.backends.mosaic import tuned
from gna_jax.device import KNOWN_DEVICES
from gna_jax.neighborhood import Neighborhood
from gna_jax.problem import Operands, describe
from gna_jax.simulator import Simulation, predict
from gna_jax.tuning import Candidate, Measurement
from pallas_kernels import limits

RULE = {"window_size": (13, 20), "stride": (4, 1)}
LAYOUT = (40, 56)


@pytest.fixture(autouse=True)
def no_tables(monkeypatch, tmp_path):
    """Tables of this machine stay out of the tests, and theirs out of the machine."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def problem_of(layout=LAYOUT, rule=RULE, device="h200", batch=1, heads=(2, 2), dim=64, dtype="bfloat16"):  # fmt: skip
    query, key = (jax.ShapeDtypeStruct((batch, *layout, n, dim), jnp.dtype(dtype)) for n in heads)
    neighborhood = Neighborhood.of(len(layout), **rule)
    operands = Operands(query, key, key)
    spec = KNOWN_DEVICES[device]
    return describe(operands, neighborhood, scale=None, precision=None, device=spec)


def pair_of(tiles, direction):
    if direction == "forward":
        return tiles.q, tiles.kv
    return tiles.backward_q, tiles.backward_kv


def timed(q, kv, seconds=1e-3):
    return tuned.Timed(q, kv, seconds, 2 * seconds, 3 * seconds)


def entry_of(forward=((4, 16), (8, 8)), backward=((8, 8), (8, 8)), date="2026-11-21"):
    """Legal on both generations' h200: not what the simulator counts best."""
    return tuned.Entry(timed(*forward), timed(*backward), 1, 2, 2, date, {"gna-jax": "1"})


def save(problem, entry, path=None):
    path = tuned.machine_table(problem.device) if path is None else path
    tuned.record(path, problem, entry)
    return path


# Candidates


def every_pair(rank):
    sizes = [1 << power for power in range(10)]
    shapes = [s for s in itertools.product(sizes, repeat=rank) if math.prod(s) <= 512]
    return itertools.product(shapes, shapes)


@pytest.mark.parametrize(
    ("device", "direction", "dim"),
    [
        ("h200", "forward", 128),
        ("h200", "backward", 32),
        ("b200", "forward", 32),
        ("b200", "backward", 128),
    ],
)
def test_legal_tiles_are_all_that_the_kernels_take(device, direction, dim):
    problem = problem_of(device=device, dim=dim)
    default = mosaic_tiles.counted(problem)
    kernels = set()
    for q, kv in every_pair(2):
        if direction == "forward":
            whole = dataclasses.replace(default, q=q, kv=kv)
        else:
            whole = dataclasses.replace(default, backward_q=q, backward_kv=kv)
        if limits.supports(problem, whole) is None:
            plan = (limits.forward_plan if direction == "forward" else limits.key_gradient_plan)(
                problem, whole
            )
            kernels.add((plan.q_tile, plan.kv_tile))
    legal = mosaic_tiles.legal_tiles(problem, direction)
    pairs = [pair_of(tiles, direction) for tiles in legal]
    assert len(set(pairs)) == len(pairs) > 50
    assert set(pairs) == kernels
    assert pair_of(default, direction) in kernels


def test_legal_tiles_hold_the_padded_heads():
    """48 columns take as much room as 64."""
    assert mosaic_tiles.legal_tiles(problem_of(dim=48), "forward") == mosaic_tiles.legal_tiles(
        problem_of(dim=64), "forward"
    )


@pytest.mark.parametrize(
    ("device", "direction"), [("h200", "forward"), ("h200", "backward"), ("b200", "backward")]
)
def test_candidates_are_the_fastest_of_every_size_of_visited_tiles(device, direction):
    problem = problem_of(device=device, rule=RULE | {"dilation": (1, 2)}, dim=40)
    default = mosaic_tiles.counted(problem)
    seconds, of_size = {}, {}
    for number, tiles in enumerate(mosaic_tiles.legal_tiles(problem, direction)):
        q, kv = pair_of(tiles, direction)
        simulation = Simulation.of(problem.neighborhood, LAYOUT, Tiles(q, kv, dynamic=True))
        call = {"heads": 2, "head_dim": 64, "device": device, "direction": direction}
        seconds[q, kv] = predict(simulation, **call).kernel_seconds[-1]
        if (q, kv) != pair_of(default, direction):
            size = math.prod(kv if direction == "forward" else q)
            of_size.setdefault(size, []).append((seconds[q, kv], number, (q, kv)))
    queues = [sorted(of_size[size]) for size in sorted(of_size, reverse=True)]
    for most in (1, 11):
        expected, turn = [], 0
        while len(expected) < most:
            queue = queues[turn % len(queues)]
            expected.append(queue[turn // len(queues)][2])
            turn += 1
        first, *others = tuning.candidates(problem, direction, most)
        assert first.is_default and first.tiles == default
        assert {pair_of(one.tiles, direction) for one in others} == set(expected)
        assert [one.predicted_seconds for one in others] == sorted(seconds[e] for e in expected)
        assert first.predicted_seconds == seconds[pair_of(default, direction)]
        assert not any(one.is_default for one in others)


def test_most_tiles_need_no_prediction(monkeypatch):
    asked = []
    real = tuning.predicted_seconds
    monkeypatch.setattr(tuning, "predicted_seconds", lambda *a: asked.append(a) or real(*a))
    problem = problem_of((256, 256), {"window_size": 80}, heads=(24, 24), dim=128)
    tuning.candidates(problem, "backward", 4)
    assert 4 <= len(asked) < len(mosaic_tiles.legal_tiles(problem, "backward")) / 2


def test_fewer_candidates_where_there_are_no_more():
    problem = problem_of(**LINE)
    assert len(tuning.candidates(problem, "forward", 100)) == len(
        mosaic_tiles.legal_tiles(problem, "forward")
    )


def test_candidates_refuse_what_the_kernels_refuse():
    with pytest.raises(NotImplementedError, match="take bfloat16 and float16; got float32"):
        tuning.candidates(problem_of(dtype="float32"), "forward", 8)
    with pytest.raises(NotImplementedError, match="run on Hopper"):
        tuning.candidates(problem_of(device="a100"), "forward", 8)


# Measuring


class Clock:
    """A clock that runs only while something works."""

    def __init__(self):
        self.now, self.order = 0.0, []

    def __call__(self):
        return self.now

    def work(self, name, *seconds):
        """A run that takes these seconds in turn."""
        durations = itertools.cycle(seconds)

        def run():
            self.now += next(durations)
            self.order.append(name)
            return jnp.zeros(())

        return run


def test_runs_take_turns_and_short_ones_repeat():
    clock = Clock()
    runs = [clock.work("a", 0.25), clock.work("b", tuning.TURN_SECONDS / 4), clock.work("c", 1e-9)]
    said = []
    seconds = tuning.time_in_turns(runs, 3, said.append, clock)
    np.testing.assert_allclose(seconds[0], [0.25] * 3)
    np.testing.assert_allclose(seconds[1], [tuning.TURN_SECONDS / 4] * 3)
    turns = [(name, len(list(group))) for name, group in itertools.groupby(clock.order[3:])]
    most = tuning.MOST_CALLS
    # b ends the second round with c and a before it, and the third begins with c.
    assert turns == [
        ("a", 1), ("b", 4), ("c", most), ("b", 4), ("c", most), ("a", 1), ("c", most), ("a", 1), ("b", 4),
    ]  # fmt: skip
    assert said == [f"timing: round {n} of 3" for n in (1, 2, 3)]


def test_a_turn_ends_when_the_results_are_there(monkeypatch):
    clock = Clock()
    waited = []

    def wait(results):
        clock.now += 0.5
        waited.append(results)

    monkeypatch.setattr(jax, "block_until_ready", wait)
    (seconds,) = tuning.time_in_turns([clock.work("a", 0.25)], 2, clock=clock)
    assert seconds == (0.75, 0.75) and len(waited) == 3


def measurement(*seconds, is_default=False, failure=""):
    return Measurement(Candidate(Tiles((64,), (64,)), 1.0, is_default), seconds, failure)


def test_only_a_clear_gain_wins():
    default = measurement(10.0, 10.2, 10.4, is_default=True)
    assert (default.median, default.spread) == (10.2, pytest.approx(0.2))
    faster, little, noisy = measurement(9.0, 9.0, 9.1), measurement(10.1), measurement(8.0, 9.9, 20)
    assert tuning.winner([default, faster, little]) is faster
    assert tuning.winner([default, little]) is default
    assert tuning.winner([default, noisy]) is default
    assert tuning.winner([measurement(10.0, is_default=True), little]).candidate.is_default
    failed = measurement(failure="no")
    assert failed.median == math.inf and failed.spread == 0
    assert tuning.winner([default, failed]) is default
    with pytest.raises(RuntimeError, match="the default's tiles failed.*: out of memory; see what"):
        tuning.winner([measurement(is_default=True, failure="out of memory"), faster])


def test_kernels_that_fail_or_differ_are_not_timed(monkeypatch):
    problem = problem_of()
    error = ValueError("too many\nregisters")
    factors = {9: (2, 1), 1: (2.001, 1), 2: error, 3: (2.2, 1), 4: (2, math.nan)}
    given = []

    def kernel(problem, direction, tiles):
        factor = factors[tiles.q[0]]
        if factor is error:
            raise error
        shape = jax.ShapeDtypeStruct((3, 4), jnp.bfloat16)
        row = jax.ShapeDtypeStruct((3,), jnp.float32)

        def run(operands, rows):
            given.append((operands.query, operands.key_origin, rows))
            return operands.query.astype(jnp.float32) * factor[0], rows * factor[1]

        return types.SimpleNamespace(call=run, arguments=(Operands(shape, shape, shape), row))

    monkeypatch.setattr(tuning, "_kernel", kernel)
    tried = [Candidate(Tiles((q,), (1,)), 1.0, q == 9) for q in factors]
    done = tuning.measure_kernels(problem, "forward", tried, rounds=2)
    assert [one.candidate for one in done] == tried
    assert [len(one.seconds) for one in done] == [2, 2, 0, 0, 0]
    assert done[2].failure == "ValueError: too many registers"
    assert done[3].failure == "its results are not the default's: 0.1 apart"
    assert done[4].failure == "its results are not the default's: nan apart"
    query, origin, rows = given[0]
    assert (query.shape, query.dtype, origin) == ((3, 4), jnp.bfloat16, None)
    assert (rows.shape, rows.dtype) == ((3,), jnp.float32)
    assert all(x > 0 for one in done for x in one.seconds)


def fake_measure(seconds_of):
    """Times from a function of direction and candidate."""

    def measure(problem, direction, tried, rounds, report):
        return [Measurement(one, (seconds_of(direction, one),) * rounds) for one in tried]

    return measure


LINE = {"layout": (4096,), "rule": {"window_size": 512}}
"""One axis: few shapes to rank."""


def test_tuning_records_the_winner_of_each_direction():
    problem = problem_of(**LINE, batch=3, heads=(4, 2), dim=32)
    fast = {d: tuning.candidates(problem, d, 4)[3] for d in tuning.DIRECTIONS}
    of = lambda d, one: 1e-3 if d == "forward" and one == fast[d] else 2e-3
    done = tuning.tune(problem, num_candidates=4, rounds=3, measure=fake_measure(of))
    assert [len(done.forward), len(done.backward)] == [5, 4]
    entry = done.entry("2026-11-21", {"jax": "1"})
    assert (entry.forward.q, entry.forward.kv) == pair_of(fast["forward"].tiles, "forward")
    assert (entry.forward.seconds, entry.forward.default_seconds) == (1e-3, 2e-3)
    assert entry.forward.predicted_seconds == fast["forward"].predicted_seconds
    default = mosaic_tiles.counted(problem)
    assert (entry.backward.q, entry.backward.kv) == pair_of(default, "backward")
    assert entry.backward.seconds == entry.backward.default_seconds == 2e-3
    assert (entry.batch, entry.heads, entry.kv_heads) == (3, 4, 2)
    save(problem, entry)
    assert mosaic_tiles.complete(problem, None) == entry.tiles


def test_tuning_says_what_it_cannot_do():
    problem = problem_of(**LINE)
    with pytest.raises(RuntimeError, match="the default device is cpu: run it where.*--dry-run"):
        tuning.tune(problem)
    with interpret_gpu("h200"):
        with pytest.raises(RuntimeError, match=r"NVIDIA H200 \(played by the interpreter\)"):
            tuning.tune(problem)
    for sizes in ({"num_candidates": 0}, {"rounds": 0}):
        with pytest.raises(ValueError, match="at least one candidate and one round; got"):
            tuning.tune(problem, **sizes)
    failed = lambda *a: [Measurement(one, failure="no") for one in a[2]]
    with pytest.raises(RuntimeError, match="the default's tiles failed"):
        tuning.tune(problem, num_candidates=1, measure=failed)


# Tables


def test_a_call_gets_the_tiles_of_its_entry():
    problem, entry = problem_of(), entry_of()
    counted = mosaic_tiles.counted(problem)
    assert mosaic_tiles.complete(problem, None) == counted != entry.tiles
    path = save(problem, entry)
    assert tuned.lookup(problem) == (entry, path)
    assert mosaic_tiles.complete(problem, None) == entry.tiles
    assert gna_jax.backends.load("mosaic").workload(problem, None).tiles == entry.tiles


def test_tiles_of_the_caller_win():
    problem, entry = problem_of(), entry_of()
    save(problem, entry)
    own = Tiles(q=(8, 8), kv=(4, 16))
    expected = Tiles((8, 8), (4, 16), entry.backward.q, entry.backward.kv)
    assert mosaic_tiles.complete(problem, own) == expected
    assert mosaic_tiles.origin(problem, own) == "backward tuned on 2026-11-21"
    whole = Tiles((8, 8), (4, 16), (4, 16), (8, 16))
    assert mosaic_tiles.complete(problem, whole) == whole
    assert mosaic_tiles.origin(problem, whole) == ""


def test_a_call_with_all_tiles_reads_no_table(no_tables):
    problem = problem_of()
    path = tuned.machine_table(problem.device)
    path.parent.mkdir(parents=True)
    path.write_text("{")
    whole = Tiles((8, 8), (4, 16), (4, 16), (8, 16))
    assert mosaic_tiles.complete(problem, whole) == whole


@pytest.mark.parametrize(
    "changes",
    [
        {"batch": 7},
        {"heads": (6, 2)},
        {"dim": 40},
        {"rule": RULE | {"stride": (4, 1), "dilation": 1, "is_causal": False}},
    ],
    ids=str,
)
def test_what_the_key_leaves_out(changes):
    assert tuned.key(problem_of(**changes)) == tuned.key(problem_of())


@pytest.mark.parametrize(
    "changes",
    [
        {"layout": (40, 57)},
        {"rule": RULE | {"window_size": (13, 21)}},
        {"rule": RULE | {"stride": (5, 1)}},
        {"rule": RULE | {"dilation": (1, 2)}},
        {"rule": RULE | {"is_causal": (False, True)}},
        {"dim": 72},
        {"dtype": "float16"},
        {"device": "b200"},
    ],
    ids=str,
)
def test_what_the_key_tells_apart(changes):
    save(problem_of(), entry_of())
    other = problem_of(**changes)
    assert tuned.key(other) != tuned.key(problem_of())
    assert tuned.lookup(other) is None
    assert mosaic_tiles.complete(other, None) == mosaic_tiles.counted(other)


def test_another_kind_of_device_has_its_own_table():
    save(problem_of(), entry_of())
    assert tuned.key(problem_of(device="h100")) == tuned.key(problem_of())
    assert tuned.lookup(problem_of(device="h100")) is None


def test_the_machine_comes_before_the_package(monkeypatch, tmp_path):
    problem = problem_of()
    package, machine = entry_of(date="2026-01-01"), entry_of(date="2026-02-02")
    monkeypatch.setattr(tuned, "package_table", lambda: tmp_path / "tuned.json")
    save(problem, package, tmp_path / "tuned.json")
    assert tuned.lookup(problem) == (package, tmp_path / "tuned.json")
    save(problem, machine)
    assert tuned.lookup(problem)[0] == machine


def test_a_table_keeps_its_other_entries(no_tables):
    path = no_tables / "folder" / "table.json"
    problems = problem_of(), problem_of(dtype="float16"), problem_of(device="b200")
    for problem in problems:
        save(problem, entry_of(), path)
    save(problems[0], entry_of(date="2027-01-01"), path)
    table = tuned.read(path)
    dates = {(kind, key): e.date for kind, entries in table.items() for key, e in entries.items()}
    assert len(dates) == 3
    assert dates["NVIDIA H200", tuned.key(problems[0])] == "2027-01-01"
    assert list(dates.values()).count("2026-11-21") == 2
    assert [file.name for file in path.parent.iterdir()] == ["table.json"]


def test_a_new_tuning_is_found_at_once():
    problem = problem_of()
    save(problem, entry_of(date="2026-11-21"))
    assert tuned.lookup(problem)[0].date == "2026-11-21"
    save(problem, entry_of(date="2026-11-22"))
    assert tuned.lookup(problem)[0].date == "2026-11-22"


def edited(change):
    """The text of a table with one entry, changed."""
    problem, fields = problem_of(), dataclasses.asdict(entry_of())
    change(fields)
    return json.dumps({problem.device.kind: {tuned.key(problem): fields}})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "JSONDecodeError"),
        ("[]", "AttributeError"),
        ('{"NVIDIA H200": 3}', "AttributeError"),
        (edited(lambda fields: fields.pop("backward")), "KeyError: 'backward'"),
        (edited(lambda fields: fields["forward"].pop("default_seconds")), "default_seconds"),
        (edited(lambda fields: fields["forward"].update(q=[8, 0])), "got tiles.q=.*0"),
        (edited(lambda fields: fields["forward"].update(q=8)), "TypeError"),
        (edited(lambda fields: fields["backward"].update(kv=[8, 8, 8])), "one size per spatial"),
        (edited(lambda fields: fields.update(versions=3)), "TypeError"),
    ],
)
def test_a_file_that_is_no_table_is_an_error_that_names_it(text, says):
    problem = problem_of()
    path = tuned.machine_table(problem.device)
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(RuntimeError, match=f"{path} is no table of tuned tiles .*{says}") as raised:
        mosaic_tiles.complete(problem, None)
    assert "remove it, and make it again with `gna-jax tune`" in str(raised.value)
    with pytest.raises(RuntimeError, match="is no table of tuned tiles"):
        save(problem, entry_of())
    assert path.read_text() == text, "never overwritten"


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (entry_of(forward=((4, 4), (8, 8))), "tiles.q has 64 or 128 tokens, not 16"),
        (entry_of(forward=((8, 8), (2, 3))), "powers of two"),
        (entry_of(backward=((32, 2), (8, 8))), "at least 4 queries on the last axis"),
        (entry_of(forward=((8, 8), (64, 64))), "64 to 128 tokens with head_dim 64, not 4096"),
    ],
    ids=lambda value: "" if isinstance(value, tuned.Entry) else str(value),
)
def test_an_entry_that_the_kernels_refuse_is_an_error_that_names_its_file(entry, reason):
    problem = problem_of()
    path = save(problem, entry)
    with pytest.raises(RuntimeError, match=f"{path}: the kernels refuse the tuned tiles of") as why:
        mosaic_tiles.complete(problem, None)
    assert reason in str(why.value)
    assert "Run `gna-jax tune` again for this call, remove the entry, or pass tiles=" in str(
        why.value
    )


def test_an_entry_of_another_rank_is_an_error():
    path = save(problem_of(), entry_of(forward=((64,), (64,)), backward=((64,), (64,))))
    with pytest.raises(RuntimeError, match=rf"{path} is no table .*\(tiles of 1 axes for 'Hopper"):
        mosaic_tiles.complete(problem_of(), None)


def test_a_table_that_cannot_be_written(no_tables):
    (no_tables / "file").write_text("")
    with pytest.raises(RuntimeError, match="cannot be written .*name another file with --into"):
        save(problem_of(), entry_of(), no_tables / "file" / "table.json")


def test_the_package_carries_a_table_of_legal_entries():
    path = tuned.package_table()
    assert path.is_file()
    for kind, entries in tuned.read(path).items():
        assert any(device.kind == kind for device in KNOWN_DEVICES.values())
        assert all(entry.versions["jax"] for entry in entries.values())


def test_explain_says_where_tiles_come_from():
    x = jax.ShapeDtypeStruct((1, *LAYOUT, 2, 64), jnp.bfloat16)
    call = {**RULE, "device": "h200", "implementation": "mosaic"}
    told = gna_jax.explain(x, x, x, **call)
    assert told.tiles_from == "" and "tuned" not in str(told)
    entry = entry_of()
    save(problem_of(), entry)
    told = gna_jax.explain(x, x, x, **call)
    assert told.tiles == entry.tiles and told.tiles_from == "tuned on 2026-11-21"
    assert "  tiles     4x16 queries, 8x8 keys, backward 8x8 queries, 8x8 keys (tuned on 2026-11-21)\n" in str(told)  # fmt: skip
    other = gna_jax.explain(x, x, x, **call | {"implementation": "xla"})
    assert other.tiles_from == ""


@pytest.mark.gpu
def test_tuning_on_this_gpu(no_tables):
    spec = gna_jax.device.resolve_device(None)
    problem = dataclasses.replace(problem_of(), device=spec)
    done = tuning.tune(problem, num_candidates=3, rounds=2)
    for one in (*done.forward, *done.backward):
        assert not one.failure and len(one.seconds) == 2 and one.median > 0
    entry = done.entry("2026-11-21", {})
    save(problem, entry)
    x = jax.random.normal(jax.random.key(0), (1, *LAYOUT, 2, 64), jnp.bfloat16)
    run = lambda tiles: gna_jax.gna(x, x, x, **RULE, implementation="mosaic", tiles=tiles)
    assert mosaic_tiles.complete(problem, None) == entry.tiles
    difference = run(None) - run(mosaic_tiles.counted(problem))
    assert jnp.abs(difference.astype(jnp.float32)).max() < 3e-2
