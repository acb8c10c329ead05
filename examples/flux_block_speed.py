"""The two kinds of block of FLUX.1 at their real size and a 4K image, dense against neighborhood attention.

    python examples/flux_block_speed.py --help

On a GPU the blocks have their real size; without one they run scaled down, for a minute, and it says so. Prints a table.
"""

import functools
from typing import Any

import jax
import numpy as np
import typer
from block_speed import HEAD_DIM, Kind, Model, Size, command, normal
from flax import nnx

from gna_jax.models.flux_model import FLUX
from gna_jax.models.mmdit import DoubleStreamBlock, SingleStreamBlock
from gna_jax.models.rotary import axial_rotation, inverse_frequencies

PUBLISHED = FLUX["dev"]


def block(kind: Any, size: Size) -> tuple[nnx.Module, tuple[Any, ...]]:
    """A block, and image tokens, text tokens, condition and rotary table."""
    features = size.heads * HEAD_DIM
    sizes = features, size.heads, HEAD_DIM, int(features * PUBLISHED.mlp_ratio)
    made = {"dtype": size.dtype, "param_dtype": size.dtype, "implementation": size.implementation}
    make = nnx.jit(lambda key: kind(*sizes, **made, rngs=nnx.Rngs(key)))
    # An image turns by its row and column; the pairs of the image's number stay as they are.
    frequencies = [inverse_frequencies(dim, PUBLISHED.theta) for dim in PUBLISHED.rotary_dims]
    positions = [np.zeros(1), *(np.arange(length) for length in size.layout)]
    table = axial_rotation(positions, frequencies)
    rotation = jax.tree.map(lambda angles: angles[0], table)
    image = normal((1, *size.layout, features), size.dtype, 1)
    text = normal((1, size.text_tokens, features), size.dtype, 2)
    return make(jax.random.key(0)), (image, text, normal((1, features), size.dtype, 3), rotation)


MODEL = Model(
    title="FLUX.1-dev, 4K image",
    kinds=(
        Kind("double", PUBLISHED.num_double, functools.partial(block, DoubleStreamBlock)),
        Kind("single", PUBLISHED.num_single, functools.partial(block, SingleStreamBlock)),
    ),
    rows=(("flux-4k", (1, 1)), ("flux-4k", (16, 16))),
    block_share=0.912,
    text_tokens=512,
    is_joint=True,
    small_layout=(64, 64),
)

if __name__ == "__main__":
    typer.run(command(MODEL))
