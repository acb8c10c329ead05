"""Where a GPU kernel has proved itself: the rule that a default never takes an unproven kernel.

A kernel counts as verified on a device kind when the package carries a benchmark result of it (`verified.json`, written
from `benchmarks/results/`), or when this machine holds a stamp that a self-check wrote after comparing the kernel with the
reference. A named implementation runs unverified; only the default asks here.
"""

import functools
import importlib.metadata
import importlib.resources
import json
import os
import pathlib
import re

from gna_jax.device import DeviceSpec


def is_verified(implementation: str, device: DeviceSpec) -> bool:
    """Whether `implementation` has been verified on this kind of device with this version of the package."""
    if device.kind in _committed().get(implementation, ()):
        return True
    return stamp_path(implementation, device).is_file()


def write_stamp(implementation: str, device: DeviceSpec, report: dict) -> pathlib.Path:
    """Record that a self-check of `implementation` passed on this machine; returns the stamp's path."""
    path = stamp_path(implementation, device)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.write_text(json.dumps(report, indent=1, sort_keys=True) + "\n")
    return path


def stamp_path(implementation: str, device: DeviceSpec) -> pathlib.Path:
    """Where the stamp lies: `machine_file("verified", ..)`, the implementation's name before the device's."""
    return machine_file("verified", device, f"{implementation}-")


def machine_file(folder: str, device: DeviceSpec, prefix: str = "") -> pathlib.Path:
    """What this machine keeps of a kind of device: `$XDG_CACHE_HOME/gna_jax/<folder>/<prefix><kind>-<version>.json`."""
    cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    kind = re.sub(r"[^a-z0-9]+", "-", device.kind.lower())
    return pathlib.Path(cache) / "gna_jax" / folder / f"{prefix}{kind}-{_version()}.json"


@functools.cache
def _committed() -> dict[str, list[str]]:
    text = importlib.resources.files("gna_jax.backends").joinpath("verified.json").read_text()
    return json.loads(text)


@functools.cache
def _version() -> str:
    try:
        return importlib.metadata.version("gna-jax")
    except importlib.metadata.PackageNotFoundError:
        return "source"
