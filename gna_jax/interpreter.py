"""`interpret_gpu`: the GPU kernels' own source on a machine without a GPU, in JAX's interpreter.

Two contexts of JAX's are composed, and both are part of the key under which `jax.jit` keeps programs: an abstract mesh whose
device is the GPU on the platform of CPUs, which is how `gna_jax.device` recognises it, and Pallas' interpreter.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import jax

from gna_jax.device import KNOWN_DEVICES, DeviceSpec, resolve_device

THREADS = 4
"""Warpgroups of a thread block, at most. The interpreter runs each on a thread of the CPU client's pool, and all must run at once."""


@contextlib.contextmanager
def interpret_gpu(
    device: str | DeviceSpec = "h200", *, detect_races: bool = False
) -> Iterator[None]:
    """Inside, the default device is this GPU, and `implementation="mosaic"` runs its kernels in JAX's interpreter on the CPU.

    For debugging a model with the real kernels: forward, backward, under `jax.jit` and `jax.grad`. Slow, thousands of times:
    use a few hundred tokens. The interpreter does not model that wgmma runs asynchronously. `implementation="triton"` runs in
    Triton's own interpreter, in a Python that was started with TRITON_INTERPRET=1.

    Args:
      device: `"h100"`, `"h200"`, `"b200"`, or a `DeviceSpec` of such a GPU.
      detect_races: whether unordered accesses to the same shared memory are errors (on jax 0.11 they are only printed).

    Raises:
      ValueError: for a device that is unknown, or no NVIDIA GPU.
      RuntimeError: where the CPU client has too few threads; the interpreter would wait for ever.

    >>> import jax, jax.numpy as jnp, gna_jax
    >>> x = jax.random.normal(jax.random.key(0), (1, 12, 2, 32), jnp.bfloat16)
    >>> with gna_jax.interpret_gpu("h200"):
    ...     gna_jax.gna(x, x, x, window_size=5, implementation="mosaic").shape
    (1, 12, 2, 32)
    """
    spec = resolve_device(device)
    if spec.platform != "cuda":
        names = sorted(name for name, known in KNOWN_DEVICES.items() if known.platform == "cuda")
        raise ValueError(
            f"interpret_gpu needs an NVIDIA GPU to play; got device={device!r}: name one of {names}"
        )
    _check_threads()
    from jax.experimental.pallas import mosaic_gpu as plgpu

    mesh = jax.sharding.get_abstract_mesh()
    mesh = jax.sharding.AbstractMesh(
        mesh.axis_sizes,
        mesh.axis_names,
        axis_types=mesh.axis_types,
        abstract_device=jax.sharding.AbstractDevice(
            device_kind=spec.kind, platform="cpu", num_cores=spec.num_sms
        ),
    )
    params = plgpu.InterpretGPUParams(detect_races=detect_races)
    with jax.sharding.use_abstract_mesh(mesh), plgpu.force_gpu_interpret_mode(params):
        try:
            yield
        except BaseException:
            _reset()
            raise


def _check_threads() -> None:
    """Raise unless the CPU client's pool has a thread for every warpgroup."""
    devices: list[Any] = jax.devices("cpu")
    cores = int(os.environ.get("NPROC") or os.cpu_count() or 1)
    if max(cores, len(devices)) < THREADS:
        raise RuntimeError(
            f"the interpreter needs {THREADS} threads, JAX's CPU client has {max(cores, len(devices))}; set"
            " XLA_FLAGS=--xla_force_host_platform_device_count=8 before jax is imported"
        )


def _reset() -> None:
    """Free the interpreter's state, which JAX keeps after an exception and then refuses to run. Not public in jax 0.12 (2026-11)."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    gpu_callbacks.reset_gpu_interpret_mode_state()
