"""XLA's handlers of `cuda_ffi` for tests, built by the host's compiler: the one for the CPU, and under the name of the CUDA one too.

What is built here passes for the built library, lies in a cache of its own, and has a record of its hash. No tests here.
"""

import json
import pathlib
import shutil
import subprocess

import jax

from cuda_ffi import library

SOURCES = library.source_folder()
FLAGS = ("-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", "-fvisibility=hidden")  # fmt: skip
HARNESSES = pathlib.Path(__file__).parent / "cuda"


def compiled(folder: pathlib.Path, *sources: pathlib.Path, flags: tuple[str, ...] = ()) -> pathlib.Path:  # fmt: skip
    """These sources, with what the library says of itself, as `folder`'s library."""
    compiler = shutil.which("g++")
    assert compiler, "these tests compile C++: install g++ (Debian: apt-get install g++)"
    path = folder / library.LIBRARY
    includes = (f"-I{SOURCES}", f"-I{SOURCES / 'handlers'}", f"-I{SOURCES / 'include'}")
    headers = ("-isystem", jax.ffi.include_dir(), f'-DGNA_SOURCES="{library.fingerprint()}"')
    files = (str(SOURCES / "handlers" / "abi.cc"), *map(str, sources))
    command = [compiler, *FLAGS, *includes, *headers, *flags, *files, "-o", str(path)]
    completed = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert completed.returncode == 0, completed.stderr
    path.chmod(0o700)
    return path


def stand_in(cache: pathlib.Path) -> pathlib.Path:
    """The stand-in for the built library in the cache `cache`, the value of `XDG_CACHE_HOME`."""
    folder = cache / "gna_jax" / "cuda"
    folder.mkdir(parents=True, mode=0o700)
    path = compiled(folder, HARNESSES / "handlers.cc")
    record(path)
    return path


def record(path: pathlib.Path) -> None:
    """What `gna-jax build-cuda` writes beside a library."""
    path.with_name(library.RECORD).write_text(json.dumps({"sha256": library.sha256(path)}))
