"""A GPU that is not there, described to XLA's compiler: the text of a GpuTargetConfigProto.

The numbers of a device are those of `gna_jax.device` and of the simulator's rates; what is written here are limits that all GPUs
of compute capability 9 and 10 share (CUDA C++ programming guide, "Technical Specifications per Compute Capability").
"""

from gna_jax.device import DeviceSpec
from gna_jax.simulator.devices import device_rates

CUDA = "13.0.0"
"""The CUDA release whose PTX is written."""
CUDNN = 9, 10
"""The compiler asks for a release; no kernel here uses it."""
MEMORY_BYTES = 80_000_000_000
"""Of the smallest device. It decides about programs that fill the memory, and a single kernel never does."""
LARGEST_GRID = 2**31 - 1, 65535, 65535
LARGEST_BLOCK = 1024, 1024, 64

_TARGET = """
gpu_device_info {{
  name: "{kind}"
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: ACCELERATED_FEATURES }}
  core_count: {num_sms}
  clock_rate_ghz: {clock_ghz}
  memory_bandwidth: {bandwidth}
  device_memory_size: {memory}
  l2_cache_size: {l2}
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {smem}
  shared_memory_per_core: {smem_per_sm}
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  fpus_per_core: 128
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  block_dim_limit_x: {grid[0]} block_dim_limit_y: {grid[1]} block_dim_limit_z: {grid[2]}
  thread_dim_limit_x: {block[0]} thread_dim_limit_y: {block[1]} thread_dim_limit_z: {block[2]}
  driver_version: "{cuda}"
  runtime_version: "{cuda}"
  compile_time_toolkit_version: "{cuda}"
  dnn_version: "{cudnn[0]}.{cudnn[1]}.0"
}}
platform_name: "CUDA"
device_description_str: "{kind}"
runtime_version {{ major: 13 }}
dnn_version_info {{ major: {cudnn[0]} minor: {cudnn[1]} }}
"""


def target_config(device: DeviceSpec) -> str:
    """GpuTargetConfigProto of a device of compute capability 9 or 10, with the instructions of its architecture alone ("a").

    Raises:
      ValueError: for a device that the simulator has no rates of.
    """
    major, minor = _capability(device)
    rates = device_rates(device)
    return _TARGET.format(
        kind=device.kind,
        major=major,
        minor=minor,
        num_sms=rates.spec.num_sms,
        clock_ghz=rates.clock / 1e9,
        bandwidth=int(rates.hbm_bandwidth),
        memory=MEMORY_BYTES,
        l2=rates.l2_bytes,
        smem=rates.spec.smem_bytes,
        smem_per_sm=rates.spec.smem_bytes + 1024,  # the runtime keeps 1 KiB of every block's
        grid=LARGEST_GRID,
        block=LARGEST_BLOCK,
        cuda=CUDA,
        cudnn=CUDNN,
    )


def architecture(device: DeviceSpec) -> str:
    """Name of the instruction set, as `ptxas` spells it.

    >>> from gna_jax.device import KNOWN_DEVICES
    >>> architecture(KNOWN_DEVICES["b200"])
    'sm_100a'
    """
    major, minor = _capability(device)
    return f"sm_{major}{minor}a"


def _capability(device: DeviceSpec) -> tuple[int, int]:
    if device.compute_capability is None:
        raise ValueError(f"kernels are compiled for CUDA GPUs; got {device.kind}: name one")
    return device.compute_capability
