"""Sharded calls of `implementation="triton"`, compiled for four H200 that are not there: every device runs its own, nothing is gathered.

A process per call: jax's compiler for a described GPU is not to be shared, and Triton must not interpret.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.triton

PROGRAM = """
import json, re, sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from gna_jax import gna
from gna_jax.device import KNOWN_DEVICES
from gna_jax.inspection.targets import target_config

topology = topologies.get_topology_desc(
    platform="cuda", target_config=target_config(KNOWN_DEVICES["h200"]), topology="1x1x4"
)
axis_type = AxisType.Explicit if sys.argv[1] == "explicit" else AxisType.Auto
devices = np.array(topology.devices).reshape(2, 2)
mesh = Mesh(devices, ("batch", "heads"), axis_types=(axis_type,) * 2)
tokens, text = P("batch", None, None, "heads"), P("batch", None, "heads")

def shape(sizes, spec, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, spec))

arrays = [shape((4, 9, 20, n, 32), tokens) for n in (8, 4, 4)]
arrays += [shape((4, 7, 4, 32), text)] * 2 + [shape((8, 5, 9), P("heads"))]
specs = [tokens] * 3 + [text] * 2 + [P("heads")]

def run(query, key, value, additional_keys, additional_values, bias):
    return gna(
        query, key, value, additional_keys=additional_keys, additional_values=additional_values,
        relative_position_bias=bias, window_size=(3, 5), dilation=(2, 3), return_lse=True,
        implementation="triton", device="h200",
    )

if sys.argv[1] == "shard_map":
    specs, out = tuple(specs), (tokens, tokens)
    run = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=out, check_vma=True)

def loss(*arrays):
    out, lse = run(*arrays)
    return (out.astype(jnp.float32) ** 2).sum() + lse.sum()

def look(function):
    program = jax.jit(function).trace(*arrays).lower().compile()
    text = program.as_text()
    moved = sorted(set(re.findall(r" (all-gather|all-to-all|collective-permute)(?:-start)?[(]", text)))
    kernels = len(re.findall(r"custom-call[(][^\\n]*triton_kernel_call", text))
    return moved, kernels, [str(x.spec) for x in jax.tree.leaves(program.output_shardings)]

gradients = jax.grad(loss, argnums=tuple(range(len(arrays))))
print(json.dumps([look(run), look(gradients)]))
"""


@pytest.mark.parametrize("kind", ["auto", "explicit", "shard_map"])
def test_every_device_keeps_its_own(kind):
    root = Path(__file__).parents[1]
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    changes = {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(paths),
        "TRITON_INTERPRET": "0",
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, kind],
        env=os.environ | changes,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (moved, kernels, specs), gradients = json.loads(done.stdout.splitlines()[-1])
    assert moved == [] and kernels == 1
    assert all("batch" in spec and "heads" in spec for spec in specs)
    moved, kernels, specs = gradients
    # Sums over the batch of the bias' gradient are reduced; nothing else moves.
    assert moved == [] and kernels == 4
    assert all("batch" in spec and "heads" in spec for spec in specs[:5])
