"""How long a simulated call would take on a device: a roofline over the exact counts. Predictions, never measurements.

A GPU kernel is persistent: tiles, heavy first, go to whichever SM is free next. On an SM a tile takes

    visits * max(matrix products / efficiency, exponentials) + masked visits * mask + prologue and epilogue

because products of one visit run beside the exponentials of another, while masks stand between the products of one visit. The
kernel takes the longest of its busiest SM, its reads from L2 and its traffic with memory, after its launch (`roofline`, with the
rates of `devices`). On a CPU the xla backend's own prediction is asked (`query_box_cost`).
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from gna_jax.device import DeviceSpec, resolve_device
from gna_jax.neighborhood import WHOLE_GROUP, Neighborhood
from gna_jax.problem import Problem
from gna_jax.simulator import roofline
from gna_jax.simulator.devices import DeviceRates, device_rates
from gna_jax.simulator.query_box_cost import Axes, choose_tiles, predicted_time
from gna_jax.simulator.query_boxes import axis_outline
from gna_jax.simulator.roofline import Call, Direction, Kernel, Masks
from gna_jax.simulator.simulation import Simulation, layout_of

FORWARD_PRODUCTS = 2
"""Q K^T and P V."""
FUSED_BACKWARD_PRODUCTS = 5
"""Q K^T, dO V^T, and one for each of dQ, dK and dV: what the useful work of a backward is counted with."""
DQ_PRODUCTS = 3
"""The same in kernels without atomics: Q K^T, dO V^T and dQ in the first."""
WIDEST_SHARED_HEAD = 128
"""Up to this head dim one kernel has room for the sums of both dK and dV."""


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Predicted time of one call. `print` it.

    Attributes:
      device: kind of device.
      direction: `"forward"` or `"backward"`.
      seconds: of all its kernels.
      kernel_seconds: of the kernels that walk tiles: the forward, or dQ and then dK with dV, or dK and dV apart. On a CPU equal
        to `seconds`.
      resources: seconds that each resource would take alone and perfectly balanced: `mma` (products), `exp`, `mask`, `l2`, `hbm`
        (memory), `launch` (starting kernels; prologue and epilogue of tiles). On a CPU they are parts of `seconds`.
      waves: tiles per SM; 0 on a CPU.
      wave_loss: share of the SMs' time that is spent waiting for the busiest SM; 0 on a CPU.
      useful_flops: flops of the attended pairs alone: 4, backward 10, per pair and head dim.
      computed_flops: flops of all products, with masked pairs, padding and what a backward computes twice.
    """

    device: str
    direction: Direction
    seconds: float
    kernel_seconds: tuple[float, ...]
    resources: dict[str, float] = dataclasses.field(hash=False)
    waves: float
    wave_loss: float
    useful_flops: int
    computed_flops: int

    @property
    def bound(self) -> str:
        """The resource that would take longest alone."""
        return max(self.resources, key=lambda name: self.resources[name])

    @property
    def useful_tflops(self) -> float:
        """Useful flops per second, in 1e12."""
        return self.useful_flops / self.seconds / 1e12

    def __str__(self) -> str:
        """A few lines for people."""
        parts = ", ".join(f"{name} {value * 1e3:.3g}" for name, value in self.resources.items())
        lines = [
            f"{self.direction} on {self.device}: {self.seconds * 1e3:.4g} ms predicted, bound by {self.bound}",
            f"  each alone, ms   {parts}",
            f"  TFLOP/s          {self.useful_tflops:.4g} useful,"
            f" {self.computed_flops / self.seconds / 1e12:.4g} computed",
        ]
        if self.waves:
            waiting = f"{self.wave_loss:.1%} of SM time lost waiting"
            lines.append(f"  waves            {self.waves:.2f} tiles per SM, {waiting}")
        return "\n".join(lines)


def predict(
    simulation: Simulation,
    *,
    batch: int = 1,
    heads: int,
    kv_heads: int | None = None,
    head_dim: int,
    dtype: str = "bfloat16",
    device: str | DeviceSpec | None,
    direction: Direction = "forward",
    masks: Masks = "shell",
) -> Prediction:
    """Predicted time of a simulated rule with its tiles.

    The backward is the two deterministic kernels, dQ and then dK with dV: seven products, at the forward's efficiency. With head
    dims above 128 dK and dV have a kernel each, and products are eight.

    Args:
      simulation: rule, layout, tiles and additional keys.
      batch, heads, kv_heads, head_dim: of the call; `kv_heads` of None equals `heads`.
      dtype: of queries, keys and values. float32 runs as tf32 on GPUs.
      device: as in `gna_jax.explain`: a name, a `DeviceSpec`, or None for the default device.
      direction: `"forward"` or `"backward"`.
      masks: `"shell"`: only visits with a masked pair pay for a mask. `"all"`: as NATTEN's kernels, all visits do, and
        a dearer one, unless the whole problem is fully block-sparse. The CPU has only one way.

    >>> from gna_jax.simulator import simulate
    >>> flux = simulate((256, 256), window_size=80, stride=16, q_tile=16, kv_tile=(16, 8))
    >>> predict(flux, heads=24, head_dim=128, device="b200").bound
    'mma'

    Raises:
      ValueError: for a device, dtype, direction, mask or number of heads that is not known or legal.
    """
    call = Call.of(batch, heads, kv_heads, head_dim, dtype, direction)
    roofline.check_choice("masks", masks, ("shell", "all"))
    spec = resolve_device(device)
    useful = _useful_flops(simulation.attended_pairs, call)
    if spec.platform == "cpu":
        rule, extra = simulation.neighborhood, simulation.additional_keys
        problem = _problem(rule, simulation.layout, extra, call, spec)
        # Of tiles that a caller names, the xla backend always keeps those at the edges apart.
        return _on_cpu(problem, tuple((size, True) for size in simulation.tiles.q), call, useful)
    on = device_rates(spec)
    return _on_gpu(_kernels_of(simulation, call, on), call, on, masks, useful)


def predict_dense(
    layout: int | Sequence[int],
    *,
    additional_keys: int = 0,
    batch: int = 1,
    heads: int,
    kv_heads: int | None = None,
    head_dim: int,
    dtype: str = "bfloat16",
    device: str | DeviceSpec | None,
    direction: Direction = "forward",
) -> Prediction:
    """Predicted time of good dense attention (cuDNN, FlashAttention) of the same tokens; the CPU's is the xla backend's.

    Its backward is one kernel with five products. Arguments and errors as `predict`.

    >>> f"{predict_dense(65536, heads=24, head_dim=128, device='h100').seconds:.3f} s; cuDNN took 0.097 s"
    '0.084 s; cuDNN took 0.097 s'
    """
    call = Call.of(batch, heads, kv_heads, head_dim, dtype, direction)
    layout = layout_of(layout)
    if additional_keys < 0:
        raise ValueError(
            f"additional_keys must not be negative; got additional_keys={additional_keys}; use 0 for none"
        )
    spec = resolve_device(device)
    tokens = math.prod(layout)
    useful = _useful_flops(tokens * (tokens + additional_keys), call)
    if spec.platform == "cpu":
        whole = Neighborhood.of(len(layout), window_size=WHOLE_GROUP)
        problem = _problem(whole, layout, additional_keys, call, spec)
        return _on_cpu(problem, choose_tiles(problem, direction == "backward"), call, useful)
    on = device_rates(spec)
    rows, columns = on.dense_tile
    visits = -(-(tokens + additional_keys) // columns)
    is_forward = direction == "forward"
    kernel = Kernel(
        kinds=np.array([[visits, 0, -(-tokens // rows)]]),
        rows=rows,
        columns=columns,
        products=FORWARD_PRODUCTS if is_forward else FUSED_BACKWARD_PRODUCTS,
        efficiency=on.forward_efficiency if is_forward else on.backward_efficiency,
        queries=tokens,
        keys=tokens + additional_keys,
        query_tensors=2 if is_forward else 3,
        key_tensors=2 if is_forward else 4,
        reused=tokens + additional_keys,
    )
    return _on_gpu([kernel], call, on, "shell", useful)


def key_gradient_products(head_dim: int) -> tuple[int, ...]:
    """Products of each kernel that sums up dK and dV: Q K^T and dV, dO V^T and dK; apart, both compute Q K^T."""
    return (4,) if head_dim <= WIDEST_SHARED_HEAD else (3, 2)


def _useful_flops(pairs: int, call: Call) -> int:
    products = FORWARD_PRODUCTS if call.direction == "forward" else FUSED_BACKWARD_PRODUCTS
    return 2 * products * pairs * call.head_dim * call.heads * call.batch


def _kernels_of(simulation: Simulation, call: Call, on: DeviceRates) -> list[Kernel]:
    extra = simulation.additional_tiles

    def kernel(products: int, query_tensors: int, key_tensors: int, inverse: bool) -> Kernel:
        counts = simulation.backward if inverse else simulation.forward
        kinds = [
            (visits + (0 if inverse else extra), visits - full, tiles)
            for (visits, full), tiles in counts.histogram().items()
        ]
        if inverse and extra:
            kinds.append((simulation.forward.tiles, 0, extra))
        return Kernel(
            kinds=np.array(kinds),
            rows=counts.tile_elements,
            columns=counts.visited_elements,
            products=products,
            efficiency=on.forward_efficiency,
            queries=simulation.tokens,
            keys=simulation.tokens + simulation.additional_keys,
            query_tensors=query_tensors,
            key_tensors=key_tensors,
            reused=_reused(simulation, inverse),
            visits_queries=inverse,
        )

    if call.direction == "forward":
        return [kernel(FORWARD_PRODUCTS, 2, 2, inverse=False)]  # Q, O; K, V
    # Q, dO; K, V and what is summed up.
    products = key_gradient_products(call.head_dim)
    key_tensors = (4,) if len(products) == 1 else (3, 3)
    return [
        kernel(DQ_PRODUCTS, 3, 2, inverse=False),  # Q, dO, dQ; K, V
        *(kernel(p, 2, k, inverse=True) for p, k in zip(products, key_tensors, strict=True)),
    ]


def _reused(simulation: Simulation, inverse: bool) -> int:
    """Tokens of one dilation group that tiles in raster order come back to: what a tile spans of axis 0, all of the others."""
    counts = simulation.backward if inverse else simulation.forward
    tiles = simulation.tiles
    visited = tiles.q if inverse or tiles.kv is None else tiles.kv
    axes = zip(simulation.layout, simulation.neighborhood.dilation, strict=True)
    group = [-(-length // dilation) for length, dilation in axes]
    span = min(group[0], counts.axes[0].worst * visited[0])
    return span * math.prod(group[1:]) + simulation.additional_keys


def _on_gpu(
    kernels: list[Kernel], call: Call, on: DeviceRates, masks: Masks, useful: int
) -> Prediction:
    resources: dict[str, float] = {}
    of_kernels: list[float] = []
    busy = capacity = waves = computed = 0.0
    for kernel in kernels:
        parts, per_tile = roofline.kernel_parts(kernel, call, on, masks)
        weight, count = roofline.merged_kinds(
            per_tile, kernel.kinds[:, 2] * call.batch * call.heads
        )
        busiest = roofline.busiest_sm(weight, count, on.spec.num_sms)
        of_kernels.append(roofline.LAUNCH_SECONDS + max(busiest, parts["l2"], parts["hbm"]))
        busy += float(weight @ count)
        capacity += busiest * on.spec.num_sms
        waves += int(count.sum()) / on.spec.num_sms
        visits = int(kernel.kinds[:, 0] @ kernel.kinds[:, 2]) * call.batch * call.heads
        computed += visits * kernel.rows * kernel.columns * kernel.products * 2 * call.head_dim
        resources = {name: resources.get(name, 0.0) + part for name, part in parts.items()}
    seconds = sum(of_kernels)
    if call.direction == "backward":
        # delta = sum of O * dO per query, before the others.
        size = call.head_dim * call.itemsize
        delta = call.batch * call.heads * kernels[0].queries * (2 * size + roofline.STATISTIC_BYTES)
        resources["hbm"] += delta / (on.hbm_bandwidth * roofline.HBM_SHARE)
        resources["launch"] += roofline.LAUNCH_SECONDS
        seconds += roofline.LAUNCH_SECONDS + delta / (on.hbm_bandwidth * roofline.HBM_SHARE)
    return Prediction(
        device=on.spec.kind,
        direction=call.direction,
        seconds=seconds,
        kernel_seconds=tuple(of_kernels),
        resources=resources,
        waves=waves,
        wave_loss=1 - busy / capacity,
        useful_flops=useful,
        computed_flops=int(computed),
    )


def _problem(
    rule: Neighborhood, layout: tuple[int, ...], additional_keys: int, call: Call, spec: DeviceSpec
) -> Problem:
    return Problem(
        neighborhood=rule,
        global_layout=layout,
        query_layout=layout,
        key_layout=layout,
        batch=call.batch,
        query_heads=call.heads,
        kv_heads=call.kv_heads,
        head_dim=call.head_dim,
        value_dim=call.head_dim,
        dtype=np.dtype(call.dtype),
        scale=1.0,
        is_slab=False,
        num_additional=additional_keys,
        has_additional_lengths=False,
        has_bias=False,
        precision=None,
        device=spec,
    )


def _on_cpu(problem: Problem, tiles: Axes, call: Call, useful: int) -> Prediction:
    """The xla backend's own prediction; its parts follow one another, so their sum is the time."""
    is_backward = call.direction == "backward"
    time = predicted_time(problem, tiles, is_backward)
    parts = {
        "mma": time.products,
        "exp": time.scores,
        "mask": time.masks,
        "l2": 0.0,
        "hbm": time.moves,
        "launch": time.steps,
    }
    axes = zip(problem.neighborhood.axes, problem.global_layout, tiles, strict=True)
    pairs = 1.0
    for axis, length, tile in axes:
        outline = axis_outline(axis, length, *tile)
        sizes = zip(outline.rows, outline.count, outline.box, strict=True)
        pairs *= sum(rows * count * box for rows, count, box in sizes)
    pairs += math.prod(problem.global_layout) * problem.num_additional
    products = FUSED_BACKWARD_PRODUCTS if is_backward else FORWARD_PRODUCTS
    return Prediction(
        device=problem.device.kind,
        direction=call.direction,
        seconds=time.total * 1e-9,
        kernel_seconds=(time.total * 1e-9,),
        resources={name: part * 1e-9 for name, part in parts.items()},
        waves=0.0,
        wave_loss=0.0,
        useful_flops=useful,
        computed_flops=int(2 * products * pairs * call.head_dim * call.batch * call.heads),
    )


def duration(seconds: float) -> str:
    """Seconds for people: three digits, in ms below a second.

    >>> duration(0.01234), duration(192.4)
    ('12.3 ms', '192 s')
    """
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 100 else f"{seconds:,.0f} s"
