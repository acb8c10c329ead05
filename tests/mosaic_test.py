"""`implementation="mosaic"` as a caller has it: lowered for CUDA, and run in the interpreter with every option of `gna`."""

import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from attention_suite import (
    attend,
    case_1d,
    case_of,
    check_array,
    check_close,
    differentiate,
    oracle,
)

import gna_jax
from gna_jax import gna, interpret_gpu
from gna_jax.tiling import Tiles

BFLOAT16 = ml_dtypes.bfloat16
LSE = 1e-5  # float32, from exact products of 16-bit operands
OUT = 1.5e-2
"""Of out and gradients in bfloat16, of the largest entry: weights and score gradients are rounded to 8 bits before their products."""

SMALL = Tiles(q=(64,), kv=(32,), backward_q=(32,), backward_kv=(64,))


def lowered(function, *arrays) -> str:
    """The program for CUDA, on a machine without one."""
    return jax.jit(function).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()


def test_lowers_for_cuda_to_one_kernel_and_no_copy():
    x = jax.ShapeDtypeStruct((2, 16, 24, 4, 64), jnp.bfloat16)
    options = {"window_size": (5, 7), "implementation": "mosaic", "device": "h200"}
    text = lowered(lambda q, k, v: gna(q, k, v, **options), x, x, x)
    assert len(re.findall(r"custom_call @mosaic_gpu", text)) == 1
    assert "stablehlo.pad" not in text and "stablehlo.while" not in text
    # Rows of lse alone are put in order outside the kernel.
    assert not re.findall(r"stablehlo.transpose.*bf16", text)
    # The same trace for a CPU is the xla backend.
    text = jax.jit(lambda q: gna(q, q, q, **options)).trace(x).lower().as_text()
    assert "mosaic_gpu" not in text and "stablehlo.while" in text


def test_paddings_are_named_steps():
    x = jax.ShapeDtypeStruct((1, 9, 20, 1, 48), jnp.bfloat16)
    options = {"window_size": 3, "implementation": "mosaic", "device": "h200"}
    run = lambda x: gna(x, x, x, dilation=(2, 1), **options)
    program = jax.jit(run).trace(x).lower(lowering_platforms=("cuda",))
    text = program.as_text(debug_info=True)
    assert "pad_head_dim" in text and "pad_to_dilation" in text


def test_default_never_takes_an_unverified_kernel():
    x = jax.ShapeDtypeStruct((1, 16, 16, 2, 64), jnp.bfloat16)
    told = gna_jax.explain(x, x, x, window_size=3, device="h200")
    assert told.implementation == "xla"
    assert "has not been verified" in dict(told.reasons)["mosaic"]


def test_interpreting_is_part_of_the_key_of_a_compiled_function():
    """One jitted function outside, inside and outside again."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 20, 1, 32)), jnp.bfloat16)
    seen = set()

    @jax.jit
    def run(x):
        spec = gna_jax.device.resolve_device(None)
        seen.add((spec.platform, spec.is_interpreted))
        return gna(x, x, x, window_size=5, implementation=("mosaic", "xla"), tiles=None)

    outside = run(x)
    assert seen == {("cpu", False)}
    with interpret_gpu("h200"):
        inside = run(x)
    assert seen == {("cpu", False), ("cuda", True)}
    again = run(x)
    np.testing.assert_array_equal(outside.view(np.uint16), again.view(np.uint16))
    check_array(inside.astype(np.float32), outside.astype(np.float32), OUT)


def test_interpret_gpu_refuses_what_is_no_gpu():
    with pytest.raises(ValueError, match="needs an NVIDIA GPU to play; got device='cpu'"):
        with interpret_gpu("cpu"):
            pass
    with pytest.raises(ValueError, match="device must be one of"):
        with interpret_gpu("h300"):
            pass


def test_interpret_gpu_needs_threads(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda platform: [None])
    monkeypatch.setenv("NPROC", "2")
    with pytest.raises(
        RuntimeError, match="needs 4 threads, JAX's CPU client has 2; set XLA_FLAGS"
    ):
        with interpret_gpu("h200"):
            pass


def check(case, device: str) -> None:
    """Values, lse and all gradients through `gna`, under jit, against float64."""
    arrays, cotangents = case.inputs(BFLOAT16), case.cotangents(BFLOAT16)
    run = lambda arrays: attend(case, arrays, implementation="mosaic", precision=None)
    with interpret_gpu(device, detect_races=True):
        got = jax.jit(lambda a, c: differentiate(run, a, c))(arrays, cotangents)
        got = jax.tree.map(np.asarray, got)
    want = oracle(case, arrays, cotangents)
    check_array(got.lse, want.lse, LSE, f"lse {case!r}")
    check_close(got, want, OUT, repr(case))
    assert got.out.dtype == BFLOAT16 and got.lse.dtype == np.float32


CASES = (
    # Additional keys of which one sample sees some and the other none.
    case_1d(70, 9, heads_per_kv=1, head_dim=32, value_dim=32, num_additional=5, lengths=(0, 3)),
    # Every sample sees them all; grouped heads, heads that are padded, values narrower than keys.
    case_of((9, 11), (3, 5), batch=1, head_dim=24, value_dim=17, num_additional=3),
    # Strides, dilation that divides neither axis, a causal axis, a scale below zero.
    case_of((5, 20), (2, 5), stride=(2, 1), dilation=(2, 3), is_causal=(True, False), batch=1, heads_per_kv=1, head_dim=32, value_dim=32, scale=-0.2),
)  # fmt: skip


@pytest.mark.kernel
@pytest.mark.parametrize("device", ["h200", "b200"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_option(case, device):
    check(case, device)


@pytest.mark.kernel
def test_vmap_joins_the_batch():
    case = case_1d(40, 7, batch=2, heads_per_kv=1, head_dim=32, value_dim=32, tiles=SMALL)
    arrays = case.inputs(BFLOAT16)
    one_by_one = {name: array[:, None] for name, array in arrays.items()}
    run = lambda arrays: attend(case, arrays, implementation="mosaic", precision=None)
    with interpret_gpu("h200"):
        jaxpr = jax.make_jaxpr(jax.vmap(run))(one_by_one)
        got = jax.jit(jax.vmap(run))(one_by_one)
        want = jax.jit(run)(arrays)
    assert str(jaxpr).count("name=body") == 1, "one kernel for all entries"
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(np.asarray(a)[:, 0], np.asarray(b))
