"""HunyuanVideo's parameters from the tensors of a checkpoint in diffusers' layout (`HunyuanVideoTransformer3DModel`)."""

from gna_jax.models.checkpoint import Entry, same
from gna_jax.models.mmdit_checkpoint import (
    Entries,
    embedder_entries,
    head_entries,
    joint_transformer_entries,
    linear_entries,
    out_entries,
)


def hunyuan_video_entries(
    num_double: int,
    num_single: int,
    num_refiner: int,
    num_heads: int,
    features: int,
    guidance: bool,
) -> Entries:
    """Of every parameter of a `HunyuanVideoTransformer` of this size, where it comes from."""
    patches = {
        # A convolution over patches [out, in, t, y, x], as a linear layer of a patch's (t, y, x, in).
        "patch_embedder.kernel": Entry(
            ("x_embedder.proj.weight",),
            lambda w: w.transpose(2, 3, 4, 1, 0).reshape(-1, w.shape[0]),
        ),
        "patch_embedder.bias": same("x_embedder.proj.bias"),
    }
    shared = joint_transformer_entries(num_double, num_single, num_heads, features, guidance)
    return patches | shared | _refiner_entries(num_refiner, num_heads)


def _refiner_entries(num_blocks: int, num_heads: int) -> Entries:
    mine, theirs = "text_refiner", "context_embedder"
    entries = linear_entries(f"{mine}.embedder", f"{theirs}.proj_in")
    for key, name in {
        "timestep_embedder": "time_embedder",
        "text_embedder": "pooled_embedder",
    }.items():
        entries |= embedder_entries(f"{mine}.{name}", f"{theirs}.time_text_embed.{key}")
    for n in range(num_blocks):
        block, keys = f"{mine}.blocks.{n}", f"{theirs}.token_refiner.refiner_blocks.{n}"
        entries |= linear_entries(f"{block}.gates.linear", f"{keys}.norm_out.linear")
        for norm in ("norm1", "norm2"):
            entries[f"{block}.{norm}.scale"] = same(f"{keys}.{norm}.weight")
            entries[f"{block}.{norm}.bias"] = same(f"{keys}.{norm}.bias")
        for name in ("query", "key", "value"):
            entries |= head_entries(f"{block}.{name}", f"{keys}.attn.to_{name[0]}", num_heads)
        entries |= out_entries(f"{block}.out", f"{keys}.attn.to_out.0", num_heads)
        entries |= linear_entries(f"{block}.mlp_in", f"{keys}.ff.net.0.proj")
        entries |= linear_entries(f"{block}.mlp_out", f"{keys}.ff.net.2")
    return entries
