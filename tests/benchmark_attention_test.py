"""The arithmetic of `benchmarks/attention.py`: flops against a brute-force count, ratios, tables, targets, the budget of time."""

import dataclasses
import json
import math
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import typer

import gna_jax
from gna_jax.device import KNOWN_DEVICES
from gna_jax.neighborhood import WHOLE_GROUP, Neighborhood
from gna_jax.simulator import Simulation, best_tiles
from gna_jax.simulator.published import PAPER_TILES
from gna_jax.tiling import Tiles

BENCHMARKS = pathlib.Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import attention  # noqa: E402
from published import contestants, report, rounds  # noqa: E402
from published.blocks import BLOCK, block_kinds, tile_of, tile_order  # noqa: E402
from published.cases import BACKWARD, FORWARD, PUBLISHED, Case  # noqa: E402
from published.report import Facts  # noqa: E402
from published.rounds import Budget, Result, Unavailable, measure  # noqa: E402
from published.torch_process import TorchFlex  # noqa: E402

sys.path.remove(str(BENCHMARKS))

H200 = KNOWN_DEVICES["h200"]
TINY = Case("tiny", (6, 10), Neighborhood.of(2, window_size=(3, 4)), 3, 2, 8, "bfloat16")


def smaller(case: Case) -> Case:
    """A case shrunk to at most 10 tokens per axis, its windows and strides with it."""
    shrink = lambda size, n: size if n <= 10 else max(1, size * 10 // n)
    rule, layout = case.neighborhood, case.layout
    return dataclasses.replace(
        case,
        layout=tuple(shrink(n, n) for n in layout),
        neighborhood=dataclasses.replace(
            rule,
            window_size=tuple(map(shrink, rule.window_size, layout)),
            stride=tuple(map(shrink, rule.stride, layout)),
        ),
    )


@pytest.mark.parametrize("case", PUBLISHED.values(), ids=lambda case: case.name)
def test_useful_flops_against_a_count_of_the_mask(case):
    case = smaller(case)
    pairs = int(case.neighborhood.mask(case.layout).sum())
    per_pair = case.batch * case.heads * case.head_dim
    assert case.flops(FORWARD) == 4 * pairs * per_pair
    assert case.flops(BACKWARD) == 10 * pairs * per_pair
    assert case.flops(FORWARD, is_dense=True) == 4 * case.tokens**2 * per_pair
    assert case.flop_bound == case.tokens**2 / pairs


def test_the_published_sizes():
    """Tera-flops and FLOP-wise bounds as arXiv 2504.16922 and NATTEN's documents have them."""
    known = {
        "hunyuan-s16x8x8": (14.677, 11.11),
        "hunyuan-s1": (14.677, 11.11),
        "hunyuan-s2x8x8": (14.677, 11.11),
        "flux-s16": (5.154, 10.24),
        "flux-s1": (5.154, 10.24),
        "cosmos-s1": (5.669, 9.17),
        "1d-s1": (0.0344, 16.0),
        "nat-1": (0.0101, 64.0),
        "nat-1-bias": (0.0101, 64.0),
    }
    assert PUBLISHED.keys() == known.keys()
    for name, (flops, bound) in known.items():
        case = PUBLISHED[name]
        assert case.flops(FORWARD) / 1e12 == pytest.approx(flops, rel=0.01), name
        assert case.flop_bound == pytest.approx(bound, rel=0.001), name
    strides = {name: case.neighborhood.stride for name, case in PUBLISHED.items()}
    assert strides["hunyuan-s16x8x8"] == (16, 8, 8) and strides["hunyuan-s2x8x8"] == (2, 8, 8)
    assert strides["flux-s16"] == (16, 16)
    assert all(
        set(s) == {1} for name, s in strides.items() if name.endswith(("s1", "nat-1", "bias"))
    )
    nat = PUBLISHED["nat-1"]
    rows = nat.batch * 56 * 56 * 4
    assert nat.forward_bytes == 4 * (rows * 32 * 2) + rows * 4
    assert nat.bias_shape is None and PUBLISHED["nat-1-bias"].bias_shape == (4, 13, 13)
    assert PUBLISHED["nat-1-bias"].title == nat.title + ", bias"


def test_cases_with_a_target_of_block_sparse_kernels_are_block_sparse():
    for case in PUBLISHED.values():
        tiles = best_tiles(case.neighborhood, case.layout, 128, 128, dynamic=True)
        simulation = Simulation.of(case.neighborhood, case.layout, tiles)
        targets = [case.targets.get(name, {}).get(FORWARD) for name in ("mosaic", "triton")]
        assert simulation.fully_block_sparse == (targets == [620.0, 350.0]), case.name


def test_predictions_are_the_simulators():
    case = PUBLISHED["flux-s16"]
    tiles = Tiles(q=(16, 8), kv=(16, 8), backward_q=(8, 8), backward_kv=(16, 8), dynamic=True)
    forward = case.predicted_seconds(tiles, FORWARD, H200)
    assert 4e-3 < forward < 12e-3  # NATTEN on an H100: 7.9 ms
    backward = case.predicted_seconds(tiles, BACKWARD, H200)
    assert 2.5 * forward < backward < 6 * forward
    assert case.predicted_seconds(None, FORWARD, H200) is None
    assert case.predicted_seconds(Tiles(q=(8, 8), kv=None), FORWARD, H200) is None
    assert case.predicted_seconds(PAPER_TILES["flux-4k"], FORWARD, KNOWN_DEVICES["cpu"]) is None
    assert case.predicted_dense_seconds(FORWARD, H200) > 8 * forward
    assert case.predicted_dense_seconds(FORWARD, KNOWN_DEVICES["cpu"]) is None


def result(contestant, seconds, direction=FORWARD, **more):
    name = PUBLISHED["flux-s16"].name
    return Result(name, direction, contestant, seconds=seconds, errors={"out": 1e-3}, **more)


def rows():
    """gna takes 8 ms, dense attention 80 ms, another 10 ms."""
    case = PUBLISHED["flux-s16"]
    results = [
        result("gna mosaic", [0.009, 0.008, 0.007], is_ours=True),
        result("cuDNN dense", [0.08], is_dense=True),
        result("torch flex", [0.01]),
        result("tokamax", [], note="one axis only"),
    ]
    return report.rows_of(case, results, {"gna mosaic": Facts(0.0076, 0.8)})


def test_ratios():
    gna, dense, flex, tokamax = rows()
    case = PUBLISHED["flux-s16"]
    assert gna.useful_tflops == pytest.approx(case.flops(FORWARD) / 0.008 / 1e12)
    assert dense.useful_tflops == pytest.approx(52.78 / 0.08, rel=1e-3)  # all pairs
    assert gna.times_dense == pytest.approx(10) and flex.times_dense == pytest.approx(8)
    assert gna.share_of_bound == pytest.approx(10 / 10.24)
    assert gna.share_of_predicted == pytest.approx(0.95)
    assert gna.times_best_peer == pytest.approx(1.25)
    assert gna.tile_tflops == pytest.approx(gna.useful_tflops / 0.8)
    for row, fields in (
        (dense, ("share_of_bound", "share_of_predicted", "times_best_peer", "tile_tflops")),
        (flex, ("share_of_predicted", "times_best_peer", "useful_share")),
        (tokamax, ("useful_tflops", "times_dense", "share_of_bound")),
    ):
        assert all(math.isnan(getattr(row, field)) for field in fields)


def test_without_a_dense_time_or_a_peer_there_is_no_ratio():
    (alone,) = report.rows_of(
        PUBLISHED["flux-s16"], [result("gna mosaic", [1.0], is_ours=True)], {}
    )
    assert math.isnan(alone.times_dense) and math.isnan(alone.times_best_peer)
    assert report.verdicts([alone], PUBLISHED) == [
        "flux-s16 forward, gna mosaic: 5 useful TFLOP/s, wanted 620: MISSED"
    ]


def test_tables_and_targets():
    gna, dense, _, tokamax = report.table(rows(), PUBLISHED)
    assert gna[:5] == (PUBLISHED["flux-s16"].title, "gna mosaic", "8.00", "7.50 to 8.50", "3")
    assert gna[5:] == ("644", "10.00", "98%", "95%", "1.25", "805", "80%", "1e-03")
    assert dense[5:8] == ("660", "1.00", "") and tokamax[2] == "one axis only"
    assert {len(gna), len(dense), len(tokamax)} == {len(report.HEADER)}
    assert report.verdicts(rows(), PUBLISHED) == [
        "flux-s16 forward, gna mosaic: 644 useful TFLOP/s, wanted 620 (tile rate 805 x useful share 80%): met",
        "flux-s16 forward, gna mosaic: 1.25x the best peer, wanted 0.9: met",
    ]


class Clock:
    """Time passes only where a contestant spends it."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@dataclasses.dataclass
class Fake:
    """A contestant whose preparation and calls take a fixed time."""

    name: str
    clock: Clock
    order: list
    prepares: float = 1.0
    call: float = 0.05
    error: float = 1e-3
    raises: Exception | None = None
    is_ours: bool = False
    is_dense: bool = False

    def prepare(self, case, direction, seconds_left):
        self.clock.now += self.prepares
        if self.raises:
            raise self.raises
        self.errors = {"out": self.error}
        return self

    def seconds_per_call(self, calls):
        self.clock.now += calls * self.call
        self.order.append((self.name, calls))
        return self.call


def test_turns():
    clock, order = Clock(), []
    fakes = [Fake(name, clock, order, call=call) for name, call in (("a", 0.05), ("b", 0.3))]
    results = measure(TINY, FORWARD, fakes, 3, Budget(1000, clock))
    assert [r.seconds for r in results] == [[0.05] * 3, [0.3] * 3]
    # An estimate each, then 0.1 s of calls, at least one; every round begins with another.
    names, calls = zip(*order, strict=True)
    assert "".join(names) == "ab" + "abbaab" and calls == (1, 1, 2, 1, 1, 2, 2, 1)
    assert results[0].prepare_seconds == pytest.approx(1.05)


def test_the_budget_ends_the_rounds_and_names_who_was_not_reached():
    clock, order = Clock(), []
    fakes = [
        Fake("slow", clock, order, prepares=4, call=3.0),
        Fake("late", clock, order, prepares=4, call=1.0),
        Fake("never", clock, order),
    ]
    budget = Budget(11, clock)
    results = {r.contestant: r for r in measure(TINY, FORWARD, fakes, 9, budget)}
    assert results["never"].note == "not reached" and not results["never"].seconds
    # Everyone prepared has one time at least, though the budget is overdrawn for it.
    assert len(results["slow"].seconds) == len(results["late"].seconds) == 1
    assert budget.left == 11 - (4 + 3 + 4 + 1) - (3 + 1)


def test_what_cannot_and_what_is_wrong_has_no_times():
    clock, order = Clock(), []
    fakes = [
        Fake("not here", clock, order, raises=Unavailable("needs a GPU")),
        Fake("ours", clock, order, raises=RuntimeError("illegal\naddress"), is_ours=True),
        Fake("theirs", clock, order, raises=RuntimeError("RESOURCE_EXHAUSTED: 3 GiB")),
        Fake("wrong", clock, order, error=0.5),
        Fake("nan", clock, order, error=math.nan),
        Fake("right", clock, order),
    ]
    results = measure(TINY, FORWARD, fakes, 1, Budget(1000, clock))
    told = [(r.note, r.is_defect, bool(r.seconds)) for r in results]
    assert told == [
        ("needs a GPU", False, False),
        ("RuntimeError: illegal address", True, False),
        ("out of memory", False, False),
        ("wrong result", True, False),
        ("wrong result", True, False),
        ("", False, True),
    ]


def run(tmp_path, monkeypatch, has_bias=False, **options):
    """The command on the tiny case, on this CPU, by the xla backend and without peers."""
    case = dataclasses.replace(TINY, has_bias=has_bias)
    monkeypatch.setitem(attention.SUITES, "tiny", {TINY.name: case})
    monkeypatch.setattr(rounds, "REPETITION_SECONDS", 0.001)
    arguments = {
        "suite": "tiny",
        "direction": "both",
        "cases": "",
        "implementations": "xla",
        "peers": "none",
        "rounds": 2,
        "minutes": 5.0,
        "out": tmp_path / "found.md",
        "torch_python": None,
    }
    attention.main(**arguments | options)


def test_a_run_on_the_cpu(tmp_path, monkeypatch):
    """With a bias, whose gradient is compared as well."""
    run(tmp_path, monkeypatch, has_bias=True, peers="dense,flex,tokamax")
    record = json.loads((tmp_path / "found.json").read_text())
    times = {(r["contestant"], r["direction"]): r for r in record["results"]}
    gradients = {f"d {name}" for name in ("query", "key", "value", "relative_position_bias")}
    for direction, arrays in ((FORWARD, {"out"}), (BACKWARD, gradients)):
        own = times["gna xla", direction]
        assert len(own["seconds"]) == 2 and own["errors"].keys() == arrays
        assert 0 < max(own["errors"].values()) < 1e-2
        assert own["useful_tflops"] == pytest.approx(TINY.flops(direction) / own["median_ms"] / 1e9)
        assert times["cuDNN dense", direction]["note"] == "needs a GPU"
        assert times["torch flex", direction]["note"] == "no --torch-python"
        assert times["tokamax", direction]["note"] == "one axis only"
    assert record["not_reached"] == [] and record["clocks"].keys() == {
        "tiny forward",
        "tiny backward",
    }
    text = (tmp_path / "found.md").read_text()
    assert record["copied_bytes_per_second"] > 1e8 and " TB/s, bytes read and written" in text
    assert times["gna xla", FORWARD]["times_floor"] > 0
    assert "## Forward" in text and "## Backward" in text and TINY.title in text


def test_an_implementation_that_cannot_has_a_row_with_its_reason(tmp_path, monkeypatch):
    """No crash, no target that it misses, and the others' times; its backward is another's."""
    monkeypatch.setitem(contestants.GRADIENTS_OF, "xla", "reference")
    run(tmp_path, monkeypatch, implementations="xla, cutlass", direction="both")
    record = json.loads((tmp_path / "found.json").read_text())
    rows = {(r["contestant"], r["direction"]): r for r in record["results"]}
    reason = rows["gna cutlass", FORWARD]
    assert "cutlass runs on cuda, the device is cpu" in reason["note"]
    assert not reason["is_defect"] and not reason["seconds"]
    assert rows["gna cutlass", BACKWARD]["note"] == "its backward is mosaic's"
    assert rows["gna xla", BACKWARD]["note"] == "its backward is reference's"
    assert rows["gna xla", FORWARD]["seconds"]
    assert not [line for line in record["targets"] if "cutlass" in line]
    text = (tmp_path / "found.md").read_text()
    assert "| gna cutlass | implementation='cutlass' cannot run this call: cutlass runs on" in text


def test_without_a_library_the_cutlass_row_says_how_to_build_one(tmp_path, monkeypatch):
    """On a Hopper GPU, as far as the dispatch knows."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    explain = gna_jax.explain
    monkeypatch.setattr(gna_jax, "explain", lambda *a, **k: explain(*a, **k, device="h200"))
    contestant = contestants.Gna("cutlass")
    case = PUBLISHED["flux-s16"]
    with pytest.raises(Unavailable, match="the CUDA library is not built; build it with `gna-jax"):
        contestant.prepare(case, FORWARD, 60.0)


def test_targets_are_told_for_each_implementation():
    case = PUBLISHED["flux-s16"]
    ours = [
        result(f"gna {name}", [ms / 1e3], is_ours=True)
        for name, ms in (("mosaic", 8.0), ("cutlass", 12.0), ("triton", 12.0), ("xla", 100.0))
    ]
    lines = report.verdicts(report.rows_of(case, ours, {}), PUBLISHED)
    assert lines == [
        "flux-s16 forward, gna mosaic: 644 useful TFLOP/s, wanted 620: met",
        "flux-s16 forward, gna cutlass: 429 useful TFLOP/s, wanted 620: MISSED",
        "flux-s16 forward, gna triton: 429 useful TFLOP/s, wanted 350: met",
    ]


def test_targets_of_triton():
    """Ahead of flex_attention, whoever else is faster; NAT's forward within twice the time that its bytes take."""
    case = PUBLISHED["nat-1"]
    floor = case.forward_bytes / 4.0e12
    ours = Result(case.name, FORWARD, "gna triton", seconds=[1.5 * floor], is_ours=True)
    flex = Result(case.name, FORWARD, "torch flex", seconds=[1.8 * floor])
    faster = Result(case.name, FORWARD, "cuDNN dense", seconds=[floor], is_dense=True)
    known = {"gna triton": Facts(floor_seconds=floor)}
    told = report.verdicts(report.rows_of(case, [ours, flex, faster], known), PUBLISHED)
    mb = case.forward_bytes / 1e6
    assert told == [
        f"nat-1 forward, gna triton: 1.50x the memory floor ({mb:.0f} MB at 4.00 TB/s, as a copy has it), wanted 2 at most: met",
        "nat-1 forward, gna triton: 1.20x torch flex, wanted more than 1: met",
    ]
    ours.seconds = [2.1 * floor]
    told = report.verdicts(report.rows_of(case, [ours, flex, faster], known), PUBLISHED)
    assert len(told) == 2 and all(line.endswith("MISSED") for line in told)
    assert report.verdicts(report.rows_of(case, [ours], {}), PUBLISHED) == []


def test_without_time_every_case_is_listed_as_not_reached(tmp_path, monkeypatch):
    with pytest.raises(typer.Exit):  # nothing of gna's was timed
        run(tmp_path, monkeypatch, minutes=0.0)
    record = json.loads((tmp_path / "found.json").read_text())
    assert record["not_reached"] == ["tiny forward", "tiny backward"]
    assert "- tiny backward" in (tmp_path / "found.md").read_text()


def test_a_wrong_result_ends_the_run_with_status_1(tmp_path, monkeypatch):
    gna = contestants.gna
    monkeypatch.setattr(contestants, "gna", lambda *x, **options: 1.1 * gna(*x, **options))
    with pytest.raises(typer.Exit):
        run(tmp_path, monkeypatch, direction="forward")
    (row,) = json.loads((tmp_path / "found.json").read_text())["results"]
    assert row["note"] == "wrong result" and row["errors"]["out"] > 0.05


def test_names_are_checked(tmp_path, monkeypatch):
    with pytest.raises(typer.BadParameter, match="--cases: got \\['giant'\\]; choose from tiny"):
        run(tmp_path, monkeypatch, cases="giant")
    with pytest.raises(typer.BadParameter, match=r"--implementations: got \['pallas'\]; choose"):
        run(tmp_path, monkeypatch, implementations="xla,pallas")
    with pytest.raises(typer.BadParameter, match="--suite must be one of"):
        run(tmp_path, monkeypatch, suite="unpublished")


@pytest.mark.slow
def test_dense_attention_through_the_same_path():
    """The comparison of the dense peer, with jax's own attention in cuDNN's place."""
    rule = Neighborhood.of(1, window_size=WHOLE_GROUP)
    attention = jax.nn.dot_product_attention
    for direction in (FORWARD, BACKWARD):
        with jax.numpy_dtype_promotion("standard"):  # jax's own attention mixes dtypes
            ready = contestants.prepared(TINY, direction, attention, rule, (TINY.tokens,))
            outputs = jax.tree.leaves(ready.run())
        assert 0 < max(ready.errors.values()) < rounds.TOLERANCE
        shape = (TINY.batch, TINY.tokens, TINY.heads, TINY.head_dim)
        assert {x.shape for x in outputs} == {shape}
    assert np.isfinite(contestants.empty_call_seconds())
    names = [name for name, _ in contestants.arrays(TINY)]
    assert names == ["query", "key", "value", "cotangent"]
    assert contestants.arrays(TINY)[3][1].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("layout", "window", "stride", "tile"),
    [
        ((512,), (40,), (8,), (128,)),
        ((32, 32), (9, 7), (1, 4), (16, 8)),
        ((4, 16, 16), (3, 5, 8), (2, 1, 8), (2, 8, 8)),
        ((8, 8, 16), (4, 8, 8), (2, 8, 8), (2, 8, 8)),
    ],
)
def test_blocks_of_torchs_mask_against_a_scan(layout, window, stride, tile):
    """Which blocks of tokens in tile order have a pair that attends, and which have no other."""
    assert tile_of(layout) == tile and math.prod(tile) == BLOCK
    rule = Neighborhood.of(len(layout), window_size=window, stride=stride)
    places = tile_order(layout, tile)
    number = np.ravel_multi_index(tuple(places), layout)
    assert sorted(number) == list(range(math.prod(layout)))
    mask = rule.mask(layout).reshape(len(number), -1)[np.ix_(number, number)]
    blocks = mask.reshape(len(number) // BLOCK, BLOCK, -1, BLOCK)
    intervals = [axis.keys(np.arange(n), n) for axis, n in zip(rule.axes, layout, strict=True)]
    met, full = block_kinds(intervals, layout, tile)
    np.testing.assert_array_equal(met, blocks.any(axis=(1, 3)))
    np.testing.assert_array_equal(full, blocks.all(axis=(1, 3)))


class TestTorchProcess:
    """The parent's side, with a stand-in for torch's process."""

    def worker(self, tmp_path, monkeypatch, body):
        script = tmp_path / "worker.py"
        script.write_text(
            "import json, os, sys, time\n"
            "print(json.dumps({'torch': os.environ.get('PYTHONPATH', '9')}), flush=True)\n"
            f"for line in sys.stdin:\n    order = json.loads(line)\n    {body}\n"
        )
        monkeypatch.setattr("published.torch_process.WORKER", script)
        return TorchFlex(pathlib.Path(sys.executable), "cpu")

    def test_orders_and_replies(self, tmp_path, monkeypatch):
        body = "print(json.dumps({'errors': {'out': order['heads']}} if order['do'] == 'prepare' else {'seconds': order['calls']}), flush=True)"
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # of this Python, not of torch's
        flex = self.worker(tmp_path, monkeypatch, body)
        assert flex.prepare(TINY, FORWARD, 60).errors == {"out": 2}
        assert flex.seconds_per_call(7) == 7 and flex.versions == {"torch": "9"}
        flex.stop()

    @pytest.mark.parametrize(
        ("body", "message"),
        [
            ("print(json.dumps({'failed': 'no flex'}), flush=True)", "no flex"),
            ("sys.exit(3)", "torch's process ended"),
            ("time.sleep(60)", "no answer in 31 s"),
        ],
    )
    def test_failures_name_themselves(self, tmp_path, monkeypatch, body, message):
        flex = self.worker(tmp_path, monkeypatch, body)
        select = lambda r, w, x, seconds: (
            r if seconds != 31 or "sleep" not in body else [],
            [],
            [],
        )
        monkeypatch.setattr("published.torch_process.select.select", select)
        with pytest.raises(RuntimeError, match=message):
            flex.prepare(TINY, FORWARD, 31)
        flex.stop()

    def test_what_it_does_not_take(self):
        flex = TorchFlex(pathlib.Path(sys.executable), "cpu")
        dilated = Neighborhood.of(2, window_size=(3, 4), dilation=2)
        with pytest.raises(Unavailable, match="stride and window only"):
            flex.prepare(dataclasses.replace(TINY, neighborhood=dilated), FORWARD, 60)
        with pytest.raises(Unavailable, match="not reached"):
            flex.prepare(TINY, FORWARD, 5)
