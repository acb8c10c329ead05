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
from gna_jax.tiling import Tiles, key_walk

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


@pytest.mark.parametrize("version", ["3.6.0", "3.10.1", "4.0.0+git1"])
def test_an_old_triton_is_one_sentence(without_triton, monkeypatch, version):
    """Of 3.6 jax-triton imports all that it names, and fails when it compiles."""
    triton, fits = type(sys)("triton"), type(sys)("jax_triton")
    triton.__version__ = version
    fits.triton_call = lambda *arrays, kernel, out_type, backend_options, **options: None
    monkeypatch.setitem(sys.modules, "triton", triton)
    monkeypatch.setitem(sys.modules, "jax_triton", fits)
    monkeypatch.setattr(toolchain, "_keep_calls_whole", lambda library: None)
    if version != "3.6.0":
        assert toolchain.triton_call() is fits.triton_call
        return
    with pytest.raises(RuntimeError, match="need triton 3.9 or newer; found 3.6.0: install"):
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


def slab_of(problem, query_layout, key_layout):
    return dataclasses.replace(
        problem, query_layout=query_layout, key_layout=key_layout, is_slab=True
    )


def test_slabs_count_their_own_tokens(without_triton):
    """Of a volume that is too large as a whole, slabs may be small enough: what is missing then is Triton alone."""
    volume = problem_of((1 << 26,), window_size=3)
    assert "32 bits" in backend.supports(volume, None)
    assert "not installed" in backend.supports(slab_of(volume, (64,), (66,)), None)
    assert "32 bits" in backend.supports(slab_of(volume, (64,), (1 << 26,)), None)


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
    assert runs.run_tiles * 4 >= plan.q_tiles and runs.run_tokens * 4 >= plan.query_tokens


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


def test_a_small_window_loads_little():
    """A walk loads its box and no more: 14 x 14 keys amid the layout, of 8 x 8 queries; with edges 2.7 keys per query."""
    rule, tiles = Neighborhood.of(2, window_size=7), Tiles((8, 8), (2, 16))
    boxes = []
    for axis, q, kv in zip(rule.axes, tiles.q, tiles.kv, strict=True):
        walk = key_walk(axis, 56, np.arange(0, 56, q), q_tile=q, kv_tile=kv, dynamic=True)
        boxes.append((walk.outer[1] - walk.outer[0]).sum())
    keys = math.prod(boxes) / 56**2
    head_bytes = 32 * 2
    moved = (2 * keys * head_bytes + 2 * head_bytes + 4) * 56**2 * 2 * 128
    assert keys == pytest.approx(2.699, abs=1e-3) and moved == pytest.approx(383.3e6, rel=1e-3)


def test_tiles_fill_the_slab():
    """Thin slabs get thin tiles; the volume as its own slab is counted like the volume."""
    volume = problem_of((30, 48, 80), window_size=(18, 24, 24))
    tiles = Tiles((2, 4, 8), (2, 2, 8))
    same = slab_of(volume, volume.query_layout, volume.key_layout)
    assert tile_choice.forward_pairs(same, tiles) == tile_choice.forward_pairs(volume, tiles)
    thin = slab_of(volume, (30, 6, 80), (30, 30, 80))
    chosen, work = tile_choice.complete(thin, None), backend.workload(thin, None)
    assert tile_choice.refused(thin, chosen) is None and 6 % chosen.q[1] == 0
    assert 1 <= 8 * work.computed_pairs / backend.workload(same, None).computed_pairs < 1.15


def test_dq_has_tiles_of_its_own():
    """Where the caller names none: the settings of dQ are for other sizes than the forward's."""
    problem = problem_of((16, 32, 32), dim=256, window_size=(8, 16, 16))
    for job in ("forward", "query_gradient"):
        sizes, tiles = tile_choice.settings(problem, job), tile_choice.complete(problem, None, job)
        assert (math.prod(tiles.q), math.prod(tiles.kv)) == (sizes.q, sizes.kv)
    mine = Tiles((2, 4, 4), (2, 2, 4))
    assert tile_choice.complete(problem, mine, "query_gradient").q == mine.q


def test_the_extra_names_both():
    project = tomllib.loads((pathlib.Path(__file__).parents[1] / "pyproject.toml").read_text())
    named = project["project"]["optional-dependencies"]["triton"]
    assert [one.split(">")[0] for one in named] == ["jax-triton", "triton"]


def test_the_type_names_are_tritons():
    assert toolchain.type_name(np.dtype(jnp.bfloat16)) == "bf16"
