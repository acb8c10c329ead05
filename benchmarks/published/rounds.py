"""Who runs when: a budget of time, contestants prepared and compared with float32, then timed in turns.

What is timed: `contestants` and `torch_flex`. Tables: `report`.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from published.cases import Case

REPETITION_SECONDS = 0.1
"""Calls are queued until a repetition takes about this long, or `MAX_CALLS`."""
MAX_CALLS = 200
MIN_SECONDS = 12.0
"""With less time left no further case is begun."""
TOLERANCE = 2.5e-2
"""Largest error against float32, as a share of the array's largest entry, that a 16-bit result may have. Times of worse ones are dropped."""


class Unavailable(Exception):
    """A contestant does not offer what was asked; the message says why. Not a failure."""


class Prepared(Protocol):
    """A contestant ready to run one case: compiled and compared."""

    errors: dict[str, float]

    def seconds_per_call(self, calls: int) -> float:
        """Mean seconds of `calls` calls queued one after the other, waited for once, after an untimed one."""
        ...


class Contestant(Protocol):
    """Something to time.

    Attributes:
      name: in the tables.
      is_ours: whether it is gna.
      is_dense: whether it attends to every pair: another answer, the usual way out.
    """

    name: str
    is_ours: bool
    is_dense: bool

    def prepare(self, case: Case, direction: str, seconds_left: float) -> Prepared:
        """Compile, run, compare.

        Raises:
          Unavailable: for what it does not offer, here or in this case.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Budget:
    """Seconds that a run may take, by a clock of its own."""

    seconds: float
    clock: Callable[[], float] = time.monotonic
    started: float = dataclasses.field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "started", self.clock())

    @property
    def left(self) -> float:
        """Seconds left; below zero when overdrawn."""
        return self.started + self.seconds - self.clock()


@dataclasses.dataclass
class Result:
    """One contestant on one case.

    Attributes:
      seconds: of a call, one per repetition; `calls` queued calls make a repetition.
      errors: against float32 at sampled queries, by array, as a share of its largest entry.
      prepare_seconds: what compiling, running and comparing took.
      note: why there are no times. `is_defect`: and that should not be.
    """

    case: str
    direction: str
    contestant: str
    is_ours: bool = False
    is_dense: bool = False
    seconds: list[float] = dataclasses.field(default_factory=list)
    calls: int = 0
    errors: dict[str, float] = dataclasses.field(default_factory=dict)
    prepare_seconds: float = math.nan
    note: str = ""
    is_defect: bool = False

    @property
    def median(self) -> float:
        """Median seconds of a call; infinite without times."""
        return float(np.median(self.seconds)) if self.seconds else math.inf

    @property
    def quartiles(self) -> tuple[float, float]:
        """The middle half of the repetitions lies between these seconds."""
        first, third = np.quantile(self.seconds, (0.25, 0.75))
        return float(first), float(third)


def measure(
    case: Case,
    direction: str,
    contestants: Sequence[Contestant],
    rounds: int,
    budget: Budget,
    report: Callable[[str], None] = lambda text: None,
) -> list[Result]:
    """Prepare every contestant in turn, then time them in turns: one repetition each, every round beginning with another.

    Stops when the budget is used up: a contestant that was not prepared by then has a note, the others fewer repetitions.
    """
    results, running = [], []
    for contestant in contestants:
        result = Result(
            case.name, direction, contestant.name, contestant.is_ours, contestant.is_dense
        )
        results.append(result)
        if budget.left <= 0:
            result.note = "not reached"
            continue
        report(f"preparing {contestant.name}")
        began = budget.clock()
        prepared = _prepare(contestant, case, result, budget)
        result.prepare_seconds = budget.clock() - began
        if prepared is not None:
            running.append((result, prepared))
    for number in range(rounds):
        start = number % max(1, len(running))
        for result, prepared in running[start:] + running[:start]:
            if budget.left <= 0 and result.seconds:
                continue
            report(f"round {number + 1} of {rounds}: {result.contestant}")
            _repeat(result, prepared)
    return results


def _prepare(contestant: Contestant, case: Case, result: Result, budget: Budget) -> Prepared | None:
    """The prepared contestant, or None with the reason in the result."""
    try:
        prepared = contestant.prepare(case, result.direction, budget.left)
        result.errors = prepared.errors
        if not max(prepared.errors.values(), default=0.0) <= TOLERANCE:  # NaN is wrong as well
            result.note, result.is_defect = "wrong result", True
            return None
        estimate = prepared.seconds_per_call(1)
    except Unavailable as reason:
        result.note = str(reason)
        return None
    except Exception as error:  # whatever ended it, the others go on
        result.note, result.is_defect = _short(error), contestant.is_ours
        return None
    result.calls = max(1, min(MAX_CALLS, round(REPETITION_SECONDS / estimate)))
    return prepared


def _repeat(result: Result, prepared: Prepared) -> None:
    if result.note:
        return
    try:
        result.seconds.append(prepared.seconds_per_call(result.calls))
    except Exception as error:  # as above
        result.note, result.is_defect = _short(error), result.is_ours
        result.seconds.clear()


def _short(error: Exception) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return "out of memory" if "RESOURCE_EXHAUSTED" in text else text[:200]
