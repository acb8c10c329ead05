"""Inspection without a compiler: calls and targets, reading a compiler's files, and a compiling process that fails in every way."""

import dataclasses
import json
import math
import stat
from importlib.metadata import version

import jax
import kernel_resources
import pytest
from compiler_files import FILES, MEMORY, PROGRAM, PTX, PTXAS

import gna_jax
from gna_jax.device import KNOWN_DEVICES
from gna_jax.inspection import Call, compile_kernel, toolchain
from gna_jax.inspection import compile as compiling
from gna_jax.inspection.call import predicted_seconds
from gna_jax.inspection.report import CompilerFiles, memory_passes, read_resources
from gna_jax.inspection.targets import architecture, target_config
from gna_jax.simulator.devices import RATES

CALL = Call((64, 64), 9, heads=4, kv_heads=2, device="h200")


def read(**changed):
    files = CompilerFiles(**FILES | changed)
    (kernel,) = CALL.kernels("forward")
    return read_resources(kernel, (), files)


def test_every_number_of_the_compilers_files_is_read():
    got = read()
    assert (got.kernel, got.direction, got.architecture) == ("hopper_forward", "forward", "sm_90a")
    assert (got.layout, got.window_size, got.heads, got.kv_heads) == ((64, 64), (9, 9), 4, 2)
    assert (got.threads, got.registers, got.most_registers) == (384, 168, 168)
    assert (got.worker_registers, got.producer_registers) == (224, 56)
    assert (got.spill_bytes, got.stack_bytes, got.serialized_wgmma) == (60 + 92, 40, 1)
    assert (got.smem_bytes, got.smem_limit) == (166912, 227 * 1024)
    assert (got.tmem_columns, got.tmem_limit) == (512, 0)
    assert (got.mma, got.mma_instruction) == (2, "wgmma")
    assert (got.tma_loads, got.tma_load_rank, got.tma_stores) == (2, 5, 1)
    json.dumps(dataclasses.asdict(got))


def test_blackwells_files_are_read():
    ptx = """.maxntid 128, 1, 1
      tcgen05.mma.cta_group::1.kind::f16 [%r1], %rd1, %rd2, %r2, 1;
      tcgen05.commit.cta_group::1.mbarrier::arrive::one.b64 [%rd1];
      tcgen05.mma.cta_group::1.kind::f16 [%r1], [%r2], %rd2, %r2, 1;"""
    got = read(ptx=ptx)
    assert (got.mma, got.mma_instruction) == (2, "tcgen05.mma")
    assert got.worker_registers == got.producer_registers == got.registers  # nothing moves them
    assert got.most_registers == 255  # not 65536 / 128: no instruction names more
    assert (got.tma_loads, got.tma_load_rank) == (0, 0)


def test_passes_over_tokens_are_those_that_touch_the_operands_dtype():
    # Padding of an operand, and a sum over out; not the float32 statistics, and not what XLA fused away.
    assert list(memory_passes(PROGRAM, "bfloat16")) == [
        "fusion bf16[1,9,18,2,64] pad_to_dilation/pad",
        "fusion f32[]",
    ]
    assert list(memory_passes(PROGRAM, "float16")) == ["copy f16[4]"]


@pytest.mark.parametrize("name", ["ptxas", "memory", "program"])
def test_a_file_that_says_something_else_is_an_error(name):
    with pytest.raises(RuntimeError, match="begins 'something else'"):
        read(**{name: "something else"})


def write_files(folder):
    for name, text in (
        ("body_0.ptx", PTX),
        ("body_0.ptxas", PTXAS),
        ("body_0.resources.txt", MEMORY),
        ("program.hlo", PROGRAM),
    ):
        (folder / name).write_text(text)


def test_files_of_one_kernel_are_found(tmp_path):
    write_files(tmp_path)
    (tmp_path / "body_0.mlir-passes.log").write_text("long")
    assert CompilerFiles.of(tmp_path) == CompilerFiles(**FILES)
    (tmp_path / "other_1.ptx").write_text(PTX)
    with pytest.raises(RuntimeError, match=r"one \*.ptx, it wrote \['body_0.ptx', 'other_1.ptx'\]"):
        CompilerFiles.of(tmp_path)
    (tmp_path / "body_0.ptx").unlink()
    (tmp_path / "body_0.ptxas").unlink()
    with pytest.raises(RuntimeError, match=r"one \*.ptxas, it wrote none"):
        CompilerFiles.of(tmp_path)


def test_targets_say_what_the_device_tables_say():
    for name in ("h100", "h200", "b200"):
        device, rates = KNOWN_DEVICES[name], RATES[name]
        text = target_config(device)
        major, minor = device.compute_capability
        for part in (
            f'name: "{device.kind}"',
            f"{{ major: {major} minor: {minor} feature_extension: ACCELERATED_FEATURES }}",
            f"core_count: {device.num_sms}\n",
            f"shared_memory_per_block_optin: {device.smem_bytes}\n",
            f"memory_bandwidth: {int(rates.hbm_bandwidth)}\n",
            f"l2_cache_size: {rates.l2_bytes}\n",
        ):
            assert part in text
        assert text.count("{") == text.count("}")
        assert architecture(device) == f"sm_{major}{minor}a"
    with pytest.raises(ValueError, match="kernels are compiled for CUDA GPUs; got cpu: name one"):
        architecture(KNOWN_DEVICES["cpu"])


def test_predicted_seconds_are_explains():
    call = Call((30, 48, 80), (18, 24, 24), (16, 8, 8), heads=24, device="b200")
    forward, query_gradient, key_gradient = map(predicted_seconds, call.kernels())
    x = jax.ShapeDtypeStruct((1, 30, 48, 80, 24, 128), "bfloat16")
    explanation = gna_jax.explain(
        x, x, x, window_size=(18, 24, 24), stride=(16, 8, 8), device="b200", implementation="mosaic"
    )
    assert math.isclose(forward, explanation.predicted, rel_tol=1e-9)
    # 2, 3 and 4 products of the same pairs.
    assert forward < query_gradient < key_gradient < 4 * forward


@pytest.mark.parametrize("device", ["h200", "b200"])
def test_wide_heads_have_kernels_of_their_own_for_keys_and_values(device):
    call = Call((30, 48, 80), (18, 24, 24), heads=4, head_dim=192, device=device)
    generation = {"h200": "hopper", "b200": "blackwell"}[device]
    jobs = ("forward", "query_gradient", "key_gradient", "value_gradient")
    assert [kernel.name for kernel in call.kernels()] == [f"{generation}_{job}" for job in jobs]
    assert all(kernel.plan.problem.head_dim == 256 for kernel in call.kernels())
    seconds = dict(zip(jobs, map(predicted_seconds, call.kernels()), strict=True))
    # Three products and two of the same pairs, but the same tiles to read, which may take longer.
    assert seconds["value_gradient"] <= seconds["key_gradient"] < 1.6 * seconds["value_gradient"]


def test_calls_travel_as_json():
    for call in (CALL, Call((9,), (3,), is_causal=(True,), q_tile=(64,), kv_tile=64)):
        again = Call.from_json(json.loads(json.dumps(dataclasses.asdict(call))))
        assert again == call and again.problem() == call.problem() and again.tiles() == call.tiles()


def test_tiles_of_a_call():
    assert CALL.tiles() is None
    tiles = Call((64, 64), 9, q_tile=(8, 16), kv_tile=8, backward_q_tile=8).tiles()
    assert (tiles.q, tiles.kv, tiles.backward_q, tiles.backward_kv) == (
        (8, 16),
        (8, 8),
        (8, 8),
        None,
    )
    with pytest.raises(ValueError, match="tiles need q_tile; got kv_tile=8"):
        Call((64, 64), 9, kv_tile=8).tiles()


def test_kernels_of_a_direction():
    names = [kernel.name for kernel in CALL.kernels()]
    assert names == ["hopper_forward", "hopper_query_gradient", "hopper_key_gradient"]
    assert [kernel.name for kernel in CALL.kernels("backward")] == names[1:]
    with pytest.raises(ValueError, match="direction must be forward, backward or both; got"):
        CALL.kernels("up")
    with pytest.raises(ValueError, match="got name='hopper'"):
        compile_kernel(CALL, "hopper")
    with pytest.raises(NotImplementedError, match="got NVIDIA A100"):
        dataclasses.replace(CALL, device="a100").kernels()


def test_what_gna_copies_before_the_kernels_is_said():
    assert CALL.copies() == ()
    padded = dataclasses.replace(CALL, layout=(64, 65), dilation=(1, 2), head_dim=48)
    assert [text.split(" padded")[0] for text in padded.copies()] == ["axis 1", "heads"]


def test_missing_tools_come_with_the_lines_that_install_them(monkeypatch):
    monkeypatch.setattr(toolchain, "_version", lambda name: None)
    monkeypatch.setattr(toolchain, "find_tool", lambda name: None)
    wanted = version("jaxlib")
    text = toolchain.missing()
    assert f"pip install --no-deps jax-cuda13-plugin=={wanted} jax-cuda13-pjrt=={wanted}" in text
    assert "pip install --no-deps nvidia-cuda-nvcc" in text
    with pytest.raises(RuntimeError, match="compiling for a GPU needs no GPU, but jax's CUDA"):
        compile_kernel(CALL, "hopper_forward")
    # The compiler of another release of jax does not work with this one.
    monkeypatch.setattr(toolchain, "_version", lambda name: "0.1")
    assert "jax-cuda13-plugin" in toolchain.missing()
    monkeypatch.setattr(toolchain, "_version", lambda name: wanted)
    assert "jax-cuda13-plugin" not in toolchain.missing() and "ptxas" in toolchain.missing()
    with pytest.raises(RuntimeError, match="SASS needs ptxas and nvdisasm: CUDA's bin folder"):
        toolchain.disassemble(PTX, "sm_90a")


def test_tools_are_found_where_cuda_is(monkeypatch, tmp_path):
    program(tmp_path / "bin" / "ptxas-of-a-test", "exit 0")
    assert toolchain.find_tool("ptxas-of-a-test") is None
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert toolchain.find_tool("ptxas-of-a-test") == str(tmp_path / "bin" / "ptxas-of-a-test")


def program(path, text):
    """An executable shell script."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.fixture
def pretend(monkeypatch, tmp_path):
    """Sets a shell script in the place of the compiling process."""

    def become(script):
        monkeypatch.setattr(toolchain, "missing", lambda: None)
        monkeypatch.setattr(
            compiling.sys, "executable", program(tmp_path / "bin" / "python", script)
        )

    return become


def test_a_compiling_process_is_told_its_job_and_its_files_are_read(pretend, tmp_path):
    (tmp_path / "files").mkdir()
    write_files(tmp_path / "files")
    pretend(
        f'echo "$3" > {tmp_path}/request; echo "$JAX_ENABLE_COMPILATION_CACHE" > {tmp_path}/cache;'
        f' cp {tmp_path}/files/* "$MOSAIC_GPU_DUMP_TO"'
    )
    compiled = compile_kernel(CALL, "hopper_forward")
    assert compiled.ptx == PTX and compiled.resources == read()
    request = json.loads((tmp_path / "request").read_text())
    assert Call.from_json(request["call"]) == CALL and request["kernel"] == "hopper_forward"
    assert (tmp_path / "cache").read_text() == "0\n"  # a cached program leaves no files


def test_a_compiler_that_fails_or_hangs_is_an_error_with_its_last_words(pretend):
    pretend("seq 100 >&2; echo 'LLVM ERROR: Cannot select' >&2; kill -ABRT $$")
    with pytest.raises(RuntimeError) as caught:
        compile_kernel(CALL, "hopper_forward")
    text = str(caught.value)
    assert text.startswith("compiling hopper_forward for h200 failed, exit code -6:\n87\n")
    assert text.endswith("LLVM ERROR: Cannot select")
    pretend("exec sleep 60")
    with pytest.raises(RuntimeError, match="took longer than 0.2 s"):
        compile_kernel(CALL, "hopper_forward", seconds=0.2)
    pretend("exit 0")
    with pytest.raises(RuntimeError, match="it wrote none"):
        compile_kernel(CALL, "hopper_forward")


def test_the_committed_table_has_a_row_for_every_kernel():
    table = kernel_resources.read()
    calls = kernel_resources.calls()
    wanted = {(name, kernel.name) for name, call in calls.items() for kernel in call.kernels()}
    assert set(table) == wanted
    assert all(row["mma"] > 0 for row in table.values())
    assert all(row["architecture"] in ("sm_90a", "sm_100a") for row in table.values())


def test_worse_than_the_table_is_found():
    row = kernel_resources.row_of("h200-2d", read())
    assert kernel_resources.worse(row, row) == []
    for field, step, is_worse in (
        *((field, 1, True) for field in kernel_resources.SMALL_IS_GOOD),
        *((field, -1, False) for field in kernel_resources.SMALL_IS_GOOD),
        ("mma", 1, False),
        ("mma", -1, True),
    ):
        fresh = row | {field: row[field] + step}
        assert bool(kernel_resources.worse(row, fresh)) == is_worse, (field, step)
    assert kernel_resources.worse(row, row | {"tiles": "8x8 / 8x8"})
