"""The page docs/predictions.md: times that others published, and what the cost model says of them.

`python -m gna_jax.simulator.predictions > docs/predictions.md` makes it anew; a test compares the two.
"""

import dataclasses

from gna_jax.neighborhood import Neighborhood, by
from gna_jax.simulator.cost import Prediction, predict, predict_dense
from gna_jax.simulator.presets import PRESETS
from gna_jax.simulator.roofline import Masks
from gna_jax.simulator.simulation import Simulation
from gna_jax.tiling import Tiles


@dataclasses.dataclass(frozen=True)
class PublishedTime:
    """One kernel time that others measured. Forward, batch 1, without permuting tokens.

    Attributes:
      device: name in `RATES`.
      case: name of a preset.
      seconds: time of the kernel.
      stride: of the preset's first window; None for dense attention.
      tiles: of the kernel, as far as published; None for dense attention.
    """

    device: str
    case: str
    seconds: float
    stride: int | tuple[int, ...] | None = None
    tiles: Tiles | None = None


def _runs(device: str, case: str, tiles: Tiles, **milliseconds: float) -> tuple[PublishedTime, ...]:
    strides = {
        "dense": None,
        "sliding": 1,
        "block_sparse": {"flux-4k": 16, "hunyuan-91": (16, 8, 8), "1d-32k": 256}[case],
        "blocked": 2048,
    }
    return tuple(
        PublishedTime(device, case, ms / 1e3, strides[name], None if name == "dense" else tiles)
        for name, ms in milliseconds.items()
    )


_SQUARE, _HALF = Tiles(q=(16, 16), kv=(16, 8)), Tiles(q=(16, 8), kv=(16, 8))
_CUBE, _THIN = Tiles(q=(4, 8, 8), kv=(2, 8, 8)), Tiles(q=(2, 8, 8), kv=(2, 8, 8))
# fmt: off
PUBLISHED = (
    *_runs("b200", "flux-4k", _SQUARE, dense=43.313, sliding=8.692, block_sparse=4.114),
    *_runs("b200", "hunyuan-91", _CUBE, dense=135.265, sliding=42.243, block_sparse=13.010),
    *_runs("b200", "1d-32k", Tiles(q=(256,), kv=(128,)),
           dense=0.424766, sliding=0.058111, block_sparse=0.037888, blocked=0.038240),
    *_runs("h100", "flux-4k", _HALF, dense=97.435, sliding=16.201, block_sparse=7.914),
    *_runs("h100", "hunyuan-91", _THIN, dense=283.327, sliding=79.043, block_sparse=23.359),
    *_runs("h100", "1d-32k", Tiles(q=(128,), kv=(128,)),
           dense=0.787392, sliding=0.094848, block_sparse=0.062687, blocked=0.059264),
)
# fmt: on
"""NATTEN 0.20 and cuDNN of mid-2025, fp16: NATTEN repository, documentation, sample outputs of its profiler."""


INTRODUCTION = """\
# Predicted against published times

The [cost model](../gna_jax/simulator/cost.py) against times that others published: NATTEN 0.20 and cuDNN of mid-2025 on H100 and B200,
forward, fp16, tokens already permuted. **They are figures of other kernels, on machines that nobody here has measured**; no
kernel of this repository is in the table. *Dense* rows are where each device's one efficiency comes from, so their errors show its
spread and prove nothing. No constant was fitted to the other rows, but they are no blind test either: that a mask adds to a
visit's time, and that its selects alone are counted, was settled after looking at the rows of stride 1.

Long runs are slower per visit than short ones (1d-32k), most likely because full load lowers the clock; the model has one clock.

NATTEN masks every tile unless the whole problem is block-sparse, and *predicted* does the same (`masks="all"`). Kernels that mask
only the tiles that need it would take *shell only* (`masks="shell"`), with the same tiles.

Made by `python -m gna_jax.simulator.predictions`.

"""
HEADER = (
    *("device", "case", "kernel", "tiles Q / KV", "published ms", "predicted ms", "error", "bound"),
    *("SM time lost", "shell only ms"),
)


def predictions_page() -> str:
    """The page docs/predictions.md."""
    rows = [HEADER, ("---",) * len(HEADER), *map(_row, PUBLISHED)]
    return INTRODUCTION + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def predict_published(run: PublishedTime, masks: Masks = "all") -> Prediction:
    """The cost model's time for a published run."""
    preset = PRESETS[run.case]
    shapes = {"heads": preset.heads, "head_dim": preset.head_dim, "dtype": "float16"}
    if run.tiles is None:
        return predict_dense(preset.layout, device=run.device, **shapes)
    rank = len(preset.layout)
    window = preset.rules[0].neighborhood.window_size
    rule = Neighborhood.of(rank, window_size=window, stride=run.stride or 1)
    simulation = Simulation.of(rule, preset.layout, run.tiles)
    return predict(simulation, device=run.device, masks=masks, **shapes)


def _row(run: PublishedTime) -> tuple[str, ...]:
    one = predict_published(run)
    kernel, tiles, shell = "dense", "", ""
    if run.tiles is not None:
        stride = run.stride if isinstance(run.stride, tuple) else (run.stride,)
        kernel = f"stride {by(stride)}"
        tiles = f"{by(run.tiles.q)} / {by(run.tiles.kv or ())}"
        shell = f"{predict_published(run, 'shell').seconds * 1e3:.4g}"
    times = f"{run.seconds * 1e3:.4g}", f"{one.seconds * 1e3:.4g}"
    error, lost = f"{one.seconds / run.seconds - 1:+.0%}", f"{one.wave_loss:.0%}"
    return run.device, run.case, kernel, tiles, *times, error, one.bound, lost, shell


if __name__ == "__main__":
    print(predictions_page(), end="")
