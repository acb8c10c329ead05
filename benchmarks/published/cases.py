"""The problems of `benchmarks/attention.py`, most important first, and their arithmetic: useful flops, bounds, predictions, targets.

Layouts, heads and sources stand in `gna_jax.simulator.presets`. Nothing is run here.
"""

import dataclasses
import math
from typing import Any

import jax

import gna_jax
from gna_jax.device import DeviceSpec
from gna_jax.neighborhood import Neighborhood, by
from gna_jax.simulator import Simulation, predict, predict_dense
from gna_jax.simulator.counts import attended_pairs
from gna_jax.simulator.devices import is_known
from gna_jax.simulator.presets import PRESETS
from gna_jax.tiling import Tiles

FORWARD, BACKWARD = "forward", "backward"
DIRECTIONS = (FORWARD, BACKWARD)

FLOPS_PER_PAIR = {FORWARD: 4, BACKWARD: 10}
"""Times the head dim: two products forward; five backward, as FlashAttention counts it, whatever a kernel computes twice."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One self-attention problem.

    Attributes:
      name: what `--cases` takes.
      layout, neighborhood, batch, heads, head_dim, dtype: of the call; as many key/value heads as heads.
      has_bias: whether the call has a relative position bias.
      targets: useful TFLOP/s to reach on an H200, by implementation and direction; empty where none is set.
      floor_targets: the most times the memory floor that a forward is to take, by implementation.
    """

    name: str
    layout: tuple[int, ...]
    neighborhood: Neighborhood
    batch: int
    heads: int
    head_dim: int
    dtype: str
    has_bias: bool = False
    targets: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict, hash=False)
    floor_targets: dict[str, float] = dataclasses.field(default_factory=dict, hash=False)

    @property
    def title(self) -> str:
        """As it stands in the tables."""
        rule = self.neighborhood
        stride = f" s{by(rule.stride)}"
        heads = f"{self.heads} x {self.head_dim}"
        batch = f", batch {self.batch}" if self.batch != 1 else ""
        bias = ", bias" if self.has_bias else ""
        window = f"{by(self.layout)} w{by(rule.window_size)}{stride}"
        return f"{window}, {heads} {self.dtype}{batch}{bias}"

    @property
    def tokens(self) -> int:
        """Tokens of the layout."""
        return math.prod(self.layout)

    @property
    def pairs(self) -> int:
        """Query-key pairs that attend, per batch entry and head."""
        return attended_pairs(self.neighborhood, self.layout)

    @property
    def flop_bound(self) -> float:
        """Most that skipping pairs can gain over dense attention: all pairs over those that attend."""
        return self.tokens**2 / self.pairs

    def flops(self, direction: str, is_dense: bool = False) -> int:
        """Useful flops of a call: of the pairs that attend alone, which are all of them in dense attention."""
        pairs = self.tokens**2 if is_dense else self.pairs
        return FLOPS_PER_PAIR[direction] * pairs * self.head_dim * self.heads * self.batch

    @property
    def bias_shape(self) -> tuple[int, ...] | None:
        """`[heads, *(2 * window - 1)]`, or None where there is no bias."""
        if not self.has_bias:
            return None
        axes = zip(self.neighborhood.axes, self.layout, strict=True)
        return (self.heads, *(2 * axis.window_extent(length) - 1 for axis, length in axes))

    @property
    def forward_bytes(self) -> int:
        """That a forward cannot but move: query, key, value and out once, and lse in float32; a bias' table is nothing beside them."""
        of_a_row = 4 * self.head_dim * jax.numpy.dtype(self.dtype).itemsize + 4
        return self.batch * self.tokens * self.heads * of_a_row

    def explain(self, implementation: str) -> gna_jax.Explanation:
        """What gna does with it on the default device."""
        shape = (self.batch, *self.layout, self.heads, self.head_dim)
        array = jax.ShapeDtypeStruct(shape, self.dtype)
        options = dataclasses.asdict(self.neighborhood) | {"implementation": implementation}
        if self.bias_shape is not None:
            bias = jax.ShapeDtypeStruct(self.bias_shape, self.dtype)
            options["relative_position_bias"] = bias
        return gna_jax.explain(array, array, array, **options)

    def predicted_seconds(
        self, tiles: Tiles | None, direction: str, device: DeviceSpec
    ) -> float | None:
        """What the simulator says of a kernel with these tiles; None for a device or an implementation it does not know."""
        if tiles is None or tiles.kv is None or not is_known(device):
            return None
        shapes = [Tiles(q=tiles.q, kv=tiles.kv, dynamic=tiles.dynamic)]
        if direction == BACKWARD and tiles.backward_q is not None:
            back = Tiles(q=tiles.backward_q, kv=tiles.backward_kv, dynamic=tiles.dynamic)
            shapes.append(back)
        predictions = [
            predict(
                Simulation.of(self.neighborhood, self.layout, shape),
                direction=direction,
                device=device,
                **self._call(),
            )
            for shape in shapes
        ]
        if direction == FORWARD:
            return predictions[0].seconds
        # dQ walks as the forward does; dK and dV walk their own tiles.
        return predictions[0].kernel_seconds[0] + predictions[-1].kernel_seconds[1]

    def predicted_dense_seconds(self, direction: str, device: DeviceSpec) -> float | None:
        """What the simulator says of good dense attention of the same tokens."""
        if not is_known(device):
            return None
        dense = predict_dense(self.layout, direction=direction, device=device, **self._call())
        return dense.seconds

    def _call(self) -> dict:
        return {
            "batch": self.batch,
            "heads": self.heads,
            "head_dim": self.head_dim,
            "dtype": self.dtype,
        }


_HOPPER = {FORWARD: 620.0, BACKWARD: 400.0}
BLOCK_SPARSE = {"mosaic": _HOPPER, "cutlass": _HOPPER, "triton": {FORWARD: 350.0}}
"""Useful TFLOP/s where no tile needs a mask. NATTEN's Hopper kernel: 628 to 651 forward, 480 to 500 with its permutation."""
SLIDING = {"mosaic": {FORWARD: 340.0}, "cutlass": {FORWARD: 340.0}}
"""The same of stride 1 on HunyuanVideo's tokens. NATTEN on an H100: 186."""
AHEAD_OF_FLEX = ("triton",)
"""Implementations that are to be faster than torch's compiled flex_attention everywhere; `BEST_PEER` is for the others."""
BEST_PEER = 0.9
"""Share of the best peer's speed below which gna never falls."""


def _preset(name: str, preset: str, rule: int, **more: Any) -> Case:
    one = PRESETS[preset]
    return Case(
        name,
        one.layout,
        one.rules[rule].neighborhood,
        one.batch,
        one.heads,
        one.head_dim,
        one.dtype,
        **more,
    )


PUBLISHED = {
    case.name: case
    for case in (
        _preset("hunyuan-s16x8x8", "hunyuan-91", 6, targets=BLOCK_SPARSE),
        _preset("flux-s16", "flux-4k", 2, targets=BLOCK_SPARSE),
        _preset("hunyuan-s1", "hunyuan-91", 0, targets=SLIDING),
        _preset("1d-s1", "1d-32k", 0),
        _preset("nat-1", "nat-1", 0, floor_targets={"triton": 2.0}),
        _preset("nat-1-bias", "nat-1", 0, has_bias=True),
        _preset("cosmos-s1", "cosmos-89", 0),
        _preset("hunyuan-s2x8x8", "hunyuan-91", 5, targets=BLOCK_SPARSE),
        _preset("flux-s1", "flux-4k", 0),
    )
}
"""Every case by its name, most important first: a run that ends early leaves out the last."""
SUITES = {"published": PUBLISHED}
