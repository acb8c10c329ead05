"""How many elements a kernel's tiles have on each kind of device, and why. Shapes are chosen in `tile_shapes`.

The numbers are those of attention kernels with head dim 128 in 16 bits. They say what a kernel's matrix units and memories ask
for; how well a budget does in time is the cost model's question.
"""

import dataclasses

from gna_jax.device import DeviceSpec, resolve_device


@dataclasses.dataclass(frozen=True)
class TileBudget:
    """Tile sizes of one kind of kernel.

    Attributes:
      name: kind of kernel.
      q_elements, kv_elements: elements of a Q and of a KV tile.
      dynamic: whether KV tiles start exactly where the window box starts.
      reason: why these.
    """

    name: str
    q_elements: int
    kv_elements: int
    dynamic: bool
    reason: str


BLACKWELL = TileBudget(
    "blackwell",
    q_elements=256,
    kv_elements=128,
    dynamic=True,
    reason="two 128-row accumulators in tensor memory share every KV tile; a TMA box of tokens may start at any token",
)
HOPPER = TileBudget(
    "hopper",
    q_elements=128,
    kv_elements=128,
    dynamic=True,
    reason="two warpgroups of 64 rows; two stages of K and V fit in 227 KiB; a TMA box of tokens may start at any token",
)
AMPERE = TileBudget(
    "ampere",
    q_elements=64,
    kv_elements=128,
    dynamic=True,
    reason="scores and output of 64 rows fit in registers; cp.async addresses every row by itself, so tiles start anywhere",
)
ADA = TileBudget(
    "ada",
    q_elements=64,
    kv_elements=64,
    dynamic=True,
    reason="as ampere, with two stages of K and V in 99 KiB of shared memory",
)
XLA = TileBudget(
    "xla",
    q_elements=64,
    kv_elements=1,
    dynamic=True,
    reason="the xla backend reads the box of keys of a Q tile whole: KV tiles of one key count it exactly",
)

_BY_CAPABILITY = {
    (8, 0): AMPERE,
    (8, 6): ADA,
    (8, 9): ADA,
    (9, 0): HOPPER,
    (10, 0): BLACKWELL,
    (10, 3): BLACKWELL,
    (12, 0): ADA,
    (12, 1): ADA,
}


def tile_budget(device: str | DeviceSpec | None = None) -> TileBudget:
    """The budget of a device: a name as in `gna_jax.explain`, a `DeviceSpec`, or None for the default device.

    A device without a kernel of its own has the budget of the xla backend.

    Raises:
      ValueError: for an unknown name.
      TypeError: for anything else.
    """
    capability = resolve_device(device).compute_capability
    return XLA if capability is None else _BY_CAPABILITY.get(capability, XLA)
