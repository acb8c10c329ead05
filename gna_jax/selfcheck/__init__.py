"""`selfcheck`: everything of this package that can run on this machine, checked and timed, and what came of it.

Every part runs in a process of its own (`processes`), so that none hides another's results; the process that asks for them never
touches the GPU. `report.markdown` makes it a text. For one kernel, in this process: `gna-jax verify`.
"""

import dataclasses
import datetime
import time
from collections.abc import Sequence

from gna_jax import verification
from gna_jax.device import resolve_device
from gna_jax.selfcheck import machine, timing
from gna_jax.selfcheck.machine import Device, Library, Standing
from gna_jax.selfcheck.processes import Part, Ran, Report, Run, Send, run_apart
from gna_jax.selfcheck.stamp import record_success
from gna_jax.selfcheck.timing import EmptyCall, Timed
from gna_jax.verification import Outcome, Trial, one_line

LOOK_SECONDS = 60.0
"""Most for starting JAX and loading the library."""
COMPARE_SHARE, INTERPRETED_SHARE = 0.6, 0.95
"""Of the time, for comparing: on a GPU, and interpreted, where nothing is timed. Kernels are compared at the same time, timed in turn."""
PROCESSES = 3
"""That compare one kernel's calls, each its share: most of the time is one thread compiling, a second or more for each Triton kernel."""


@dataclasses.dataclass(frozen=True)
class Check:
    """What came of one kernel.

    Attributes:
      name: of the implementation.
      trials: the calls that were to be compared.
      outcomes: of those that were reached, in order.
      failure: what ended comparing early; else empty.
      stamp: path of the stamp that lets the default take the kernel; empty where none was written.
      stamp_failure: why it could not be.
      timed: published sizes, as far as they were reached.
      timing_failure: what ended timing early; else empty.
      empty_call: seconds of a call that computes nothing.
    """

    name: str
    trials: tuple[Trial, ...]
    outcomes: tuple[Outcome, ...] = ()
    failure: str = ""
    stamp: str = ""
    stamp_failure: str = ""
    timed: tuple[Timed, ...] = ()
    timing_failure: str = ""
    empty_call: float | None = None

    @property
    def wrong(self) -> tuple[Outcome, ...]:
        """Outcomes that are not right."""
        return tuple(outcome for outcome in self.outcomes if not outcome.is_right)

    @property
    def is_right(self) -> bool:
        """Whether every call was reached and is right."""
        return len(self.outcomes) == len(self.trials) and not self.wrong and not self.failure


@dataclasses.dataclass(frozen=True)
class SelfCheck:
    """All of it.

    Attributes:
      date: of its start, UTC.
      minutes: what it was given.
      interpret: the GPU that JAX's interpreter played; None on a GPU.
      environment: driver, system and versions by name.
      device: JAX's default device; None where JAX could not tell.
      library: the CUDA library; None where it ended the process that looked.
      standings: of the implementations.
      looking_failure: what ended looking for these early; else empty.
      checks: per GPU implementation that runs here.
      seconds: that it took.
    """

    date: str
    minutes: float
    interpret: str | None
    environment: dict[str, str]
    device: Device | None = None
    library: Library | None = None
    standings: tuple[Standing, ...] = ()
    looking_failure: str = ""
    checks: tuple[Check, ...] = ()
    seconds: float = 0.0

    @property
    def problems(self) -> tuple[str, ...]:
        """Everything that is wrong, a line each; none if all is well. What was not reached in time is wrong where it was to be compared."""
        found = []
        if self.looking_failure:
            found.append(f"looking at the machine failed: {self.looking_failure}")
        if self.device is not None and not self._has_gpu():
            found.append(machine.missing_gpu(self.device.spec.kind, self.environment))
        elif self.device is not None and not self.checks:
            found.append(
                f"no GPU implementation runs on {self.device.spec.kind}, so nothing was checked"
            )
        if self.library is not None and self.library.is_there and self.library.failure:
            found.append(f"the CUDA library is there and cannot be used: {self.library.failure}")
        found += [f"{one.name}: {one.reason}" for one in self.standings if one.is_broken]
        for check in self.checks:
            found += _problems(check)
        return tuple(found)

    def _has_gpu(self) -> bool:
        return self.device is not None and self.device.spec.platform == "cuda"


def _problems(check: Check) -> list[str]:
    found = []
    if check.wrong:
        found.append(f"{check.name} is wrong in {len(check.wrong)} of {len(check.trials)} calls")
    reached = {outcome.trial for outcome in check.outcomes}
    missing = [trial for trial in check.trials if trial not in reached]
    if missing:
        found.append(
            f"{check.name}: {len(reached)} of {len(check.trials)} calls were compared; `{missing[0]}`:"
            f" {check.failure or 'no result'}"
        )
    elif check.failure:
        found.append(f"{check.name}: {check.failure}")
    if check.stamp_failure:
        found.append(f"{check.name}: its stamp could not be written: {check.stamp_failure}")
    failed = [timed for timed in check.timed if timed.failure]
    found += [f"{check.name}, {t.size} {t.direction}: {t.failure}" for t in failed]
    return found


def selfcheck(
    minutes: float = 5.0,
    *,
    interpret: str | None = None,
    report: Report = lambda text: None,
    run: Run = run_apart,
) -> SelfCheck:
    """Look at the machine, compare every GPU implementation that runs here with float32, time those that are right.

    Args:
      minutes: for all of it; what was not reached by then is told.
      interpret: the name of a GPU that JAX's interpreter plays: small calls, no times, no stamp.
      report: called with what is being done.
      run: runs parts; in processes of their own by default.

    Raises:
      ValueError: for a time that is not positive, or a device that is not known.
    """
    if interpret is not None:
        resolve_device(interpret)
    if not 0 < minutes < float("inf"):
        raise ValueError(
            f"minutes must be a positive number; got {minutes:g}: 5 is enough for most"
        )
    started = time.monotonic()
    left = lambda: max(0.0, started + 60 * minutes - time.monotonic())
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    found = SelfCheck(date, minutes, interpret, machine.environment())
    found = _look(found, min(left(), LOOK_SECONDS), report, run)
    if found.device is not None and found._has_gpu():
        kernels = [one for one in found.standings if one.is_kernel and not one.reason]
        share = COMPARE_SHARE if interpret is None else INTERPRETED_SHARE
        checks = _compare(kernels, found.device, interpret, share * left(), report, run)
        for number, check in enumerate(checks):
            share = left() / (len(checks) - number)
            checks[number] = _time(check, interpret, share, report, run)
        found = dataclasses.replace(found, checks=tuple(checks))
    return dataclasses.replace(found, seconds=time.monotonic() - started)


def _look(found: SelfCheck, seconds: float, report: Report, run: Run) -> SelfCheck:
    trial = next(iter(timing.SIZES.values()))
    part = Part("looking at the machine", machine.look, (found.interpret, trial), 7)
    (ran,) = run([part], seconds, report)
    return dataclasses.replace(
        found,
        device=next((m for m in ran.messages if isinstance(m, Device)), None),
        library=next((m for m in ran.messages if isinstance(m, Library)), None),
        standings=tuple(m for m in ran.messages if isinstance(m, Standing)),
        looking_failure=ran.failure,
    )


def _compare(
    kernels: Sequence[Standing],
    device: Device,
    interpret: str | None,
    seconds: float,
    report: Report,
    run: Run,
) -> list[Check]:
    """Every kernel's trials, at the same time, and the stamps of those that are right."""
    trials = lambda one: verification.trials_with(one.optional, interpret is not None)
    checks = [Check(one.name, trials(one)) for one in kernels]
    shares = [[check.trials[n::PROCESSES] for n in range(PROCESSES)] for check in checks]
    parts = [
        Part(f"comparing {check.name}", compare, (check.name, share, interpret), len(share))
        for check, mine in zip(checks, shares, strict=True)
        for share in mine
        if share
    ]
    all_ran = run(parts, seconds, report)
    for number, check in enumerate(checks):
        mine = [r for p, r in zip(parts, all_ran, strict=True) if p.arguments[0] == check.name]
        check = dataclasses.replace(
            check,
            outcomes=_in_order(check.trials, mine),
            failure="; ".join(dict.fromkeys(ran.failure for ran in mine if ran.failure)),
        )
        if check.is_right and interpret is None:
            try:
                path = record_success(check.name, device.spec, check.outcomes)
                check = dataclasses.replace(check, stamp=str(path))
            except OSError as error:
                check = dataclasses.replace(check, stamp_failure=one_line(error))
        checks[number] = check
    return checks


def _in_order(trials: Sequence[Trial], all_ran: Sequence[Ran]) -> tuple[Outcome, ...]:
    """The outcomes of all processes in the order of the trials."""
    by_trial = {outcome.trial: outcome for ran in all_ran for outcome in ran.messages}
    return tuple(by_trial[trial] for trial in trials if trial in by_trial)


def compare(send: Send, implementation: str, trials: Sequence[Trial], interpret: str | None) -> None:  # fmt: skip
    """Send the `Outcome` of every trial."""
    with machine.interpreted(interpret):
        verification.verify(implementation, trials, report=send)


def _time(check: Check, interpret: str | None, seconds: float, report: Report, run: Run) -> Check:
    """Published sizes; of a kernel that is wrong no time is worth telling."""
    if not check.is_right:
        return dataclasses.replace(check, timing_failure="not timed, since it is not right")
    most = 1 + len(timing.SIZES) * len(timing.DIRECTIONS)
    part = Part(f"timing {check.name}", timing.measure, (check.name, interpret), most)
    ran: Ran = run([part], seconds, report)[0]
    empty = [m.seconds for m in ran.messages if isinstance(m, EmptyCall)]
    return dataclasses.replace(
        check,
        timed=tuple(m for m in ran.messages if isinstance(m, Timed)),
        timing_failure=ran.failure,
        empty_call=empty[0] if empty else None,
    )
