"""The two kinds of block of HunyuanVideo at their real size, 5 s of 720p, dense against neighborhood attention.

    python examples/hunyuan_block_speed.py --help

On a GPU the blocks have their real size; without one they run scaled down, for a minute, and it says so. Prints a table.
"""

import functools
from typing import Any

import jax
import numpy as np
import typer
from block_speed import HEAD_DIM, Kind, Model, Size, command, normal
from flax import nnx

from gna_jax.models.hunyuan_video_model import HUNYUAN_VIDEO
from gna_jax.models.mmdit import DoubleStreamBlock, SingleStreamBlock
from gna_jax.models.rotary import axial_rotation, inverse_frequencies

PUBLISHED = HUNYUAN_VIDEO["t2v"]


def block(kind: Any, size: Size) -> tuple[nnx.Module, tuple[Any, ...]]:
    """A block, and video tokens, text tokens, condition and rotary table."""
    features = size.heads * HEAD_DIM
    sizes = features, size.heads, HEAD_DIM, int(features * PUBLISHED.mlp_ratio)
    made = {"dtype": size.dtype, "param_dtype": size.dtype, "implementation": size.implementation}
    make = nnx.jit(lambda key: kind(*sizes, **made, rngs=nnx.Rngs(key)))
    frequencies = [inverse_frequencies(dim, PUBLISHED.theta) for dim in PUBLISHED.rotary_dims]
    rotation = axial_rotation([np.arange(length) for length in size.layout], frequencies)
    video = normal((1, *size.layout, features), size.dtype, 1)
    text = normal((1, size.text_tokens, features), size.dtype, 2)
    return make(jax.random.key(0)), (video, text, normal((1, features), size.dtype, 3), rotation)


MODEL = Model(
    title="HunyuanVideo, 5 s of 720p",
    kinds=(
        Kind("double", PUBLISHED.num_double, functools.partial(block, DoubleStreamBlock)),
        Kind("single", PUBLISHED.num_single, functools.partial(block, SingleStreamBlock)),
    ),
    rows=(("hunyuan-91", (1, 1, 1)), ("hunyuan-91", (16, 8, 8))),
    block_share=0.928,
    text_tokens=256,
    is_joint=True,
    small_layout=(10, 16, 20),
)

if __name__ == "__main__":
    typer.run(command(MODEL))
