"""What the order of tiles costs: idle time of an H200's SMs under three schedules, counted, not measured.

    python benchmarks/tile_order.py

A thread block fills an SM. Blocks start in the order of the grid, each on the first SM that is free, as GPUs do it; a tile takes as
long as its visits and two more for its start and end. The kernels' choice is column "chosen" (`TilePlan.is_uneven`).
"""

import heapq
import math

import numpy as np
from rich.console import Console
from rich.table import Table

from gna_jax.device import KNOWN_DEVICES
from gna_jax.neighborhood import Neighborhood
from gna_jax.simulator import best_tiles
from gna_jax.tiling import key_walk

SMS = KNOWN_DEVICES["h200"].num_sms
START_AND_END = 2  # of a tile, in visits
VIDEO = {"layout": (30, 48, 80), "heads": 24, "window_size": (18, 24, 24)}
CASES = (
    {"layout": (32768,), "heads": 16, "window_size": 2048},
    {"layout": (32768,), "heads": 16, "window_size": 2048, "is_causal": True},
    {"layout": (4096,), "heads": 16, "window_size": -1, "is_causal": True},
    {"layout": (256, 256), "heads": 24, "window_size": 80},
    VIDEO,
    VIDEO | {"stride": (16, 8, 8)},
    VIDEO | {"is_causal": (True, False, False)},
    {"layout": (16, 44, 80), "heads": 32, "window_size": (16, 24, 16)},
)


def tile_costs(layout, rule):
    """Visits of every Q tile of one head, row-major, start and end included."""
    tiles = best_tiles(rule, layout, 128, 128, dynamic=True)
    costs = np.ones((), np.int64)
    for axis, length, q, kv in zip(rule.axes, layout, tiles.q, tiles.kv, strict=True):
        start = np.arange(0, length, q)
        walk = key_walk(axis, length, start, q_tile=q, kv_tile=kv, dynamic=True)
        costs = np.multiply.outer(costs, walk.num_visits)
    return costs + START_AND_END


def makespan(costs):
    """When the last SM is done, if each block takes the SM that is free first."""
    free = [0] * SMS
    for cost in costs:
        heapq.heapreplace(free, free[0] + int(cost))
    return max(free)


def schedules(costs, is_causal, heads):
    """Makespans: the natural order; as the kernels number tiles and heads; a fixed share of tiles per persistent block."""
    natural = np.tile(costs.ravel(), heads)
    chosen = natural
    if any(is_causal):
        late_first = tuple(slice(None, None, -1) if flag else slice(None) for flag in is_causal)
        chosen = np.repeat(costs[late_first].ravel(), heads)
    persistent = max(int(chosen[sm::SMS].sum()) for sm in range(SMS))
    return makespan(natural), makespan(chosen), persistent


def main():
    """Print the table."""
    columns = ("problem", "tiles", "lightest to heaviest", "natural", "chosen", "persistent")
    table = Table(*columns, title=f"time over perfectly balanced time, {SMS} SMs")
    for case in CASES:
        layout, heads = case["layout"], case["heads"]
        options = {name: case[name] for name in case if name not in ("layout", "heads")}
        rule = Neighborhood.of(len(layout), **options)
        costs = tile_costs(layout, rule)
        ideal = math.prod(costs.shape) * costs.mean() * heads / SMS
        times = schedules(costs, rule.is_causal, heads)
        words = f"{'x'.join(map(str, layout))} " + " ".join(f"{k}={v}" for k, v in options.items())
        table.add_row(
            words,
            str(costs.size * heads),
            f"{costs.min()} to {costs.max()}",
            *(f"{time / ideal:.3f}" for time in times),
        )
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
