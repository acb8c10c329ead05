"""The command `gna-jax`: its answers are the library's, and bad input ends with the library's message and no traceback."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from typer.testing import CliRunner

import gna_jax
from gna_jax.cli import app


def run(*arguments):
    """Exit code, standard output, and standard error as one line without the frame drawn around it."""
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "400", "NO_COLOR": "1"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, " ".join(result.stderr.replace("│", "").split())


def test_explain_prints_what_the_library_explains():
    shapes = [((2, 6, 8, 10, n, h), "float32") for n, h in [(4, 32), (2, 32), (2, 16)]]
    expected = gna_jax.explain(
        *(jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape, dtype in shapes),
        window_size=(3, 4, 5),
        stride=(1, 2, 2),
        dilation=(2, 1, 1),
        is_causal=(True, False, False),
        device="h200",
        implementation="xla",
    )
    arguments = "6x8x10 -w 3x4x5 -s 1x2x2 --dilation 2x1x1 -c 1x0x0 -b 2 -n 4 --kv-heads 2 -d 32 --value-dim 16"
    arguments += " --dtype float32 --device h200 --implementation xla"
    assert run("explain", *arguments.split()) == (0, f"{expected}\n", "")


def test_one_value_is_meant_for_every_axis_and_commas_join_as_well():
    assert run("explain", "12x12", "-w", "5")[1] == run("explain", "12,12", "-w", "5,5")[1]


def test_minus_one_is_the_whole_axis():
    code, out, _ = run("explain", "12x12", "-w", "-1", "--device", "cpu", "--json")
    assert code == 0
    assert json.loads(out)["dense_share"] == 1.0


def test_json_holds_every_field_of_the_explanation():
    code, out, _ = run("explain", "24x24", "-w", "7", "-s", "2", "--device", "cpu", "--json")
    answer = json.loads(out)
    assert code == 0
    assert answer["implementation"] == "xla"
    assert answer["problem"]["neighborhood"]["window_size"] == [7, 7]
    assert answer["problem"]["neighborhood"]["stride"] == [2, 2]
    assert set(answer) == set(gna_jax.Explanation.__dataclass_fields__)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("8x8 -w 9", "window_size must not exceed the layout on any axis; got window_size=(9, 9)"),
        ("8x8 -w 3x3x3", "got window_size=(3, 3, 3) for 2 spatial axes"),
        ("8x8 -w 3 -s 4", "stride must not exceed window_size"),
        ("8xeight -w 3", "LAYOUT must be integers joined by x, as in 30x48x80; got '8xeight'"),
        ("8x8 -w 3 -c maybe", "--causal must be integers joined by x, as in 30x48x80; got 'maybe'"),
        ("8x8 -w 3 --dtype float31", "float31"),
        ("8x8 -w 3 --device abacus", "got device='abacus'"),
        ("8x8 -w 3 --implementation magic", "got implementation='magic'"),
        ("8x8", "Missing option '--window'"),
    ],
)
def test_bad_input_ends_with_code_2_and_says_the_rule(arguments, message):
    code, out, error = run("explain", *arguments.split())
    assert (code, out) == (2, "")
    assert message in error


def test_an_implementation_that_cannot_ends_with_code_1_and_its_reason():
    code, out, error = run(*"explain 8x8 -w 3 --device cpu --implementation mosaic".split())
    assert (code, out) == (1, "")
    assert error.startswith("gna-jax: implementation='mosaic' cannot run this call:")


def test_version_and_module_entry():
    expected = f"gna-jax {gna_jax.__version__}, jax {jax.__version__}\n"
    assert run("--version") == (0, expected, "")
    command = [sys.executable, "-m", "gna_jax", "--version"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == expected


def test_without_a_command_the_help_names_every_command():
    _, out, error = run()
    assert "explain" in out + error
