"""Faults planted in the Triton kernels' sources are caught: proof that the tests of values would notice.

A fault is one change of one line, made in a copy of the kernels; none reads past an array, where anything may stand. Its case is one of
`triton_calls.CHOSEN`, as the suite runs it.
"""

import dataclasses
import re
import shutil
import sys
from pathlib import Path

import pytest
from triton_calls import CHOSEN, check

from gna_jax.backends import triton as backend

pytestmark = pytest.mark.triton

KERNELS = Path(backend.__file__).parent / "kernels"
PACKAGE = f"{backend.__name__}.kernels"


@dataclasses.dataclass(frozen=True)
class Fault:
    """`text` of a kernels' module, which stands there once, becomes `fault`; `case` shows it in the results named `shown`."""

    case: str
    shown: str
    module: str
    text: str
    fault: str


WALK, GROUPED = "several clean tiles", "three heads of two"
FAULTS = {
    "a clean tile too many": Fault(
        WALK, "out", "geometry", "inner_first - start + (tile - 1)) // tile", "inner_first - start) // tile"
    ),
    "the last visit is left out": Fault(
        WALK, "out", "geometry", "(outer_end - start + (tile - 1)) // tile", "(outer_end - start) // tile"
    ),
    "the shell starts with clean tiles": Fault(
        WALK, "out", "geometry", "tl.where(step < clean_first, step, step + clean)", "step"
    ),
    "the residue of another axis": Fault(
        "bias of two axes", "out", "geometry", "rest % plan.axes[2].dilation,", "rest_of_axes % plan.axes[2].dilation,"
    ),
    "a causal query does not see itself": Fault(
        "causal", "out", "geometry", "return query + 1", "return tl.maximum(query, 1)"
    ),
    "a causal key is not seen by its own query": Fault(
        "causal", "d key", "geometry", "        return key\n", "        return key + 1\n"
    ),
    "the middle of a group of strided queries": Fault(
        WALK, "out", "geometry", "group_start + axis.stride // 2", "group_start"
    ),
    "no mask in the shell": Fault(
        WALK, "out", "scores", "        scores = tl.where(mask, scores, float(\"-inf\"))\n    return scores, tile", "        pass\n    return scores, tile"
    ),
    "no mask in the shell of keys": Fault(
        WALK, "d key", "key_gradient", "scores = tl.where(mask, scores, float(\"-inf\"))", "pass"
    ),
    "the first column of a row's interval": Fault(
        WALK, "out", "token_tiles", "mask & (offset < size[:, None])", "mask & (offset - 1 < size[:, None])"
    ),
    "the output is not rescaled": Fault(
        WALK, "out", "forward", "values = values * shrink[:, None]", "values = values * 1.0"
    ),
    "query heads share the wrong key head": Fault(
        GROUPED, "out", "forward", "kv_head = head // plan.heads_per_kv", "kv_head = head % plan.kv_heads"
    ),
    "dQ of the wrong key head": Fault(
        "two heads of two", "d query", "query_gradient", "kv_head = head // plan.heads_per_kv", "kv_head = head % plan.kv_heads"
    ),
    "dQ of the wrong key head, with a bias": Fault(
        GROUPED, "d query", "bias_gradient", "kv_head = head // plan.heads_per_kv", "kv_head = head % plan.kv_heads"
    ),
    "dK of one query head": Fault(
        GROUPED, "d key", "key_gradient", "return head, step - head * visits", "return 0, step - head * visits"
    ),
    "the sign of delta in dQ": Fault(
        WALK, "d query", "query_gradient", "products - delta[:, None]", "products + delta[:, None]"
    ),
    "the sign of delta in dK": Fault(
        WALK, "d key", "key_gradient", "products - delta[None, :]", "products + delta[None, :]"
    ),
    "the bias of the opposite offset": Fault(
        "bias of two axes", "out", "token_tiles", "plan.bias_entries + numbers", "plan.bias_entries + plan.bias_entries - 1 - numbers"
    ),
    "the bias of the next head": Fault(
        GROUPED, "out", "token_tiles", "head * plan.bias_entries", "(head + 1) % plan.query_heads * plan.bias_entries"
    ),
    "the bias' gradient of one query too few": Fault(
        "bias of two axes", "d relative_position_bias", "bias_gradient", "for row in range(0, plan.q_rows)", "for row in range(1, plan.q_rows)"
    ),
    "the last additional tile is left out": Fault(
        "additional keys", "out", "forward", "range(0, count, plan.kv_rows)", "range(0, count - plan.kv_rows + 1, plan.kv_rows)"
    ),
    "lengths are ignored": Fault(
        "additional keys", "out", "scores", "tl.minimum(count, plan.num_additional)", "plan.num_additional + 0 * count"
    ),
    "what memory held is added to the bias' gradient": Fault(
        "bias of two axes", "d relative_position_bias", "bias_gradient", "tl.where(is_first, 0.0, total)", "total + 0.0"
    ),
    "the last run of queries is left out": Fault(
        "additional keys", "d additional_keys", "key_gradient", "(end - first_token + plan.q_rows - 1) // plan.q_rows", "(end - first_token) // plan.q_rows"
    ),
}  # fmt: skip


@pytest.fixture
def plant(tmp_path, monkeypatch):
    """Puts kernels with a fault in the place of the real ones."""

    def plant(fault):
        folder = shutil.copytree(KERNELS, tmp_path / "kernels")
        path = folder / f"{fault.module}.py"
        source = path.read_text()
        assert source.count(fault.text) == 1, "the source has changed: name a line that is there"
        path.write_text(source.replace(fault.text, fault.fault))
        for name in [name for name in sys.modules if name.startswith(PACKAGE)]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setattr(backend, "__path__", [str(tmp_path), *backend.__path__])

    yield plant
    for name in [name for name in sys.modules if name.startswith(PACKAGE)]:
        del sys.modules[name]


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_caught(name, plant):
    fault = FAULTS[name]
    plant(fault)
    with pytest.raises(AssertionError, match=re.escape(f"{fault.shown} Case(")):
        check(CHOSEN[fault.case])


@pytest.mark.parametrize("name", sorted({fault.case for fault in FAULTS.values()}))
def test_without_a_fault(name):
    check(CHOSEN[name])
