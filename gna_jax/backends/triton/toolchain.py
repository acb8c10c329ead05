"""jax-triton and Triton, imported when a kernel is wanted, and every check of their versions."""

import functools
import importlib
import inspect
import os
import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

OPTIONS = {
    # The oldest PTX that has every GPU here: a driver or ptxas older than Triton's own reads it.
    "ptx_version": 87,
    "enable_fp_fusion": True,
}
"""Of Triton's compiler."""

OLDEST = (3, 9)
"""Of Triton, as the extra has it: what jax-triton 0.4.1 imports of 3.6 is not all that it calls."""

_TYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "int32": "i32", "int64": "i64"}
_INSTALL = "install what fits this jax with pip install 'gna-jax[triton]', or use 'xla'"


def type_name(dtype: np.dtype) -> str:
    """A dtype in Triton's words."""
    return _TYPES[dtype.name]


def is_interpreting() -> bool:
    """Whether Triton was told to interpret kernels: from its import on, for the whole process."""
    return os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "on", "yes")


def check(is_interpreted: bool) -> None:
    """Raise RuntimeError, in one sentence, where the kernels cannot be compiled (or interpreted) here."""
    if is_interpreted and not is_interpreting():
        raise RuntimeError(
            "Triton decides at its import whether it interprets kernels: start Python with TRITON_INTERPRET=1 to run"
            " 'triton' in interpret_gpu"
        )
    if is_interpreted:
        _import("triton")
        return
    if is_interpreting():
        raise RuntimeError(
            "TRITON_INTERPRET=1 makes Triton interpret every kernel: unset it to compile for a GPU"
        )
    triton_call()


@functools.cache
def triton_call() -> Callable[..., Any]:
    """`jax_triton.triton_call`.

    Raises:
      RuntimeError: where jax-triton or Triton is missing, or does not fit this jax.
    """
    triton = _import("triton")
    library = _import("jax_triton")
    parameters = inspect.signature(library.triton_call).parameters
    if "out_type" not in parameters or "backend_options" not in parameters:
        version = getattr(library, "__version__", "unknown")
        raise RuntimeError(
            f"the Triton kernels need jax-triton 0.4.1 or newer; found {version}: {_INSTALL}"
        )
    found = getattr(triton, "__version__", "0")
    if tuple(int(part) for part in re.findall(r"\d+", found)[:2]) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise RuntimeError(
            f"the Triton kernels need triton {oldest} or newer; found {found}: {_INSTALL}"
        )
    _keep_calls_whole(library)
    return library.triton_call


def _import(name: str) -> Any:
    package = name.replace("_", "-")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other projects' deprecations
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise RuntimeError(
                f"{package} needs {error.name}, which is missing: {_INSTALL}"
            ) from error
        raise RuntimeError(
            f"the Triton kernels need {package}, which is not installed: {_INSTALL}"
        ) from error
    except (ImportError, AttributeError) as error:
        raise RuntimeError(
            f"{package} does not fit the installed jax or triton ({error}): {_INSTALL}"
        ) from error


def _keep_calls_whole(library: Any) -> None:
    """jax 0.12 hands rules of dead code a third argument, which that of jax-triton 0.4.1 does not take (2026-11).

    In its place one that takes either and says the same: every operand is used.
    """
    from jax.interpreters.partial_eval import dce_rules

    primitive = library.triton_lib.triton_kernel_call_p
    rule = dce_rules[primitive]

    def keep(used_results: list[bool], *rest: Any) -> tuple[list[bool], Any]:
        del used_results
        return [True] * len(rest[-1].invars), rest[-1]

    if len(inspect.signature(rule).parameters) == 2:
        dce_rules[primitive] = keep
