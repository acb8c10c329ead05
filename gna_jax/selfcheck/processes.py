"""Parts of the self-check in processes of their own: what ends a kernel ends that process alone, and a hang ends when its time is up.

An illegal access on a GPU ends every later call of its process; a kernel that waits for ever cannot be stopped from within.
"""

import dataclasses
import multiprocessing
import os
import pathlib
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

from gna_jax.verification import one_line

Send = Callable[[Any], None]
Report = Callable[[str], None]

TAIL = 400
"""Characters of what a process wrote that go into the report when it ends by itself."""


@dataclasses.dataclass(frozen=True)
class Part:
    """Something to run.

    Attributes:
      name: for people.
      run: called as `run(send, *arguments)`; a function of a module, since another process must find it.
      arguments: what it gets, as far as `pickle` goes.
      most: messages that it will send, for the progress.
    """

    name: str
    run: Callable[..., None]
    arguments: tuple[Any, ...] = ()
    most: int = 1


@dataclasses.dataclass
class Ran:
    """What came of a part.

    Attributes:
      messages: what it sent, in order.
      failure: what ended it, an error, a signal, or the time; else empty.
    """

    messages: list[Any] = dataclasses.field(default_factory=list)
    failure: str = ""


Run = Callable[[Sequence[Part], float, Report], list[Ran]]
"""As `run_apart`."""


@dataclasses.dataclass(frozen=True)
class _End:
    """A process's last message."""

    failure: str


@dataclasses.dataclass
class _Running:
    part: Part
    ran: Ran
    process: SpawnProcess
    written: pathlib.Path
    last_word: float


def run_apart(parts: Sequence[Part], seconds: float, report: Report) -> list[Ran]:
    """Run parts at the same time, each in a process of its own, for `seconds` at most.

    Args:
      parts: what to run.
      seconds: a part that still runs then is killed; what it sent is kept.
      report: called with how far they are.
    """
    started = time.monotonic()
    results = [Ran() for _ in parts]
    running: dict[Any, _Running] = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            for number, (part, ran) in enumerate(zip(parts, results, strict=True)):
                written = pathlib.Path(folder, str(number))
                connection, process = _start(part, written)
                running[connection] = _Running(part, ran, process, written, started)
            while running and (left := started + seconds - time.monotonic()) > 0:
                told = (f"{r.part.name} {len(r.ran.messages)}/{r.part.most}" for r in running.values())  # fmt: skip
                report(f"{', '.join(told)}; {left:.0f} s left")
                for connection in wait(list(running), timeout=min(left, 1.0)):
                    if _receive(connection, running[connection]):
                        _end(connection, running.pop(connection))
            for one in running.values():
                silent = time.monotonic() - one.last_word
                one.ran.failure = f"stopped when its {seconds:.0f} s were up, {silent:.0f} s after its last result"
        finally:
            for connection, one in running.items():
                one.process.kill()
                _end(connection, one)
    return results


def _start(part: Part, written: pathlib.Path) -> tuple[Connection, SpawnProcess]:
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(send, written, part), daemon=True)
    process.start()
    send.close()  # the process has its own; with this one open its end would go unseen
    return receive, process


def _work(connection: Connection, written: pathlib.Path, part: Part) -> None:
    """In the process: run the part, with what it writes kept in a file."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    file = os.open(written, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(file, 1)
    os.dup2(file, 2)
    # Parts share a GPU.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    failure = ""
    try:
        part.run(connection.send, *part.arguments)
    except Exception as error:  # whatever ends a part belongs into the report
        failure = one_line(error)
    connection.send(_End(failure))


def _end_with_parent() -> None:
    """Whatever ends the process that asked, a signal too, nobody is left behind on the GPU."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _receive(connection: Any, one: _Running) -> bool:
    """Take a message; whether it was the last."""
    try:
        message = connection.recv()
    except EOFError:
        one.process.join()
        one.ran.failure = f"its process ended with {_status(one.process)}{_tail(one.written)}"
        return True
    if isinstance(message, _End):
        one.ran.failure = message.failure
        return True
    one.ran.messages.append(message)
    one.last_word = time.monotonic()
    return False


def _end(connection: Any, one: _Running) -> None:
    connection.close()
    one.process.join(5.0)
    if one.process.is_alive():  # its work is done, or it was killed
        one.process.kill()
        one.process.join(5.0)


def _status(process: SpawnProcess) -> str:
    code = process.exitcode or 0
    return signal.Signals(-code).name if code < 0 else f"status {code}"


def _tail(written: pathlib.Path) -> str:
    text = " ".join(written.read_text(errors="replace").split()) if written.exists() else ""
    return f"; the end of what it wrote: {text[-TAIL:]}" if text else ""
