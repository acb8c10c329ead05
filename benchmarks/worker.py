"""The worker's side of a benchmark: hold one implementation, run it when told. One JSON line in, one JSON line out.

Runs under the project's interpreter and under torch's, so it needs numpy alone. Implementations: `peers_jax.py` and
`peers_torch.py`. The parent's side, which decides who runs when, is `rounds.py`.
"""

import dataclasses
import gc
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

FORWARD, BOTH = "forward", "forward+backward"
OUTPUTS = {FORWARD: ("out",), BOTH: ("out", "d query", "d key", "d value")}
"""What a call returns, by direction."""

OUT_OF_MEMORY = ("out of memory", "can't allocate", "cannot allocate", "resource_exhausted")
"""How numpy, torch and XLA say so, lower case."""


class Unavailable(Exception):
    """This implementation does not offer what was asked; the message says why. Not a failure."""


@dataclasses.dataclass(frozen=True)
class Task:
    """One thing to time. Its arrays lie as `.npy` files in `folder`, the same for every worker.

    `query`, `key`, `value`, `cotangent`: float32 `[B, *space, N, H]` of values that bfloat16 holds exactly.
    `first_<axis>`, `end_<axis>`: the keys `[first, end)` that each position of an axis sees, from `gna_jax.neighborhood`.
    """

    folder: str
    layout: Sequence[int]
    window: Sequence[int]
    dtype: str
    direction: str

    def load(self, name: str) -> np.ndarray:
        """An array of the task."""
        return np.load(Path(self.folder, f"{name}.npy"))

    def flat(self, name: str) -> np.ndarray:
        """An array with its spatial axes as one: `[B, tokens, N, H]`."""
        array = self.load(name)
        return array.reshape(array.shape[0], -1, *array.shape[-2:])

    def intervals(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Per axis, `first` and `end` of the keys that each position sees."""
        return [
            (self.load(f"first_{axis}"), self.load(f"end_{axis}"))
            for axis in range(len(self.layout))
        ]

    def visible(self) -> np.ndarray:
        """The dense mask, bool `[tokens, tokens]`: does the first see the second?"""
        rank = len(self.layout)
        mask = np.ones((1,) * (2 * rank), dtype=bool)
        for axis, (length, (first, end)) in enumerate(
            zip(self.layout, self.intervals(), strict=True)
        ):
            shape = [1] * (2 * rank)
            shape[axis] = shape[rank + axis] = length
            place = np.arange(length)
            sees = (first[:, None] <= place[None, :]) & (place[None, :] < end[:, None])
            mask = mask & sees.reshape(shape)
        return mask.reshape(int(np.prod(self.layout)), -1)


@dataclasses.dataclass(frozen=True)
class Call:
    """A prepared implementation: `run()` returns when its outputs are computed, `to_numpy` makes them float32."""

    run: Callable[[], Any]
    to_numpy: Callable[[Any], Sequence[np.ndarray]]


def serve(versions: dict[str, str], build: Callable[[Task], Call]) -> None:
    """Answer orders from standard input until it closes."""
    # Libraries may print: their standard output goes to standard error, replies keep the pipe.
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    replies.write(json.dumps(versions) + "\n")
    call = None
    for line in sys.stdin:
        order = json.loads(line)
        try:
            if order["do"] == "prepare":
                call = None
                gc.collect()
                task = Task(**order["task"])
                call = build(task)
                reply = _first_calls(call, task, order["save_as"])
            else:
                reply = {"seconds": _seconds_per_call(call, order["calls"])}
        except Unavailable as error:
            reply = {"unavailable": str(error)}
        except Exception as error:
            reply = _failure(error)
        replies.write(json.dumps(reply) + "\n")


def limit_memory(limit_bytes: int) -> None:
    """Let allocations beyond `limit_bytes` fail in this process, before the machine has to end one."""
    resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes))


def _first_calls(call: Call, task: Task, save_as: str) -> dict[str, float]:
    """The untimed calls: the first compiles and gives the outputs to verify, the second estimates time and memory."""
    arrays = call.to_numpy(call.run())
    for name, array in zip(OUTPUTS[task.direction], arrays, strict=True):
        np.save(Path(task.folder, f"{save_as}-{name}.npy"), array)
    del arrays
    gc.collect()
    before = _reset_peak_memory()
    started = time.perf_counter()
    call.run()
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "peak_mib": _memory_mib("VmHWM") - before}


def _seconds_per_call(call: Call, calls: int) -> float:
    """Mean of `calls` calls in a row, after one untimed call where there are several.

    Short calls would else be timed with the caches and clock that the process before left behind.
    """
    if calls > 1:
        call.run()
    started = time.perf_counter()
    for _ in range(calls):
        call.run()
    return (time.perf_counter() - started) / calls


def _reset_peak_memory() -> float:
    """Set the process's peak back to what it holds now, in MiB; NaN where the system has no such thing."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return float("nan")
    return _memory_mib("VmRSS")


def _memory_mib(field: str) -> float:
    """A field of this process's memory status."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return float("nan")
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def _failure(error: Exception) -> dict[str, str]:
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, MemoryError) or any(said in text.lower() for said in OUT_OF_MEMORY):
        return {"unavailable": "out of memory"}
    return {"failed": " ".join(text.split())[:300]}
