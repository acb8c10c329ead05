"""The programs and packages that compiling for a GPU takes: where they are, and what to install where they are not."""

import importlib.metadata
import os
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

PLUGIN = "jax-cuda13-plugin", "jax-cuda13-pjrt"
"""jax's compiler for CUDA. Neither needs a GPU or a driver."""
ASSEMBLER_SECONDS = 120


def missing() -> str | None:
    """None, or what is missing for compiling, with the lines that install it."""
    lines = []
    wanted = importlib.metadata.version("jaxlib")
    if any(_version(name) != wanted for name in PLUGIN):
        packages = " ".join(f"{name}=={wanted}" for name in PLUGIN)
        lines.append(f"jax's CUDA compiler: pip install --no-deps {packages}")
    if find_tool("ptxas") is None:
        lines.append("ptxas: CUDA's bin folder on PATH, or pip install --no-deps nvidia-cuda-nvcc")
    if not lines:
        return None
    return "compiling for a GPU needs no GPU, but " + "; ".join(lines)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def search_path() -> str:
    """PATH, then where CUDA's installer and its wheels put programs."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_ROOT") if os.environ.get(name)]
    homes += ["/usr/local/cuda", os.path.join(sysconfig.get_path("purelib"), "nvidia", "cu13")]
    return os.pathsep.join([os.environ.get("PATH", os.defpath), *(f"{home}/bin" for home in homes)])


def find_tool(name: str) -> str | None:
    """Path of one of CUDA's programs; None where there is none."""
    return shutil.which(name, path=search_path())


def missing_for_sass() -> str | None:
    """None, or what is missing for disassembling, with the line that installs it. `cuobjdump` would call `nvdisasm` as well."""
    absent = [name for name in ("ptxas", "nvdisasm") if find_tool(name) is None]
    if not absent:
        return None
    return (
        f"SASS needs {' and '.join(absent)}: CUDA's bin folder on PATH,"
        " or pip install --no-deps nvidia-cuda-nvcc nvidia-cuda-nvdisasm"
    )


def disassemble(ptx: str, architecture: str) -> str:
    """SASS of a kernel, assembled anew: what the GPU would execute.

    Args:
      ptx: of the kernel.
      architecture: such as `"sm_90a"`.

    Raises:
      RuntimeError: without `ptxas` or `nvdisasm`, or where one of them fails.
    """
    ptxas, nvdisasm = map(find_tool, ("ptxas", "nvdisasm"))
    if ptxas is None or nvdisasm is None:
        raise RuntimeError(missing_for_sass())
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx)
        _run([ptxas, f"-arch={architecture}", "-o", str(binary), str(source)])
        return _run([nvdisasm, "-c", str(binary)])


def _run(command: list[str]) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=ASSEMBLER_SECONDS, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name} failed: {done.stderr.strip()}")
    return done.stdout
