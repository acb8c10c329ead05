"""FLUX.1's parameters from the tensors of a checkpoint in diffusers' layout (`FluxTransformer2DModel`)."""

from gna_jax.models.mmdit_checkpoint import Entries, joint_transformer_entries, linear_entries


def flux_entries(
    num_double: int, num_single: int, num_heads: int, features: int, guidance: bool
) -> Entries:
    """Of every parameter of a `FluxTransformer` of this size, where it comes from."""
    return (
        linear_entries("image_embedder", "x_embedder")
        | linear_entries("text_embedder", "context_embedder")
        | joint_transformer_entries(num_double, num_single, num_heads, features, guidance)
    )
