"""The Triton kernels compiled without a GPU: registers, spills and shared memory of the default tiles; and the programs for CUDA."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from triton_suite import GPUS, SHARED_MEMORY, compiled, problem_of

from gna_jax import gna, gna_sharded

pytestmark = pytest.mark.triton

SMALL = ((56, 56), {"window_size": 7})
LARGE = ((16, 32, 32), {"window_size": (8, 16, 16)})
JOBS = ("forward", "query_gradient", "key_gradient")


def check(job, problem, capability):
    got = compiled(job, problem, capability)
    # Of float32 ptxas keeps a few values out where another program fits the multiprocessor then; a wide dQ has too many.
    most = 64 if job == "query_gradient" and problem.head_dim == 256 else 24
    assert got.spilled <= (0 if problem.dtype.itemsize == 2 else most), got[:3]
    assert got.shared_memory <= SHARED_MEMORY[capability], got[:3]
    if problem.dtype.itemsize == 2:
        assert re.search(r"\b(mma\.sync|wgmma\.mma_async)", got.ptx), "the matrix unit is used"
    return got


@pytest.mark.parametrize("capability", GPUS)
@pytest.mark.parametrize("job", JOBS)
def test_default_tiles_spill_nothing(job, capability):
    check(job, problem_of(*LARGE, 64, jnp.bfloat16), capability)


BIASED = ("forward", "bias_gradient", "key_gradient")


@pytest.mark.parametrize("job", BIASED)
def test_a_small_window_with_a_bias(job):
    check(job, problem_of(*SMALL, 32, jnp.float16, has_bias=True), 80)


# Of every kernel: the problem, additional keys, and whether it has a bias.
VARIANTS = [
    *((job, LARGE, 77, False) for job in (*JOBS, "additional_gradient")),
    ("query_gradient", SMALL, 77, False),
    *((job, SMALL, 0, True) for job in BIASED),
    ("bias_gradient", SMALL, 77, True),
]


@pytest.mark.slow
@pytest.mark.parametrize("capability", GPUS)
@pytest.mark.parametrize("dim", (32, 64, 128, 256))
@pytest.mark.parametrize("precision", (None, "highest", "default"))
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda x: f"{x[0]}-{len(x[1][0])}d-{x[2]}")
def test_every_setting(variant, precision, dim, capability):
    """bfloat16, and float32, exact and as TF32."""
    job, rule, more, has_bias = variant
    dtype = jnp.bfloat16 if precision is None else jnp.float32
    options = {"num_additional": more, "has_bias": has_bias, "precision": precision}
    check(job, problem_of(*rule, dim, dtype, **options), capability)


def lowered(function, *arrays):
    program = jax.jit(function).trace(*arrays).lower(lowering_platforms=("cuda",))
    return program.as_text()


def kernels(text):
    return len(re.findall(r"custom_call @triton_kernel_call_ffi", text))


OPTIONS = {"window_size": 5, "implementation": "triton", "device": "a100"}


def test_lowers_for_cuda_to_one_kernel_and_no_copy():
    x = jax.ShapeDtypeStruct((2, 8, 24, 4, 32), jnp.bfloat16)
    text = lowered(lambda q, k, v: gna(q, k, v, dilation=(1, 3), **OPTIONS), x, x, x)
    assert kernels(text) == 1
    assert not re.search(r"stablehlo\.(pad|transpose|while|gather)", text)


def test_gradients_under_vmap_are_two_more_kernels():
    x = jax.ShapeDtypeStruct((3, 2, 24, 4, 32), jnp.bfloat16)
    loss = lambda x: gna(x, x, x, **OPTIONS).astype(jnp.float32).sum()
    text = lowered(jax.grad(lambda x: jax.vmap(loss)(x).sum()), x)
    assert kernels(text) == 3 and "stablehlo.while" not in text


def test_exports_where_its_custom_call_is_allowed():
    x = jax.ShapeDtypeStruct((2, 24, 4, 32), jnp.bfloat16)
    run = jax.jit(lambda x: gna(x, x, x, **OPTIONS))
    allowed = jax.export.DisabledSafetyCheck.custom_call("triton_kernel_call_ffi")
    exported = jax.export.export(run, platforms=("cuda",), disabled_checks=[allowed])(x)
    again = jax.export.deserialize(exported.serialize())
    assert again.out_avals == (jax.core.ShapedArray(x.shape, x.dtype),)
    assert kernels(again.mlir_module()) == 1


def test_shard_map_keeps_its_shares():
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("batch", "heads"))
    spec = PartitionSpec("batch", None, "heads")
    run = jax.shard_map(
        lambda x: gna(x, x, x, **OPTIONS), mesh=mesh, in_specs=spec, out_specs=spec, check_vma=True
    )
    text = lowered(run, jax.ShapeDtypeStruct((4, 24, 4, 32), jnp.bfloat16))
    assert kernels(text) == 1 and "tensor<2x24x2x32xbf16>" in text
    assert not re.search(r"all_gather|all_reduce|all_to_all|collective_permute", text)


SLABS = ((4, 32, 32), (11, 32, 32))
"""Of `LARGE`, cut along time over four devices: queries, and the keys that they see."""


@pytest.mark.parametrize("job", JOBS)
def test_default_tiles_of_slabs_spill_nothing(job):
    check(job, problem_of(*LARGE, 64, jnp.bfloat16, slabs=SLABS), 80)


@pytest.mark.slow
@pytest.mark.parametrize("capability", GPUS)
@pytest.mark.parametrize("job", (*JOBS, "additional_gradient"))
@pytest.mark.parametrize("dim", (32, 64, 128, 256))
def test_every_slab(dim, job, capability):
    more = 77 if job == "additional_gradient" else 0
    check(job, problem_of(*LARGE, dim, jnp.bfloat16, slabs=SLABS, num_additional=more), capability)


PLANES = ((28, 56), (34, 56))
"""Of `SMALL`, cut in two."""


@pytest.mark.slow
@pytest.mark.parametrize("job", BIASED)
@pytest.mark.parametrize("dim", (32, 64, 128))
def test_every_slab_with_a_bias(dim, job):
    check(job, problem_of(*SMALL, dim, jnp.bfloat16, slabs=PLANES, has_bias=True), 80)


@pytest.mark.parametrize("job", ("bias_gradient", "additional_gradient"))
def test_other_gradients_of_slabs_spill_nothing(job):
    more = {"has_bias": True} if job == "bias_gradient" else {"num_additional": 77}
    check(job, problem_of(*SMALL, 32, jnp.float16, slabs=PLANES, **more), 80)


def test_a_volume_sharded_over_space_is_slabs():
    """One kernel per device, with its origins; halos are permuted, nothing is gathered."""
    mesh = Mesh(np.array(jax.devices()[:2]), ("x",))
    spec = PartitionSpec(None, "x")
    x = jax.ShapeDtypeStruct((1, 16, 24, 2, 64), jnp.bfloat16)
    run = lambda q, k, v: gna_sharded(q, k, v, spec=spec, mesh=mesh, overlap=False, **OPTIONS)
    text = lowered(run, x, x, x)
    assert kernels(text) == 1 and "stablehlo.collective_permute" in text
    (call,) = [line for line in text.splitlines() if "@triton_kernel_call_ffi" in line]
    operands = call.rpartition(" : (")[2].partition(") -> ")[0].split(", ")
    assert operands.count("tensor<2xi32>") == 2 and "tensor<1x8x24x2x64xbf16>" in operands
    assert not re.search(r"all_gather|all_to_all|stablehlo.gather", text)
