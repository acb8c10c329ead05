"""The results of `benchmarks/attention.py` as tables and JSON, and which targets they meet. What the numbers mean stands in `METHOD`."""

import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from published.cases import AHEAD_OF_FLEX, BEST_PEER, DIRECTIONS, FORWARD, Case
from published.rounds import Result
from published.torch_process import TorchFlex

METHOD = (
    "ms: median over the repetitions of one call, and the middle half of them. A repetition queues enough calls one after the other to"
    " fill about 0.1 s, waits once for the last, and counts their mean; an untimed call goes before. Contestants take turns, one"
    " repetition each, every round beginning with another. Backward: the gradients by query, key and value from what the forward saved,"
    " every pass over memory included.",
    "useful TFLOP/s: flops of the pairs that attend, and of no other, over the median: 4 * head dim per pair and head forward, 10 backward"
    " (five products, as FlashAttention counts them; a deterministic backward computes seven). Dense attention attends to all pairs.",
    "x dense: cuDNN's dense time over this one's. of bound: that ratio over the FLOP-wise bound, all pairs / pairs that attend.",
    "of predicted: the time that the simulator predicts over the measured one, for gna's own tiles; below 100 %: slower than predicted.",
    "x best peer: the time of the fastest other (dense included) over gna's.",
    "tile rate, useful share: useful TFLOP/s = tile rate * useful share, where the tile rate counts every pair that the tiles compute and"
    " the useful share is counted, not measured. Forward only: the two kernels of a backward walk different tiles.",
    "error: largest difference from float32 attention at 16 random queries and its gradients, as a share of the largest entry.",
    "torch flex: compiled flex_attention of the torch named below, its tokens already in tile order (bringing them there is not timed)."
    " tokamax: one interval of keys per query, one axis only.",
    "memory floor: what query, key, value, out and lse have in bytes, each moved once, over the bytes per second that a copy of"
    " 1 GiB reads and writes on this device.",
)

HEADER = (
    "case",
    "",
    "ms",
    "middle half",
    "n",
    "useful TFLOP/s",
    "x dense",
    "of bound",
    "of predicted",
    "x best peer",
    "tile rate",
    "useful share",
    "error",
)


@dataclasses.dataclass(frozen=True)
class Run:
    """Where and how the results were taken."""

    date: str
    command: str
    device: str
    driver: str
    versions: dict[str, str]
    empty_call_seconds: float
    clocks: dict[str, str]
    not_reached: tuple[str, ...]
    seconds: float
    copied_bytes_per_second: float


@dataclasses.dataclass(frozen=True)
class Row:
    """A result with the numbers that follow from it. NaN where one cannot be told.

    Attributes:
      useful_tflops, times_dense, share_of_bound, share_of_predicted, times_best_peer, tile_tflops, useful_share: as in `METHOD`.
      times_flex: torch flex's time over this one's.
      times_floor: this one's time over the memory floor. `floor_seconds`: that.
    """

    result: Result
    useful_tflops: float
    times_dense: float
    share_of_bound: float
    share_of_predicted: float
    times_best_peer: float
    tile_tflops: float
    useful_share: float
    times_flex: float
    times_floor: float
    floor_seconds: float


@dataclasses.dataclass(frozen=True)
class Facts:
    """What is known of a contestant on a case before anything runs: NaN where nothing is."""

    predicted_seconds: float = math.nan
    useful_share: float = math.nan
    floor_seconds: float = math.nan


def rows_of(case: Case, results: Sequence[Result], facts: dict[str, Facts]) -> list[Row]:
    """The rows of one case and direction; `facts` by contestant."""
    dense = min((r.median for r in results if r.is_dense), default=math.inf)
    peer = min((r.median for r in results if not r.is_ours), default=math.inf)
    flex = min((r.median for r in results if r.contestant == TorchFlex.name), default=math.inf)
    rows = []
    for result in results:
        known = facts.get(result.contestant, Facts())
        flops = case.flops(result.direction, result.is_dense) / 1e12
        useful = flops / result.median if result.seconds else math.nan
        times_dense = _ratio(dense, result.median)
        rows.append(
            Row(
                result,
                useful_tflops=useful,
                times_dense=times_dense,
                share_of_bound=math.nan if result.is_dense else times_dense / case.flop_bound,
                share_of_predicted=_ratio(known.predicted_seconds, result.median),
                times_best_peer=_ratio(peer, result.median) if result.is_ours else math.nan,
                tile_tflops=useful / known.useful_share,
                useful_share=known.useful_share,
                times_flex=_ratio(flex, result.median) if result.is_ours else math.nan,
                times_floor=_ratio(result.median, known.floor_seconds),
                floor_seconds=known.floor_seconds,
            )
        )
    return rows


def _ratio(a: float, b: float) -> float:
    return a / b if math.isfinite(a) and math.isfinite(b) else math.nan


def table(rows: Sequence[Row], cases: dict[str, Case]) -> list[tuple[str, ...]]:
    """Cells under `HEADER`."""
    return [_cells(row, cases[row.result.case]) for row in rows]


def _cells(row: Row, case: Case) -> tuple[str, ...]:
    result = row.result
    if not result.seconds:
        return (case.title, result.contestant, result.note or "not reached", *[""] * 10)
    first, third = (_milliseconds(x) for x in result.quartiles)
    error = max(result.errors.values(), default=math.nan)
    return (
        case.title,
        result.contestant,
        _milliseconds(result.median),
        f"{first} to {third}",
        str(len(result.seconds)),
        _number(row.useful_tflops, ".0f"),
        _number(row.times_dense, ".2f"),
        _number(row.share_of_bound, ".0%"),
        _number(row.share_of_predicted, ".0%"),
        _number(row.times_best_peer, ".2f"),
        _number(row.tile_tflops, ".0f"),
        _number(row.useful_share, ".0%"),
        _number(error, ".0e"),
    )


def verdicts(rows: Sequence[Row], cases: dict[str, Case]) -> list[str]:
    """One line per target that applies to a timed row of gna."""
    ours = [row for row in rows if row.result.is_ours and row.result.seconds]
    return [line for row in ours for line in _verdicts(row, cases[row.result.case])]


def _verdicts(row: Row, case: Case) -> Iterable[str]:
    result, implementation = row.result, row.result.contestant.removeprefix("gna ")
    is_forward = result.direction == FORWARD
    what = f"{case.name} {result.direction}, {result.contestant}"
    wanted = case.targets.get(implementation, {}).get(result.direction)
    if wanted is not None:
        told = f"{what}: {row.useful_tflops:.0f} useful TFLOP/s, wanted {wanted:.0f}"
        if is_forward and not math.isnan(row.useful_share):
            told += f" (tile rate {row.tile_tflops:.0f} x useful share {row.useful_share:.0%})"
        yield _verdict(told, row.useful_tflops >= wanted)
    most = case.floor_targets.get(implementation)
    if most is not None and is_forward and not math.isnan(row.times_floor):
        rate = f"{case.forward_bytes / 1e6:.0f} MB at {case.forward_bytes / row.floor_seconds / 1e12:.2f} TB/s, as a copy has it"
        told = f"{what}: {row.times_floor:.2f}x the memory floor ({rate}), wanted {most:g} at most"
        yield _verdict(told, row.times_floor <= most)
    if implementation in AHEAD_OF_FLEX:
        if not math.isnan(row.times_flex):
            told = f"{what}: {row.times_flex:.2f}x {TorchFlex.name}, wanted more than 1"
            yield _verdict(told, row.times_flex > 1)
    elif not math.isnan(row.times_best_peer):
        told = f"{what}: {row.times_best_peer:.2f}x the best peer, wanted {BEST_PEER}"
        yield _verdict(told, row.times_best_peer >= BEST_PEER)


def _verdict(told: str, is_met: bool) -> str:
    return f"{told}: {'met' if is_met else 'MISSED'}"


def write(rows: Sequence[Row], run: Run, cases: dict[str, Case], out: Path) -> tuple[Path, Path]:
    """Write `out` as `.md` and as `.json`, whichever was named; returns both paths."""
    out.parent.mkdir(parents=True, exist_ok=True)
    markdown, record = out.with_suffix(".md"), out.with_suffix(".json")
    markdown.write_text("\n".join(_markdown(rows, run, cases)) + "\n")
    whole = {
        **dataclasses.asdict(run),
        "method": METHOD,
        "targets": verdicts(rows, cases),
        "cases": {case.name: _case_record(case) for case in cases.values()},
        "results": [_record(row) for row in rows],
    }
    record.write_text(json.dumps(_without_nan(whole), indent=1) + "\n")
    return markdown, record


def _markdown(rows: Sequence[Row], run: Run, cases: dict[str, Case]) -> Iterable[str]:
    yield f"# Neighborhood attention at published sizes on {run.device}"
    yield ""
    versions = ", ".join(f"{name} {version}" for name, version in run.versions.items())
    yield f"{run.date}, {run.device}, driver {run.driver}  "
    yield f"{versions}  "
    yield f"`{run.command}`, {run.seconds:.0f} s; a call that computes nothing takes {1e6 * run.empty_call_seconds:.0f} us, a"
    yield f"copy moves {run.copied_bytes_per_second / 1e12:.2f} TB/s, bytes read and written"
    for direction in DIRECTIONS:
        mine = [row for row in rows if row.result.direction == direction]
        if mine:
            yield from ("", f"## {direction.capitalize()}", "")
            yield "| " + " | ".join(HEADER) + " |"
            yield "|---" * len(HEADER) + "|"
            yield from ("| " + " | ".join(cells) + " |" for cells in table(mine, cases))
    yield from ("", "## Targets on an H200", "")
    yield from (f"- {line}" for line in verdicts(rows, cases) or ["no target could be told"])
    yield from ("", "## Not reached", "")
    yield from (f"- {line}" for line in run.not_reached or ["nothing: every case was timed"])
    yield from ("", "## Method", "")
    for paragraph in METHOD:
        yield from (paragraph, "")
    yield "Clocks, power and temperature after each case:"
    yield ""
    yield from (f"- {name}: {text}" for name, text in run.clocks.items())


def _case_record(case: Case) -> dict[str, Any]:
    more = {"pairs": case.pairs, "flop_bound": case.flop_bound, "title": case.title}
    return dataclasses.asdict(case) | more


def _record(row: Row) -> dict[str, Any]:
    record = dataclasses.asdict(row)
    result = record.pop("result")
    if row.result.seconds:
        first, third = row.result.quartiles
        result |= {
            "median_ms": 1e3 * row.result.median,
            "quartiles_ms": [1e3 * first, 1e3 * third],
        }
    return result | record


def _without_nan(value: Any) -> Any:
    """NaN and infinities as null: JSON has none."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _milliseconds(seconds: float) -> str:
    """Three digits: 0.0421, 4.21, 421."""
    milliseconds = 1e3 * seconds
    return f"{milliseconds:.{max(0, 2 - math.floor(math.log10(milliseconds)))}f}"


def _number(value: float, form: str) -> str:
    return "" if math.isnan(value) else format(value, form)
