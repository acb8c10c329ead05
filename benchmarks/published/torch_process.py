"""torch's process as the parent sees it: started when first asked, given up when it does not answer in time."""

import json
import os
import select
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

from published.cases import Case
from published.rounds import Unavailable

WORKER = Path(__file__).with_name("torch_flex.py")
START_SECONDS = 60.0
LEAST_SECONDS = 30.0
"""Compiling flex_attention takes about this long; with less time left it is not begun."""
REPETITION_SECONDS = 60.0


class TorchFlex:
    """Compiled flex_attention of another Python, on the same device."""

    name, is_ours, is_dense = "torch flex", False, False

    def __init__(self, python: Path | None, device: str) -> None:
        self._python, self._device = python, device
        self._process: subprocess.Popen | None = None
        self.versions: dict[str, str] = {}
        self.errors: dict[str, float] = {}

    def prepare(self, case: Case, direction: str, seconds_left: float) -> "TorchFlex":
        """As `rounds.Contestant`."""
        if self._python is None:
            raise Unavailable("no --torch-python")
        if max(case.neighborhood.dilation) > 1 or any(case.neighborhood.is_causal):
            raise Unavailable("stride and window only")
        if seconds_left < LEAST_SECONDS:
            raise Unavailable("not reached")
        axes = zip(case.neighborhood.axes, case.layout, strict=True)
        intervals = [[x.tolist() for x in axis.keys(np.arange(n), n)] for axis, n in axes]
        order = {
            "do": "prepare",
            "layout": case.layout,
            "batch": case.batch,
            "heads": case.heads,
            "head_dim": case.head_dim,
            "dtype": case.dtype,
            "direction": direction,
            "intervals": intervals,
            "bias_shape": case.bias_shape,
        }
        self.errors = self._ask(order, seconds_left)["errors"]
        return self

    def seconds_per_call(self, calls: int) -> float:
        """As `rounds.Prepared`."""
        return self._ask({"do": "time", "calls": calls}, REPETITION_SECONDS)["seconds"]

    def stop(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                pipe.close()
            self._process = None

    def _ask(self, order: dict[str, Any], seconds: float) -> dict[str, Any]:
        if self._process is None:
            command = [self._python, WORKER, self._device]
            # What was added to this Python is not for another: torch needs the Triton that it came with.
            own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=own,
            )
            self.versions = self._reply(START_SECONDS)
        try:
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the reply, which never comes, says so
        reply = self._reply(seconds)
        if "failed" in reply:
            raise RuntimeError(reply["failed"])
        return reply

    def _reply(self, seconds: float) -> dict[str, Any]:
        ready, _, _ = select.select([self._process.stdout], [], [], seconds)
        line = self._process.stdout.readline() if ready else b""
        if not line:
            self.stop()
            raise RuntimeError(
                "torch's process ended" if ready else f"no answer in {seconds:.0f} s"
            )
        return json.loads(line)
