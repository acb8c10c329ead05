"""What GPUs do per cycle and per second, with sources. How long a kernel takes with these rates: `roofline`.

The CPU's rates are those of the xla backend, in `query_box_cost`.
"""

import dataclasses
import re

from gna_jax.device import KNOWN_DEVICES, DeviceSpec


@dataclasses.dataclass(frozen=True)
class DeviceRates:
    """What one GPU does per cycle and SM, and its memories per second.

    Attributes:
      spec: number of SMs and shared memory of one block [B].
      clock: cycles per second at which the vendor states the peak of the matrix units [Hz].
      mma_16bit, mma_tf32: flops of the matrix units with bf16 or fp16, and with tf32 operands, dense [flop/cycle/SM].
      mma_rows: rows that a matrix instruction computes at full rate; fewer take as long.
      exponentials: `2**x` of the special function units [1/cycle/SM].
      selects: compares, selects, minima and maxima of 32 bits [1/cycle/SM].
      l2_bandwidth: reads from the L2 cache, sustained [B/s].
      l2_bytes: size of the L2 cache [B].
      hbm_bandwidth: nominal bandwidth of the device's memory [B/s]; `roofline.HBM_SHARE` of it is sustained.
      dense_tile: queries and keys of a tile of good dense attention.
      forward_efficiency: share of the matrix units' peak that dense forward attention reaches on long sequences.
      backward_efficiency: the same of the fused dense backward with five products.
    """

    spec: DeviceSpec
    clock: float
    mma_16bit: int
    mma_tf32: int
    mma_rows: int
    exponentials: int
    selects: int
    l2_bandwidth: float
    l2_bytes: int
    hbm_bandwidth: float
    dense_tile: tuple[int, int]
    forward_efficiency: float
    backward_efficiency: float


_MIB = 1 << 20
# Of all devices: exponentials and selects per cycle are those of the CUDA C++ programming guide, table "Throughput of native
# arithmetic instructions". mma_* is the vendor's dense peak / (SMs * clock). L2 sizes and memory bandwidths are data sheets'.
# Softmax needs some 4 more operations per score (scale, maximum, sum, conversion): the 64 or 128 lanes of an SM take at most
# as long for them as the special function units for the exponential, and run beside it, so they never bind.
_HOPPER = DeviceRates(
    spec=KNOWN_DEVICES["h100"],
    clock=1.83e9,  # 989 TFLOP/s
    mma_16bit=4096,
    mma_tf32=2048,
    mma_rows=64,  # wgmma
    exponentials=16,
    selects=64,
    # Assumed: the vendor says nothing, and third parties between 5.5e12 and 7.9e12 (arXiv 2402.13499, table 5: 4472 B/cycle).
    # NATTEN's block-sparse run of hunyuan-91 needs 4.9e12, so it is not less.
    l2_bandwidth=5.6e12,
    l2_bytes=50 * _MIB,
    hbm_bandwidth=3.35e12,
    dense_tile=(128, 128),
    # 542 to 720 TFLOP/s per busy SM: the slowest and fastest dense run of `predictions.PUBLISHED`, its idle SMs apart; the middle, 631.
    # FlashAttention-3 and ThunderKittens publish 648 and 653.
    forward_efficiency=0.638,
    # FlashAttention-3: 500 TFLOP/s with 12k tokens and no mask (plot of ThunderKittens, whose own kernel has 553 to 568 there).
    backward_efficiency=0.51,
)
RATES = {
    "h100": _HOPPER,
    "h200": dataclasses.replace(
        _HOPPER,
        spec=KNOWN_DEVICES["h200"],
        hbm_bandwidth=4.8e12,
        # cuDNN 9.19 (cudnn-frontend 1.19, benchmark tables): 633 to 702 forward, 504 to 612 backward; middles over 989.
        forward_efficiency=0.675,
        backward_efficiency=0.565,
    ),
    "b200": DeviceRates(
        spec=KNOWN_DEVICES["b200"],
        clock=1.856e9,  # 2250 TFLOP/s
        mma_16bit=8192,
        mma_tf32=4096,
        mma_rows=128,  # tcgen05, one CTA
        exponentials=16,  # also the roofline of FlashAttention-4, arXiv 2603.05451
        selects=64,
        l2_bandwidth=11e12,  # a guess: twice the H100's, as two dies; no source. 1600 TFLOP/s of 256 queries ask for 6e12
        l2_bytes=126 * _MIB,
        hbm_bandwidth=8e12,
        dense_tile=(256, 128),
        # 1206 to 1496 TFLOP/s per busy SM: the slowest and fastest dense run of `predictions.PUBLISHED` (cuDNN of mid-2025); the middle,
        # 1351. Newer kernels are faster: FlashAttention-4 up to 1613, cuDNN 9.22 on GB200 up to 1783.
        forward_efficiency=0.60,
        # cuDNN 9.22 on GB200: 1254 to 1417 TFLOP/s of that device's 2500; lower half.
        backward_efficiency=0.52,
    ),
    "a100": DeviceRates(
        spec=KNOWN_DEVICES["a100"],
        clock=1.41e9,  # 312 TFLOP/s
        mma_16bit=2048,
        mma_tf32=1024,
        mma_rows=16,  # mma.m16n8k16
        exponentials=16,
        selects=64,
        l2_bandwidth=5.4e12,  # white paper: 5120 B/cycle = 7.2e12; third-party cp.async reads: 3840 B/cycle
        l2_bytes=40 * _MIB,
        hbm_bandwidth=2.039e12,  # 80 GB
        dense_tile=(128, 64),
        # FlashAttention-2, arXiv 2307.08691: up to 73 % of the peak forward, 63 % backward; a little less.
        forward_efficiency=0.70,
        backward_efficiency=0.60,
    ),
    "l40": DeviceRates(
        spec=KNOWN_DEVICES["l40"],
        clock=2.49e9,  # 181 TFLOP/s
        mma_16bit=512,
        mma_tf32=256,
        mma_rows=16,
        exponentials=16,
        selects=64,
        l2_bandwidth=4.8e12,  # third-party cp.async reads of the same architecture (RTX 4090): 1945 B/cycle
        l2_bytes=96 * _MIB,
        hbm_bandwidth=0.864e12,  # GDDR6
        dense_tile=(128, 64),
        # Assumed equal to the A100's: the same instructions and kernels.
        forward_efficiency=0.70,
        backward_efficiency=0.60,
    ),
}
"""Rates by the names of `gna_jax.device.KNOWN_DEVICES`."""


def is_known(spec: DeviceSpec) -> bool:
    """Whether `device_rates` knows the device."""
    return _name_of(spec) is not None


def _name_of(spec: DeviceSpec) -> str | None:
    words = re.findall(r"[a-z]+[0-9]+", spec.kind.lower())
    return next((word for word in words if word in RATES), None)


def device_rates(spec: DeviceSpec) -> DeviceRates:
    """Rates of the GPU whose name is a word of `spec.kind`, with the SMs and shared memory that `spec` knows.

    >>> device_rates(DeviceSpec("NVIDIA H100 80GB HBM3", "cuda", num_sms=114)).spec.num_sms
    114

    Raises:
      ValueError: for any other kind.
    """
    name = _name_of(spec)
    if name is None:
        raise ValueError(
            f"the cost model knows the devices {sorted([*RATES, 'cpu'])}; got device kind {spec.kind!r};"
            " name the most similar of them"
        )
    rates = RATES[name]
    known = dataclasses.replace(
        rates.spec,
        kind=spec.kind,
        num_sms=spec.num_sms or rates.spec.num_sms,
        smem_bytes=spec.smem_bytes or rates.spec.smem_bytes,
    )
    return dataclasses.replace(rates, spec=known)
