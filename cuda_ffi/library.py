"""The built library: where it may lie, whether it may be loaded, and XLA's handlers in it. Building it: `build`.

It is code, so it is loaded from two places only: this package's folder, and the user's own cache, where `gna-jax build-cuda` puts
it with a record of its hash. Never from the current directory or a search path. Nothing here touches a GPU or its driver.
"""

import ctypes
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import re
import stat

import jax

TARGET = "gna_jax_forward"
"""Name of the forward's handler at XLA."""
LIBRARY = "libgna_jax_cuda.so"
RECORD = "libgna_jax_cuda.json"
"""Beside the library in the cache: its sha256, and what built it."""
BUILD_AGAIN = "remove it, and build it again with `gna-jax build-cuda`"

# A process keeps what it has loaded from a path.
_AND_RESTART = f"{BUILD_AGAIN}, then start Python anew"
_SOURCES = (
    "CMakeLists.txt",
    "handlers/*.cc",
    "handlers/*.h",
    "include/**/*.h",
    "kernels/*.cu",
    "kernels/*.h",
)
_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


@dataclasses.dataclass(frozen=True)
class Library:
    """What a loaded library says of itself, and where it is.

    Attributes:
      path: the file.
      sources: `fingerprint` of what it was built from.
      ffi_version: of XLA's FFI that it was built for, `(major, minor)`.
      handle: for its symbols.
    """

    path: pathlib.Path
    sources: str
    ffi_version: tuple[int, int]
    handle: ctypes.CDLL


def source_folder() -> pathlib.Path:
    """The folder of CMakeLists.txt: this package's."""
    return pathlib.Path(__file__).parent


def cache_folder() -> pathlib.Path:
    """The user's own: `$XDG_CACHE_HOME/gna_jax/cuda`; a relative `XDG_CACHE_HOME` is ignored, as its specification says."""
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "")
    if not cache.is_absolute():
        cache = pathlib.Path.home() / ".cache"
    return cache / "gna_jax" / "cuda"


@functools.cache
def fingerprint() -> str:
    """Of the names and contents of the C++ sources in this package: a library of other sources is another version."""
    folder = source_folder()
    files = {path.relative_to(folder).as_posix(): path for p in _SOURCES for path in folder.glob(p)}
    lines = (f"{sha256(path)}  {name}\n" for name, path in sorted(files.items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def sha256(path: pathlib.Path) -> str:
    """Of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find() -> pathlib.Path:
    """The library's path: the package's, else the cache's. Cheap: content is looked at by `load`.

    Raises:
      RuntimeError: where none is built, or where others could have written it.
    """
    package = source_folder() / LIBRARY
    if package.exists():
        # As trustworthy as this module: of the same owner.
        _check_writers(package, _owner(), stat.S_IWOTH)
        return package
    path = cache_folder() / LIBRARY
    if not path.exists():
        raise RuntimeError(
            "the CUDA library is not built; build it with `gna-jax build-cuda`, which takes nvcc and minutes, or use 'mosaic'"
        )
    _check_writers(path.parent, os.geteuid(), _WRITABLE_BY_OTHERS)
    _check_writers(path, os.geteuid(), _WRITABLE_BY_OTHERS)
    return path


def _owner() -> int:
    return pathlib.Path(__file__).stat().st_uid


def _check_writers(path: pathlib.Path, owner: int, forbidden: int) -> None:
    status = path.stat(follow_symlinks=False)
    if stat.S_ISLNK(status.st_mode):
        raise RuntimeError(
            f"{path} must not be a link: what it leads to is not checked; {BUILD_AGAIN}"
        )
    if status.st_uid != owner:
        raise RuntimeError(
            f"{path} must belong to user {owner}; got owner {status.st_uid}: code of somebody else is not loaded; {BUILD_AGAIN}"
        )
    if status.st_mode & forbidden:
        raise RuntimeError(
            f"{path} must be writable by its owner alone; got mode {stat.S_IMODE(status.st_mode):o};"
            f" {BUILD_AGAIN} (others may have changed it)"
        )


def _check_hash(path: pathlib.Path) -> None:
    record = path.with_name(RECORD)
    try:
        want = json.loads(record.read_text())["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RuntimeError(
            f"{path} has no record of its hash in {RECORD} ({type(error).__name__}): it is not loaded; {BUILD_AGAIN}"
        ) from error
    got = sha256(path)
    if got != want:
        raise RuntimeError(
            f"{path} is not what was built here: {RECORD} has sha256 {want}, got {got}; {BUILD_AGAIN}"
        )


def load() -> Library:
    """The library, checked and loaded.

    Raises:
      RuntimeError: what `find` raises; where the cache's is not the file that was recorded; where it cannot be loaded; where it was
        built from other sources than this package's, or for another version of XLA's FFI than the installed jaxlib has.
    """
    path = find()
    status = path.stat()
    library = _open(path, status.st_mtime_ns, status.st_size)
    if library.sources != fingerprint():
        raise RuntimeError(
            f"{path} was built from other sources than this version of gna_jax has; got {library.sources[:12]},"
            f" here are {fingerprint()[:12]}; {_AND_RESTART}"
        )
    # XLA keeps reading what was built for an older minor version.
    built, here = library.ffi_version, ffi_version()
    if built[0] != here[0] or built[1] > here[1]:
        raise RuntimeError(
            f"{path} was built for XLA's FFI {built[0]}.{built[1]}, the installed jaxlib has {here[0]}.{here[1]}:"
            f" update jaxlib, or {_AND_RESTART}"
        )
    return library


@functools.lru_cache(maxsize=8)
def _open(path: pathlib.Path, changed: int, size: int) -> Library:
    """`changed` and `size` are those of the file: another build is another key of the cache."""
    del changed, size
    if path.parent == cache_folder():
        _check_hash(path)
    try:
        handle = ctypes.CDLL(str(path))
        handle.gna_sources.restype = ctypes.c_char_p
        sources, ffi = handle.gna_sources().decode(), handle.gna_ffi_version()
    except (OSError, AttributeError) as error:
        raise RuntimeError(f"{path} cannot be loaded ({error}); {BUILD_AGAIN}") from error
    return Library(path, sources, divmod(ffi, 1000), handle)


@functools.cache
def ffi_version() -> tuple[int, int]:
    """Of XLA's FFI in the installed jaxlib, `(major, minor)`, as its headers have it."""
    header = pathlib.Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h").read_text()
    major, minor = (
        int(re.findall(rf"#define XLA_FFI_API_{part} (\d+)", header)[0])
        for part in ("MAJOR", "MINOR")
    )
    return major, minor


def register() -> None:
    """Make XLA know the handlers, once per process; what `load` raises."""
    _register(load().path)


@functools.cache
def _register(path: pathlib.Path) -> None:
    handler = load().handle.GnaForwardCuda
    jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(handler), platform="CUDA")
