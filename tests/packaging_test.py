"""What the package looks like from outside: the wheel, its version, what importing costs, layers, sizes, files."""

import ast
import os
import pathlib
import re
import subprocess
import sys
import tomllib
import zipfile

import pytest

import gna_jax
from cuda_ffi import build_backend

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = ("gna_jax", "pallas_kernels", "cuda_ffi")

# From the bottom: a module may import modules of its own row and of rows above it in this list.
LAYERS = (
    ("gna_jax.neighborhood", "gna_jax.device"),
    ("gna_jax.problem", "gna_jax.tiling", "gna_jax.halo"),
    ("gna_jax.mesh_types", "gna_jax.merge", "gna_jax.interpreter"),
    ("gna_jax.simulator",),
    PACKAGES[1:],
    ("gna_jax.backends",),
    ("gna_jax.vjp",),
    ("gna_jax.attention",),
    ("gna_jax.halo_exchange",),
    ("gna_jax.explanation", "gna_jax.natten", "gna_jax.sharding"),
    ("gna_jax.trials", "gna_jax.tuning", "gna_jax.verification"),
    ("gna_jax.inspection",),
    ("gna_jax.pictures",),
    ("gna_jax.flax",),
    ("gna_jax.models",),
    ("gna_jax",),
    ("gna_jax.selfcheck",),
    ("gna_jax.cli",),
    ("gna_jax.__main__",),
)
KERNEL_BACKENDS = tuple(f"gna_jax.backends.{name}" for name in ("cutlass", "mosaic", "slab_tiles"))
KERNEL_BUILDERS = ("gna_jax.cli.build_cuda",)


def tracked_files():
    """Every file of the checkout that git does not ignore."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert listing.returncode == 0, listing.stderr
    return [ROOT / name for name in listing.stdout.splitlines() if (ROOT / name).is_file()]


FILES = tracked_files()
SOURCES = [file for file in FILES if file.suffix == ".py"]
PACKAGE_SOURCES = [file for file in SOURCES if file.relative_to(ROOT).parts[0] in PACKAGES]


def name_of(path):
    return str(path.relative_to(ROOT))


def module_name(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def run_python(code, **environment):
    completed = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | environment,
        timeout=120,
    )
    assert completed.returncode == 0, completed.stderr
    return completed.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, ROOT], check=True, timeout=120)
    (file,) = folder.glob("*.whl")
    return file


def test_the_wheel_is_pure_small_and_holds_the_packages_alone(wheel):
    assert wheel.name.endswith("-py3-none-any.whl")
    assert wheel.stat().st_size < 2**20
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == set(PACKAGES)
    assert {name_of(file) for file in PACKAGE_SOURCES} <= names
    assert not [name for name in names if "test" in name or "__pycache__" in name]


def test_the_wheel_has_the_version_that_the_package_says(wheel):
    assert wheel.name.split("-")[1] == gna_jax.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+|rc\d+)?", gna_jax.__version__)
    assert f"## [{gna_jax.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_the_wheel_asks_for_what_pyproject_says(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = archive.read(name).decode()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"Requires-Python: {project['requires-python']}" in metadata
    asked = re.findall(r"^Requires-Dist: ([^;\n]+?) *$", metadata, re.MULTILINE)
    assert sorted(asked) == sorted(project["dependencies"])
    assert re.findall(r"^Provides-Extra: (.+)$", metadata, re.MULTILINE) == list(
        project["optional-dependencies"]
    )


def test_pip_is_asked_for_cuda_s_compiler_only_where_it_is_missing(monkeypatch):
    """`GNA_JAX_CUDA=1 pip install .` takes $CUDACXX, the machine's nvcc, else its wheels; without the switch, none of this."""
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("GNA_JAX_CUDA", raising=False)
    plain = build_backend.get_requires_for_build_wheel()
    assert not plain
    monkeypatch.setenv("GNA_JAX_CUDA", "1")
    monkeypatch.setenv("CUDACXX", "/opt/own/nvcc")
    asked = build_backend.get_requires_for_build_wheel()
    assert asked == build_backend.get_requires_for_build_editable()
    assert {"jaxlib==0.11.2", "nvidia-cutlass==4.2.0.0"} <= set(asked)
    assert not [name for name in asked if "nvcc" in name]
    monkeypatch.delenv("CUDACXX")
    looked = []
    places = iter(["/usr/bin/nvcc", None, None])

    def which(name, path):
        looked.append(path)
        return next(places)

    monkeypatch.setattr(build_backend.shutil, "which", which)
    assert build_backend.with_nvcc(asked) == asked
    wheels = [re.split("[<>=]", name)[0] for name in build_backend.with_nvcc(asked)[len(asked) :]]
    assert sorted(wheels) == ["nvidia-cuda-cccl", "nvidia-cuda-nvcc"]
    assert build_backend.with_nvcc(plain) == plain
    assert looked[0].startswith(os.environ["PATH"]) and "/usr/local/cuda/bin" in looked[0]


def test_importing_takes_little_over_jax():
    # Processor time, not the clock: other tests share the cores.
    code = "import time, jax, jax.numpy; start = time.process_time(); import gna_jax; print(time.process_time() - start)"
    assert min(float(run_python(code)) for _ in range(3)) < 0.2


def test_importing_starts_no_backend_and_loads_no_kernels():
    loaded = run_python(
        "import sys, gna_jax, jax\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge.backends_are_initialized()\n"
        f"print([name for name in sys.modules if name.split('.')[0] in {(*PACKAGES[1:], 'flax')}])"
    )
    assert loaded == "[]"


def imports_of(path):
    """(module, whether it is imported at import time) for each of our modules that a file imports."""
    tree = ast.parse(path.read_text())
    at_import_time = set(map(id, walk_outside_functions(tree)))
    package = (
        module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]
    )
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = parents[: len(parents) + 1 - node.level] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            # `from package import name` imports package.name where that is a module.
            names = [
                f"{module}.{alias.name}" if is_module(f"{module}.{alias.name}") else module
                for alias in node.names
            ]
        for name in names:
            if name.split(".")[0] in PACKAGES:
                yield name, id(node) in at_import_time


def walk_outside_functions(node):
    yield node
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        for child in ast.iter_child_nodes(node):
            yield from walk_outside_functions(child)


def is_module(name):
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def layer_of(module):
    """Number of the layer whose longest entry is `module` or holds it."""
    entries = {entry: number for number, layer in enumerate(LAYERS) for entry in layer}
    held = [entry for entry in entries if module == entry or module.startswith(f"{entry}.")]
    entry = max(held, key=len)
    assert entry != "gna_jax" or module == entry, f"{module} has no layer: add it to LAYERS here"
    return entries[entry]


@pytest.mark.parametrize("path", PACKAGE_SOURCES, ids=name_of)
def test_imports_only_go_down(path):
    module = module_name(path)
    upward = [name for name, _ in imports_of(path) if layer_of(name) > layer_of(module)]
    assert not upward, f"{module} imports {upward}, which are above it"


@pytest.mark.parametrize("path", PACKAGE_SOURCES, ids=name_of)
def test_only_their_backends_import_kernels(path):
    """And those backends are imported by name, when asked for: see `test_importing_starts_no_backend_and_loads_no_kernels`."""
    inside = path.relative_to(ROOT).parts[0]
    kernels = [
        name
        for name, _ in imports_of(path)
        if name.split(".")[0] in PACKAGES[1:] and name.split(".")[0] != inside
    ]
    assert not kernels or module_name(path).startswith(KERNEL_BACKENDS + KERNEL_BUILDERS)


@pytest.mark.parametrize("path", PACKAGE_SOURCES, ids=name_of)
def test_modules_and_functions_stay_short(path):
    source = path.read_text()
    most = 700 if module_name(path).startswith(PACKAGES[1:]) else 400  # a kernel is one piece
    assert source.count("\n") <= most
    long = {
        node.name: own_lines(node)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef) and own_lines(node) > 60
    }
    assert not long


def own_lines(function):
    """Lines of a function's body after its docstring."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return function.end_lineno - body[0].lineno + 1 if body else 0


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_modules_open_with_a_docstring(path):
    assert ast.get_docstring(ast.parse(path.read_text()))


def test_nothing_is_left_to_do_and_no_machine_is_named():
    # Written in two parts, so that this file does not find itself.
    marks = re.compile(
        "|".join(["TO" + "DO", "FIX" + "ME", "/ro" + r"ot/", "/ho" + r"me/\w", "/wo" + "rk/"])
    )
    texts = {file: file.read_text(errors="ignore") for file in FILES if file.suffix != ".png"}
    assert not [
        f"{name_of(file)}: {match}" for file, text in texts.items() if (match := marks.search(text))
    ]


def test_every_directory_says_what_is_in_it():
    folders = {file.parent for file in FILES if file.suffix != ".png"}
    folders |= {parent for folder in folders for parent in folder.parents if ROOT in parent.parents}
    seen = [
        f for f in folders if not any(part.startswith(".") for part in f.relative_to(ROOT).parts)
    ]
    assert not [name_of(folder) for folder in seen if not (folder / "README.md").is_file()]
    inner = [folder / "README.md" for folder in seen if folder != ROOT]
    assert not [name_of(file) for file in inner if file.read_text().count("\n") > 30]


def test_bazel_knows_every_source_and_test():
    rules = (ROOT / "BUILD.bazel").read_text()
    tests = [name_of(file) for file in FILES if file.name.endswith(("_test.py", "_test.cc"))]
    assert not [name for name in tests if f'"{name}"' not in rules]
    named = re.findall(r'"((?:gna_jax|pallas_kernels|cuda_ffi|tests|examples)/[^"*]+\.py)"', rules)
    assert not [name for name in named if not (ROOT / name).is_file()]
