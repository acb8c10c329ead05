"""`implementation="cutlass"` without a GPU: XLA's handler on the CPU, which decodes as the CUDA one does, and the program for CUDA.

The library is a stand-in that the host's compiler makes (`cuda_handlers`). The kernels themselves: `cuda_kernels_test.py`.
"""

import ctypes
import dataclasses
import os
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from attention_suite import case_1d, case_of, check_array, oracle
from cuda_handlers import HARNESSES, SOURCES, compiled, stand_in
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import gna_jax
from cuda_ffi import library
from gna_jax import DeviceSpec, Tiles, backends, gna, gna_sharded
from gna_jax.backends import cutlass
from gna_jax.device import KNOWN_DEVICES
from gna_jax.neighborhood import Neighborhood
from gna_jax.problem import Operands, describe

BFLOAT16, FLOAT16 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)
FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)
TOLERANCE = {BFLOAT16: 5e-3, FLOAT16: 6e-4, FLOAT8: 5e-3}
"""Of out: one rounding to 8 or 11 bits; scores and sums are float32. Out of float8 is bfloat16."""
LSE = 1e-5
TILES = {"h200": {1: 128, 2: (8, 16), 3: (2, 8, 8)}, "b200": {1: 256, 2: (16, 16), 3: (4, 8, 8)}}
KEYS = {1: 128, 2: (16, 8), 3: (4, 4, 8)}


@pytest.fixture(scope="module")
def handlers(tmp_path_factory):
    """The stand-in, registered with XLA for CUDA as the library is, and for the CPU; and the cache it lies in."""
    cache = tmp_path_factory.mktemp("cache")
    path = stand_in(cache)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        library.register()
        handle = library.load().handle
        assert library.load().path == path
        capsule = jax.ffi.pycapsule(handle.GnaForwardCpu)
        jax.ffi.register_ffi_target(library.TARGET, capsule, platform="cpu")
        for function in (handle.decode_misaligned, handle.decode_large):
            function.restype = ctypes.c_char_p
        yield handle


def problem_of(case, dtype=BFLOAT16, device="h200"):
    arrays = case.inputs(dtype)
    names = ("query", "key", "value", None, None, "additional_keys", "additional_values")
    names += ("additional_lengths",)
    operands = Operands(*(arrays.get(name) for name in names))
    spec = KNOWN_DEVICES[device] if isinstance(device, str) else device
    options = {"scale": case.scale, "precision": None, "device": spec}
    return describe(operands, case.neighborhood, **options), operands


CASES = (
    (case_1d(300, 40, head_dim=64, value_dim=64), BFLOAT16, "h200"),
    (case_1d(90, 21, 7, 3, head_dim=64, value_dim=64, is_causal=True), FLOAT16, "b200"),
    # Groups of 12 and 13 tokens, all of which are seen.
    (case_1d(37, -1, 2, 3, head_dim=64, value_dim=64, batch=1), BFLOAT16, "h200"),
    (case_1d(40, -1, head_dim=128, value_dim=128, is_causal=True, batch=1), FLOAT16, "h200"),
    (case_of((9, 20), (3, 5), head_dim=64, value_dim=64, kv_heads=2), BFLOAT16, "b200"),
    # No axis is a multiple of its dilation.
    (case_of((11, 13), (3, 4), stride=(2, 4), dilation=(3, 2), head_dim=64, value_dim=64), FLOAT16, "h200"),
    (case_of((12, 12), (4, 4), stride=(4, 4), is_causal=(True, False), head_dim=64, value_dim=64, heads_per_kv=1), BFLOAT16, "b200"),
    (case_of((5, 7, 6), (2, 3, 6), head_dim=64, value_dim=64, batch=1), FLOAT16, "h200"),
    (case_of((5, 6, 7), (2, 3, 3), stride=(1, 2, 3), dilation=(2, 2, 2), is_causal=(True, False, True), head_dim=128, value_dim=128, heads_per_kv=3, batch=1), BFLOAT16, "b200"),
    (case_of((4, 5, 6), (1, 1, 1), head_dim=64, value_dim=64, batch=1), FLOAT16, "h200"),
    # Heads that are padded, values narrower than keys; scales of one's own.
    (case_of((9, 10), (3, 3), dilation=(1, 3), head_dim=24, value_dim=17, scale=0.3), BFLOAT16, "h200"),
    (case_1d(50, 9, head_dim=64, value_dim=80, scale=0.02, batch=1), FLOAT16, "b200"),
    # Out in another dtype than the operands.
    (case_of((9, 20), (3, 5), stride=(1, 2), dilation=(2, 3), head_dim=64, value_dim=64, kv_heads=2), FLOAT8, "b200"),
    (case_1d(40, -1, head_dim=100, value_dim=128, is_causal=True, batch=1, num_additional=5, lengths=(3,)), FLOAT8, "b200"),
    # Additional keys, of which samples see some.
    (case_of((8, 9), (3, 3), head_dim=64, value_dim=64, num_additional=5, lengths=(0, 3)), BFLOAT16, "h200"),
)  # fmt: skip


@pytest.mark.parametrize(("case", "dtype", "device"), CASES, ids=lambda x: str(x))
def test_values(handlers, case, dtype, device):
    """Geometry, dtype, layout and padding survive the way to the handler and back."""
    problem, operands = problem_of(case, dtype, device)
    out, lse = jax.jit(lambda operands: cutlass.forward(problem, operands, None))(operands)
    want = oracle(case, case.inputs(dtype), case.cotangents(dtype))
    assert out.dtype == (BFLOAT16 if dtype == FLOAT8 else dtype) and lse.dtype == np.float32
    check_array(out, want.out, TOLERANCE[dtype])
    check_array(lse, want.lse, LSE)


def test_mapped_axes_join_the_batch(handlers):
    case = case_of((6, 8), (3, 3), head_dim=64, value_dim=64)
    problem, operands = problem_of(case)
    one = dataclasses.replace(problem, batch=1)
    split = Operands(*(array[:, None] for array in operands[:3]))
    tiles = cutlass.complete(problem, None)
    want = cutlass.call_handler(problem, operands, tiles)
    got = jax.vmap(lambda x: cutlass.call_handler(one, x, tiles))(split)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(np.asarray(a[:, 0], np.float32), np.asarray(b, np.float32))
    # A key that is shared by all of them is not copied by the caller.
    shared = jax.vmap(
        lambda q: cutlass.call_handler(one, Operands(q, *(x[:1] for x in operands[1:3])), tiles)
    )(operands.query[:, None])
    check_array(shared[1][0, 0], want[1][0], 0.0)


def test_in_shard_map(handlers):
    """A device's own share: with varying types checked, as `jax.shard_map` does by default."""
    case = case_of((6, 8), (3, 3), head_dim=64, value_dim=64)
    problem, operands = problem_of(case)
    mesh = Mesh(np.array(jax.devices()[:2]), ("batch",), axis_types=(AxisType.Auto,))
    share = dataclasses.replace(problem, batch=1)
    spec = PartitionSpec("batch")

    @jax.jit
    @jax.shard_map(mesh=mesh, in_specs=spec, out_specs=(spec, spec))
    def run(query, key, value):
        return cutlass.forward(share, Operands(query, key, value), None)

    want = cutlass.forward(problem, operands, None)
    for a, b in zip(run(*operands[:3]), want, strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


def test_on_a_mesh_every_device_has_its_share(handlers):
    """Batch and heads are split, query heads with their key/value head, and nothing is gathered."""
    case = case_of((6, 8), (3, 3), kv_heads=2, head_dim=64, value_dim=64)
    problem, operands = problem_of(case)
    devices = np.array(jax.devices()[:4]).reshape(2, 2)
    mesh = Mesh(devices, ("batch", "heads"), axis_types=(AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, PartitionSpec("batch", None, None, "heads"))
    arrays = jax.device_put(operands[:3], sharding)
    run = jax.jit(lambda *arrays: cutlass.forward(problem, Operands(*arrays), None))
    program = run.lower(*arrays).compile()
    assert "all-gather" not in program.as_text() and "bf16[1,6,8,2,64]" in program.as_text()
    want = cutlass.forward(problem, operands, None)
    for a, b in zip(program(*arrays), want, strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


def test_exports_where_the_call_is_allowed(handlers):
    """jax exports no call of a library that it does not know, unless told to."""
    x = jax.ShapeDtypeStruct((1, 16, 2, 64), jnp.bfloat16)
    options = {"window_size": 5, "implementation": "cutlass", "device": "h200"}
    run = jax.jit(lambda x: gna(x, x, x, **options))
    allowed = jax.export.DisabledSafetyCheck.custom_call(library.TARGET)
    exported = jax.export.export(run, platforms=("cuda",), disabled_checks=[allowed])(x)
    assert exported.platforms == ("cuda",) and "gna_jax_forward" in exported.mlir_module()
    with pytest.raises(ValueError, match="gna_jax_forward"):
        jax.export.export(run, platforms=("cuda",))(x)


def tokens(layout=(8, 8), *, batch=2, heads=2, dim=64, dtype=BFLOAT16):
    return np.zeros((batch, *layout, heads, dim), dtype)


RULE = {
    "layout": (8, 8),
    "window_size": (3, 3),
    "stride": (1, 1),
    "dilation": (1, 1),
    "is_causal": (0, 0),
    "q_tile": (8, 16),
    "kv_tile": (16, 8),
    "compute_capability": (9, 0),
}


def call(query=None, key=None, value=None, *, out=None, lse=None, scale=None, **rule):
    """The bare target: correct but for what is given."""
    query = tokens() if query is None else query
    key = query if key is None else key
    value = key if value is None else value
    out = jax.ShapeDtypeStruct(query.shape, query.dtype) if out is None else out
    lse = jax.ShapeDtypeStruct(query.shape[:-1], jnp.float32) if lse is None else lse
    attributes = {name: np.array(sizes, np.int64) for name, sizes in (RULE | rule).items()}
    scale = np.float32(1.0) if scale is None else scale
    results = jax.ffi.ffi_call(library.TARGET, (out, lse))(
        query, key, value, scale=scale, **attributes
    )
    return jax.block_until_ready(results)


def refusal(*arrays, **options):
    """The kind of XLA's error and its text."""
    with pytest.raises(jax.errors.JaxRuntimeError) as raised:
        call(*arrays, **options)
    kind, text = str(raised.value).split(": gna_jax_forward: ")
    return kind, text


def test_a_correct_call_passes(handlers):
    assert call()[1].shape == (2, 8, 8, 2)


NEVER_LEGAL = [
    ({"window_size": (9, 9)}, "must not exceed the layout"),
    ({"window_size": (3, 9)}, "must not exceed the layout"),
    ({"window_size": (0, 3)}, "must be at least 1, or -1"),
    ({"window_size": (3, -2)}, "must be at least 1, or -1"),
    ({"stride": (4, 4)}, "stride must not exceed window_size"),
    ({"stride": (1, 0)}, "stride must be at least 1"),
    ({"dilation": (0, 1)}, "dilation must be at least 1"),
    ({"dilation": (3, 3)}, r"window_size \* dilation must not exceed"),
    ({"window_size": (-1, 3), "stride": (9, 1)}, "must hold at least `stride` tokens"),
    ({"window_size": (-1, -1), "dilation": (9, 1)}, "must hold at least `stride` tokens"),
]


@pytest.mark.parametrize(("rule", "message"), NEVER_LEGAL, ids=lambda x: str(x))
def test_geometry_is_refused_in_python_s_words(handlers, rule, message):
    names = ("window_size", "stride", "dilation")
    sizes = {name: (RULE | rule)[name] for name in names}
    with pytest.raises(ValueError, match=message) as raised:
        Neighborhood.of(2, **sizes).check_layout((8, 8))
    assert refusal(**rule) == ("INVALID_ARGUMENT", str(raised.value))


SHAPES = [
    ((tokens(), tokens(batch=3)), "must agree in batch"),
    ((tokens(), tokens()[0]), "must have the same number of axes"),
    ((tokens(), tokens((8, 9)), tokens()), "key and value must agree in layout"),
    ((tokens(dim=64), tokens(dim=128)), "must agree in head_dim"),
    ((tokens(), tokens(heads=2), tokens(heads=1)), "key and value must agree in heads"),
    ((tokens(heads=3), tokens(heads=2)), "key/value heads must divide query heads"),
    ((tokens(), tokens(heads=0)), "no axis of query, key or value may be empty"),
]


@pytest.mark.parametrize(("arrays", "message"), SHAPES, ids=[m for _, m in SHAPES])
def test_shapes_are_refused_in_python_s_words(handlers, arrays, message):
    query, key, value = (*arrays, *arrays[-1:] * (3 - len(arrays)))
    rule = Neighborhood.of(2, window_size=3)
    with pytest.raises(ValueError, match=message) as raised:
        describe(
            Operands(query, key, value),
            rule,
            scale=None,
            precision=None,
            device=KNOWN_DEVICES["h200"],
        )
    assert refusal(query, key, value) == ("INVALID_ARGUMENT", str(raised.value))


def shaped(*shape, dtype=BFLOAT16):
    return jax.ShapeDtypeStruct(shape, dtype)


ILLEGAL = [
    ((), {"layout": ()}, "layout must have 1 to 3 spatial axes; got layout (); fold further axes"),
    ((), {"layout": (2, 2, 2, 2)}, "layout must have 1 to 3 spatial axes; got layout (2, 2, 2, 2)"),
    ((), {"layout": (0, 8)}, "no axis of layout may be empty; got layout (0, 8)"),
    *(((), {name: (1,)}, f"{name} must be one per spatial axis; got {name}=(1,) for 2 spatial axes") for name in list(RULE)[1:-1]),
    ((), {"is_causal": (0, 2)}, "is_causal must be 0 or 1 on every axis; got is_causal=(0, 2)"),
    ((), {"scale": np.float32("inf")}, "scale must be finite; got scale=inf"),
    ((tokens()[0],), {}, "query must be [batch, *space, heads, head_dim] with 2 spatial axes; got query of shape (8, 8, 2, 64)"),
    ((tokens((8, 9)), tokens((8, 8))), {}, "query and key must agree in layout (their spatial axes); got query (2, 8, 9, 2, 64), key (2, 8, 8, 2, 64)"),
    ((), {"dilation": (1, 2), "layout": (8, 7), "window_size": (3, 3)}, None),
    ((), {"layout": (8, 9)}, "every axis rounded up to a multiple of its dilation; got query (2, 8, 8, 2, 64)"),
    ((), {"layout": (8, 8), "dilation": (1, 3), "window_size": (3, 2)}, "layout (8, 8), dilation=(1, 3); pad them with zeros"),
    ((tokens(), tokens(dtype=FLOAT16)), {}, "key must have query's dtype; got query of bfloat16, key of float16"),
    ((tokens(), tokens(), tokens(dtype=np.float32)), {}, "value must have query's dtype; got query of bfloat16, value of float32"),
    ((), {"out": shaped(2, 8, 8, 2, 64, dtype=FLOAT16)}, "out must have query's dtype, or bfloat16 for float8_e4m3fn; got query of bfloat16, out of float16"),
    ((tokens(dtype=FLOAT8),), {"compute_capability": (10, 0), "q_tile": (16, 16)}, "got query of float8_e4m3fn, out of float8_e4m3fn"),
    ((), {"lse": shaped(2, 8, 8, 2)}, "lse must be float32; got lse of bfloat16"),
    ((), {"out": shaped(2, 8, 8, 2, 128)}, "out must have query's shape, and lse the same without head_dim; got query (2, 8, 8, 2, 64), out (2, 8, 8, 2, 128), lse (2, 8, 8, 2)"),
    ((), {"lse": shaped(2, 8, 8, 2, 1, dtype=np.float32)}, "out (2, 8, 8, 2, 64), lse (2, 8, 8, 2, 1)"),
    ((), {"lse": shaped(2, 2, 8, 8, dtype=np.float32)}, "lse (2, 2, 8, 8)"),
]  # fmt: skip


@pytest.mark.parametrize(("arrays", "options", "message"), ILLEGAL, ids=[str(m) for *_, m in ILLEGAL])  # fmt: skip
def test_what_is_never_legal(handlers, arrays, options, message):
    if message is None:  # a layout of 7 tokens in an array of 8
        call(*arrays, **options)
        return
    kind, text = refusal(*arrays, **options)
    assert kind == "INVALID_ARGUMENT" and message in text


NOT_IMPLEMENTED = [
    ((tokens(dtype=np.float32),), {}, "the CUTLASS kernels take bfloat16 and float16, on Blackwell float8_e4m3fn too; got float32 on Hopper: cast the operands"),
    ((tokens(dtype=np.int32),), {}, "got XLA's element type"),
    ((tokens(dtype=FLOAT8),), {}, "got float8_e4m3fn on Hopper: cast the operands"),
    ((tokens(dim=32),), {}, "take head dims 64 and 128, the same for query and value; got head_dim=32, value_dim=32: pad the heads"),
    ((tokens(), tokens(), tokens(dim=128)), {}, "got head_dim=64, value_dim=128"),
    ((), {"scale": np.float32(0.0)}, "take a positive scale; got scale=0.000000: scale the query instead"),
    ((), {"scale": np.float32(-0.5)}, "take a positive scale; got scale=-0.500000"),
    ((), {"compute_capability": (8, 0)}, "run on compute capability 9.0 (Hopper) and 10.0 (Blackwell); got (8, 0): name such a device"),
    ((), {"compute_capability": (9,)}, "got (9,)"),
    ((), {"layout": (2**31, 8)}, "take up to 1073741824 tokens per axis; got layout (2147483648, 8): use slabs"),
    ((), {"q_tile": (8, 12)}, "tile sizes are powers of two up to 256 per axis; got q=(8, 12), kv=(16, 8)"),
    ((), {"kv_tile": (512, 1)}, "tile sizes are powers of two up to 256 per axis; got q=(8, 16), kv=(512, 1)"),
    ((), {"q_tile": (16, 16)}, "on Hopper tiles.q has 128 tokens, not 256; got q=(16, 16), kv=(16, 8)"),
    ((), {"compute_capability": (10, 0)}, "on Blackwell tiles.q has 256 tokens, not 128; got q=(8, 16)"),
    ((), {"kv_tile": (8, 8)}, "on Hopper tiles.kv has 128 tokens, not 64; got q=(8, 16), kv=(8, 8)"),
]  # fmt: skip


@pytest.mark.parametrize(("arrays", "options", "message"), NOT_IMPLEMENTED, ids=[m for *_, m in NOT_IMPLEMENTED])  # fmt: skip
def test_what_these_kernels_cannot(handlers, arrays, options, message):
    kind, text = refusal(*arrays, **options)
    assert kind == "UNIMPLEMENTED" and message in text


def test_counts_past_32_bits_are_refused(handlers):
    decode = handlers.decode_large
    assert decode(1, 8, 1) == b""
    for sizes in ((2**20, 2**12, 1), (2**31, 1, 1), (1, 8, 2**26)):
        text = decode(*map(ctypes.c_int64, sizes))
        assert b"in 32 bits; got query" in text and text.endswith(b": split the batch")
    # A tile of one real token each.
    text = decode(2**24, 1, 1)
    assert (
        b"less than 2^31 queries of all samples and heads, tiles filled up; got 2147483648," in text
    )
    assert decode(2**24 - 1, 1, 1) == b""


def test_arrays_start_at_multiples_of_16_bytes(handlers):
    assert handlers.decode_misaligned(0) == b""
    assert handlers.decode_misaligned(32) == b""
    assert b"arrays must start at a multiple of 16 bytes; got" in handlers.decode_misaligned(8)


def test_attributes_of_another_type_are_refused_by_xla(handlers):
    with pytest.raises(jax.errors.JaxRuntimeError, match="expected F32 but got S32"):
        call(scale=np.int32(7))  # 1 would be the same key of a cache as 1.0
    with pytest.raises(jax.errors.JaxRuntimeError, match="expected 9 attributes but got 10"):
        call(more=(1,))


def lowered(function, *arrays) -> str:
    """The program for CUDA, on a machine without one."""
    return jax.jit(function).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(("device", "queries", "capability"), [("h200", 128, "9, 0"), ("b200", 256, "10, 0")])  # fmt: skip
def test_lowers_for_cuda_to_one_call_with_its_attributes(handlers, device, queries, capability):
    x = jax.ShapeDtypeStruct((2, 16, 24, 4, 64), jnp.bfloat16)
    rule = {"window_size": (5, -1), "stride": (2, 1), "is_causal": (True, False), "scale": 0.25}
    options = {"implementation": "cutlass", "device": device}
    run = lambda q, k, v: gna(q, k, v, **rule, **options)
    text = lowered(run, x, x, x)
    (line,) = [line for line in text.splitlines() if "custom_call @gna_jax_forward" in line]
    assert "stablehlo.pad" not in text and "stablehlo.while" not in text
    for attribute in (
        "layout = dense<[16, 24]>",
        "window_size = dense<[5, -1]>",
        "stride = dense<[2, 1]>",
        "dilation = dense<1>",
        "is_causal = dense<[1, 0]>",
        f"compute_capability = dense<[{capability}]>",
        "scale = 2.500000e-01 : f32",
    ):
        assert attribute in line
    sizes = re.findall(r"(q_tile|kv_tile) = dense<\[?([\d, ]+)\]?>", line)
    assert len(sizes) == 2
    # A size that both axes have is written once.
    tiles = {name: [int(n) for n in text.split(", ")] for name, text in sizes}
    products = {name: np.prod(n * 2 if len(n) == 1 else n) for name, n in tiles.items()}
    assert products == {"q_tile": queries, "kv_tile": 128}
    # The same trace for a CPU is the xla backend.
    text = jax.jit(run).trace(x, x, x).lower().as_text()
    assert "gna_jax_forward" not in text and "stablehlo.while" in text


def test_sharded_calls_keep_it_local(handlers):
    """Batch and heads over a mesh: it gets shards, and nothing is moved. Sharded space is left to who takes slabs."""
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    x = jax.ShapeDtypeStruct((2, 32, 16, 4, 64), jnp.bfloat16)

    def run(*spec, implementation="cutlass"):
        options = {"window_size": (8, 8), "implementation": implementation, "device": "b200"}
        spec = PartitionSpec(*spec)
        call = lambda q, k, v: gna_sharded(q, k, v, spec=spec, mesh=mesh, overlap=False, **options)
        text = lowered(call, x, x, x)
        assert "all_gather" not in text
        return text

    text = run("x", None, None, "y")
    (line,) = [line for line in text.splitlines() if "custom_call @gna_jax_forward" in line]
    assert line.count("tensor<1x32x16x2x64xbf16>") == 4 and "collective_permute" not in text
    with pytest.raises(NotImplementedError, match="CUTLASS kernels take whole volumes only.*slab"):
        run(None, "x", "y")
    text = run(None, "x", "y", implementation=("cutlass", "mosaic"))
    assert "mosaic_gpu" in text and "gna_jax_forward" not in text and "collective_permute" in text


def test_gradients_are_the_pallas_kernels(handlers):
    x = jax.ShapeDtypeStruct((1, 16, 16, 2, 64), jnp.bfloat16)
    options = {"window_size": 5, "implementation": "cutlass", "device": "h200"}
    loss = lambda q, k, v: gna(q, k, v, **options).astype(jnp.float32).sum()
    text = lowered(jax.grad(loss, argnums=(0, 1, 2)), x, x, x)
    assert len(re.findall("custom_call @gna_jax_forward", text)) == 1
    assert len(re.findall("custom_call @mosaic_gpu", text)) == 2


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_float8_is_what_its_values_in_float32_are(implementation):
    """On the implementations of every platform, which the kernel's results can be compared with."""
    case = case_of((7, 9), (3, 5), dilation=(2, 1), is_causal=(False, True), num_additional=3)
    _, operands = problem_of(case, FLOAT8)
    options = {"window_size": (3, 5), "dilation": (2, 1), "is_causal": (False, True)}
    options |= {"return_lse": True, "implementation": implementation}

    def run(dtype):
        query, key, value = (jnp.asarray(x).astype(dtype) for x in operands[:3])
        more = {
            name: jnp.asarray(getattr(operands, name)).astype(dtype)
            for name in ("additional_keys", "additional_values")
        }
        return gna(query, key, value, **more, **options)

    (out, lse), (want, want_lse) = run(FLOAT8), run(jnp.float32)
    assert out.dtype == jnp.bfloat16
    check_array(out, want, TOLERANCE[BFLOAT16])
    check_array(lse, want_lse, LSE)


@pytest.mark.parametrize("implementation", ["cutlass", "xla"])
def test_float8_has_no_gradients(handlers, implementation):
    x = jnp.zeros((1, 16, 2, 64), FLOAT8)
    options = {"window_size": 3, "implementation": implementation, "device": "b200"}
    loss = lambda x: gna(x, x, x, **options).astype(jnp.float32).sum()
    with pytest.raises(NotImplementedError, match="more than 8 bits; got float8_e4m3fn: differe"):
        jax.jit(jax.grad(loss)).trace(x).lower(lowering_platforms=("cuda",))
    # As a step of a program in bfloat16 it has none either.
    with pytest.raises(NotImplementedError, match=r"in bfloat16, e\.g\. with query\.astype"):
        jax.grad(lambda x: loss(x.astype(FLOAT8)))(jnp.zeros(x.shape, jnp.bfloat16))


def test_paddings_are_named_steps(handlers):
    x = jax.ShapeDtypeStruct((1, 9, 20, 1, 48), jnp.bfloat16)
    options = {"window_size": 3, "implementation": "cutlass", "device": "h200"}
    run = lambda x: gna(x, x, x, dilation=(2, 1), **options)
    text = jax.jit(run).trace(x).lower(lowering_platforms=("cuda",)).as_text(debug_info=True)
    assert "pad_head_dim" in text and "pad_to_dilation" in text
    told = gna_jax.explain(x, x, x, dilation=(2, 1), **options)
    assert told.copies == (
        "axis 0 padded from 9 to 10 for dilation 2",
        "heads padded from 48 to 64 columns",
    )


def test_explains_tiles_and_costs(handlers):
    x = jax.ShapeDtypeStruct((1, 32, 32, 8, 128), jnp.bfloat16)
    for device, queries in (("h200", 128), ("b200", 256)):
        options = {"window_size": 9, "implementation": "cutlass", "device": device}
        told = gna_jax.explain(x, x, x, **options)
        assert told.implementation == "cutlass" and told.predicted and told.copies == ()
        assert (np.prod(told.tiles.q), np.prod(told.tiles.kv)) == (queries, 128)
        tiles = Tiles(q=TILES[device][2], kv=KEYS[2])
        assert gna_jax.explain(x, x, x, tiles=tiles, **options).tiles.q == TILES[device][2]


def test_the_default_takes_it_only_where_it_is_verified(handlers, monkeypatch):
    x = jax.ShapeDtypeStruct((1, 16, 16, 2, 64), jnp.bfloat16)
    told = gna_jax.explain(x, x, x, window_size=3, device="h200")
    assert told.implementation == "xla"
    assert "cutlass has not been verified on NVIDIA H200" in dict(told.reasons)["cutlass"]
    monkeypatch.setattr(backends.verified, "_committed", lambda: {"cutlass": ["NVIDIA H200"]})
    assert gna_jax.explain(x, x, x, window_size=3, device="h200").implementation == "cutlass"
    assert gna_jax.explain(x, x, x, window_size=3, device="b200").implementation == "xla"


REFUSED = [
    ({"device": "a100"}, "run on compute capability 9.0 .Hopper. and 10.0 .Blackwell.; got NVIDIA A100"),
    ({"device": DeviceSpec("NVIDIA B300", "cuda", (10, 3), 160, 227 << 10, 512)}, "got NVIDIA B300: name such"),
    ({"dtype": FLOAT8}, "kernel of NVIDIA H200 takes bfloat16 and float16, that of Blackwell float8_e4m3fn too: cast the operands"),
    ({"dtype": jnp.float32}, "takes its gradients from the Pallas kernels; .*got float32"),
    ({"scale": 0.0}, "take a positive scale; got scale=0.0: scale the query instead, or use 'mosaic'"),
    ({"dim": 160}, "take head dims up to 128; got head_dim=160, value_dim=160: use 'mosaic'"),
    ({"tiles": Tiles(q=(8, 8), kv=(8, 16))}, r"on NVIDIA H200 the CUTLASS kernels take 128 queries and 128 keys per tile; got q=\(8, 8\)"),
    ({"tiles": Tiles(q=(8, 16), kv=(8, 8))}, r"128 keys per tile; got q=\(8, 16\), kv=\(8, 8\)"),
    ({"tiles": Tiles(q=(8, 16), kv=None)}, "the Pallas kernels need tiles.q with tiles.kv"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[m for _, m in REFUSED])
def test_says_what_it_does_not_run(handlers, options, message):
    options = {"device": "h200", "dtype": jnp.bfloat16, "dim": 64} | options
    x = jax.ShapeDtypeStruct((1, 16, 16, 2, options.pop("dim")), options.pop("dtype"))
    with pytest.raises(NotImplementedError, match=message):
        gna_jax.explain(x, x, x, window_size=3, implementation="cutlass", **options)


def test_an_interpreter_cannot_run_machine_code(handlers):
    x = jax.ShapeDtypeStruct((1, 16, 2, 64), jnp.bfloat16)
    with gna_jax.interpret_gpu("h200"), pytest.raises(NotImplementedError, match="use 'mosaic'"):
        gna_jax.explain(x, x, x, window_size=3, implementation="cutlass")


def test_a_missing_library_is_the_last_reason(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    x = jax.ShapeDtypeStruct((1, 16, 16, 2, 64), jnp.bfloat16)
    options = {"window_size": 3, "implementation": "cutlass", "device": "h200"}
    with pytest.raises(NotImplementedError, match="library is not built; build it with `gna-jax b"):
        gna_jax.explain(x, x, x, **options)
    with pytest.raises(NotImplementedError, match="got NVIDIA A100"):
        gna_jax.explain(x, x, x, **options | {"device": "a100"})


RUNTIME = """
#pragma once
#define cudaSuccess 0
using cudaError_t = int;
using cudaStream_t = struct Stream*;
enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor, cudaDevAttrComputeCapabilityMinor, cudaDevAttrMultiProcessorCount
};
cudaError_t cudaGetDevice(int*);
cudaError_t cudaDeviceGetAttribute(int*, cudaDeviceAttr, int);
const char* cudaGetErrorString(cudaError_t);
"""


@pytest.fixture(scope="module")
def dispatch(tmp_path_factory):
    """The handler for CUDA on a device that is made up."""
    folder = tmp_path_factory.mktemp("dispatch")
    (folder / "cuda_runtime_api.h").write_text(RUNTIME)
    path = compiled(folder, HARNESSES / "dispatch.cc", flags=(f"-I{folder}",))
    function = ctypes.CDLL(str(path)).dispatch
    function.restype = ctypes.c_char_p
    return lambda made_for, major, minor=0, fails=False, reason=None, dtype=0: function(
        made_for, dtype, major, minor, fails, reason
    ).decode()


@pytest.mark.parametrize("dtype", [0, 1, 2], ids=["bfloat16", "float16", "float8"])
@pytest.mark.parametrize(("major", "kernel", "queries"), [(9, "sm90", 128), (10, "sm100", 256)])
def test_the_device_chooses_the_kernel(dispatch, major, kernel, queries, dtype):
    """Groups of 17 and 16 tokens; the axis that vmap added counts as batch."""
    if (major, dtype) == (9, 2):
        assert "got float8_e4m3fn on Hopper" in dispatch(major, major, dtype=dtype)
        return
    assert dispatch(major, major, dtype=dtype) == (
        f"{kernel} rank 1 length 33 window 17 stride 3 dilation 2 causal 1 tiles {queries} 128 batch 10 heads 6 3"
        f" dim 64 scale 0.500000 dtype {dtype} arrays 16 32 48 64 80 sms 132 stream 77"
    )


def test_a_program_for_another_generation_is_refused(dispatch):
    text = "a program runs on the generation that its tiles were chosen for; got tiles for (9, 0) on a device of (10, 0)"
    assert text in dispatch(9, 10)
    assert "got tiles for (10, 0) on a device of (10, 3): trace it with" in dispatch(10, 10, 3)


def test_what_cuda_and_kernels_say_is_passed_on(dispatch):
    assert dispatch(9, 9, fails=True) == "gna_jax_forward: CUDA: no device"
    assert dispatch(9, 9, reason=b"too large") == "gna_jax_forward: Hopper kernel: too large"
    assert dispatch(10, 10, reason=b"no") == "gna_jax_forward: Blackwell kernel: no"


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from gna_jax import gna
from gna_jax.device import KNOWN_DEVICES
from gna_jax.inspection.targets import target_config

config = target_config(KNOWN_DEVICES["h200"])
topology = topologies.get_topology_desc(platform="cuda", target_config=config, topology="1x1x4")
devices = np.array(topology.devices).reshape(2, 2)
mesh = Mesh(devices, ("batch", "heads"), axis_types=(AxisType.Auto,) * 2)
sharding = NamedSharding(mesh, PartitionSpec("batch", None, None, "heads"))
x = jax.ShapeDtypeStruct((4, 9, 20, 4, 64), jnp.bfloat16, sharding=sharding)
rule = {"window_size": (3, 5), "dilation": (2, 3), "implementation": "cutlass", "device": "h200"}
run = jax.jit(lambda q, k, v: gna(q, k, v, return_lse=True, **rule))
print(run.trace(x, x, x).lower().compile().as_text())
"""


@pytest.mark.kernel
def test_compiles_for_four_gpus_that_are_not_there(handlers):
    """By jax's compiler for CUDA, in a process of its own: a call per device, of its samples and heads."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    root = str(SOURCES.parent)
    environment["PYTHONPATH"] = os.pathsep.join([root, environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", SHARDED]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    (call,) = re.findall(r"= \((.*)\) custom-call.*gna_jax_forward", done.stdout)
    assert re.findall(r"\w+\[[\d,]+\]", call) == ["bf16[2,10,21,2,64]", "f32[2,10,21,2]"]
    assert "all-gather" not in done.stdout


LAUNCH = """
#include "kernels/launch.h"
namespace gna {
const char* launch_sm90_forward(const ForwardArguments&) { return nullptr; }
const char* launch_sm100_forward(const ForwardArguments&) { return nullptr; }
}  // namespace gna
"""


@pytest.mark.kernel
def test_the_handler_for_cuda_links_without_a_driver_and_registers(tmp_path):
    """With stand-ins for the kernels: a library that a machine without a GPU loads, and a jax without CUDA takes."""
    nvcc = shutil.which("nvcc")
    assert nvcc, "this test needs nvcc on PATH"
    source = tmp_path / "launch.cu"
    source.write_text(LAUNCH)
    path = tmp_path / "library.so"
    handlers = [str(SOURCES / "handlers" / name) for name in ("abi.cc", "forward_cuda.cc")]
    options = ["-shared", "-std=c++17", "-cudart", "static", "-Xcompiler", "-fPIC,-fvisibility=hidden"]  # fmt: skip
    options += ["-Xlinker", "--no-undefined", f"-I{SOURCES}", f"-I{SOURCES / 'include'}"]
    options += ["-isystem", jax.ffi.include_dir(), f'-DGNA_SOURCES="{library.fingerprint()}"']
    command = [nvcc, *options, *handlers, str(source), "-o", str(path)]
    completed = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert completed.returncode == 0, completed.stderr
    needed = subprocess.run(["readelf", "-d", str(path)], capture_output=True, text=True).stdout
    assert "libcuda" not in needed
    handle = ctypes.CDLL(str(path))
    jax.ffi.register_ffi_target("gna_jax_forward_test", jax.ffi.pycapsule(handle.GnaForwardCuda), platform="CUDA")  # fmt: skip
