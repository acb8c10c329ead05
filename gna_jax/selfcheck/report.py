"""A self-check as Markdown that reads as plain text too: tables with their columns aligned, to be pasted into an issue."""

import statistics
from collections.abc import Iterable, Sequence

import gna_jax
from gna_jax import verification
from gna_jax.selfcheck import Check, SelfCheck
from gna_jax.selfcheck.timing import DIRECTIONS, SIZES, Timed
from gna_jax.verification import Outcome

ERROR = 300
"""Characters of an error in a list; what is wrong stands at the front."""

METHOD = (
    "ms: median of a call, in turns with cuDNN's; + backward: both passes. TFLOP/s: flops of the pairs that attend and of no other, two"
    " products forward, five backward. cuDNN: attention of all tokens to all tokens, jax.nn.dot_product_attention; x dense: its time over"
    " the kernel's. predicted: ms, by this package's cost model for the kernel's tiles."
)


def markdown(found: SelfCheck) -> str:
    """The whole report."""
    parts = [_head(found), _implementations(found)]
    parts += [_check(check, found) for check in found.checks]
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


def _head(found: SelfCheck) -> list[str]:
    kind = found.device.spec.kind if found.device else "unknown device"
    played = f", played by JAX's interpreter as {found.interpret}" if found.interpret else ""
    lines = [f"# gna-jax selfcheck, {gna_jax.__version__}: {kind}{played}", ""]
    lines += [f"- **Problem**: {_shortened(problem)}" for problem in found.problems]
    for check in found.checks:
        if check.is_right:
            twice = "forward and backward, the same twice"
            lines.append(f"- {check.name} is right in {len(check.trials)} calls, {twice}")
    rows = [("date", f"{found.date}, {found.seconds:.0f} s of {60 * found.minutes:.0f}")]
    if found.device is not None:
        rows.append(("device", _device(found)))
    rows += list(found.environment.items())
    return [*lines, "", *_table(("", "on this machine"), rows)]


def _device(found: SelfCheck) -> str:
    if found.device is None:
        return ""
    spec, number = found.device.spec, found.device.number
    parts = [spec.kind]
    if spec.compute_capability:
        parts.append(f"compute capability {'.'.join(map(str, spec.compute_capability))}")
    if spec.num_sms:
        parts.append(f"{spec.num_sms} SMs")
    if number > 1 and not found.interpret:
        parts.append(f"the first of {number}")
    return ", ".join(parts)


def _implementations(found: SelfCheck) -> list[str]:
    lines = ["## Implementations", ""]
    for one in found.standings:
        lines.append(f"- `{one.name}`: {_shortened(one.reason) or 'runs here'}")
    if not found.standings:
        lines.append("- not known: looking at the machine failed")
    if found.library is None:
        return lines
    lines += ["", "## CUDA library", ""]
    if found.library.failure:
        return [*lines, f"- not loaded: {_shortened(found.library.failure)}"]
    return [*lines, *(f"- {name}: {value}" for name, value in found.library.facts.items())]


def _check(check: Check, found: SelfCheck) -> list[str]:
    lines = [f"## {check.name}: results against float32", ""]
    lines += _errors(check.outcomes)
    lines += _wrong(check)
    if check.stamp:
        lines += ["", f"`gna` takes it here by default from now on: {check.stamp}"]
    lines += ["", f"## {check.name}: times", ""]
    if check.timed:
        lines += [*_times(check.timed), ""]
    if check.timing_failure:
        of = f"{len(check.timed)} of {len(SIZES) * len(DIRECTIONS)} were reached: "
        lines += [f"{of if check.timed else ''}{_shortened(check.timing_failure)}", ""]
    elif found.interpret:
        lines += ["Interpreted calls are not timed.", ""]
    if check.timed:
        lines.append(METHOD)
        if check.empty_call is not None:
            lines.append(f"A call that computes nothing takes {1e6 * check.empty_call:.0f} us.")
    return lines[:-1] if not lines[-1] else lines


def _errors(outcomes: Sequence[Outcome]) -> list[str]:
    """The largest error of each array by dtype, products of TF32 apart."""
    dtypes = list(dict.fromkeys(outcome.trial.arithmetic for outcome in outcomes))
    largest: dict[str, dict[str, float]] = {}
    for outcome in outcomes:
        for name, error in outcome.errors.items():
            of_name = largest.setdefault(name, {})
            before = of_name.get(outcome.trial.arithmetic, 0.0)
            # NaN stays.
            of_name[outcome.trial.arithmetic] = before if error <= before else error
    if not largest:
        return ["No result was compared."]
    header = ["largest error", *(part for dtype in dtypes for part in (dtype, "allowed"))]
    rows = []
    for name, of_name in largest.items():
        pairs = ((of_name.get(dtype), verification.tolerance(name, dtype)) for dtype in dtypes)
        cells = (("", "") if e is None else (f"{e:.1e}", f"{allowed:.1e}") for e, allowed in pairs)
        rows.append([name, *(cell for pair in cells for cell in pair)])
    return [*_table(header, rows), "", "As a share of the array's largest entry."]


def _wrong(check: Check) -> list[str]:
    """A line per call that is not right."""
    lines = []
    for outcome in check.wrong:
        trial = f"`{outcome.trial}` {outcome.trial.arithmetic}"
        lines.append(f"- **WRONG** {trial}: {_shortened(_told(outcome))}")
    return ["", *lines] if lines else []


def _told(outcome: Outcome) -> str:
    """What is wrong."""
    if outcome.failure:
        return outcome.failure
    allowed = lambda name: verification.tolerance(name, outcome.trial.arithmetic)
    over = [f"{n} {e:.1e}" for n, e in outcome.errors.items() if not e <= allowed(n)]
    over += [] if outcome.is_repeatable else ["another result the second time"]
    return ", ".join(over) or "no result"


def _times(timed: Sequence[Timed]) -> list[str]:
    """A table, and what the names in it mean."""
    header = ("size", "", "ms", "TFLOP/s", "cuDNN ms", "x dense", "predicted")
    names = list(dict.fromkeys(one.size for one in timed))
    lines = _table(header, [_row(one) for one in timed])
    lines += ["", *(f"- {name}: {SIZES[name]}, {SIZES[name].dtype}" for name in names)]
    for one in timed:
        for what, failure in (("", one.failure), (", cuDNN", one.dense_failure)):
            if failure:
                lines.append(f"- {one.size} {one.direction}{what}: {_shortened(failure)}")
    return lines


def _row(one: Timed) -> tuple[str, ...]:
    number = lambda value, form: "" if value is None else format(value, form)
    return (
        one.size,
        one.direction.replace("forward+", "+ "),
        "failed" if one.failure else _milliseconds(one.seconds),
        number(one.useful_tflops, ".0f"),
        "failed" if one.dense_failure else _milliseconds(one.dense),
        number(one.times_dense, ".2f"),
        "" if one.predicted is None else _milliseconds((one.predicted,)),
    )


def _milliseconds(seconds: Sequence[float]) -> str:
    return f"{1e3 * statistics.median(seconds):.4g}" if seconds else ""


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Of Markdown, its columns aligned; a bar in a cell would begin another."""
    cells = [[text.replace("|", "/") for text in row] for row in (header, *rows)]
    widths = [max(len(row[n]) for row in cells) for n in range(len(header))]
    line = lambda row: "| " + " | ".join(t.ljust(w) for t, w in zip(row, widths, strict=True)) + " |"  # fmt: skip
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return [line(cells[0]), rule, *map(line, cells[1:])]


def _shortened(text: str) -> str:
    """One line, its middle left out where it is long."""
    text = " ".join(text.split())
    return text if len(text) <= ERROR else f"{text[: 2 * ERROR // 3]} [..] {text[-ERROR // 3 :]}"
