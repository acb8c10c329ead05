"""`gna-jax inspect`: its table and records are the compiler's numbers, its files the kernels', and what is missing is said first."""

import importlib
import json

import pytest
from compiler_files import FILES, PTX
from typer.testing import CliRunner

from gna_jax.cli import app
from gna_jax.inspection import CompiledKernel, toolchain
from gna_jax.inspection.report import CompilerFiles, read_resources

GOOD = {
    "ptxas": "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\nUsed 168 registers",
    "program": "\nENTRY %main () -> () {\n}\n",
}
command = importlib.import_module("gna_jax.cli.inspect")  # the package's attribute is the function

COMPILED = []
"""What the compiler in the fixture was asked for: calls and kernels."""


@pytest.fixture
def compiler(monkeypatch):
    """A compiler in the place of jax's: quick, and with the same numbers for every kernel, as `files` changes them."""

    def become(**files):
        COMPILED.clear()

        def compile_kernel(call, name):
            COMPILED.append((call, name))
            (kernel,) = (one for one in call.kernels() if one.name == name)
            texts = CompilerFiles(**FILES | GOOD | files)
            return CompiledKernel(read_resources(kernel, call.copies(), texts), texts.ptx)

        monkeypatch.setattr(toolchain, "missing", lambda: None)
        monkeypatch.setattr(command, "compile_kernel", compile_kernel)

    become()
    return become


def run(*arguments, width=200):
    """Exit code, standard output, and standard error as one line without the frame drawn around it."""
    environment = {"COLUMNS": str(width), "NO_COLOR": "1"}
    result = CliRunner().invoke(app, ["inspect", *arguments], env=environment)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, " ".join(result.stderr.replace("│", "").split())


def test_json_has_a_record_per_kernel(compiler):
    code, out, _ = run(*"64x64 -w 9 -s 3 -n 4 --kv-heads 2 -d 64 --dtype float16 --json".split())
    assert code == 0
    records = json.loads(out)
    names = ["hopper_forward", "hopper_query_gradient", "hopper_key_gradient"]
    assert [record["kernel"] for record in records] == names
    for record in records:
        assert (record["registers"], record["spill_bytes"]) == (168, 0)
        assert (record["smem_bytes"], record["tmem_columns"]) == (166912, 512)
        assert (record["window_size"], record["stride"]) == ([9, 9], [3, 3])
        assert (record["heads"], record["kv_heads"], record["head_dim"]) == (4, 2, 64)
        assert record["dtype"] == "float16" and record["predicted_seconds"] > 0
    assert [name for _, name in COMPILED] == names


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits_and_holds_the_numbers(compiler, width):
    arguments = "30x48x80 -w 18x24x24 -s 16x8x8 -n 24 --device b200".split()
    code, out, _ = run(*arguments, width=width)
    lines = out.splitlines()
    assert code == 0 and max(map(len, lines)) <= width and "…" not in out
    assert "30x48x80 tokens, batch 1, 24 heads (24 key/value) x 128, bfloat16" in lines[0]
    assert "NVIDIA B200, sm_100a: compiled, not run" in out
    head = next(line for line in lines if "query gradient" in line)
    assert head.split() == "forward query gradient key gradient".split()
    cells = {line[:24].strip(): line[24:].split() for line in lines[lines.index(head) + 1 :]}
    assert cells["registers per thread"] == "168 of 168".split() * 3
    assert cells["spilled, B"] == ["0"] * 3
    assert cells["shared memory, KiB"] == "163.0 of 227".split() * 3
    assert cells["tensor memory, columns"] == "512 of 512".split() * 3
    assert cells["matrix instructions"] == "2 wgmma".split() * 3
    assert cells["memory passes"] == ["0"] * 3
    assert cells["predicted time"][1::2] == ["ms"] * 3
    assert "serialized" not in out


def test_faults_are_shown(compiler):
    compiler(**{name: FILES[name] for name in GOOD})
    _, out, _ = run(*"9x17 -w 3 --dilation 1x2 --direction forward".split())
    cells = {line[:24].strip(): line[24:].split() for line in out.splitlines()}
    assert cells["spilled, B"] == ["152"] and cells["stack, B"] == ["40"]
    assert cells["serialized"] == ["1"] and cells["memory passes"] == ["2"]
    assert "around hopper_forward: fusion bf16[1,9,18,2,64] pad_to_dilation/pad" in out
    assert "copied before: axis 1 padded from 17 to 18 for dilation 2" in out
    assert "tensor memory" not in out  # Hopper has none


def test_direction_device_and_tiles_reach_the_compiler(compiler):
    options = "--q-tile 8x16 --kv-tile 4x16 --backward-q-tile 8 --backward-kv-tile 16x8"
    code, out, _ = run(*f"64x64 -w 9 -c 1x0 --direction backward --device h100 {options}".split())
    assert code == 0 and "causal axes [0]" in out and "NVIDIA H100" in out
    (call, first), (_, second) = COMPILED
    assert (first, second) == ("hopper_query_gradient", "hopper_key_gradient")
    tiles = call.tiles()
    assert (tiles.q, tiles.kv) == ((8, 16), (4, 16))
    assert (tiles.backward_q, tiles.backward_kv) == ((8, 8), (16, 8))


def test_ptx_and_sass_are_written(compiler, monkeypatch, tmp_path):
    monkeypatch.setattr(toolchain, "find_tool", lambda name: name)
    monkeypatch.setattr(toolchain, "disassemble", lambda ptx, arch: f"{arch}: {len(ptx)}")
    folders = [str(tmp_path / name / "inner") for name in ("ptx", "sass")]
    arguments = "64x64 -w 9 --direction forward".split()
    code, out, _ = run(*arguments, "--ptx", folders[0], "--sass", folders[1])
    assert code == 0
    ptx = tmp_path / "ptx/inner/hopper_forward.sm_90a.ptx"
    sass = tmp_path / "sass/inner/hopper_forward.sm_90a.sass"
    assert ptx.read_text() == PTX and sass.read_text() == f"sm_90a: {len(PTX)}"
    assert [str(ptx), str(sass)] == out.splitlines()[-2:]


def test_what_is_missing_is_said_before_anything_is_compiled(compiler, monkeypatch, tmp_path):
    monkeypatch.setattr(toolchain, "find_tool", lambda name: None)
    code, out, error = run("64x64", "-w", "9", "--sass", str(tmp_path))
    assert (code, out, COMPILED) == (1, "", [])
    assert error.startswith("gna-jax: SASS needs ptxas and nvdisasm")
    monkeypatch.setattr(toolchain, "missing", lambda: "install this")
    code, out, error = run("64x64", "-w", "9")
    assert (code, out, error, COMPILED) == (1, "", "gna-jax: install this", [])


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ("64x64 -w 9 --device a100", 1, "the Pallas kernels run on Hopper"),
        ("64x64 -w 9 --dtype float32", 1, "take bfloat16 and float16; got float32"),
        ("64x64 -w 9 -d 264", 1, "got head_dim=264"),
        ("64x64 -w 9 --device cpu", 1, "mosaic runs on cuda, the device is cpu"),
        ("64x64 -w 9 --q-tile 8x9 --kv-tile 8x8", 1, "powers of two"),
        ("64x64 -w 9 --device abacus", 2, "got device='abacus'"),
        ("64x64 -w 9 --direction up", 2, "direction must be forward, backward or both; got"),
        ("64x64 -w 65", 2, "got window_size=(65, 65)"),
        ("64x64 -w 9 --kv-tile 8x8", 2, "tiles need q_tile"),
        ("64x64 -w 9 --q-tile 8x8x8", 2, "tiles must have one size per spatial axis"),
        ("64x64 -w 9 --q-tile many", 2, "--q-tile must be integers joined by x"),
        ("64x64 -w 9 -n 3 --kv-heads 2", 2, "3"),
    ],
)
def test_what_cannot_be_compiled_ends_with_its_reason(compiler, arguments, code, message):
    got = run(*arguments.split())
    assert got[:2] == (code, "") and COMPILED == []
    assert message in got[2]
