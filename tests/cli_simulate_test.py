"""`gna-jax simulate` and `gna-jax draw`: their answers are the simulator's and the pictures', and bad input ends with one line."""

import json
import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from gna_jax import pictures
from gna_jax.cli import app
from gna_jax.pictures.gallery import PICTURES
from gna_jax.simulator import PRESETS, best_tiles, search, simulate


def run(*arguments, width=200):
    """Exit code, standard output, and standard error as one line without the frame drawn around it."""
    environment = {"COLUMNS": str(width), "NO_COLOR": "1"}
    result = CliRunner().invoke(app, list(arguments), env=environment)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, " ".join(result.stderr.replace("│", "").split())


def rows_of(*arguments):
    """The sections of `simulate --json`."""
    code, out, error = run("simulate", *arguments, "--json")
    assert (code, error) == (0, "")
    return json.loads(out)["sections"]


def test_preset_prints_the_published_rules_and_the_front():
    published, front = rows_of("--preset", "hunyuan-91", "--device", "h100", "--static")
    preset = PRESETS["hunyuan-91"]
    assert [tuple(row["stride"]) for row in published["rows"]] == [
        rule.neighborhood.stride for rule in preset.rules
    ]
    for row, rule in zip(published["rows"], preset.rules, strict=True):
        tiles = best_tiles(rule.neighborhood, preset.layout, 128, 128, dynamic=False)
        expected = simulate(
            preset.layout,
            window_size=(18, 24, 24),
            stride=rule.neighborhood.stride,
            q_tile=tiles.q,
            kv_tile=tiles.kv,
        )
        assert row["total_work_speedup"] == expected.total_work_speedup
        assert row["worst_tile_speedup"] == expected.worst_tile_speedup
        assert row["end_to_end"] > 1
    result = search(preset.layout, windows=[(18, 24, 24)])
    assert [tuple(row["stride"]) for row in front["rows"]] == [one.stride for one in result.pareto]


def test_a_named_window_and_stride_is_one_row():
    (section,) = rows_of(*"24x24 -w 8 -s 4 --tiles 16/16 --static --device a100".split())
    (row,) = section["rows"]
    assert (row["window_size"], row["stride"], row["dynamic"]) == ([8, 8], [4, 4], False)
    expected = simulate(
        (24, 24), window_size=8, stride=4, q_tile=row["q_tile"], kv_tile=row["kv_tile"]
    )
    assert row["masked_tile_share"] == expected.masked_tile_share
    assert row["sparsity"] == expected.sparsity


def test_a_wish_is_met():
    (section,) = rows_of(*"64x64 --sparsity 0.8 --device h200".split())
    assert section["rows"] and all(row["sparsity"] >= 0.8 for row in section["rows"])
    (section,) = rows_of(*"64x64 --speedup 4 --device h200".split())
    assert section["rows"] and all(row["total_work_speedup"] >= 4 for row in section["rows"])


def test_every_preset_prints_on_every_device():
    for name, device in zip(PRESETS, ("h100", "h200", "b200", "a100", "l40") * 2, strict=False):
        code, out, error = run("simulate", "--preset", name, "--device", device)
        assert (code, error) == (0, "")
        assert PRESETS[name].title in out and "published rules" in out
        assert max(map(len, out.splitlines())) <= 200


def test_top_cuts_the_table_and_says_so():
    _, out, _ = run("simulate", "--preset", "hunyuan-91", "--top", "3")
    assert "more: --top" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "simulate needs a LAYOUT or a --preset, not both"),
        ("8x8 --preset nat-1", "simulate needs a LAYOUT or a --preset, not both"),
        ("--preset nat-9", "--preset must be one of flux-4k, hunyuan-91"),
        ("8x8 -w 9", "window_size must not exceed the layout on any axis; got window_size=(9, 9)"),
        ("8xeight", "LAYOUT must be integers joined by x, as in 30x48x80; got '8xeight'"),
        ("8x8 --sparsity 1.5", "sparsity must be at least 0 and below 1; got sparsity=1.5"),
        ("8x8 -w 3 --tiles 12/16", "a tile must have a power of two of elements; got 12"),
        ("8x8 -w 3 --tiles many", "--tiles must be elements of the Q and the KV tile"),
        ("8x8 -w 3 --device abacus", "abacus"),
    ],
)
def test_bad_input_ends_with_code_2_and_says_the_rule(arguments, message):
    code, out, error = run("simulate", *arguments.split(), *(() if arguments else ("--json",)))
    assert (code, out) == (2, "")
    assert message in error


def processor_seconds(*command):
    """Processor time of a Python command."""
    begin = os.times()
    subprocess.run([sys.executable, *command], capture_output=True, check=True)
    end = os.times()
    before = begin.children_user + begin.children_system
    return end.children_user + end.children_system - before


def test_a_preset_takes_little_over_importing_jax():
    """1.6 times on a quiet machine; another job beside stretches processor time too, so the least of a few runs counts."""
    spent = {("-m", "gna_jax", "simulate", "--preset", "hunyuan-91"): [], ("-c", "import jax"): []}
    for _ in range(6):
        for command, seconds in spent.items():
            seconds.append(processor_seconds(*command))
        preset, jax = map(min, spent.values())
        if preset < 2 * jax:
            return
    raise AssertionError(f"the preset takes {preset:.2f} s, importing jax {jax:.2f} s")


DRAWINGS = {
    "mask 32 -w 8 -s 4": lambda: pictures.mask_1d(32, window_size=8, stride=4),
    "window 12x12 -w 5 --query 3x4": lambda: pictures.window((12, 12), window_size=5, query=(3, 4)),
    "strides 16x16 -w 8 -s 1 -s 4": lambda: pictures.strides(
        (16, 16), window_size=8, strides=(1, 4)
    ),
    "tiles 32x32 -w 12 --q-tile 4x4 --kv-tile 4": lambda: pictures.tile_map(
        (32, 32), window_size=12, q_tile=4, kv_tile=4
    ),
    "work 48x64 -w 24 --q-tile 8 --kv-tile 8": lambda: pictures.work_map(
        (48, 64), window_size=24, q_tile=8, kv_tile=8
    ),
}


@pytest.mark.parametrize("arguments", DRAWINGS)
def test_draw_shows_the_picture_in_the_terminal(arguments):
    code, out, error = run("draw", *arguments.split(), width=160)
    assert (code, error) == (0, "")
    expected = DRAWINGS[arguments]().text(160).plain
    assert [line.rstrip() for line in out.splitlines()] == [
        line.rstrip() for line in expected.splitlines()
    ]


def test_draw_writes_files(tmp_path):
    files = [tmp_path / "mask.png", tmp_path / "mask.svg"]
    code, out, _ = run("draw", *"mask 16 -w 4 -o".split(), str(files[0]), "-o", str(files[1]))
    assert code == 0 and out.split() == [str(file) for file in files]
    assert files[0].read_bytes().startswith(b"\x89PNG") and b"<svg" in files[1].read_bytes()
    code, _, error = run("draw", *"mask 16 -w 4 -o".split(), str(tmp_path / "mask.pdf"))
    assert code == 2 and "must end in .png or .svg" in error


@pytest.mark.slow
def test_draw_speedup_and_gallery(tmp_path):
    code, out, _ = run(
        "draw", *"speedup 256x256 -w 80 -s 1 -s 16x1 -s 16 --q-tile 16x16 --kv-tile 16x8".split()
    )
    assert code == 0 and "10.2" in out
    code, out, _ = run("draw", "gallery", str(tmp_path / "pictures"))
    assert code == 0 and len(out.split()) == len(PICTURES)


def test_draw_refuses_what_it_cannot_show():
    code, _, error = run("draw", *"mask 8x8 -w 3".split())
    assert code == 2 and "a mask is drawn of one axis" in error
