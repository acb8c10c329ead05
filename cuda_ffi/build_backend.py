"""What pip asks to build this project's wheel: scikit-build-core, and nvcc's wheels where the CUDA library is asked for and no nvcc is here.

pyproject.toml can name requirements for `GNA_JAX_CUDA=1`, but not ask whether the machine has a program: that is all that is added.
It runs before anything is installed, so it imports nothing of this project.
"""

import os
import pathlib
import shutil
import tomllib

from scikit_build_core import build
from scikit_build_core.build import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

# pip's hooks.
__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

Settings = dict[str, list[str] | str] | None


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    """What building a wheel takes, as pip installs it for the time of the build."""
    return with_nvcc(build.get_requires_for_build_wheel(config_settings))


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    """As for a wheel."""
    return with_nvcc(build.get_requires_for_build_editable(config_settings))


def with_nvcc(requirements: list[str]) -> list[str]:
    """The requirements; those of a build with CUDA have nvcc among them where `CMakeLists.txt` would find none."""
    is_for_cuda = any(name.startswith("nvidia-cutlass") for name in requirements)
    if not is_for_cuda or os.environ.get("CUDACXX"):
        return requirements
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_ROOT") if os.environ.get(name)]
    folders = [f"{home}/bin" for home in [*homes, "/usr/local/cuda"]]
    if shutil.which("nvcc", path=os.pathsep.join([os.environ.get("PATH", os.defpath), *folders])):
        return requirements
    project = tomllib.loads(pathlib.Path("pyproject.toml").read_text())["project"]
    wheels = project["optional-dependencies"]["cuda-build"]
    return [*requirements, *(name for name in wheels if name.startswith("nvidia-cuda-"))]
