"""Examples that time a transformer block: they run scaled down, and at full size their shapes fit."""

import importlib
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from gna_jax.simulator import PRESETS

FOLDER = pathlib.Path(__file__).parents[1] / "examples"
MODELS = {"cosmos": "2x6x8", "flux": "8x8", "hunyuan": "4x6x8"}
# Printed in tables 2 to 5 of arXiv 2504.16922: simulated, without dense steps and with them.
SIMULATED = {
    ("flux-4k", (1, 1)): "1.76x / 1.42x",
    ("flux-4k", (16, 16)): "1.88x / 1.46x",
    ("cosmos-89", (1, 1, 1)): "1.90x / 1.45x",
    ("cosmos-89", (1, 8, 16)): "2.10x / 1.52x",
    ("hunyuan-91", (1, 1, 1)): "1.73x / 1.42x",
    ("hunyuan-91", (16, 8, 8)): "2.23x / 1.63x",
}


@pytest.fixture
def load(monkeypatch):
    """A script of the examples as a module; beside it lie those that it imports."""
    monkeypatch.syspath_prepend(str(FOLDER))

    def load(name):
        return importlib.import_module(name)

    return load


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_it_runs_scaled_down(load, capsys, name):
    model, layout = load(f"{name}_block_speed").MODEL, MODELS[name]
    load("block_speed").command(model)(layout=layout, implementation="xla", rounds=1)
    printed = capsys.readouterr().out
    assert "No GPU here: a scaled-down block of 2 heads" in printed and f"on {layout}" in printed
    lines = [line for line in printed.splitlines() if "window" in line and "stride" in line]
    assert len(lines) == len(model.rows)
    for row, rule in zip(lines, model.rows, strict=True):
        assert len(re.findall(r"[\d.]+ ms", row)) == len(model.kinds)
        assert SIMULATED.get(rule, "") in row


@pytest.mark.parametrize("name", MODELS)
def test_at_full_size_shapes_fit(load, name):
    model, block_speed = load(f"{name}_block_speed").MODEL, load("block_speed")
    published = PRESETS[model.rows[0][0]]
    size = block_speed.Size(
        published.layout, published.heads, model.text_tokens, jnp.bfloat16, implementation="xla"
    )
    rule = block_speed.rule_of(*model.rows[-1], published.layout)
    assert rule.stride == model.rows[-1][1]  # nothing scales at full size

    def run(kind, rule):
        block, arguments = kind.make(size)
        return arguments[0], block(*arguments, rule=rule)

    for kind in model.kinds:
        with jax.numpy_dtype_promotion("standard"):  # flax's norms promote to float32 implicitly
            tokens, out = nnx.eval_shape(lambda kind=kind: run(kind, rule))
        image = out[0] if model.is_joint else out
        assert image.shape == tokens.shape == (1, *size.layout, size.heads * 128)
        assert image.dtype == jnp.bfloat16


def test_what_the_paper_simulated_is_what_is_printed(load):
    block_speed = load("block_speed")
    for row, printed in SIMULATED.items():
        assert block_speed.both(block_speed.simulated(*row)) == printed
    assert block_speed.both(block_speed.MEASURED["cosmos-56", (1, 8, 16)]) == "- / 1.26x"
    faster = block_speed.whole_run("cosmos-89", 0.99, 2.0)
    assert faster == pytest.approx((1 / (1 - 0.99 / 2), 1 / (1 - 0.99 * 23 / 35 / 2)))


def test_a_layout_of_another_rank_is_refused(load):
    script, block_speed = load("flux_block_speed"), load("block_speed")
    with pytest.raises(Exception, match="needs 2 axes, as 256x256; got 8x8x8"):
        block_speed.command(script.MODEL)(layout="8x8x8", implementation=None, rounds=1)
