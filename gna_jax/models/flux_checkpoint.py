"""FLUX.1's parameters from the tensors of a checkpoint in diffusers' layout (`FluxTransformer2DModel`)."""

from gna_jax.models.checkpoint import Entry
from gna_jax.models.mmdit_checkpoint import (
    double_block_entries,
    embedder_entries,
    linear_entries,
    output_entries,
    single_block_entries,
)


def flux_entries(
    num_double: int, num_single: int, num_heads: int, features: int, guidance: bool
) -> dict[str, Entry]:
    """Of every parameter of a `FluxTransformer` of this size, where it comes from."""
    embedders = {"timestep_embedder": "time_embedder", "text_embedder": "pooled_embedder"}
    if guidance:
        embedders["guidance_embedder"] = "guidance_embedder"
    entries = (
        linear_entries("image_embedder", "x_embedder")
        | linear_entries("text_embedder", "context_embedder")
        | output_entries("output")
    )
    for key, name in embedders.items():
        entries |= embedder_entries(name, f"time_text_embed.{key}")
    for n in range(num_double):
        entries |= double_block_entries(f"double_blocks.{n}", f"transformer_blocks.{n}", num_heads)
    for n in range(num_single):
        entries |= single_block_entries(
            f"single_blocks.{n}", f"single_transformer_blocks.{n}", num_heads, features
        )
    return entries
