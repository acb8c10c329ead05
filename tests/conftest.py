"""Settings of every test: the platform, eight virtual CPU devices, and jax at its strictest.

Environment variables come before the first import of jax, since it reads them when it starts a backend.
"""

import os

DEVICES = 8  # for the sharding tests; other tests use the first

if "GNA_JAX_TEST_GPU" not in os.environ:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
flags = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in flags:
    flags = f"{flags} --xla_force_host_platform_device_count={DEVICES}".strip()
os.environ["XLA_FLAGS"] = flags

import jax  # noqa: E402 (the variables above come first)
import pytest  # noqa: E402

# Between arrays, a silent broadcast over ranks or a silent change of dtype is a mistake in this package.
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

OPTIMISED = {"xla_test", "poison_test", "memory_test"}
"""Tests of the code that XLA makes. All others compile unoptimised, which takes two thirds of the time."""
ALL_UNOPTIMISED = "GNA_JAX_TEST_UNOPTIMISED" in os.environ


@pytest.fixture(autouse=True)
def optimisation(request):
    """Compile with or without XLA's optimisations."""
    quickly = ALL_UNOPTIMISED or request.module.__name__ not in OPTIMISED
    jax.config.update("jax_disable_most_optimizations", quickly)


@pytest.fixture(autouse=True)
def races_of_wgmma(request, monkeypatch):
    """Race detection for wgmma's operands: the interpreter reads them unseen, so kernels' tests read them once more before.

    Reads are ordered with what copies write by barriers alone, as wgmma's are; the fence after them is for these reads.
    """
    if request.node.get_closest_marker("kernel") is None:
        return
    from jax.experimental.pallas import mosaic_gpu as plgpu

    wgmma = plgpu.wgmma

    def read_and_multiply(accumulator, left, right):
        for operand in (left, right):
            if not isinstance(operand, jax.Array):
                operand[...]
        plgpu.commit_smem()
        wgmma(accumulator, left, right)

    monkeypatch.setattr(plgpu, "wgmma", read_and_multiply)
