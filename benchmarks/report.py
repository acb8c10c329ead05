"""The results of a benchmark as tables and as JSON. What the numbers mean is written once, in `METHOD`."""

import dataclasses
import json
import math
import os
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cases import CASES
from predicted import predicted_seconds
from rich.table import Table
from rounds import Result
from workers import GNA

METHOD = (
    "Milliseconds of one call, batch 1: the median over the repetitions. Implementations take turns, one repetition each,"
    " in processes of one group; all others sleep meanwhile. A repetition is the mean of enough calls in a row to fill about"
    " 0.1 s, after an untimed one. The first call compiles and the"
    " second estimates: neither counts, except where one call takes longer than --seconds: then the second is all (n = 1). Inputs are the same files,"
    " laid out beforehand as each implementation wants them. Every result is compared with gna's before timing.",
    "forward+backward gives the output and the gradients of sum(output * cotangent) by query, key and value.",
    "faster = median of the best peer / median of gna (the ratio of medians, not the median of ratios). The best peer may be"
    " torch SDPA dense, which attends to every token: another answer, the usual way out.",
    "gna predicted: what the simulator's cost model says of gna, and how far that is from the measurement.",
    "jax masked: jax.nn.dot_product_attention with the dense mask. torch flex: torch.compile(flex_attention) with the block"
    " mask; torch has no backward for it on a CPU. torch SDPA masked: scaled_dot_product_attention with the bool mask.",
)


@dataclasses.dataclass(frozen=True)
class Run:
    """Where and how the results were taken: what a table needs to be read later."""

    date: str
    command: str
    cpu: str
    cores: int
    memory_gib: float
    versions: dict[str, str]

    @property
    def lines(self) -> list[str]:
        """As it stands above the tables."""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return [
            f"{self.date}, {self.cpu}, {self.cores} cores, {self.memory_gib:.0f} GiB",
            versions,
            f"`{self.command}`",
        ]


def cpu_name() -> str:
    """The processor's name, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )


def usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0))


def best_peer(row: Sequence[Result]) -> Result | None:
    """The fastest result that is not gna's, if any peer has times."""
    timed = [result for result in row if result.peer != GNA.name and result.seconds]
    return min(timed, key=lambda result: result.median, default=None)


def speedup(row: Sequence[Result]) -> float:
    """How many times faster than its best peer gna is; NaN where one of them has no times."""
    best = best_peer(row)
    own = next(result for result in row if result.peer == GNA.name)
    return best.median / own.median if best and own.seconds else math.nan


def rich_tables(results: Sequence[Result]) -> Iterable[Table]:
    """One table per dtype and direction."""
    for title, header, rows in _tables(results):
        table = Table(title=title, title_justify="left")
        for column in header:
            table.add_column(column, justify="left" if column == "case" else "right")
        for row in rows:
            table.add_row(*row)
        yield table


def write(results: Sequence[Result], run: Run, folder: Path) -> Path:
    """Write `<date>-cpu.md` and `<date>-cpu.json` into the folder; returns the first."""
    folder.mkdir(parents=True, exist_ok=True)
    markdown = folder / f"{run.date}-cpu.md"
    markdown.write_text("\n".join(_markdown(results, run)) + "\n")
    record = {
        **dataclasses.asdict(run),
        "method": METHOD,
        "cases": {name: dataclasses.asdict(case) for name, case in CASES.items()},
        "results": [_record(result) for result in results],
    }
    (folder / f"{run.date}-cpu.json").write_text(json.dumps(record, indent=1) + "\n")
    return markdown


def _tables(results: Sequence[Result]) -> Iterable[tuple[str, list[str], list[list[str]]]]:
    """Title, header and rows of every table."""
    peers = list(dict.fromkeys(result.peer for result in results))
    for dtype, direction in dict.fromkeys((r.dtype, r.direction) for r in results):
        chosen = [r for r in results if (r.dtype, r.direction) == (dtype, direction)]
        rows = []
        for case in dict.fromkeys(result.case for result in chosen):
            row = [result for result in chosen if result.case == case]
            best = best_peer(row)
            gain = speedup(row)
            cells = {result.peer: _cell(result) for result in row}
            rows.append(
                [
                    CASES[case].title,
                    f"{best.peer} {_milliseconds(best.median)}" if best else "none",
                    "-" if math.isnan(gain) else f"{gain:.2f}x",
                    *(cells[peer] for peer in peers),
                    _prediction(row),
                ]
            )
        header = ["case", "best peer", "faster", *peers, "gna predicted"]
        yield f"{dtype} {direction}, ms", header, rows


def _prediction(row: Sequence[Result]) -> str:
    """The cost model's time for gna and how far off it is."""
    own = next(result for result in row if result.peer == GNA.name)
    predicted = predicted_seconds(own.case, own.dtype, own.direction)
    if not own.seconds:
        return _milliseconds(predicted)
    return f"{_milliseconds(predicted)} ({predicted / own.median - 1:+.0%})"


def _markdown(results: Sequence[Result], run: Run) -> Iterable[str]:
    yield "# Neighborhood attention on a CPU"
    yield ""
    yield from ("  \n".join(run.lines), "")
    for paragraph in METHOD:
        yield from (paragraph, "")
    for title, header, rows in _tables(results):
        yield from (f"## {title}", "")
        yield from _markdown_table(header, rows)
        yield ""
    yield from ("## Spread, errors, memory", "")
    yield (
        "Middle half of the repetitions and their number; largest error of any output, as a share of its largest value,"
        " against gna; memory a call needs beyond its inputs; load average of the machine."
    )
    yield ""
    header = ["case", "dtype", "direction", "peer", "ms", "n", "error", "MiB", "load"]
    yield from _markdown_table(header, [_spread(result) for result in results if result.seconds])


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterable[str]:
    yield "| " + " | ".join(header) + " |"
    yield "|---" * len(header) + "|"
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def _spread(result: Result) -> list[str]:
    first, third = (_milliseconds(x) for x in result.quartiles)
    return [
        result.case,
        result.dtype,
        result.direction,
        result.peer,
        f"{first} to {third}",
        str(len(result.seconds)),
        f"{max(result.errors.values()):.1e}" if result.errors and result.peer != GNA.name else "",
        "" if math.isnan(result.peak_mib) else f"{result.peak_mib:.0f}",
        f"{sum(result.loads) / len(result.loads):.1f}",
    ]


def _cell(result: Result) -> str:
    return _milliseconds(result.median) if result.seconds else result.note


def _milliseconds(seconds: float) -> str:
    """Three digits: 4.21, 42.1, 421, 4210."""
    milliseconds = 1e3 * seconds
    return f"{milliseconds:.{max(0, 2 - math.floor(math.log10(milliseconds)))}f}"


def _record(result: Result) -> dict[str, Any]:
    """A result as JSON has it, NaN as null."""
    record = dataclasses.asdict(result)
    record["peak_mib"] = None if math.isnan(result.peak_mib) else round(result.peak_mib, 1)
    if result.seconds:
        first, third = result.quartiles
        record |= {"median_ms": 1e3 * result.median, "quartiles_ms": [1e3 * first, 1e3 * third]}
    return record
