"""Sharded calls of `implementation="mosaic"`, compiled for four H200 that are not there: nothing is gathered.

A process per call: jax's compiler for a described GPU is not to be shared.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import json, re, sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from gna_jax import gna
from gna_jax.device import KNOWN_DEVICES
from gna_jax.inspection.targets import target_config

kind, heads_per_kv, more = json.loads(sys.argv[1])
topology = topologies.get_topology_desc(
    platform="cuda", target_config=target_config(KNOWN_DEVICES["h200"]), topology="1x1x4"
)
axis_type = AxisType.Explicit if kind == "explicit" else AxisType.Auto
devices = np.array(topology.devices).reshape(2, 2)
mesh = Mesh(devices, ("batch", "heads"), axis_types=(axis_type,) * 2)
tokens, text = P("batch", None, None, "heads"), P("batch", None, "heads")

def shape(sizes, spec):
    return jax.ShapeDtypeStruct(sizes, jnp.bfloat16, sharding=NamedSharding(mesh, spec))

arrays = [shape((4, 9, 20, n, 64), tokens) for n in (4 * heads_per_kv, 4, 4)]
specs = [tokens] * 3
if more:
    arrays += [shape((4, 7, 4, 64), text)] * 2
    specs += [text] * 2

def run(query, key, value, *additional):
    names = ("additional_keys", "additional_values")
    return gna(
        query, key, value, **dict(zip(names, additional)), window_size=(3, 5), dilation=(2, 3),
        return_lse=True, implementation="mosaic", device="h200",
    )

if kind == "shard_map":
    out = tokens, tokens
    run = jax.shard_map(run, mesh=mesh, in_specs=tuple(specs), out_specs=out, check_vma=True)

def loss(*arrays):
    out, lse = run(*arrays)
    return (out.astype(jnp.float32) ** 2).sum() + lse.sum()

def collectives(function):
    program = jax.jit(function).trace(*arrays).lower().compile()
    text = program.as_text()
    names = "all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter"
    counts = {name: len(re.findall(rf" {name}(?:-start)?\\(", text)) for name in names}
    specs = [str(x.spec) for x in jax.tree.leaves(program.output_shardings)]
    return counts, len(re.findall(r"custom-call\\([^\\n]*mosaic_gpu", text)), specs

gradients = jax.grad(loss, argnums=tuple(range(len(arrays))))
print(json.dumps([collectives(run), collectives(gradients)]))
"""


def compile_sharded(*arguments):
    root = Path(__file__).parents[1]
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", PROGRAM, json.dumps(arguments)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("heads_per_kv", "more"),
    [
        (2, True),
        *(
            pytest.param(*pair, marks=pytest.mark.slow)
            for pair in ((1, False), (1, True), (2, False))
        ),
    ],
    ids=["grouped-additional", "window", "additional", "grouped-window"],
)
@pytest.mark.parametrize("kind", ["auto", "explicit", "shard_map"])
def test_every_device_keeps_its_own(kind, heads_per_kv, more):
    (forward, kernels, specs), (backward, gradient_kernels, gradient_specs) = compile_sharded(
        kind, heads_per_kv, more
    )
    assert not any(forward.values()), forward
    assert kernels == 1
    assert all("batch" in spec and "heads" in spec for spec in specs)
    # The loss is one number, whose gradient needs no sum over devices.
    assert not any(backward.values()), backward
    assert gradient_kernels == 3
    assert all("batch" in spec and "heads" in spec for spec in gradient_specs)
