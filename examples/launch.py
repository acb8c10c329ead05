"""Several processes of one program on this machine, as a scheduler starts them on the hosts of a cluster.

They live and die together: when one ends badly the others are stopped, which would wait for it in vain. Nothing here knows what
they compute. `train_two_processes.py` uses it.
"""

import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path


class ProcessDiedError(RuntimeError):
    """One of the processes ended badly."""


def start_processes(
    command: Sequence[str], *, processes: int, devices: int, logs: Path
) -> list[subprocess.Popen]:
    """Start a command that takes `--processes`, `--process` (which of them it is) and `--coordinator` (host:port of the first).

    Args:
      command: without these options.
      processes: how many.
      devices: CPU devices of each.
      logs: folder for what all but the first write: `process_1.log` and so on. The first writes where its launcher does.
    """
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    shared = ["--processes", str(processes), "--coordinator", f"localhost:{free_port()}"]
    started = []
    for number in range(processes):
        log = None if number == 0 else (logs / f"process_{number}.log").open("w")
        started.append(
            subprocess.Popen(
                [*command, *shared, "--process", str(number)],
                stdin=subprocess.PIPE,  # nothing comes through it, and it closes when the launcher is gone
                stdout=log,
                stderr=log,
                env=environment,
            )
        )
        if log is not None:
            log.close()
    return started


def wait_for(processes: Sequence[subprocess.Popen]) -> None:
    """Return when all have ended well; none is left in any case.

    Raises:
      ProcessDiedError: as soon as one has not.
    """
    try:
        is_over = False
        while not is_over:
            time.sleep(0.02)
            codes = [process.poll() for process in processes]
            if failed := [f"process {n} {ending(code)}" for n, code in enumerate(codes) if code]:
                raise ProcessDiedError(f"{' and '.join(failed)}, and all have been stopped")
            is_over = None not in codes
    finally:
        for process in processes:
            process.kill()  # of no effect on one that has ended
            process.communicate()


def ending(code: int) -> str:
    """In words, what subprocess says by a number."""
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"failed with code {code}"


def end_with_launcher() -> None:
    """In a process that was started here: end when the launcher does, however that ended."""

    def wait() -> None:
        os.read(0, 1)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def free_port() -> int:
    """A port of this machine that nobody uses now."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]
