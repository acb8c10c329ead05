"""C++ for tests: compiled with the host's compiler against `cuda_ffi/include`, loaded by ctypes, and called with numpy arrays.

Shared by the tests of the C++ geometry and of the emulated kernel; no tests here.
"""

import ctypes
import pathlib
import shutil
import subprocess
from collections.abc import Sequence
from typing import Any

import numpy as np

from gna_jax.neighborhood import WHOLE_GROUP, Neighborhood

ROOT = pathlib.Path(__file__).parents[1]
SOURCES = ROOT / "tests" / "cuda"
FLAGS = ("-O2", "-Wall", "-Wextra", "-Werror", "-std=c++17", "-shared", "-fPIC")
# Ends the process where a sum or a product leaves 32 bits, or a shift its word, and says in which line.
CHECKED = ("-fsanitize=signed-integer-overflow,shift,bounds", "-fno-sanitize-recover=all")
MAX_RANK = 3
TRIVIAL_AXIS = (1, 1, 1, 1, 0, 1, 1)


def compiled(source: str, folder: pathlib.Path, *flags: str) -> ctypes.CDLL:
    """`tests/cuda/<source>` as a library, with warnings as errors."""
    compiler = shutil.which("g++")
    assert compiler, "these tests compile C++: install g++ (Debian: apt-get install g++)"
    library = folder / "library.so"
    includes = (f"-I{ROOT / 'cuda_ffi' / 'include'}", f"-I{SOURCES}")
    command = [compiler, *FLAGS, *flags, *includes, str(SOURCES / source), "-o", str(library)]
    completed = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert completed.returncode == 0, completed.stderr
    return ctypes.CDLL(str(library))


def call(function: Any, *arguments: Any) -> Any:
    """A C function on contiguous arrays, which it may write, and on numbers with their ctypes type."""
    for array in arguments:
        assert not isinstance(array, np.ndarray) or array.flags.c_contiguous
    return function(
        *(
            argument.ctypes.data_as(ctypes.c_void_p)
            if isinstance(argument, np.ndarray)
            else argument
            for argument in arguments
        )
    )


def axis_row(
    rule: Any, length: int, q_tile: int = 1, kv_tile: int = 1
) -> tuple[int, int, int, int, int, int, int]:
    """One axis as `problem_row.h` reads it; the window written out, as `gna::Axis` wants it."""
    whole = -(-length // rule.dilation)
    window = whole if rule.window == WHOLE_GROUP else rule.window
    return (length, window, rule.stride, rule.dilation, int(rule.is_causal), q_tile, kv_tile)


def problem_row(
    neighborhood: Neighborhood,
    layout: Sequence[int],
    q_tile: Sequence[int],
    kv_tile: Sequence[int],
    *,
    batch: int = 1,
    query_heads: int = 1,
    kv_heads: int = 1,
    head_dim: int = 1,
) -> tuple[int, ...]:
    """A problem as `problem_row.h` reads it."""
    rules = zip(neighborhood.axes, layout, q_tile, kv_tile, strict=True)
    axes = [axis_row(*rule) for rule in rules]
    axes += [TRIVIAL_AXIS] * (MAX_RANK - len(axes))
    sizes = (neighborhood.rank, batch, query_heads, kv_heads, head_dim)
    return (*sizes, *(value for axis in axes for value in axis))


def stored(layout: Sequence[int], dilation: Sequence[int]) -> tuple[int, ...]:
    """A layout in memory: every axis rounded up to a multiple of its dilation."""
    return tuple(-(-length // d) * d for length, d in zip(layout, dilation, strict=True))
