"""An environment of its own for torch, so that the project's never holds it. Made once, in `.venv-torch`.

Which interpreter carries torch's CPU build depends on the package index; any Python >= 3.10 serves, not only the project's.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

TORCH = "2.13.0"
FOLDER = Path(__file__).resolve().parent.parent / ".venv-torch"


def torch_python(given: Path | None, console: Console) -> Path:
    """The interpreter that imports torch: the one given, else that of `.venv-torch`, which is made if need be.

    Raises:
      RuntimeError: the given one has no torch, or none can be installed.
    """
    if given is not None:
        if _answers(given, "import torch, numpy"):
            return given.absolute()  # not resolved: a link's target is outside its environment
        raise RuntimeError(
            f"--torch-python must be a Python that imports torch and numpy; got {given};"
            f" leave it out and {FOLDER.name} is made"
        )
    python = FOLDER / "bin" / "python"
    if not _answers(python, f"import numpy, torch; assert torch.__version__.startswith({TORCH!r})"):
        _make(console)
    return python


def _make(console: Console) -> None:
    """Install torch with the first interpreter that finds its CPU build, else any build with this interpreter."""
    attempts = [(python, f"torch=={TORCH}+cpu") for python in _interpreters()]
    attempts.append((sys.executable, f"torch=={TORCH}"))
    for python, wanted in attempts:
        console.print(f"making {FOLDER.name}: {wanted} with {python}")
        shutil.rmtree(FOLDER, ignore_errors=True)
        subprocess.run([python, "-m", "venv", FOLDER], check=True, stdout=subprocess.DEVNULL)
        pip = [FOLDER / "bin" / "python", "-m", "pip", "install", "--quiet"]
        finished = subprocess.run([*pip, wanted, "numpy"], capture_output=True, text=True)
        if finished.returncode == 0:
            return
    shutil.rmtree(FOLDER, ignore_errors=True)
    raise RuntimeError(
        f"torch {TORCH} could not be installed with any of {[python for python, _ in attempts]};"
        " set PIP_EXTRA_INDEX_URL to an index that has it, or name an interpreter that has torch: --torch-python PATH;"
        f" pip said: {finished.stderr.strip()[-400:]}"
    )


def _interpreters() -> Iterator[str]:
    """Pythons that can make environments, one per version: this one, then others of the PATH and of pyenv."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for minor in ("", "3.13", "3.12", "3.11", "3.10"):
        candidates = [sys.executable] if not minor else [shutil.which(f"python{minor}")]
        candidates += sorted(pyenv.glob(f"{minor}.*/bin/python")) if minor else []
        for candidate in candidates:
            if candidate and _answers(candidate, "import ensurepip, venv"):
                yield str(candidate)
                break


def _answers(python: str | Path, code: str) -> bool:
    """Whether the interpreter runs and the code raises nothing."""
    try:
        return subprocess.run([python, "-c", code], capture_output=True).returncode == 0
    except OSError:
        return False
