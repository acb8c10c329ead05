"""Building the CUDA library for an installed package, into the user's cache: what `gna-jax build-cuda` does. Loading it: `library`.

CMake does the work (`CMakeLists.txt`), two kernels at once at most. CUTLASS comes from its wheel, nvcc from CUDA or its wheel, XLA's
headers from the installed jaxlib.
"""

import dataclasses
import datetime
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable

import jax

from cuda_ffi import library

CUTLASS = "4.2.0.0"
"""The version of nvidia-cutlass whose headers the kernels are written for."""
INSTALL = "pip install 'gna-jax[cuda-build]'"

Report = Callable[[int, int, str], None]
"""Called with steps done, steps in all, and what is being done."""


@dataclasses.dataclass(frozen=True)
class Toolchain:
    """What a build takes.

    Attributes:
      cmake, ninja, nvcc: programs.
      cutlass: folder with CUTLASS' `include`, `tools` and `examples`.
    """

    cmake: str
    ninja: str
    nvcc: str
    cutlass: pathlib.Path


def find_toolchain(find_tool: Callable[[str], str | None] = shutil.which) -> Toolchain:
    """The programs and headers, nvcc from `$CUDACXX` where that is set.

    Args:
      find_tool: says where a program is, None where it is not.

    Raises:
      RuntimeError: with everything that is missing, and the line that installs it.
    """
    scripts = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)])
    cmake, ninja = (shutil.which(name, path=scripts) for name in ("cmake", "ninja"))
    nvcc = os.environ.get("CUDACXX") or find_tool("nvcc")
    cutlass = _cutlass()
    found = {"cmake": cmake, "ninja": ninja, "nvcc": nvcc, f"nvidia-cutlass=={CUTLASS}": cutlass}
    missing = [name for name, place in found.items() if place is None]
    if cmake is None or ninja is None or nvcc is None or cutlass is None:
        raise RuntimeError(
            f"building the CUDA library takes no GPU, but {', '.join(found)}; missing: {', '.join(missing)}:"
            f" {INSTALL} brings all of it, or set CUDACXX to your own nvcc"
        )
    return Toolchain(cmake, ninja, nvcc, cutlass)


def _cutlass() -> pathlib.Path | None:
    """CUTLASS' sources in its wheel; None where that is not installed, or is another version."""
    spec = importlib.util.find_spec("cutlass_library")
    if spec is None or spec.origin is None:
        return None
    try:
        version = importlib.metadata.version("nvidia-cutlass")
    except importlib.metadata.PackageNotFoundError:
        return None
    return pathlib.Path(spec.origin).parent / "source" if version == CUTLASS else None


def build(toolchain: Toolchain, report: Report = lambda done, steps, what: None) -> pathlib.Path:
    """Build the library into the user's cache, with a record of its hash; a library that was there is replaced.

    Returns:
      Its path.

    Raises:
      RuntimeError: where a step fails, with the end of its output.
    """
    folder = library.cache_folder()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder.chmod(0o700)
    with tempfile.TemporaryDirectory(prefix="build-", dir=folder) as build_folder:
        report(0, 0, "configuring")
        options = {
            "GNA_JAX_CUDA": "ON",
            "GNA_CUTLASS": toolchain.cutlass,
            "GNA_FFI_HEADERS": jax.ffi.include_dir(),
            "CMAKE_CUDA_COMPILER": toolchain.nvcc,
            "CMAKE_MAKE_PROGRAM": toolchain.ninja,
            "CMAKE_BUILD_TYPE": "Release",
        }
        definitions = [f"-D{name}={value}" for name, value in options.items()]
        source = ["-S", str(library.source_folder()), "-B", build_folder, "-G", "Ninja"]
        _run([toolchain.cmake, *source, *definitions], report)
        _run([toolchain.cmake, "--build", build_folder], report)
        built = pathlib.Path(build_folder, library.LIBRARY)
        built.chmod(0o700)
        record = pathlib.Path(build_folder, library.RECORD)
        record.write_text(json.dumps(_record(built, toolchain), indent=1, sort_keys=True) + "\n")
        # Each appears whole; between the two, hash and record disagree, and the library is not loaded.
        built.replace(folder / library.LIBRARY)
        record.replace(folder / library.RECORD)
    return folder / library.LIBRARY


def _record(built: pathlib.Path, toolchain: Toolchain) -> dict[str, str]:
    """What was built, from what, by what."""
    nvcc = subprocess.run([toolchain.nvcc, "--version"], capture_output=True, text=True, check=True)
    return {
        "sha256": library.sha256(built),
        "sources": library.fingerprint(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "nvcc": nvcc.stdout.strip().splitlines()[-1],
        "cutlass": CUTLASS,
        "jaxlib": importlib.metadata.version("jaxlib"),
    }


def _run(command: list[str], report: Report) -> None:
    """A step of the build; ninja's `[3/7] Building ..` are reported."""
    lines: list[str] = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        assert process.stdout is not None  # it is a pipe
        for line in process.stdout:
            lines.append(line.rstrip())
            progress = re.match(r"\[(\d+)/(\d+)\] (.*)", line)
            if progress:
                done, steps, what = progress.groups()
                report(int(done), int(steps), what)
    if process.returncode:
        tail = "\n".join(lines[-30:])
        raise RuntimeError(
            f"building the CUDA library failed: {pathlib.Path(command[0]).name} ended with {process.returncode}.\n{tail}\n"
            "A kernel takes 4 GB of memory, two are compiled at a time; known to work: nvcc 13.0"
        )
