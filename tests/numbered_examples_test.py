"""The numbered examples: each runs, ends with the line that it promises, and is short."""

import pathlib
import re
import runpy

import jax
import pytest

FOLDER = pathlib.Path(__file__).parents[1] / "examples"
EXAMPLES = sorted(FOLDER.glob("[0-9][0-9]_*.py"))


def test_they_are_numbered_without_gaps():
    assert [int(path.name[:2]) for path in EXAMPLES] == list(range(1, len(EXAMPLES) + 1))
    assert len(EXAMPLES) >= 6


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_it_ends_with_the_line_that_it_promises(path, capsys):
    text = path.read_text()
    assert len(text.splitlines()) <= 150
    opening = text.split('"""')[1]
    assert f"    python examples/{path.name}\n" in opening and "seconds on two CPU cores" in opening
    (promised,) = re.findall(r"Last line: `(.+)`", opening)
    # As a user's session has them: optax promotes implicitly.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out.splitlines()[-1] == promised
