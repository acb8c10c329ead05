"""The pictures of the documentation: one table, from which they can be drawn anew at any time."""

import os
import pathlib
from collections.abc import Callable

from gna_jax.pictures import kernel_timelines
from gna_jax.pictures.mask import mask_1d
from gna_jax.pictures.picture import Picture
from gna_jax.pictures.seen import window
from gna_jax.pictures.shard_halo import shards
from gna_jax.pictures.speedup import simulated_speedups, speedup_curve
from gna_jax.pictures.stride_groups import strides
from gna_jax.pictures.tile_walk import tile_map
from gna_jax.pictures.tile_work import work_map


def hunyuan_speedup() -> Picture:
    """HunyuanVideo (5 s of 720p) at the window of 91 % sparsity: the strides and Blackwell tiles of arXiv 2504.16922."""
    points = simulated_speedups(
        (30, 48, 80),
        window_size=(18, 24, 24),
        strides=[(1, 1, 1), (2, 1, 1), (1, 1, 8), (2, 1, 8), (1, 8, 8), (2, 8, 8), (16, 8, 8)],
        q_tile=(4, 8, 8),
        kv_tile=(2, 8, 8),
    )
    title = "HunyuanVideo, 30x48x80 tokens, window 18x24x24, Q tile 4x8x8, static KV tiles 2x8x8"
    return speedup_curve(points, title)


PICTURES: dict[str, Callable[[], Picture]] = {
    "stride": lambda: strides((24, 24), window_size=8, strides=(1, 2, 4, 8)),
    "mask": lambda: mask_1d(32, window_size=8, stride=4),
    "window-3d": lambda: window((6, 12, 16), window_size=(3, 6, 8), stride=(1, 2, 4)),
    "tile-map": lambda: tile_map((64, 64), window_size=24, q_tile=8, kv_tile=8),
    "tile-map-small": lambda: tile_map(
        (56, 56), window_size=7, q_tile=8, kv_tile=(2, 16), q_start=24
    ),
    "work-map": lambda: work_map((96, 128), window_size=40, q_tile=8, kv_tile=8),
    "speedup": hunyuan_speedup,
    "shards": lambda: shards((48, 48), window_size=9, cuts=((8, 1), (4, 2), (4, 4))),
    "hopper-forward": kernel_timelines.hopper_forward,
    "hopper-backward": kernel_timelines.hopper_key_gradient,
    "blackwell-forward": kernel_timelines.blackwell_forward,
    "cutlass-blackwell-forward": kernel_timelines.cutlass_blackwell_forward,
    "blackwell-backward": kernel_timelines.blackwell_key_gradient,
}
"""Name of the file, without its ending, and what makes the picture."""


def write_gallery(folder: str | os.PathLike[str], suffix: str = ".png") -> tuple[pathlib.Path, ...]:
    """Draw every picture of the documentation into a folder, which is made; returns the files.

    Raises:
      RuntimeError: without matplotlib.
      ValueError: for a suffix other than .png and .svg.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, make in PICTURES.items():
        file = folder / f"{name}{suffix}"
        make().save(file)
        files.append(file)
    return tuple(files)
