"""k-diffusion's checkpoints of HDiT (`image_transformer_v2`): which key becomes which parameter."""

from pathlib import Path
from typing import Any

from flax import nnx

from gna_jax.models.checkpoint import (
    Entry,
    linear,
    linear_out,
    load_parameters,
    open_checkpoint,
    same,
)
from gna_jax.models.hdit_layers import Fixed

_FREQUENCIES = ".pos_emb.freqs"
"""Stored, but the same in every model of a size: they are a formula."""


def load_pretrained(model: nnx.Module, path: str | Path) -> None:
    """Put a checkpoint into an `HDiT` of its size.

    Raises:
      ValueError: keys that are missing or that nothing uses, shapes that differ; the model is as it was.
      FileNotFoundError, RuntimeError: as of `open_checkpoint`.
    """
    load_parameters(
        model,
        open_checkpoint(path),
        entries(model),
        ignored=lambda key: key.endswith(_FREQUENCIES),
        kinds=(nnx.Param, Fixed),
    )


def entries(model: Any) -> dict[str, Entry]:
    """Of every parameter of the model, and of the random frequencies of its conditions."""
    config = model.config
    table = {
        "noise_features.weight": linear("time_emb.weight"),
        "augmentation_features.weight": linear("aug_emb.weight"),
        "patch_in.kernel": linear("patch_in.proj.weight"),
        "noise_in.kernel": linear("time_in_proj.weight"),
        "augmentation_in.kernel": linear("aug_in_proj.weight"),
        "out_norm.scale": same("out_norm.scale"),
        "patch_out.kernel": linear("patch_out.proj.weight"),
        "mapping.in_norm.scale": same("mapping.in_norm.scale"),
        "mapping.out_norm.scale": same("mapping.out_norm.scale"),
    }
    if config.num_classes:
        table["class_embedding.embedding"] = same("class_emb.weight")
    if config.condition_features:
        table["condition_in.kernel"] = linear("mapping_cond_in_proj.weight")
    for i in range(config.mapping.depth):
        table[f"mapping.norms.{i}.scale"] = same(f"mapping.blocks.{i}.norm.scale")
        table |= _feed_forward(f"mapping.feed_forwards.{i}", f"mapping.blocks.{i}")
    *fine, coarse = config.levels
    for i, level in enumerate(fine):
        for j in range(level.depth):
            table |= _layer(f"down.{i}.{j}", f"down_levels.{i}.{j}", level)
            table |= _layer(f"up.{i}.{j}", f"up_levels.{i}.{j}", level)
        table[f"merges.{i}.kernel"] = linear(f"merges.{i}.proj.weight")
        table[f"splits.{i}.projection.kernel"] = linear(f"splits.{i}.proj.weight")
        table[f"splits.{i}.factor"] = same(f"splits.{i}.fac")
    for j in range(coarse.depth):
        table |= _layer(f"middle.{j}", f"mid_level.{j}", coarse)
    return table


def _layer(ours: str, theirs: str, level: Any) -> dict[str, Entry]:
    heads = level.width // level.head_dim

    def split(weight: Any) -> Any:
        return weight.T.reshape(weight.shape[1], 3, heads, -1)

    attention = f"{theirs}.self_attn"
    return {
        f"{ours}.attention_norm.scale.kernel": linear(f"{attention}.norm.linear.weight"),
        f"{ours}.attention.qkv.kernel": Entry((f"{attention}.qkv_proj.weight",), split),
        f"{ours}.attention.scale": same(f"{attention}.scale"),
        f"{ours}.attention.out.kernel": linear_out(f"{attention}.out_proj.weight", heads),
        f"{ours}.feed_forward_norm.scale.kernel": linear(f"{theirs}.ff.norm.linear.weight"),
        **_feed_forward(f"{ours}.feed_forward", f"{theirs}.ff"),
    }


def _feed_forward(ours: str, theirs: str) -> dict[str, Entry]:
    return {
        f"{ours}.expand.kernel": linear(f"{theirs}.up_proj.weight"),
        f"{ours}.contract.kernel": linear(f"{theirs}.down_proj.weight"),
    }
