"""A block of Cosmos-Predict1 7B at its real size, dense against neighborhood attention, and what a whole run would gain.

    python examples/cosmos_block_speed.py --help

On a GPU the block has its real size; without one it runs scaled down, for half a minute, and says so. Prints a table.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import typer
from block_speed import HEAD_DIM, Kind, Model, Size, command, normal
from flax import nnx

from gna_jax.models.cosmos_blocks import CosmosBlock, TimeVectors
from gna_jax.models.cosmos_model import cosmos_rotation
from gna_jax.models.cosmos_presets import COSMOS

PUBLISHED = COSMOS["predict1-7b-text2world"]


def block(size: Size) -> tuple[nnx.Module, tuple[Any, ...]]:
    """A block, and tokens, text, time, rotary table and learned positions."""
    config = dataclasses.replace(PUBLISHED, num_heads=size.heads)
    made = {"dtype": size.dtype, "param_dtype": size.dtype, "implementation": size.implementation}
    make = nnx.jit(lambda key: CosmosBlock(config, **made, rngs=nnx.Rngs(key)))
    shape = (1, *size.layout, size.heads * HEAD_DIM)
    time = TimeVectors(
        normal((1, 1, 1, 1, config.features), size.dtype),
        normal((1, 1, 1, 1, 3 * config.features), size.dtype),
    )
    text = normal((1, size.text_tokens, config.text_features), size.dtype)
    rotation = cosmos_rotation(config, size.layout, fps=24)
    positions = normal(shape, jnp.float32, seed=2)
    return make(jax.random.key(0)), (normal(shape, size.dtype, 1), text, time, rotation, positions)


MODEL = Model(
    title="Cosmos-Predict1 7B, 5 s of 720p",
    kinds=(Kind("transformer", PUBLISHED.num_layers, block),),
    rows=(("cosmos-89", (1, 1, 1)), ("cosmos-89", (1, 8, 16)), ("cosmos-56", (1, 8, 16))),
    block_share=0.99,
    text_tokens=512,
    is_joint=False,
    small_layout=(8, 22, 20),
)

if __name__ == "__main__":
    typer.run(command(MODEL))
