"""What a machine has: driver, versions, the device that JAX takes, the CUDA library, and which implementations run, or why not.

`look` runs in a process of its own, since it starts JAX's backend and loads the library; the rest touches neither.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from contextlib import AbstractContextManager
from types import ModuleType

import jax
import jax.numpy as jnp

from gna_jax import backends, verification
from gna_jax.backends import Rung
from gna_jax.device import DeviceSpec, resolve_device
from gna_jax.interpreter import interpret_gpu
from gna_jax.problem import Operands, Problem, describe
from gna_jax.selfcheck.processes import Send
from gna_jax.selfcheck.stamp import versions
from gna_jax.verification import Trial, one_line

PLUGINS = ("jax-cuda13-plugin", "jax-cuda12-plugin")
"""What makes JAX see an NVIDIA GPU."""
PACKAGES = ("jaxlib", *PLUGINS, "nvidia-cudnn-cu13", "nvidia-cudnn-cu12", "numpy")


@dataclasses.dataclass(frozen=True)
class Device:
    """The default device, one of `number`."""

    spec: DeviceSpec
    number: int


@dataclasses.dataclass(frozen=True)
class Library:
    """The built CUDA library.

    Attributes:
      facts: where it is and what it says of itself, by name; what built it, where that is recorded.
      failure: why it is not loaded; empty where it is.
      is_there: whether there is a file.
    """

    facts: dict[str, str]
    failure: str
    is_there: bool


@dataclasses.dataclass(frozen=True)
class Standing:
    """An implementation here.

    Attributes:
      name: as `gna` takes it.
      is_kernel: whether it is for GPUs alone.
      reason: why it does not run; empty where it does.
      is_broken: whether that is a defect, not a refusal.
      optional: what it takes of `verification.OPTIONAL_TRIALS`.
    """

    name: str
    is_kernel: bool
    reason: str = ""
    is_broken: bool = False
    optional: tuple[Trial, ...] = ()


def interpreted(interpret: str | None) -> AbstractContextManager[None]:
    """JAX's interpreter as this GPU; with None the machine as it is."""
    return contextlib.nullcontext() if interpret is None else interpret_gpu(interpret)


def look(send: Send, interpret: str | None, trial: Trial) -> None:
    """Send a `Device`, the `Library`, and a `Standing` per implementation of the ladder: whether it runs `trial`."""
    with interpreted(interpret):
        device = resolve_device(None)
        send(Device(device, len(jax.devices())))
        send(find_library())
        problem = problem_of(trial, device)
        for rung in backends.RUNGS:
            is_kernel = rung.platforms is not None
            try:
                reason = rung.reason(problem, None) or ""
                send(Standing(rung.name, is_kernel, reason, optional=optional(rung, device)))
            except Exception as error:  # what cannot be loaded belongs into the report
                send(Standing(rung.name, is_kernel, one_line(error), is_broken=True))


def optional(rung: Rung, device: DeviceSpec) -> tuple[Trial, ...]:
    """The optional trials that an implementation takes on a device."""
    takes = lambda trial: rung.reason(problem_of(trial, device), None) is None
    return tuple(trial for trial in verification.OPTIONAL_TRIALS if takes(trial))


def find_library() -> Library:
    """Where the CUDA library is and what built it, or why there is none."""
    try:
        return _library(backends.load("cutlass"))
    except Exception as error:  # a backend that cannot be imported, a file that cannot be read
        return Library({}, one_line(error), is_there=True)


def _library(cutlass: ModuleType) -> Library:
    library = cutlass.library
    folders = library.source_folder(), library.cache_folder()
    is_there = any(os.path.lexists(folder / library.LIBRARY) for folder in folders)
    try:
        loaded = library.load()
    except RuntimeError as error:
        return Library({}, str(error), is_there)
    major, minor = loaded.ffi_version
    capabilities = " and ".join(".".join(map(str, c)) for c in cutlass.Q_TILE_TOKENS)
    facts = {
        "path": str(loaded.path),
        "size": f"{loaded.path.stat().st_size / 2**20:.1f} MiB",
        "compute capability": capabilities,
        "XLA FFI": f"{major}.{minor}, jaxlib's is {'.'.join(map(str, library.ffi_version()))}",
        "sources": loaded.sources[:12],
    }
    try:
        record = json.loads(loaded.path.with_name(library.RECORD).read_text())
    except (OSError, ValueError):
        return Library(facts | {"built by": "no record: not by `gna-jax build-cuda`"}, "", is_there)
    told = {f"built: {name}": str(value) for name, value in record.items() if name != "sources"}
    return Library(facts | told, "", is_there)


def problem_of(trial: Trial, device: DeviceSpec) -> Problem:
    """A trial's call, described for a device."""
    arrays = {
        name: jax.ShapeDtypeStruct(shape, jnp.dtype(trial.dtype))
        for name, shape in trial.shapes().items()
    }
    bias = arrays.pop("relative_position_bias", None)
    operands, rule = Operands(**arrays, bias=bias), trial.neighborhood
    return describe(operands, rule, scale=None, precision=trial.precision, device=device)


def environment() -> dict[str, str]:
    """Driver, system, versions of what is installed, and the variables that change what JAX does."""
    found = {"driver": gpu_state("driver_version") or "none: nvidia-smi does not answer"}
    found["system"] = f"{platform.system()} {platform.release()} {platform.machine()}"
    found |= versions() | installed(PACKAGES)
    names = ("CUDA_VISIBLE_DEVICES", "JAX_PLATFORMS", "XLA_FLAGS")
    return found | {name: os.environ[name] for name in names if os.environ.get(name)}


def installed(packages: Sequence[str]) -> dict[str, str]:
    """Versions of the packages that are there."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def gpu_state(query: str) -> str:
    """What `nvidia-smi` says of the first GPU, e.g. of `clocks.sm,power.draw`; empty where it does not run."""
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "--id=0"]
    try:
        finished = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return finished.stdout.strip() if finished.returncode == 0 else ""


def missing_gpu(kind: str, found: dict[str, str]) -> str:
    """Why there is no GPU to check, and the way out.

    Args:
      kind: of JAX's default device.
      found: `environment()`.
    """
    if found["driver"].startswith("none"):
        hint = "nvidia-smi finds no driver: run it on a machine with an NVIDIA GPU"
    elif not any(plugin in found for plugin in PLUGINS):
        hint = (
            f"driver {found['driver']} is there, JAX's plugin is not: pip install 'gna-jax[cuda13]'"
        )
    else:
        hint = (
            "driver and plugin are there, but JAX took another device: look at JAX_PLATFORMS and CUDA_VISIBLE_DEVICES,"
            " and at what `python -c 'import jax; jax.devices(\"cuda\")'` says"
        )
    return (
        f"selfcheck runs kernels on an NVIDIA GPU; JAX's default device here is {kind}: {hint}; or pass --interpret b200, which"
        " runs small calls in JAX's interpreter"
    )
