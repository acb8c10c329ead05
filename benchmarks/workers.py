"""Worker processes as the parent sees them: which implementations there are, how one is started, asked and lost.

What runs inside: `worker.py`, `peers_jax.py`, `peers_torch.py`. Who runs when: `rounds.py`.
"""

import dataclasses
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from worker import OUT_OF_MEMORY

HERE = Path(__file__).resolve().parent

REPLY_SECONDS = 900.0
"""A worker that has not answered by then is given up. Compiling takes a minute at most."""
MEMORY_SHARE = 0.85
"""Share of the free memory that one worker may allocate: calls never overlap, what a worker keeps between them is little."""

QUIET_WHEN_IDLE = {"OMP_WAIT_POLICY": "passive", "KMP_BLOCKTIME": "0"}
"""Threads of a worker that has nothing to do sleep: they do not spin on another's core."""


@dataclasses.dataclass(frozen=True)
class Peer:
    """An implementation: the worker script and which of its entries.

    Attributes:
      is_torch: whether torch's interpreter runs it.
      is_same: False for one whose answer differs from gna's by definition.
    """

    name: str
    script: str
    entry: str
    is_torch: bool = False
    is_same: bool = True


GNA = Peer("gna", "peers_jax.py", "gna")
"""What the others are measured and verified against."""
PEERS = (
    GNA,
    Peer("jax masked", "peers_jax.py", "masked"),
    Peer("torch flex", "peers_torch.py", "flex", is_torch=True),
    Peer("torch SDPA masked", "peers_torch.py", "masked", is_torch=True),
    Peer("torch SDPA dense", "peers_torch.py", "dense", is_torch=True, is_same=False),
)


class WorkerEnded(Exception):
    """The process ended or did not answer in time."""


class Worker:
    """A process that holds one implementation, in the parent's process group, asleep unless asked."""

    def __init__(self, peer: Peer, python: Path, memory_limit: int, log: Path) -> None:
        self._log = log
        with log.open("wb") as stream:
            self._process = subprocess.Popen(
                [python, HERE / peer.script, peer.entry, str(memory_limit)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                bufsize=0,
                env=os.environ | QUIET_WHEN_IDLE | {"JAX_PLATFORMS": "cpu"},
            )
        self.versions = self._reply()

    def ask(self, order: dict[str, Any]) -> dict[str, Any]:
        """Send one order, wait for its reply.

        Raises:
          WorkerEnded: there is none; the process is gone then.
        """
        try:
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
        except BrokenPipeError:
            pass  # the reply, which never comes, says why
        return self._reply()

    def stop(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()

    def _reply(self) -> dict[str, Any]:
        ready, _, _ = select.select([self._process.stdout], [], [], REPLY_SECONDS)
        if not ready:
            self.stop()
            raise WorkerEnded(f"no answer in {REPLY_SECONDS:.0f} s")
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        status = self._process.wait()
        self.stop()
        said = self._log.read_text(errors="replace").split("\n")
        last = next((text for text in reversed(said) if text.strip()), "")[:200]
        if status == -signal.SIGKILL or any(word in last.lower() for word in OUT_OF_MEMORY):
            raise WorkerEnded("out of memory")
        raise WorkerEnded(f"worker ended with status {status}: {last}")


class Workers:
    """One worker per implementation, started when first asked, and again after it ended."""

    def __init__(self, peers: Sequence[Peer], torch_python: Path, folder: Path) -> None:
        self.peers, self.folder = peers, folder
        self._torch_python = torch_python
        self._memory_limit = int(MEMORY_SHARE * available_bytes())
        self._running: dict[str, Worker] = {}

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *exception: object) -> None:
        for worker in self._running.values():
            worker.stop()

    def ask(self, peer: Peer, order: dict[str, Any]) -> dict[str, Any]:
        """The reply of a peer's worker; a process that ended reads as one that failed."""
        try:
            return self._worker(peer).ask(order)
        except WorkerEnded as ended:
            self._running.pop(peer.name, None)
            reason = str(ended)
            return {"unavailable" if reason == "out of memory" else "failed": reason}

    def versions(self) -> dict[str, str]:
        """Versions of jax, torch and their Pythons, as the workers report them."""
        merged = {}
        for peer in self.peers:
            merged |= self._worker(peer).versions
        return merged

    def _worker(self, peer: Peer) -> Worker:
        if peer.name not in self._running:
            python = self._torch_python if peer.is_torch else Path(sys.executable)
            log = self.folder / f"{peer.name}.log"
            self._running[peer.name] = Worker(peer, python, self._memory_limit, log)
        return self._running[peer.name]


def available_bytes() -> int:
    """Memory that processes may still take; all of it where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return total_bytes()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def total_bytes() -> int:
    """The machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
