"""README and docs say what is true: their code runs, their links lead somewhere, their tables match the code."""

import pathlib
import re

import numpy as np
import pytest

import gna_jax
from gna_jax import backends
from gna_jax.natten import KNOBS

ROOT = pathlib.Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")])
PAGES += sorted(
    page
    for page in ROOT.glob("*/**/README.md")
    if not page.relative_to(ROOT).parts[0].startswith((".venv", "build"))
)


def _code_blocks(page: pathlib.Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.S)


def test_ten_lines_of_the_readme_run(capsys):
    block, _, sharded = _code_blocks(ROOT / "README.md")
    assert len(block.strip().splitlines()) <= 11
    names: dict = {}
    exec(compile(block, "README.md", "exec"), names)
    printed = capsys.readouterr().out
    assert names["dq"].shape == names["q"].shape == names["out"].shape
    assert names["lse"].shape == names["q"].shape[:-1]
    assert "xla on" in printed and "window    7x7" in printed
    exec(compile(sharded, "README.md", "exec"), names)
    assert names["out"].sharding.spec == names["spec"]
    want = gna_jax.gna(*(names[name] for name in "qkv"), window_size=7)
    np.testing.assert_allclose(names["out"], want, rtol=1e-5, atol=1e-6)


@pytest.mark.kernel
def test_kernels_of_the_readme_run_in_the_interpreter():
    block, interpreted, _ = _code_blocks(ROOT / "README.md")
    names: dict = {}
    exec(compile(block, "README.md", "exec"), names)
    exec(compile(interpreted, "README.md", "exec"), names)
    assert names["out"].shape == names["x"].shape
    x = names["x"]
    want = gna_jax.gna(x, x, x, window_size=5)
    assert abs(names["out"].astype("float32") - want.astype("float32")).max() < 2e-2


def test_slab_example_runs():
    block = _code_blocks(ROOT / "docs/slabs.md")[0]
    import jax
    import jax.numpy as jnp

    from gna_jax.attention import slab_attention

    x = jax.random.normal(jax.random.key(0), (1, 32, 16, 2, 8))
    names = {
        "jnp": jnp,
        "slab_attention": slab_attention,
        "queries": x[:, 8:12],
        "keys": x[:, 5:15],
        "values": x[:, 5:15],
    }
    exec(compile(block, "slabs.md", "exec"), names)
    whole = gna_jax.gna(x, x, x, window_size=7)
    assert jnp.abs(names["out"] - whole[:, 8:12]).max() < 1e-5


def test_choosing_a_window_prints_what_it_says(capsys):
    (block,) = _code_blocks(ROOT / "docs/choosing-a-window.md")
    exec(compile(block, "choosing-a-window.md", "exec"), {})
    printed = capsys.readouterr().out
    said = [line.split("  # ")[1] for line in block.splitlines() if "  # " in line]
    assert len(said) == 2 and all(line in printed for line in said), printed
    assert "of the sliding window's pairs are kept" in printed


@pytest.mark.slow
def test_models_page_prints_what_it_says(capsys):
    """The blocks that need no weights."""
    blocks = [b for b in _code_blocks(ROOT / "docs/models.md") if "print(" in b]
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, "models.md", "exec"), {})
        (said,) = re.findall(r"^print.*  # (.*)$", block, flags=re.M)
        assert capsys.readouterr().out.strip() == said


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#]+)", text):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_table_of_what_runs_where_names_every_implementation():
    text = (ROOT / "README.md").read_text()
    for rung in backends.RUNGS:
        assert f'`"{rung.name}"`' in text


def test_natten_page_names_every_knob():
    text = (ROOT / "docs/from-natten.md").read_text()
    for knob in KNOBS:
        stem = "backward_*_tile_shape" if re.fullmatch("backward_.*_tile_shape", knob) else knob
        assert f"`{stem}=" in text, knob
