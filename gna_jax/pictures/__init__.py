"""Pictures of neighborhoods, tiles and speedups: each is a matplotlib figure, and lines for a terminal.

picture = pictures.strides((16, 16), window_size=8, strides=(1, 2, 4, 8))
picture.save("stride.png")  # or .svg; picture.figure() is the matplotlib Figure
rich.print(picture)  # in a terminal, without matplotlib
"""

from gna_jax.pictures.mask import mask_1d as mask_1d
from gna_jax.pictures.picture import Picture as Picture
from gna_jax.pictures.picture import save as save
from gna_jax.pictures.seen import window as window
from gna_jax.pictures.shard_halo import shards as shards
from gna_jax.pictures.speedup import SpeedupPoint as SpeedupPoint
from gna_jax.pictures.speedup import simulated_speedups as simulated_speedups
from gna_jax.pictures.speedup import speedup_curve as speedup_curve
from gna_jax.pictures.stride_groups import strides as strides
from gna_jax.pictures.tile_walk import tile_map as tile_map
from gna_jax.pictures.tile_work import work_map as work_map

__all__ = [
    "Picture",
    "SpeedupPoint",
    "mask_1d",
    "save",
    "shards",
    "simulated_speedups",
    "speedup_curve",
    "strides",
    "tile_map",
    "window",
    "work_map",
]
