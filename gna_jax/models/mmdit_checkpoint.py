"""Parameters of MM-DiT blocks from the tensors of a checkpoint in diffusers' layout; FLUX.1's and HunyuanVideo's are alike here."""

from gna_jax.models.checkpoint import Entry, bias_heads, linear, linear_heads, linear_out, same

Entries = dict[str, Entry]


def linear_entries(parameters: str, keys: str) -> Entries:
    """Kernel and bias of a linear layer."""
    return {
        f"{parameters}.kernel": linear(f"{keys}.weight"),
        f"{parameters}.bias": same(f"{keys}.bias"),
    }


def head_entries(parameters: str, keys: str, heads: int) -> Entries:
    """Kernel `[in, heads, head_dim]` and bias of a projection into heads."""
    return {
        f"{parameters}.kernel": linear_heads(f"{keys}.weight", heads),
        f"{parameters}.bias": bias_heads(f"{keys}.bias", heads),
    }


def out_entries(parameters: str, keys: str, heads: int) -> Entries:
    """Kernel `[heads, head_dim, out]` and bias of a projection out of heads."""
    return {
        f"{parameters}.kernel": linear_out(f"{keys}.weight", heads),
        f"{parameters}.bias": same(f"{keys}.bias"),
    }


def embedder_entries(parameters: str, keys: str) -> Entries:
    """A `VectorEmbedder`."""
    return linear_entries(f"{parameters}.linear1", f"{keys}.linear_1") | linear_entries(
        f"{parameters}.linear2", f"{keys}.linear_2"
    )


def output_entries(parameters: str) -> Entries:
    """A `ModulatedOutput`."""
    return linear_entries(f"{parameters}.modulation.linear", "norm_out.linear") | linear_entries(
        f"{parameters}.linear", "proj_out"
    )


def double_block_entries(parameters: str, keys: str, heads: int) -> Entries:
    """A `DoubleStreamBlock`: image and text lie side by side under different names."""
    image = {
        "modulation": "norm1",
        "query": "to_q",
        "key": "to_k",
        "value": "to_v",
        "query_norm": "norm_q",
        "key_norm": "norm_k",
        "out": "to_out.0",
        "mlp": "ff",
    }
    text = {
        "modulation": "norm1_context",
        "query": "add_q_proj",
        "key": "add_k_proj",
        "value": "add_v_proj",
        "query_norm": "norm_added_q",
        "key_norm": "norm_added_k",
        "out": "to_add_out",
        "mlp": "ff_context",
    }
    entries: Entries = {}
    for stream, names in (("image", image), ("text", text)):
        mine = f"{parameters}.{stream}"
        entries |= linear_entries(
            f"{mine}.modulation.linear", f"{keys}.{names['modulation']}.linear"
        )
        entries |= _heads(f"{mine}.heads", f"{keys}.attn", names, heads)
        entries |= out_entries(f"{mine}.out", f"{keys}.attn.{names['out']}", heads)
        entries |= linear_entries(f"{mine}.mlp_in", f"{keys}.{names['mlp']}.net.0.proj")
        entries |= linear_entries(f"{mine}.mlp_out", f"{keys}.{names['mlp']}.net.2")
    return entries


def single_block_entries(parameters: str, keys: str, heads: int, features: int) -> Entries:
    """A `SingleStreamBlock`: `proj_out` reads the attention's `features` columns first, then the MLP's."""
    names = {name: f"to_{name[0]}" for name in ("query", "key", "value")}
    names |= {"query_norm": "norm_q", "key_norm": "norm_k"}
    fused = f"{keys}.proj_out.weight"
    return (
        linear_entries(f"{parameters}.modulation.linear", f"{keys}.norm.linear")
        | _heads(f"{parameters}.heads", f"{keys}.attn", names, heads)
        | linear_entries(f"{parameters}.mlp_in", f"{keys}.proj_mlp")
        | {
            f"{parameters}.out.kernel": Entry(
                (fused,), lambda w: w[:, :features].T.reshape(heads, -1, w.shape[0])
            ),
            f"{parameters}.mlp_out.kernel": Entry((fused,), lambda w: w[:, features:].T),
            f"{parameters}.mlp_out.bias": same(f"{keys}.proj_out.bias"),
        }
    )


def joint_transformer_entries(
    num_double: int, num_single: int, num_heads: int, features: int, guidance: bool
) -> Entries:
    """What a `JointTransformer` of this size has: embedders of the condition, blocks, output."""
    embedders = {"timestep_embedder": "time_embedder", "text_embedder": "pooled_embedder"}
    if guidance:
        embedders["guidance_embedder"] = "guidance_embedder"
    entries = output_entries("output")
    for key, name in embedders.items():
        entries |= embedder_entries(name, f"time_text_embed.{key}")
    for n in range(num_double):
        entries |= double_block_entries(f"double_blocks.{n}", f"transformer_blocks.{n}", num_heads)
    for n in range(num_single):
        entries |= single_block_entries(
            f"single_blocks.{n}", f"single_transformer_blocks.{n}", num_heads, features
        )
    return entries


def _heads(parameters: str, keys: str, names: dict[str, str], heads: int) -> Entries:
    entries: Entries = {}
    for name in ("query", "key", "value"):
        entries |= head_entries(f"{parameters}.{name}", f"{keys}.{names[name]}", heads)
    for name in ("query_norm", "key_norm"):
        entries[f"{parameters}.{name}.scale"] = same(f"{keys}.{names[name]}.weight")
    return entries
