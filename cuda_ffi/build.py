"""Building the CUDA library for an installed package, into the user's cache: what `gna-jax build-cuda` does. Loading it: `library`.

CMake does the work (`CMakeLists.txt`), two kernels at once at most. CUTLASS comes from its wheel, nvcc from CUDA or its wheel. XLA's
headers are the installed jaxlib's: what is built serves it and newer ones, and nothing has to be downloaded. (A wheel is for
everybody, so its headers are the oldest jaxlib's: pyproject.toml.)
"""

import contextlib
import dataclasses
import datetime
import fcntl
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
from collections.abc import Callable, Iterator

import jax

from cuda_ffi import library

CUTLASS = "4.2.0.0"
"""The version of nvidia-cutlass whose headers the kernels are written for."""
INSTALL = "pip install 'gna-jax[cuda-build]'"
DISK = 2**29
"""Bytes that are free before a build starts, in the cache and for the compiler's temporary files."""
LOCK = "lock"
"""In the cache, held while a build is at work."""

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
    own = os.environ.get("CUDACXX")
    nvcc = shutil.which(own) if own else find_tool("nvcc")
    cutlass = _cutlass()
    found = {
        "cmake": cmake,
        "ninja": ninja,
        f"CUDACXX={own}, which is no program" if own else "nvcc": nvcc,
        f"nvidia-cutlass=={CUTLASS}": cutlass,
    }
    missing = [name for name, place in found.items() if place is None]
    if cmake is None or ninja is None or nvcc is None or cutlass is None:
        raise RuntimeError(
            f"building the CUDA library takes no GPU, but cmake, ninja, nvcc and CUTLASS; missing: {', '.join(missing)}:"
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


def built() -> pathlib.Path | None:
    """The library that need not be built: this package's, or one in the cache of these sources that the installed jaxlib can use.

    It is not opened: a process that had would not see a newer one at its path.

    Raises:
      RuntimeError: what `library.load` says of this package's library, which no build replaces.
    """
    if (library.source_folder() / library.LIBRARY).exists():
        return library.load().path
    try:
        path = library.find()
        record = json.loads(path.with_name(library.RECORD).read_text())
        major, minor = map(int, record["ffi"].split("."))
        wanted = record["sha256"], record["sources"]
    except (RuntimeError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    here = library.ffi_version()
    is_usable = wanted == (library.sha256(path), library.fingerprint())
    return path if is_usable and major == here[0] and minor <= here[1] else None


def build(toolchain: Toolchain, report: Report = lambda done, steps, what: None) -> pathlib.Path:
    """Build the library into the user's cache, with a record of its hash; a library that was there is replaced.

    Returns:
      Its path.

    Raises:
      RuntimeError: where a step fails, with the end of its output; where the cache cannot be written; where another build is at work.
    """
    package = library.source_folder() / library.LIBRARY
    if package.exists():
        raise RuntimeError(
            f"{package} is this package's own and comes before the cache: install the package again, or remove it"
        )
    folder = library.cache_folder()
    try:
        with _alone_in(folder):
            return _build(toolchain, folder, report)
    except OSError as error:
        raise RuntimeError(
            f"building the CUDA library failed: {error}; it goes to {folder}, which $XDG_CACHE_HOME can move"
        ) from error


@contextlib.contextmanager
def _alone_in(folder: pathlib.Path) -> Iterator[None]:
    """For one build at a time; what an interrupted one left is removed. The lock is the system's, so it ends with its process."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder.chmod(0o700)
    with (folder / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(
                f"another build is at work in {folder}: wait for it, its library serves you too"
            ) from None
        for left in folder.glob("build-*"):
            shutil.rmtree(left)
        for place in (folder, tempfile.gettempdir()):
            free = shutil.disk_usage(place).free
            if free < DISK:
                raise RuntimeError(
                    f"a build takes {DISK >> 20} MB of disk in {place}; got {free >> 20} MB:"
                    " make room, or name other places in XDG_CACHE_HOME and TMPDIR"
                )
        yield


def _build(toolchain: Toolchain, folder: pathlib.Path, report: Report) -> pathlib.Path:
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
        # ninja tells of a file when it is done.
        report(0, 0, "compiling")
        _run([toolchain.cmake, "--build", build_folder], report)
        file = pathlib.Path(build_folder, library.LIBRARY)
        file.chmod(0o700)
        record = pathlib.Path(build_folder, library.RECORD)
        record.write_text(json.dumps(_record(file, toolchain), indent=1, sort_keys=True) + "\n")
        # Each appears whole; between the two, hash and record disagree, and the library is not loaded.
        file.replace(folder / library.LIBRARY)
        record.replace(folder / library.RECORD)
    return folder / library.LIBRARY


def _record(file: pathlib.Path, toolchain: Toolchain) -> dict[str, str]:
    """What was built, from what, by what."""
    nvcc = subprocess.run([toolchain.nvcc, "--version"], capture_output=True, text=True, check=True)
    return {
        "sha256": library.sha256(file),
        "sources": library.fingerprint(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "nvcc": nvcc.stdout.strip().splitlines()[-1],
        "cutlass": CUTLASS,
        "ffi": "{}.{}".format(*library.ffi_version()),
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
            progress = re.match(r"\[([1-9]\d*)/(\d+)\] (.*)", line)
            if progress:
                done, steps, what = progress.groups()
                report(int(done), int(steps), what)
    if process.returncode:
        tail = "\n".join(lines[-30:])
        raise RuntimeError(
            f"building the CUDA library failed: {pathlib.Path(command[0]).name} ended with {process.returncode}.\n{tail}\n"
            "Known to work: nvcc 13.0 and 13.5. A kernel takes 4 GB of memory, two are compiled at a time;"
            " CMAKE_BUILD_PARALLEL_LEVEL=1 makes it one"
        )
