"""`implementation="triton"` where Triton need not be installed: what is refused, the constants of kernels, and default tiles."""

import dataclasses
import math
import pathlib
import sys
import tomllib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gna_jax import gna
from gna_jax.backends import triton as backend
from gna_jax.backends.triton import tiles as tile_choice
from gna_jax.backends.triton import toolchain
from gna_jax.backends.triton.plan import KernelPlan
from gna_jax.device import KNOWN_DEVICES, DeviceSpec
from gna_jax.neighborhood import Neighborhood
from gna_jax.problem import Operands, describe
from gna_jax.tiling import Tiles

A100 = KNOWN_DEVICES["a100"]


def problem_of(layout, *, dim=32, dtype=jnp.bfloat16, device=A100, heads=2, precision=None, **rule):
    x = jax.ShapeDtypeStruct((1, *layout, heads, dim), dtype)
    neighborhood = Neighborhood.of(len(layout), **rule)
    return describe(Operands(x, x, x), neighborhood, scale=None, precision=precision, device=device)


@pytest.fixture
def without_triton(monkeypatch):
    """As if neither package were installed."""
    toolchain.triton_call.cache_clear()
    for name in ("triton", "jax_triton"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    yield
    toolchain.triton_call.cache_clear()


def test_missing_packages_are_one_sentence(without_triton):
    x = jnp.ones((1, 8, 1, 16))
    sentence = (
        r"the Triton kernels need triton, which is not installed: install .*gna-jax\[triton\]"
    )
    with pytest.raises(NotImplementedError, match=sentence):
        gna(x, x, x, window_size=3, implementation="triton", device="a100")
    ladder = gna(x, x, x, window_size=3, implementation=("triton", "xla"), device="a100")
    assert ladder.shape == x.shape
    with pytest.raises(RuntimeError, match=sentence):
        toolchain.check(is_interpreted=False)


def test_an_old_jax_triton_is_one_sentence(without_triton, monkeypatch):
    old = type(sys)("jax_triton")
    old.__version__ = "0.3.1"
    old.triton_call = lambda *arrays, kernel, out_shape, **options: None
    monkeypatch.setitem(sys.modules, "triton", type(sys)("triton"))
    monkeypatch.setitem(sys.modules, "jax_triton", old)
    with pytest.raises(RuntimeError, match="need jax-triton 0.4.1 or newer; found 0.3.1: install"):
        toolchain.triton_call()


def test_interpreting_is_decided_when_python_starts(without_triton, monkeypatch):
    with pytest.raises(RuntimeError, match="start Python with TRITON_INTERPRET=1"):
        toolchain.check(is_interpreted=True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="unset it to compile for a GPU"):
        toolchain.check(is_interpreted=False)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device": DeviceSpec("Tesla T4", "cuda", (7, 5))}, "from compute capability 8.0"),
        ({"device": KNOWN_DEVICES["cpu"]}, "from compute capability 8.0"),
        ({"dtype": jnp.float8_e4m3fn}, "take bfloat16, float16, float32; got float8"),
        ({"dim": 260}, "head dims up to 256; got head_dim=260"),
        ({"heads": 1 << 27, "dim": 16}, "number the elements of a sample in 32 bits"),
        ({"precision": jax.lax.DotAlgorithmPreset.BF16_BF16_F32}, "know precision None, 'default'"),
    ],
)
def test_refused_calls(changes, reason):
    assert reason in backend.supports(problem_of((12,), window_size=3, **changes), None)


@pytest.mark.parametrize(
    ("tiles", "reason"),
    [
        (Tiles((16,), None), "got kv=None"),
        (Tiles((8,), (16,)), "tiles of 16 to 128 tokens, a power of two on every axis; got q 8"),
        (Tiles((16,), (48,)), "got kv 48"),
        (Tiles((16,), (16,), (256,), (16,)), "got backward_q 256"),
        (Tiles((16,), (16,), (16,)), "got backward_kv=None"),
        (Tiles((4, 4), (4, 4)), "got q=(4, 4) for a layout of 1"),
        (Tiles((16,), (16,), dynamic=False), "start KV tiles where the window starts"),
    ],
)
def test_refused_tiles(tiles, reason):
    assert reason in backend.supports(problem_of((12,), window_size=3), tiles)


@pytest.mark.parametrize(
    ("precision", "word"),
    [
        (None, "ieee"),
        ("highest", "ieee"),
        ("high", "tf32x3"),
        ("default", "tf32"),
        (jax.lax.DotAlgorithmPreset.TF32_TF32_F32, "tf32"),
        (("highest", "highest"), "ieee"),
    ],
)
def test_tf32_only_where_precision_asks(precision, word):
    problem = problem_of((12,), window_size=3, dtype=jnp.float32, precision=precision)
    assert KernelPlan.of(problem, (16,), (16,)).precision == word


def test_a_plan_has_three_axes():
    problem = problem_of((9, 20), dim=24, window_size=(3, -1), dilation=(2, 3))
    plan = KernelPlan.of(problem, (2, 8), (4, 16))
    assert [axis.length for axis in plan.axes] == [1, 9, 20]
    assert [axis.is_flat for axis in plan.axes] == [True, False, False]
    assert plan.groups == 6 and plan.q_tiles == 6 * 3 * 1 and plan.kv_tiles == 6 * 2 * 1
    assert plan.head_columns == 32 and plan.q_rows == 16 and plan.kv_rows == 64
    assert plan.axes[2].extent == 7 and plan.bias_entries == 5 * 13 and plan.slots == 3 * 7
    # A tile that reaches past an axis of one token has padding there.
    assert not KernelPlan.of(problem_of((1,), window_size=1), (16,), (16,)).axes[2].is_flat
    runs = dataclasses.replace(plan, runs=4)
    assert runs.run_tiles * 4 >= plan.q_tiles and runs.run_tokens * 4 >= plan.tokens


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["16 bits", "32 bits"])
@pytest.mark.parametrize("dim", [16, 48, 128, 256])
@pytest.mark.parametrize("window", [3, 24])
def test_default_tiles_are_legal(window, dim, dtype):
    problem = problem_of((24, 40), dim=dim, dtype=dtype, window_size=window)
    tiles = tile_choice.complete(problem, None)
    assert tile_choice.refused(problem, tiles) is None
    sizes = tile_choice.settings(problem, "forward")
    assert (math.prod(tiles.q), math.prod(tiles.kv)) == (sizes.q, sizes.kv)
    mine = Tiles((4, 4), (4, 4))
    completed = tile_choice.complete(problem, mine)
    assert completed.q == (4, 4) and completed.backward_q is not None


def test_a_small_window_reads_little():
    """NAT's first level: what a tile computes beyond its windows, which bounds the bytes through L2 as well."""
    problem = problem_of((56, 56), window_size=7)
    work = backend.workload(problem, None)
    assert work.tiles.q == (8, 8)
    assert work.computed_pairs / 56**2 == pytest.approx(214.86, rel=1e-4)


def test_the_extra_names_both():
    project = tomllib.loads((pathlib.Path(__file__).parents[1] / "pyproject.toml").read_text())
    named = project["project"]["optional-dependencies"]["triton"]
    assert [one.split(">")[0] for one in named] == ["jax-triton", "triton"]


def test_the_type_names_are_tritons():
    assert toolchain.type_name(np.dtype(jnp.bfloat16)) == "bf16"
