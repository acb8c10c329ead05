"""Compiles a forward kernel for a GPU that is not there, and prints its resources as one line of JSON.

Run as a script, a process per kernel: the compiler's cache does not tell targets apart. Needs the CUDA plugin of jax
(`pip install --no-deps jax-cuda13-plugin jax-cuda13-pjrt`) and `ptxas` on the path; no GPU and no driver.
"""

import dataclasses
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

MISSING = "device-less compile needs jax's CUDA plugin (pip install --no-deps jax-cuda13-plugin jax-cuda13-pjrt) and ptxas"

# GpuTargetConfigProto of an H200: hardware facts of its data sheet and of compute capability 9.0.
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  memory_bandwidth: 4800000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 151397597184
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0"
  name: "NVIDIA H200"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 13 }
device_description_str: "NVIDIA H200"
"""


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of `gna` to compile, in JSON's types."""

    layout: tuple[int, ...]
    window_size: tuple[int, ...]
    q_tile: tuple[int, ...]
    kv_tile: tuple[int, ...]
    stride: int = 1
    dilation: int = 1
    is_causal: bool = False
    batch: int = 1
    kv_heads: int = 2
    heads_per_kv: int = 1
    head_dim: int = 128
    dtype: str = "bfloat16"


def is_possible() -> bool:
    """Whether the plugin and `ptxas` are here."""
    has_plugin = importlib.util.find_spec("jax_cuda13_plugin") is not None
    return has_plugin and shutil.which("ptxas") is not None


def resources(call: Call) -> dict[str, int]:
    """Registers, spilled bytes, shared memory and instruction counts of the forward kernel, compiled in a process of its own."""
    command = [sys.executable, __file__, json.dumps(dataclasses.asdict(call))]
    root = str(Path(__file__).parents[1])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    with tempfile.TemporaryDirectory() as dump:
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "MOSAIC_GPU_DUMP_TO": dump,
            "PYTHONPATH": os.pathsep.join(paths),
        }
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        if done.returncode:
            raise RuntimeError(f"compiling {call} failed:\n{done.stderr[-4000:]}")
        return read_dump(Path(dump))


def read_dump(dump: Path) -> dict[str, int]:
    """The resources in the compiler's dump of one kernel."""
    (ptxas,), (ptx,), (memory,) = (
        [path.read_text() for path in dump.glob(pattern)]
        for pattern in ("*.ptxas", "*.ptx", "*.resources.txt")
    )
    spills = re.findall(r"stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", ptxas)
    copies = re.findall(r"cp\.async\.bulk\.tensor\.(\d)d\.shared::c", ptx)
    return {
        "registers": int(re.findall(r"Used (\d+) registers", ptxas)[0]),
        "spill_bytes": sum(map(int, spills[0])),
        "stack_bytes": int(re.findall(r"(\d+) bytes stack frame", ptxas)[0]),
        "smem_bytes": int(re.findall(r"(\d+)", memory)[0]),
        "wgmma": len(re.findall(r"wgmma\.mma_async", ptx)),
        "serialized_wgmma": len(re.findall(r"wgmma.*serialized", ptxas)),
        "loads": len(copies),
        "load_rank": max(map(int, copies), default=0),
        "stores": len(re.findall(r"cp\.async\.bulk\.tensor\.\dd\.global", ptx)),
    }


def lower_and_compile(call: Call) -> Any:
    """The compiled program of one call for an H200."""
    import jax
    from jax.experimental import topologies
    from jax.sharding import NamedSharding, PartitionSpec

    from gna_jax.device import KNOWN_DEVICES
    from gna_jax.neighborhood import Neighborhood
    from gna_jax.problem import Operands, describe
    from gna_jax.tiling import Tiles
    from pallas_kernels import hopper_forward, limits

    topology = topologies.get_topology_desc(platform="cuda", target_config=H200, topology="1x1x1")
    mesh = topologies.make_mesh(topology, (1,), ("x",))
    heads = call.kv_heads * call.heads_per_kv, call.kv_heads, call.kv_heads
    arrays = [
        jax.ShapeDtypeStruct(
            (call.batch, *call.layout, n, call.head_dim),
            call.dtype,
            sharding=NamedSharding(mesh, PartitionSpec()),
        )
        for n in heads
    ]
    operands = Operands(*arrays)
    rule = Neighborhood.of(
        len(call.layout),
        window_size=call.window_size,
        stride=call.stride,
        dilation=call.dilation,
        is_causal=call.is_causal,
    )
    device = KNOWN_DEVICES["h200"]
    problem = describe(operands, rule, scale=None, precision=None, device=device)
    tiles = Tiles(q=call.q_tile, kv=call.kv_tile)
    reason = limits.supports(problem, tiles)
    if reason is not None:
        raise NotImplementedError(reason)
    run = lambda operands: hopper_forward.forward(problem, operands, tiles)
    return jax.jit(run).trace(operands).lower().compile()


if __name__ == "__main__":
    lower_and_compile(Call(**json.loads(sys.argv[1])))
