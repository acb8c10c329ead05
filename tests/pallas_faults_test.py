"""Faults planted in the kernels are caught: proof that the tests of values, and the race detector, would notice.

Two faults are planted in the kernels' source, at every place: a wait that is left out, and a slot that is freed right after the wait
for it, before it is read. Two in what they call: a window that ends one token late, a box that starts one token late. Not here:
a missing wait for wgmma itself, which the interpreter does not model (`pallas_kernels/README.md`).
"""

import ast
import dataclasses
import sys
import types
from pathlib import Path

import jax
import pytest
from attention_suite import case_1d, case_of, check_array
from pallas_suite import JOBS, KEY_GRADIENT, TOLERANCE, call_of, interpret, plan_of

import pallas_kernels
from gna_jax.tiling import Tiles
from pallas_kernels import masks
from pallas_kernels.plan import tile_walk
from pallas_kernels.token_boxes import BoxBuffer

pytestmark = pytest.mark.kernel

KERNELS = [(generation, job) for generation in ("hopper", "blackwell") for job in JOBS]
TILES = {
    "hopper": Tiles(q=(2, 32), kv=(4, 8), backward_q=(4, 8), backward_kv=(2, 32)),
    "blackwell": Tiles(q=(2, 64), kv=(4, 8), backward_q=(4, 8), backward_kv=(2, 64)),
}
# One head, and in every kernel a tile that fills each slot several times, without masks and then with.
CASE = case_of((4, 104), (4, 73), batch=1, heads_per_kv=1, head_dim=32, value_dim=32)
# Wide heads, for what only a kernel of one gradient does.
WIDE = case_1d(280, 200, batch=1, heads_per_kv=1, head_dim=256, value_dim=256)
WIDE_TILES = {
    "hopper": Tiles(q=(64,), kv=(64,), backward_q=(64,), backward_kv=(64,)),
    "blackwell": Tiles(q=(128,), kv=(64,), backward_q=(64,), backward_kv=(128,)),
}
WAIT, ARRIVE = "barrier_wait", "barrier_arrive"
HARMLESS = ("memory.turn", "ready", "memory.own_ready")
"""Barriers whose faults may stay unseen. Turns at the matrix unit order nothing but time. A block's own operands are waited for once, and
copies that a thread of the interpreter's copy engine did after them can order them by chance; notes beside them are ordered by them."""
ATTEMPTS = 3
"""Runs in one of which a fault must show: which thread of the interpreter's copy engine does what is left to chance."""
CAUGHT = (AssertionError, jax.errors.JaxRuntimeError, ValueError)
"""A wrong value, a race, a barrier out of step. Not: a mutation that is no program."""


def run(generation, job, *, is_wide=False):
    """The kernel on the case: raises where something is wrong."""
    case, tiles = (WIDE, WIDE_TILES) if is_wide else (CASE, TILES)
    case = dataclasses.replace(case, tiles=tiles[generation])
    call = call_of(case)
    for name, array in interpret(case, call, generation, job).items():
        check_array(array, call.want[name], TOLERANCE[call.operands.query.dtype], name)


@pytest.mark.parametrize(("generation", "job"), KERNELS)
def test_without_a_fault(generation, job):
    plan = plan_of(dataclasses.replace(CASE, tiles=TILES[generation]), generation, job)
    walks = [tile_walk(plan, tile) for tile in range(plan.num_tiles)]
    assert any(plan.stages < walk.num_clean < walk.num_visits - plan.stages for walk in walks)
    run(generation, job)
    if job == KEY_GRADIENT:
        run(generation, job, is_wide=True)


@dataclasses.dataclass(frozen=True)
class Fault:
    """The statement number `number` among the calls of `function` in a module: left out, or moved up to the wait before it."""

    generation: str
    job: str
    module: str
    function: str
    number: int

    def __str__(self) -> str:
        return f"{self.generation}-{self.job}-{self.module}-{self.function}-{self.number}"


def source_of(module: str) -> str:
    return (Path(pallas_kernels.__file__).parent / f"{module}.py").read_text()


def blocks(tree: ast.AST, function: str):
    """Every statement that calls `plgpu.<function>`: the list it is in, and its place there. Not where slots are drained."""
    drains = [n for n in ast.walk(tree) if getattr(n, "name", "").startswith("drain")]
    drained = {id(node) for drain in drains for node in ast.walk(drain)}
    for node in ast.walk(tree):
        for body in (getattr(node, name, None) for name in ("body", "orelse")):
            for place, statement in enumerate(body if isinstance(body, list) else ()):
                if called(statement) != function or id(statement) in drained:
                    continue
                if ast.unparse(statement.value.args[0]) not in HARMLESS:
                    yield body, place


def called(statement: ast.AST) -> str | None:
    """The name of the function of `plgpu` that the statement calls and does nothing else."""
    call = getattr(statement, "value", None)
    if not isinstance(statement, ast.Expr) or not isinstance(call, ast.Call):
        return None
    return getattr(call.func, "attr", None)


def faults():
    """Every place of every kernel where a fault of synchronisation can be planted."""
    for generation, job in KERNELS:
        kernel = f"{generation}_{job}"
        for module in (kernel, f"{generation}_warpgroups", "slots"):
            tree = ast.parse(source_of(module))
            used = source_of(kernel) + (
                source_of(f"{generation}_warpgroups") if module == "slots" else ""
            )
            for node in tree.body:  # of a room that it shares, what the kernel calls
                if module != kernel and getattr(node, "name", "") not in used:
                    node.body = []
            for function in (WAIT, ARRIVE):
                for number, _ in enumerate(blocks(tree, function)):
                    yield Fault(generation, job, module, function, number)


def planted(fault: Fault) -> ast.Module:
    """The module's source with the fault."""
    tree = ast.parse(source_of(fault.module))
    body, place = list(blocks(tree, fault.function))[fault.number]
    statement = body.pop(place)
    if fault.function == ARRIVE:
        waits = [n for n, other in enumerate(body[:place]) if called(other) == WAIT]
        body.insert(waits[-1] + 1 if waits else 0, statement)
    elif not body:
        body.append(ast.Pass())
    return ast.fix_missing_locations(tree)


def load(module: str, tree: ast.Module, monkeypatch) -> None:
    """Put a module made of this source in the place of the real one."""
    name = f"pallas_kernels.{module}"
    fresh = types.ModuleType(name)
    fresh.__file__ = f"<{module} with a fault>"
    monkeypatch.setitem(sys.modules, name, fresh)
    monkeypatch.setattr(pallas_kernels, module, fresh, raising=False)
    exec(compile(tree, fresh.__file__, "exec"), fresh.__dict__)


@pytest.mark.parametrize("fault", list(faults()), ids=str)
def test_synchronisation(fault, monkeypatch):
    load(fault.module, planted(fault), monkeypatch)
    kernel = f"{fault.generation}_{fault.job}"
    shared = f"{fault.generation}_warpgroups"
    if fault.module == "slots":
        load(shared, ast.parse(source_of(shared)), monkeypatch)
    if fault.module != kernel:  # the kernel once more, with the faulty rooms that it shares
        load(kernel, ast.parse(source_of(kernel)), monkeypatch)
    load("calls", ast.parse(source_of("calls")), monkeypatch)
    with pytest.raises(CAUGHT):
        for _ in range(ATTEMPTS):
            run(fault.generation, fault.job)
            if fault.job == KEY_GRADIENT:
                run(fault.generation, fault.job, is_wide=True)


@pytest.mark.parametrize(("generation", "job"), KERNELS)
def test_a_window_that_ends_one_token_late(generation, job, monkeypatch):
    for name in ("key_intervals", "query_intervals"):
        real = getattr(masks, name)
        late = lambda *arguments, real=real: tuple((a, b + 1) for a, b in real(*arguments))
        monkeypatch.setattr(masks, name, late)
    with pytest.raises(AssertionError, match="error"):
        run(generation, job)


@pytest.mark.parametrize(("generation", "job"), KERNELS)
def test_a_box_that_starts_one_token_late(generation, job, monkeypatch):
    real = BoxBuffer.load

    def late(self, memory, scratch, slot, place, barrier):
        start = (*place.start[:-1], place.start[-1] + 1)
        real(self, memory, scratch, slot, place._replace(start=start), barrier)

    monkeypatch.setattr(BoxBuffer, "load", late)
    with pytest.raises(AssertionError, match="error"):
        run(generation, job)
