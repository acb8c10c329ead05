"""Where each parameter of a Cosmos transformer stands in a checkpoint of the diffusers layout."""

from gna_jax.models.checkpoint import Entry, linear, linear_heads, linear_out, same
from gna_jax.models.cosmos_presets import CosmosConfig


def cosmos_entries(config: CosmosConfig) -> dict[str, Entry]:
    """Table for `load_parameters`, by parameter path."""
    entries = {
        "patch_embed.kernel": linear("patch_embed.proj.weight"),
        "time_1.kernel": linear("time_embed.t_embedder.linear_1.weight"),
        "time_2.kernel": linear("time_embed.t_embedder.linear_2.weight"),
        "time_norm.scale": same("time_embed.norm.weight"),
        "norm_out.down.kernel": linear("norm_out.linear_1.weight"),
        "norm_out.up.kernel": linear("norm_out.linear_2.weight"),
        "out.kernel": linear("proj_out.weight"),
    }
    if config.learned_positions:
        for ours, theirs in zip("tyx", "thw", strict=True):
            entries[f"positions.{ours}"] = same(f"learnable_pos_embed.pos_emb_{theirs}")
    for layer in range(config.num_layers):
        block = _block_entries(f"transformer_blocks.{layer}", config.num_heads)
        entries |= {f"blocks.{layer}.{path}": entry for path, entry in block.items()}
    return entries


def _block_entries(key: str, heads: int) -> dict[str, Entry]:
    entries = {
        "mlp_in.kernel": linear(f"{key}.ff.net.0.proj.weight"),
        "mlp_out.kernel": linear(f"{key}.ff.net.2.weight"),
    }
    for number in (1, 2, 3):
        entries[f"norm_{number}.down.kernel"] = linear(f"{key}.norm{number}.linear_1.weight")
        entries[f"norm_{number}.up.kernel"] = linear(f"{key}.norm{number}.linear_2.weight")
    for ours, theirs in (("attention", f"{key}.attn1"), ("cross_attention", f"{key}.attn2")):
        for name in ("query", "key", "value"):
            entries[f"{ours}.{name}.kernel"] = linear_heads(f"{theirs}.to_{name[0]}.weight", heads)
        for name in ("query", "key"):
            entries[f"{ours}.{name}_norm.scale"] = same(f"{theirs}.norm_{name[0]}.weight")
        entries[f"{ours}.out.kernel"] = linear_out(f"{theirs}.to_out.0.weight", heads)
    return entries
