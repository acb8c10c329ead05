"""Verification of every implementation on one task, and the rounds in which they take turns.

The processes: `workers.py`. Tables: `report.py`.
"""

import dataclasses
import math
import os
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
from cases import Case
from worker import OUTPUTS, Task
from workers import GNA, Peer, Workers

from gna_jax.neighborhood import Neighborhood

REPETITION_SECONDS = 0.1
"""Calls are repeated until a repetition takes about this long, or `MAX_CALLS`."""
MAX_CALLS = 50
MIN_REPETITIONS = 3

TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2}
"""Largest difference from gna's array, as a share of that array's largest absolute value."""


@dataclasses.dataclass
class Result:
    """One implementation on one task.

    Attributes:
      seconds: of a call, one per repetition; `calls` calls in a row make a repetition.
      errors: `errors` of every output.
      peak_mib: memory that a call needed beyond what the process held before it.
      loads: the machine's one-minute load average after each repetition.
      note: why there are no times. `is_defect`: and that should not be.
    """

    case: str
    dtype: str
    direction: str
    peer: str
    seconds: list[float] = dataclasses.field(default_factory=list)
    calls: int = 0
    errors: dict[str, float] = dataclasses.field(default_factory=dict)
    peak_mib: float = math.nan
    loads: list[float] = dataclasses.field(default_factory=list)
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


def write_inputs(case: Case, folder: Path, seed: int) -> None:
    """The arrays of a case that `worker.Task` names, and the window of every position per axis."""
    random = np.random.default_rng(seed)
    shape = (1, *case.layout, case.heads, case.dim)
    for name in ("query", "key", "value", "cotangent"):
        array = random.standard_normal(shape, dtype=np.float32)
        np.save(folder / f"{name}.npy", array.astype(ml_dtypes.bfloat16).astype(np.float32))
    neighborhood = Neighborhood.of(len(case.layout), window_size=case.window)
    for number, (axis, length) in enumerate(zip(neighborhood.axes, case.layout, strict=True)):
        first, end = axis.keys(np.arange(length), length)
        np.save(folder / f"first_{number}.npy", first)
        np.save(folder / f"end_{number}.npy", end)


def measure(
    workers: Workers,
    task: Task,
    case: str,
    *,
    rounds: int,
    seconds_per_peer: float,
    report: Callable[[str], None],
) -> list[Result]:
    """Prepare and verify every peer on one task, gna first, then time them in turns.

    Round after round each peer runs one repetition while the others sleep; every round starts with another peer. A peer
    too slow for `seconds_per_peer` takes part in fewer rounds, evenly spread, at least `MIN_REPETITIONS`; one of which a
    single call takes longer than that is told by that call alone.
    """
    results, repetitions = [], {}
    for peer in workers.peers:
        result = Result(case, task.dtype, task.direction, peer.name)
        results.append(result)
        if results[0].note:
            result.note = f"not run: no {GNA.name} to verify against"
            continue
        report(f"preparing {peer.name}")
        seconds = _prepare(workers, peer, task, result)
        if seconds > seconds_per_peer:
            result.seconds.append(seconds)
            result.loads.append(os.getloadavg()[0])
        elif seconds:
            affordable = int(seconds_per_peer / (seconds * result.calls))
            repetitions[peer] = min(rounds, max(MIN_REPETITIONS, affordable))
    by_name = {result.peer: result for result in results}
    peers = list(repetitions)
    for number in range(rounds):
        start = number % max(1, len(peers))
        for peer in peers[start:] + peers[:start]:
            due = (number + 1) * repetitions[peer] // rounds > number * repetitions[peer] // rounds
            if due and not by_name[peer.name].note:
                report(f"round {number + 1} of {rounds}: {peer.name}")
                _repeat(workers, peer, by_name[peer.name])
    return results


def _prepare(workers: Workers, peer: Peer, task: Task, result: Result) -> float:
    """Compile, verify, estimate: seconds of a call, or 0 if this peer has nothing to time."""
    order = {"do": "prepare", "task": dataclasses.asdict(task), "save_as": peer.name}
    reply = workers.ask(peer, order)
    if not _accept(result, reply):
        return 0.0
    result.peak_mib = reply["peak_mib"]
    result.calls = max(1, min(MAX_CALLS, round(REPETITION_SECONDS / reply["seconds"])))
    if peer.is_same:
        result.errors = errors(peer, task)
        if not max(result.errors.values()) <= TOLERANCE[task.dtype]:  # NaN is wrong as well
            result.note, result.is_defect = "wrong result", True
            return 0.0
    return reply["seconds"]


def _repeat(workers: Workers, peer: Peer, result: Result) -> None:
    reply = workers.ask(peer, {"do": "time", "calls": result.calls})
    if _accept(result, reply):
        result.seconds.append(reply["seconds"])
        result.loads.append(os.getloadavg()[0])


def _accept(result: Result, reply: dict) -> bool:
    """Whether the reply is a success; otherwise the result says why not, and holds no times."""
    if "seconds" in reply:
        return True
    result.is_defect = "failed" in reply
    result.note = reply.get("failed") or reply["unavailable"]
    result.seconds.clear()
    return False


def errors(peer: Peer, task: Task) -> dict[str, float]:
    """Per output, the largest difference from gna's as a share of gna's largest absolute value.

    gna against itself is no test: its own error is that of the peers, which share no code with it.
    """
    found = {}
    for name in OUTPUTS[task.direction]:
        wanted = task.flat(f"{GNA.name}-{name}")
        difference = np.abs(task.flat(f"{peer.name}-{name}") - wanted)
        found[name] = float(np.max(difference) / np.max(np.abs(wanted)))
    return found
