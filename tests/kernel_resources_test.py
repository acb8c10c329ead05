"""What compiled kernels take on a GPU, from the compiler alone: no worse than the committed table, nothing spilled, nothing copied."""

import math
import pathlib
import re
import shlex
import subprocess
import sys

import kernel_resources
import pytest
from ptx_waits import unawaited, without_a_wait
from typer.testing import CliRunner

from gna_jax.cli import app
from gna_jax.inspection import Call, compile_kernel
from gna_jax.inspection.report import memory_passes
from pallas_kernels import limits

pytestmark = (
    pytest.mark.kernel
)  # without the compiler they fail, and say what to install: a skip would hide a broken set-up

CALLS = kernel_resources.calls()


def rows():
    """The table's rows; those of `QUICK` calls by default, the others with the slow tests."""
    for (name, kernel), row in kernel_resources.read().items():
        is_quick = name.partition("-")[2] in kernel_resources.QUICK
        marks = () if is_quick else (pytest.mark.slow,)
        yield pytest.param(row, id=f"{name}-{kernel}", marks=marks)


@pytest.mark.parametrize("row", list(rows()))
def test_no_worse_than_the_table(row):
    call = CALLS[row["call"]]
    compiled = compile_kernel(call, row["kernel"])
    got = compiled.resources
    assert not kernel_resources.worse(row, kernel_resources.row_of(row["call"], got))
    assert got.spill_bytes == got.stack_bytes == got.serialized_wgmma == 0
    # At launch; warpgroups that copy hand registers on to those that compute.
    assert got.registers <= got.most_registers
    assert got.memory_passes == ()
    # Nothing goes on before wgmma and copies from and to tensor memory are done; without any one of the forward's waits something does.
    assert unawaited(compiled.ptx) == []
    if got.direction == "forward":
        assert all(unawaited(faulty) for faulty in without_a_wait(compiled.ptx))
    (kernel,) = (one for one in call.kernels() if one.name == row["kernel"])
    capacity = limits.capacity_of(kernel.plan.problem)
    name = row["kernel"].partition("_")[2]
    job = getattr(capacity, name.replace("value_", "key_"))
    assert got.smem_bytes <= limits.smem_bytes(kernel.plan, job) <= got.smem_limit
    # Boxes, not rows: one copy per chunk of an array, of all axes, columns and batch together.
    has_batch_axis = got.batch > 1 or math.prod(got.dilation) > 1
    assert got.tma_load_rank == len(got.layout) + 1 + has_batch_axis
    chunks = -(-got.head_dim // 64)
    assert got.tma_loads >= 3 * chunks
    passes = capacity.key_gradient_passes
    results = len(passes[0]) if kernel.plan.is_inverse else 1
    assert got.tma_stores == results * chunks


def test_the_committed_table_has_no_spills():
    table = kernel_resources.read()
    assert not [key for key, row in table.items() if row["spill_bytes"] or row["stack_bytes"]]


def test_padding_for_a_dilation_is_seen():
    call = Call((9, 17), (3, 5), dilation=(1, 2), head_dim=64)
    passes = compile_kernel(call, "hopper_forward").resources.memory_passes
    assert len(passes) == 4  # query, key and value in, out back
    assert sum("pad_to_dilation" in text for text in passes) == 3


GNA = """
import sys
import jax
import gna_jax
from gna_jax.device import KNOWN_DEVICES
from gna_jax.inspection.compile import compile_program

device, head_dim, direction = sys.argv[1], int(sys.argv[2]), sys.argv[3]
x = jax.ShapeDtypeStruct((2, 24, 40, 4, head_dim), "bfloat16")


def forward(*arrays):
    rule = {"window_size": (6, 9), "dilation": (3, 2)}
    return gna_jax.gna(*arrays, **rule, implementation="mosaic", device=device)


def backward(cotangent, *arrays):
    out, gradients = jax.vjp(forward, *arrays)
    return out, gradients(cotangent)


function, arguments = {"forward": (forward, (x, x, x)), "backward": (backward, (x, x, x, x))}[direction]
print(compile_program(function, arguments, KNOWN_DEVICES[device]))
"""
KERNEL = 'custom_call_target="mosaic_gpu'


def gna_program(device, head_dim, direction="forward"):
    """XLA's program of the public call."""
    command = [sys.executable, "-c", GNA, device, str(head_dim), direction]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("device", ["h200", "b200"])
def test_gna_copies_no_tokens(device):
    program = gna_program(device, 64)
    assert program.count(KERNEL) == 1
    assert list(memory_passes(program, "bfloat16")) == []


@pytest.mark.parametrize("device", ["h200", "b200"])
def test_the_gradient_of_gna_reads_tokens_outside_its_kernels_for_delta_alone(device):
    program = gna_program(device, 64, "backward")
    assert program.count(KERNEL) == 3
    (delta,) = memory_passes(program, "bfloat16")
    assert delta.startswith("fusion f32[2,24,40,4] ") and delta.endswith("/reduce_sum")


def test_gna_pads_head_dims_and_it_is_seen():
    passes = list(memory_passes(gna_program("h200", 48), "bfloat16"))
    assert sum("pad_head_dim" in text for text in passes) == 3


@pytest.mark.slow
def test_the_page_shows_what_the_command_prints():
    page = (pathlib.Path(__file__).parents[1] / "docs/inspect.md").read_text()
    (command,) = re.findall(r"^gna-jax (inspect .*)$", page, re.MULTILINE)
    result = CliRunner().invoke(app, shlex.split(command), env={"COLUMNS": "80", "NO_COLOR": "1"})
    assert result.exit_code == 0
    assert result.stdout in page


def test_the_committed_table_has_every_rank_with_every_head_dim():
    rows = [(CALLS[name], kernel) for name, kernel in kernel_resources.read()]
    got = {(len(call.layout), call.head_dim, kernel) for call, kernel in rows}
    jobs = {"forward", "query_gradient", "key_gradient"}
    for generation in ("hopper", "blackwell"):
        for rank in (1, 2, 3):
            for head_dim in limits.HEAD_DIMS:
                wide = {"value_gradient"} if head_dim > limits.WIDEST_NARROW_HEAD else set()
                for job in jobs | wide:
                    assert (rank, head_dim, f"{generation}_{job}") in got
