"""The built CUDA library: what is loaded, what is refused and why, and what a build asks for.

Libraries are small stand-ins that the host's compiler makes, and programs of the build are scripts: no nvcc, no CUTLASS.
"""

import ctypes
import errno
import hashlib
import json
import os
import pathlib
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import types

import pytest
from cuda_handlers import record
from typer.testing import CliRunner

from cuda_ffi import build, library
from gna_jax.cli import app

ROOT = pathlib.Path(__file__).parents[1]
CMAKE_LISTS = ROOT / "cuda_ffi" / "CMakeLists.txt"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of this test's own; the folder of libraries in it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "gna_jax" / "cuda"


def made(folder, sources=None, ffi_version=None, body=None):
    """A library that says this of itself, with its record."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = folder / library.LIBRARY
    sources = library.fingerprint() if sources is None else sources
    major, minor = library.ffi_version() if ffi_version is None else ffi_version
    text = f'const char* gna_sources(void) {{ return "{sources}"; }}\n'
    text += f"int gna_ffi_version(void) {{ return {1000 * major + minor}; }}\n"
    command = ["g++", "-shared", "-fPIC", "-x", "c", "-", "-o", str(path)]
    assert shutil.which("g++"), "this test compiles C: install g++ (Debian: apt-get install g++)"
    subprocess.run(command, input=text if body is None else body, text=True, check=True)
    path.chmod(0o700)
    record(path)
    return path


def refused(message):
    return pytest.raises(RuntimeError, match=message)


def test_nothing_is_built():
    with refused("the CUDA library is not built; build it with `gna-jax build-cuda`"):
        library.load()


def test_the_cache_s_is_loaded(cache):
    path = made(cache)
    found = library.load()
    assert found.path == path and found.sources == library.fingerprint()
    assert found.ffi_version == library.ffi_version()


def test_never_from_the_current_directory(tmp_path, monkeypatch):
    made(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    with refused("not built"):
        library.find()
    # Neither by way of a relative cache, which its specification forbids.
    made(tmp_path / "relative" / "gna_jax" / "cuda")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "nobody"))
    assert library.cache_folder() == tmp_path / "nobody" / ".cache" / "gna_jax" / "cuda"
    with refused("not built"):
        library.find()


def test_the_package_s_comes_first(cache, tmp_path, monkeypatch):
    made(cache)
    package = tmp_path / "package"
    path = made(package)
    monkeypatch.setattr(library, "source_folder", lambda: package)
    assert library.find() == path
    # pip has put it there, with the modes that pip gives.
    path.chmod(0o775)
    assert library.find() == path
    path.chmod(0o777)
    with refused(r"must be writable by its owner alone; got mode 777; remove it, and build it aga"):
        library.find()
    path.chmod(0o755)
    owner = os.geteuid()
    monkeypatch.setattr(library, "_owner", lambda: owner + 1)
    with refused(rf"must belong to user {owner + 1}; got owner {owner}: code of somebody else"):
        library.find()


@pytest.mark.parametrize("of_folder", [False, True])
@pytest.mark.parametrize("mode", [0o720, 0o702, 0o777])
def test_others_must_not_write(cache, of_folder, mode):
    path = made(cache)
    (cache if of_folder else path).chmod(mode)
    with refused(
        rf"must be writable by its owner alone; got mode {mode:o}; .*others may have chan"
    ):
        library.load()


def test_must_be_one_s_own(cache, monkeypatch):
    made(cache)
    me = os.geteuid()
    monkeypatch.setattr(library.os, "geteuid", lambda: me + 1)
    with refused(
        rf"cuda must belong to user {me + 1}; got owner {me}: code of somebody else is not"
    ):
        library.load()


def test_must_not_be_a_link(cache, tmp_path):
    path = made(cache)
    path.rename(tmp_path / "elsewhere.so")
    path.symlink_to(tmp_path / "elsewhere.so")
    with refused("must not be a link: what it leads to is not checked"):
        library.load()


def test_must_be_what_was_built(cache):
    path = made(cache)
    want = library.sha256(path)
    with path.open("ab") as file:
        file.write(b"!")
    with refused(
        rf"is not what was built here: .*sha256 {want}, got {library.sha256(path)}; remove"
    ):
        library.load()


@pytest.mark.parametrize("text", [None, "", "[]", "{}", "null"])
def test_must_have_a_record(cache, text):
    path = made(cache)
    file = path.with_name(library.RECORD)
    file.unlink() if text is None else file.write_text(text)
    with refused(r"has no record of its hash in libgna_jax_cuda.json .*: it is not loaded; remove"):
        library.load()


def test_must_be_of_the_same_sources(cache):
    made(cache, sources="f" * 64)
    here = library.fingerprint()[:12]
    with refused(
        f"was built from other sources than this .* got ffffffffffff, here are {here}; rem"
    ):
        library.load()


@pytest.mark.parametrize(("major", "minor"), [(0, 1), (1, 0), (1, -1)])
def test_must_not_be_of_another_xla(cache, major, minor):
    here = library.ffi_version()
    other = here[0] + major, here[1] + minor
    made(cache, ffi_version=other)
    message = rf"was built for XLA's FFI {other[0]}\.{other[1]}, the installed jaxlib has {here[0]}\.{here[1]}: update jaxlib, or remove it"
    with refused(message):
        library.load()


def test_may_be_of_an_older_xla(cache):
    """Which XLA promises to read."""
    major, minor = library.ffi_version()
    made(cache, ffi_version=(major, minor - 1))
    assert library.load().ffi_version == (major, minor - 1)


@pytest.mark.parametrize("body", ["", 'const char* gna_sources(void) { return ""; }'])
def test_must_say_what_it_is(cache, body):
    made(cache, body=body)
    with refused("cannot be loaded .*undefined symbol: gna_.*; remove it, and build it again"):
        library.load()


def test_must_be_a_library(cache):
    path = made(cache)
    path.write_text("no library")
    record(path)
    with refused("cannot be loaded .*; remove it, and build it again"):
        library.load()


def test_fingerprint_is_of_names_and_contents(tmp_path, monkeypatch):
    folder = tmp_path / "sources"
    (folder / "include" / "gna").mkdir(parents=True)
    (folder / "handlers").mkdir()
    files = {"include/gna/a.h": "1", "handlers/b.cc": "2", "CMakeLists.txt": "3"}
    for name, text in (files | {"library.py": "4", "README.md": "5"}).items():
        (folder / name).write_text(text)
    monkeypatch.setattr(library, "source_folder", lambda: folder)
    fingerprint = library.fingerprint.__wrapped__
    sha = lambda text: hashlib.sha256(text.encode()).hexdigest()
    want = sha("".join(f"{sha(files[name])}  {name}\n" for name in sorted(files)))
    assert fingerprint() == want
    (folder / "library.py").write_text("other")
    assert fingerprint() == want
    (folder / "handlers" / "b.cc").write_text("other")
    assert fingerprint() != want


def test_every_source_counts():
    """The names that Python and CMake list: all C++ of the package."""
    folder = library.source_folder()
    suffixes = {".h", ".cc", ".cu", ".txt"}
    names = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.suffix in suffixes}
    listed = {p.relative_to(folder).as_posix() for g in library._SOURCES for p in folder.glob(g)}
    assert names == listed
    text = (folder / "CMakeLists.txt").read_text()
    assert all(pattern.replace("**/", "") in text for pattern in library._SOURCES)


@pytest.mark.kernel
def test_cmake_counts_the_same(tmp_path):
    """Without CUDA, CMake builds the handler for the CPU, which says of what sources."""
    folder = tmp_path / "build"
    options = [f"-DPython_EXECUTABLE={sys.executable}", "-S", str(library.source_folder())]
    for arguments in ([*options, "-B", str(folder)], ["--build", str(folder)]):
        done = subprocess.run(["cmake", *arguments], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.so")
    handle = ctypes.CDLL(str(path))
    handle.gna_sources.restype = ctypes.c_char_p
    assert handle.gna_sources().decode() == library.fingerprint()


@pytest.mark.kernel
def test_cmake_takes_one_cutlass(tmp_path):
    """Whoever starts it: pip, `gna-jax build-cuda`, Bazel or a person."""
    (tmp_path / "include" / "cutlass").mkdir(parents=True)
    folders = f"-DGNA_CUTLASS={tmp_path}", f"-DGNA_FFI_HEADERS={tmp_path}"
    source = "-S", str(library.source_folder()), "-B", str(tmp_path / "build")
    command = ["cmake", *source, "-DGNA_JAX_CUDA=ON", *folders]
    for text, version in (
        ("#define CUTLASS_MAJOR 4\n#define CUTLASS_MINOR 3\n#define CUTLASS_PATCH 0\n", "4.3.0"),
        (None, "none"),
    ):
        file = tmp_path / "include" / "cutlass" / "version.h"
        file.unlink() if text is None else file.write_text(text)
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        said = " ".join(done.stderr.split())
        assert done.returncode and f"for CUTLASS 4.2.0; got {version} in {tmp_path}: pip" in said


CMAKE = """#!/bin/sh
# Of a build: the folder is the last argument. Configuring: it says so, and succeeds.
if [ "$1" = --build ]; then
  echo "[1/3] Building CUDA object CMakeFiles/sm90_forward.dir/kernels/sm90_forward.cu.o"
  echo "[3/3] Linking CUDA shared module libgna_jax_cuda.so"
  {last}
else
  echo "$@" > "{arguments}"
fi
"""


@pytest.fixture
def toolchain(tmp_path):
    """Scripts in place of programs; the built file is empty of code."""

    def of(last: str) -> build.Toolchain:
        folder = tmp_path / "tools"
        folder.mkdir()
        texts = {
            "cmake": CMAKE.format(last=last, arguments=tmp_path / "arguments"),
            "nvcc": "#!/bin/sh\necho 'Build cuda_13.0'\n",
        }
        for name, text in texts.items():
            (folder / name).write_text(text)
            (folder / name).chmod(0o700)
        return build.Toolchain(str(folder / "cmake"), "ninja", str(folder / "nvcc"), tmp_path)

    return of


def test_build_records_what_it_built(cache, tmp_path, toolchain):
    steps = []
    path = build.build(
        toolchain('echo built > "$2/libgna_jax_cuda.so"'), lambda *step: steps.append(step)
    )
    assert path == cache / library.LIBRARY and path.read_text() == "built\n"
    with refused("cannot be loaded"):  # the record, owner and modes are in order
        library.load()
    assert [step[:2] for step in steps] == [(0, 0), (0, 0), (1, 3), (3, 3)]
    assert steps[3][2] == "Linking CUDA shared module libgna_jax_cuda.so"
    told = json.loads(path.with_name(library.RECORD).read_text())
    assert told["sha256"] == hashlib.sha256(b"built\n").hexdigest()
    assert told["sources"] == library.fingerprint() and told["nvcc"] == "Build cuda_13.0"
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    arguments = (tmp_path / "arguments").read_text()
    for option in (
        "-DGNA_JAX_CUDA=ON",
        f"-DGNA_CUTLASS={tmp_path}",
        "-G Ninja",
        "-DGNA_FFI_HEADERS=/",
    ):
        assert option in arguments
    assert sorted(os.listdir(cache)) == sorted([library.RECORD, library.LIBRARY, build.LOCK])


def test_a_build_that_fails_shows_its_end_and_leaves_the_old_library(cache, toolchain):
    path = made(cache)
    before = path.read_bytes()
    message = r"failed: cmake ended with 3\.\n(.*\n)*error: no such instruction\n.*4 GB of memory"
    with refused(message):
        build.build(toolchain("echo 'error: no such instruction' >&2; exit 3"))
    assert path.read_bytes() == before and library.load().path == path


def test_an_interrupted_build_leaves_nothing(cache, toolchain):
    """Ctrl-C: at once. Killed: what it left goes with the next build."""

    def interrupt(done, steps, what):
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build.build(toolchain('echo built > "$2/libgna_jax_cuda.so"'), interrupt)
    assert os.listdir(cache) == [build.LOCK]
    left = cache / "build-of-another-day"
    left.mkdir()
    (left / "sm90_forward.cu.o").write_text("half")
    made(cache)
    with build._alone_in(cache):
        assert not left.exists() and library.load().path.exists()


def test_one_build_at_a_time(cache, toolchain):
    tools = toolchain('echo built > "$2/libgna_jax_cuda.so"')
    with build._alone_in(cache), refused(f"another build is at work in {cache}: wait for it"):
        build.build(tools)
    assert build.build(tools).exists()


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch, toolchain):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    message = r"failed: .*Not a directory.*file/gna_jax/cuda.*, which \$XDG_CACHE_HOME can move"
    with refused(message):
        build.build(toolchain("true"))


def test_a_disk_that_is_full(cache, monkeypatch, toolchain):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "libgna_jax_cuda.json")

    path = made(cache)
    monkeypatch.setattr(build, "_record", full)
    with refused("failed: .*No space left on device: 'libgna_jax_cuda.json'; it goes to "):
        build.build(toolchain('echo built > "$2/libgna_jax_cuda.so"'))
    assert library.load().path == path


def test_a_disk_that_is_nearly_full(cache, monkeypatch, toolchain):
    """Found before minutes are spent: compilers say it in many words."""
    free = {str(cache): build.DISK, tempfile.gettempdir(): build.DISK}
    usage = lambda place: types.SimpleNamespace(free=free[str(place)])
    monkeypatch.setattr(build.shutil, "disk_usage", usage)
    tools = toolchain("true")
    for place in free:
        free[place] = 300 << 20
        with refused(f"takes 512 MB of disk in {place}; got 300 MB: make room, or name other"):
            build.build(tools)
        free[place] = build.DISK
    with build._alone_in(cache):
        pass


def test_no_build_beside_the_package_s_own(tmp_path, monkeypatch, toolchain):
    path = made(tmp_path / "package")
    monkeypatch.setattr(library, "source_folder", lambda: path.parent)
    assert build.built() == path
    with refused(f"{path} is this package's own and comes before the cache: install the pack"):
        build.build(toolchain("true"))
    other = made(tmp_path / "other", ffi_version=(9, 9))
    monkeypatch.setattr(library, "source_folder", lambda: other.parent)
    with refused("was built for XLA's FFI 9.9"):
        build.built()


def current(**changes):
    """What a build records, of the library in `made`."""
    ffi = "{}.{}".format(*library.ffi_version())
    return {"sources": library.fingerprint(), "ffi": ffi} | changes


def test_what_is_built_is_not_built_again(cache):
    assert build.built() is None
    path = made(cache)
    file = path.with_name(library.RECORD)
    sha = {"sha256": library.sha256(path)}
    major, minor = library.ffi_version()
    for usable in (current(), current(ffi=f"{major}.{minor - 1}")):
        file.write_text(json.dumps(sha | usable))
        assert build.built() == path
    others = (
        current(sources="f" * 64),
        current(sha256="0" * 64),
        current(ffi=f"{major}.{minor + 1}"),
        current(ffi=f"{major + 1}.{minor}"),
        current(ffi="new"),
        current(ffi=None),
        {},
    )
    for other in others:
        file.write_text(json.dumps(sha | other))
        assert build.built() is None, other
    file.write_text("[]")
    assert build.built() is None
    file.write_text(json.dumps(sha | current()))
    path.chmod(0o777)
    assert build.built() is None, "others may have written it"


def test_a_build_says_all_that_is_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDACXX", raising=False)
    monkeypatch.setattr(build.sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    message = r"missing: cmake, ninja, nvcc, nvidia-cutlass==4\.2\.0\.0: pip install 'gna-jax\[cuda-build\]'"
    with refused(message):
        build.find_toolchain()
    result = CliRunner().invoke(app, ["build-cuda"], env={"CUDA_HOME": "", "PATH": str(tmp_path)})
    assert result.exit_code == 1
    message = "gna-jax: building the CUDA library takes no GPU, but cmake, ninja, nvcc and CUTLASS"
    assert message in result.stderr


def test_a_build_takes_the_nvcc_that_is_named(monkeypatch, tmp_path):
    """And CUTLASS of the one version that the kernels are written for."""
    for name in ("cmake", "ninja"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o700)
    monkeypatch.setenv("PATH", str(tmp_path))
    own = tmp_path / "own" / "nvcc"
    monkeypatch.setenv("CUDACXX", str(own))
    spec = type("Spec", (), {"origin": str(tmp_path / "cutlass_library" / "__init__.py")})
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: spec)
    versions = {"nvidia-cutlass": build.CUTLASS}
    monkeypatch.setattr(build.importlib.metadata, "version", versions.__getitem__)
    with refused(f"missing: CUDACXX={own}, which is no program: pip install"):
        build.find_toolchain()
    own.parent.mkdir()
    own.write_text("#!/bin/sh\n")
    own.chmod(0o700)
    found = build.find_toolchain(lambda name: "/another/nvcc")
    assert found.nvcc == str(own)
    assert found.cutlass == tmp_path / "cutlass_library" / "source"
    versions["nvidia-cutlass"] = "4.3.0.0"
    with refused("missing: nvidia-cutlass==4"):
        build.find_toolchain()


def test_the_command_builds_and_loads(monkeypatch, tmp_path, cache):
    """With a build in place of CMake's: what a person sees."""
    monkeypatch.setattr(build, "find_toolchain", lambda find_tool: None)

    def fake(toolchain, report):
        report(0, 0, "configuring")
        report(1, 2, "Building CUDA object a/sm90_forward.cu.o")
        return made(cache)

    monkeypatch.setattr(build, "build", fake)
    result = CliRunner().invoke(app, ["build-cuda"], env={"COLUMNS": "400"})
    assert result.exit_code == 0, result.output
    assert re.search(rf"built in \d+ s, 0\.0 MiB: {cache / library.LIBRARY}", result.stdout)
    assert result.stderr.split("\n")[:2] == ["configuring", "1/2 sm90_forward.cu.o"]
    record = cache / library.RECORD
    record.write_text(json.dumps(json.loads(record.read_text()) | current()))
    for arguments, said in (([], "already built: "), (["--force"], "built in ")):
        result = CliRunner().invoke(app, ["build-cuda", *arguments], env={"COLUMNS": "400"})
        assert result.exit_code == 0 and result.stdout.startswith(said), result.output


def test_pyproject_names_the_same_versions():
    text = (ROOT / "pyproject.toml").read_text()
    assert text.count(f"nvidia-cutlass=={build.CUTLASS}") == 2
    oldest = re.findall(r"OLDEST_JAX := (.+)", (ROOT / "Makefile").read_text())[0]
    assert f'"jaxlib=={oldest}"' in text
    (cmake,) = re.findall(r"cmake_minimum_required\(VERSION (.+)\)", CMAKE_LISTS.read_text())
    assert f'cmake.version = ">={cmake}"' in text and f'"cmake>={cmake}"' in text
