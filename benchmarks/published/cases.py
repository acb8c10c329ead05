"""The problems of `benchmarks/attention.py`, most important first, and their arithmetic: useful flops, bounds, predictions, targets.

Layouts, heads and sources stand in `gna_jax.simulator.presets`. Nothing is run here.
"""

import dataclasses
import math

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
      targets: useful TFLOP/s that gna is to reach on an H200, by direction; empty where none is set.
    """

    name: str
    layout: tuple[int, ...]
    neighborhood: Neighborhood
    batch: int
    heads: int
    head_dim: int
    dtype: str
    targets: dict[str, float] = dataclasses.field(default_factory=dict, hash=False)

    @property
    def title(self) -> str:
        """As it stands in the tables."""
        rule = self.neighborhood
        stride = f" s{by(rule.stride)}"
        heads = f"{self.heads} x {self.head_dim}"
        batch = f", batch {self.batch}" if self.batch != 1 else ""
        return f"{by(self.layout)} w{by(rule.window_size)}{stride}, {heads} {self.dtype}{batch}"

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

    def explain(self, implementation: str) -> gna_jax.Explanation:
        """What gna does with it on the default device."""
        shape = (self.batch, *self.layout, self.heads, self.head_dim)
        array = jax.ShapeDtypeStruct(shape, self.dtype)
        rule = dataclasses.asdict(self.neighborhood)
        return gna_jax.explain(array, array, array, **rule, implementation=implementation)

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


BLOCK_SPARSE = {FORWARD: 620.0, BACKWARD: 400.0}
"""Useful TFLOP/s where no tile needs a mask. NATTEN's Hopper kernel: 628 to 651 forward, 480 to 500 with its permutation."""
BEST_PEER = 0.9
"""Share of the best peer's speed below which gna never falls."""


def _preset(name: str, preset: str, rule: int, **targets: float) -> Case:
    one = PRESETS[preset]
    return Case(
        name,
        one.layout,
        one.rules[rule].neighborhood,
        one.batch,
        one.heads,
        one.head_dim,
        one.dtype,
        targets,
    )


PUBLISHED = {
    case.name: case
    for case in (
        _preset("hunyuan-s16x8x8", "hunyuan-91", 6, **BLOCK_SPARSE),
        _preset("flux-s16", "flux-4k", 2, **BLOCK_SPARSE),
        _preset("hunyuan-s1", "hunyuan-91", 0, forward=340.0),  # NATTEN on an H100: 186
        _preset("1d-s1", "1d-32k", 0),
        _preset("nat-1", "nat-1", 0),
        _preset("cosmos-s1", "cosmos-89", 0),
        _preset("hunyuan-s2x8x8", "hunyuan-91", 5, **BLOCK_SPARSE),
        _preset("flux-s1", "flux-4k", 0),
    )
}
"""Every case by its name, most important first: a run that ends early leaves out the last."""
SUITES = {"published": PUBLISHED}
