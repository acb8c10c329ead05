"""Tables of measured tiles: what `gna-jax tune` writes and a call without tiles of its own finds.

Two tables: one that the package carries (`tuned.json`), and before it one of this machine, beside the stamps of
`gna_jax.backends.verified`. Both are `{device kind: {key: entry}}`; `key` names what decides which tiles are fast. Only
`gna-jax tune` writes them (`gna_jax.tuning`); what tiles a call gets is the business of `tiles`.
"""

import dataclasses
import functools
import importlib.resources
import json
import os
import pathlib
from typing import Any

from gna_jax.backends.mosaic.head_dims import padded_head_dim
from gna_jax.backends.verified import machine_file
from gna_jax.device import DeviceSpec
from gna_jax.neighborhood import by
from gna_jax.problem import Problem
from gna_jax.tiling import Tiles
from pallas_kernels import limits

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Timed:
    """The tiles of one direction, and why they are these.

    Attributes:
      q, kv: tiles of the forward (dQ takes them too), or of dK and dV.
      seconds: measured median of the kernel with these tiles.
      predicted_seconds: what the cost model says.
      default_seconds: measured median with the tiles that the simulator chooses; equal to `seconds` where those are these.
    """

    q: Shape
    kv: Shape
    seconds: float
    predicted_seconds: float
    default_seconds: float


@dataclasses.dataclass(frozen=True)
class Entry:
    """What was measured for one key.

    Attributes:
      forward, backward: tiles of the forward, and of dK and dV.
      batch, heads, kv_heads: of the measured call.
      date: of the measurement, `2026-11-21`.
      versions: of the software it was measured with, by name.
    """

    forward: Timed
    backward: Timed
    batch: int
    heads: int
    kv_heads: int
    date: str
    versions: dict[str, str] = dataclasses.field(hash=False)

    @property
    def tiles(self) -> Tiles:
        """All four shapes."""
        forward, backward = self.forward, self.backward
        return Tiles(forward.q, forward.kv, backward.q, backward.kv, dynamic=True)


def key(problem: Problem) -> str:
    """Layout, window, stride, dilation, causal axes, head dim and dtype as the kernels get them, and generation.

    Batch, heads and scale are not part of it: they change how many tiles there are, not what one costs. Where tiles are too few
    to fill the GPU that matters as well: smaller ones spread further, so tune with the batch and heads of the real call.
    """
    generation, rule = limits.generation_of(problem), problem.neighborhood
    if generation is None:
        raise NotImplementedError(limits.supports(problem, None))
    sizes = {
        "window": rule.window_size,
        "stride": rule.stride,
        "dilation": rule.dilation,
        "causal": rule.is_causal,
    }
    return ", ".join(
        (
            generation.name,
            by(problem.global_layout),
            *(f"{name} {by(values)}" for name, values in sizes.items()),
            f"head dim {padded_head_dim(problem)}",
            problem.dtype.name,
        )
    )


def lookup(problem: Problem) -> tuple[Entry, pathlib.Path] | None:
    """The entry of a problem that the kernels take, and the file that holds it: this machine's, else the package's; else None.

    Raises:
      RuntimeError: for a file that is no table.
    """
    for path in (machine_table(problem.device), package_table()):
        entry = read(path).get(problem.device.kind, {}).get(key(problem))
        if entry is None:
            continue
        if len(entry.forward.q) != problem.rank:
            raise _no_table(path, f"tiles of {len(entry.forward.q)} axes for {key(problem)!r}")
        return entry, path
    return None


def machine_table(device: DeviceSpec) -> pathlib.Path:
    """This machine's table of a kind of device: `$XDG_CACHE_HOME/gna_jax/tuned/<kind>-<version>.json`."""
    return machine_file("tuned", device)


def package_table() -> pathlib.Path:
    """The table that the package carries."""
    return pathlib.Path(str(importlib.resources.files("gna_jax.backends.mosaic"))) / "tuned.json"


def read(path: pathlib.Path) -> dict[str, dict[str, Entry]]:
    """The entries of a table by kind of device and key; none where there is no file.

    Raises:
      RuntimeError: for a file that is no table.
    """
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return {}
    return _parsed(path, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=16)
def _parsed(path: pathlib.Path, changed: int, size: int) -> dict[str, dict[str, Entry]]:
    """`changed` and `size` are those of the file: another content is another key of the cache."""
    del changed, size
    try:
        kinds = json.loads(path.read_text())
        return {
            kind: {name: _entry(fields) for name, fields in entries.items()}
            for kind, entries in kinds.items()
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise _no_table(path, f"{type(error).__name__}: {error}") from error


def _no_table(path: pathlib.Path, reason: str) -> RuntimeError:
    return RuntimeError(
        f"{path} is no table of tuned tiles ({reason}); remove it, and make it again with `gna-jax tune`"
    )


def _entry(fields: dict[str, Any]) -> Entry:
    def timed(part: dict[str, Any]) -> Timed:
        seconds = (float(part[f"{name}seconds"]) for name in ("", "predicted_", "default_"))
        return Timed(tuple(part["q"]), tuple(part["kv"]), *seconds)

    forward, backward = timed(fields["forward"]), timed(fields["backward"])
    Tiles(forward.q, forward.kv, backward.q, backward.kv)  # raises for shapes that are none
    sizes = {name: int(fields[name]) for name in ("batch", "heads", "kv_heads")}
    date, versions = str(fields["date"]), dict(fields["versions"])
    return Entry(forward, backward, **sizes, date=date, versions=versions)


def record(path: pathlib.Path, problem: Problem, entry: Entry) -> None:
    """Put an entry into a table, in place of an older one of the same key; the file appears whole or not at all.

    Raises:
      RuntimeError: for a file that is no table, or that cannot be written.
    """
    read(path)
    kinds = json.loads(path.read_text()) if path.exists() else {}
    kinds.setdefault(problem.device.kind, {})[key(problem)] = dataclasses.asdict(entry)
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        part = path.with_name(f"{path.name}.{os.getpid()}")
        part.write_text(json.dumps(kinds, indent=1, sort_keys=True) + "\n")
        part.replace(path)
    except OSError as error:
        raise RuntimeError(
            f"{path} cannot be written ({error}); name another file with --into"
        ) from error
