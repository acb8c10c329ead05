"""The committed resources of compiled kernels, `kernel_resources.json`: which calls it holds, and how it is written.

`python tests/kernel_resources.py` compiles every kernel of every call anew and rewrites the table (some minutes on a CPU; needs
jax's CUDA compiler and ptxas, no GPU); with names of kernels it rewrites their rows alone. A rewritten row that got worse is a
decision: say why in the commit.
"""

import json
import sys
from pathlib import Path
from typing import Any

from gna_jax.inspection import Call, KernelResources, compile_kernel
from gna_jax.neighborhood import by

TABLE = Path(__file__).with_suffix(".json")

SMALL_IS_GOOD = ("registers", "spill_bytes", "stack_bytes", "smem_bytes", "tmem_columns")
"""Of these a fresh compile may not have more than its row."""
LARGE_IS_GOOD = ("mma",)
"""And of these not less: fewer matrix instructions mean that products moved elsewhere, or shrank."""

_SEQUENCE = {"layout": (32768,), "window_size": (2048,)}
_VIDEO = {"layout": (30, 48, 80), "window_size": (18, 24, 24)}
_IMAGE = {"layout": (256, 256), "window_size": (80, 80)}
CALLS = {
    "1d": _SEQUENCE,
    "2d": {**_IMAGE, "batch": 2},
    "3d-float16": {**_VIDEO, "batch": 2, "dtype": "float16"},
    "3d-all": {**_VIDEO, "window_size": (6, 8, 8), "stride": (1, 2, 4), "dilation": (1, 3, 2),
               "is_causal": (True, False, False), "batch": 2, "heads": 4},
    "2d-256": {**_IMAGE, "head_dim": 256},
    "3d-256-all": {**_VIDEO, "window_size": (6, 8, 8), "stride": (1, 2, 4), "dilation": (1, 3, 2),
               "is_causal": (True, False, False), "head_dim": 256, "batch": 2, "heads": 4},
    "2d-64": {**_IMAGE, "head_dim": 64},
    "3d-64": {**_VIDEO, "head_dim": 64, "heads": 4},
    # What is left of every rank with every head dim.
    "1d-256": {**_SEQUENCE, "head_dim": 256},
    "1d-64": {**_SEQUENCE, "head_dim": 64},
    "1d-32": {**_SEQUENCE, "head_dim": 32},
    "3d-32": {**_VIDEO, "head_dim": 32},
    # 2**33 elements in each array: nothing may be counted in 32 bits.
    "2d-huge": {"layout": (4096, 4096), "window_size": (16, 16), "head_dim": 64, "heads": 8, "kv_heads": 8},
    "2d-32": {"layout": (5, 6), "window_size": (3, 3), "head_dim": 32},
}  # fmt: skip
"""What a kernel is compiled for besides its device, by name; two key/value heads, and the backend's tiles."""
QUICK = ("2d", "3d-all", "3d-64")
"""Compiled by default, the others with the slow tests."""
DEVICES = ("h200", "b200")


def calls() -> dict[str, Call]:
    """Every call on every device, by name."""
    return {
        f"{device}-{name}": Call(device=device, **{"heads": 2, "kv_heads": 2, **fields})
        for device in DEVICES
        for name, fields in CALLS.items()
    }


def read() -> dict[tuple[str, str], dict[str, Any]]:
    """The table's rows by call and kernel."""
    rows = json.loads(TABLE.read_text()) if TABLE.exists() else []
    return {(row["call"], row["kernel"]): row for row in rows}


def row_of(name: str, resources: KernelResources) -> dict[str, Any]:
    """A row: which call and kernel, its tiles, and its numbers."""
    numbers = {field: getattr(resources, field) for field in (*SMALL_IS_GOOD, *LARGE_IS_GOOD)}
    tiles = f"{by(resources.q_tile)} / {by(resources.kv_tile)}"
    names = {"call": name, "kernel": resources.kernel, "architecture": resources.architecture}
    return {**names, "tiles": tiles, **numbers}


def worse(row: dict[str, Any], fresh: dict[str, Any]) -> list[str]:
    """What a fresh row has worse than the table's, for people. Other tiles are another kernel: their row must be written anew."""
    return [
        f"{field}: {fresh[field]}, was {row[field]}"
        for field in row
        if (field in SMALL_IS_GOOD and fresh[field] > row[field])
        or (field in LARGE_IS_GOOD and fresh[field] < row[field])
        or (field in ("architecture", "tiles") and fresh[field] != row[field])
    ]


def write(kernels: list[str]) -> None:
    """Compile and rewrite the table, after every kernel: every row, or those of some kernels."""
    old, rows = read(), {}
    keys = [(name, kernel.name) for name, call in calls().items() for kernel in call.kernels()]
    for name, kernel in keys:
        if kernels and kernel not in kernels:
            continue
        rows[name, kernel] = row_of(name, compile_kernel(calls()[name], kernel).resources)
        print(json.dumps(rows[name, kernel]), file=sys.stderr)
        known = old | rows
        lines = ",\n".join(json.dumps(known[key]) for key in keys if key in known)
        TABLE.write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    write(sys.argv[1:])
