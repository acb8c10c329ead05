"""Keys of NAT's and DiNAT's PyTorch checkpoints, as their authors and as transformers name them.

The layout is recognized by one key that only it has. What reads files and compares shapes is `gna_jax.models.checkpoint`.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from gna_jax.models.checkpoint import (
    Checkpoint,
    Entry,
    bias_heads,
    conv,
    linear,
    linear_heads,
    linear_out,
    load_parameters,
    open_checkpoint,
    same,
)

if TYPE_CHECKING:
    from gna_jax.models.nat_model import NAT
    from gna_jax.models.nat_presets import NATConfig

Entries = dict[str, Entry]
_HF_STEM = "embeddings.patch_embeddings.projection.0.weight"


def load_pretrained(model: "NAT", path: str | Path, *, head: bool = True) -> None:
    """`NAT.load_pretrained`."""
    load(model, open_checkpoint(path), head=head)


def load(model: "NAT", checkpoint: Checkpoint, *, head: bool = True) -> None:
    """Put an open checkpoint into a model; arguments and errors as in `NAT.load_pretrained`."""
    entries, head_key = _entries(model.config, checkpoint)
    if model.head is not None:
        entries |= _linear("head", head_key) if head else _kept("head", model.head)
    skip_head = model.head is None or not head
    if not skip_head:
        _check_classes(model, checkpoint, f"{head_key}.weight")

    def ignored(key: str) -> bool:
        # A ViT's buffer, made again from the size of its map: no weights.
        return key.endswith(".relative_position_index") or (
            skip_head and key.startswith(f"{head_key}.")
        )

    load_parameters(model, checkpoint, entries, ignored)


def _entries(config: "NATConfig", checkpoint: Checkpoint) -> tuple[Entries, str]:
    """Everything but the head, and the head's key."""
    if (prefix := _hf_prefix(checkpoint)) is not None:
        _check_family(config, checkpoint, prefix)
        stem = f"{prefix}embeddings"
        entries = _stem(config, f"{stem}.patch_embeddings.projection", f"{stem}.norm")
        entries |= _levels(
            config, f"{prefix}encoder.levels.{{level}}", _hf_block, ".layers.{block}"
        )
        return entries | _norm("norm", f"{prefix}layernorm"), "classifier"
    if "levels.0.blocks.0.norm1.weight" in checkpoint:
        levels = ("levels.{level}", ".blocks.{block}")
    elif "layers.0.blocks.0.norm1.weight" in checkpoint:
        levels = ("layers.{level}", ".blocks.{block}")
    elif "layers.0.norm1.weight" in checkpoint:
        levels = ("layers", ".{block}")
    else:
        raise ValueError(
            "a checkpoint of NAT, DiNAT, DiNAT_s or an isotropic model is named as in the authors' repository"
            f" (levels.0.blocks.0.norm1.weight, ..) or as in transformers (dinat.{_HF_STEM}, ..);"
            f" got {checkpoint.name} with {', '.join(sorted(checkpoint)[:5]) or 'no keys'}, ..;"
            " rename its keys, or give the file as it was published"
        )
    entries = _stem(config, "patch_embed.proj", "patch_embed.norm")
    entries |= _levels(config, levels[0], _block, levels[1])
    return entries | _norm("norm", "norm"), "head"


def _hf_prefix(checkpoint: Checkpoint) -> str | None:
    """What precedes transformers' keys: `nat.` or `dinat.`, nothing in a file without classifier; None: other keys."""
    found = (key for key in checkpoint if key.endswith(_HF_STEM))
    return next((key.removesuffix(_HF_STEM) for key in found), None)


def _check_family(config: "NATConfig", checkpoint: Checkpoint, prefix: str) -> None:
    """Dilations are not in the weights, but transformers' keys name the family."""
    if (prefix == "nat.") == (config.dilations is not None) and prefix:
        raise ValueError(
            "weights of NAT are for a model without dilations, and weights of DiNAT for one with them;"
            f" got {checkpoint.name} with keys {prefix}* and dilations={config.dilations};"
            " make the model with nat(..) or dinat(..), as the keys say"
        )


def _check_classes(model: "NAT", checkpoint: Checkpoint, key: str) -> None:
    """The head's size is the one that people change."""
    if key in checkpoint and checkpoint.shape(key)[:1] != (model.num_classes,):
        wanted = model.config.level_dims[-1], model.num_classes
        raise ValueError(
            f"{key} {checkpoint.shape(key)} would become parameter head.kernel {checkpoint.shape(key)[::-1]};"
            f" the model's is {wanted}; make the model with num_classes={checkpoint.shape(key)[0]}, or load with"
            " head=False and train the model's own head"
        )


def _stem(config: "NATConfig", projection: str, norm: str) -> Entries:
    if config.patch_size is None:
        convs = _conv("stem.conv1", f"{projection}.0") | _conv("stem.conv2", f"{projection}.1")
    else:
        convs = _conv("stem.conv", projection)
    return convs | _norm("stem.norm", norm)


def _levels(
    config: "NATConfig",
    level_key: str,
    block_entries: Callable[[str, str, int, bool], Entries],
    block_key: str,
) -> Entries:
    entries: Entries = {}
    for level, (depth, heads) in enumerate(zip(config.depths, config.num_heads, strict=True)):
        source, target = level_key.format(level=level), f"levels.{level}"
        for block in range(depth):
            entries |= block_entries(
                f"{target}.blocks.{block}",
                source + block_key.format(block=block),
                heads,
                config.layer_scale is not None,
            )
        if level + 1 < len(config.depths):
            reduction = conv if config.patch_size is None else linear
            source, target = f"{source}.downsample", f"{target}.downsample"
            entries[f"{target}.reduction.kernel"] = reduction(f"{source}.reduction.weight")
            entries |= _norm(f"{target}.norm", f"{source}.norm")
    return entries


def _block(target: str, source: str, heads: int, layer_scale: bool) -> Entries:
    """A layer as its authors store it: one tensor for query, key and value."""
    entries = {}
    for part, name in enumerate(("query", "key", "value")):
        for kind, convert in (("weight", linear_heads), ("bias", bias_heads)):
            path = f"{target}.attention.{name}.{'kernel' if kind == 'weight' else 'bias'}"
            entries[path] = _third(convert(f"{source}.attn.qkv.{kind}", heads), part)
    entries |= _attention_rest(target, f"{source}.attn.rpb", f"{source}.attn.proj", heads)
    entries |= _norm(f"{target}.norm1", f"{source}.norm1")
    entries |= _norm(f"{target}.norm2", f"{source}.norm2")
    entries |= _linear(f"{target}.mlp_in", f"{source}.mlp.fc1")
    entries |= _linear(f"{target}.mlp_out", f"{source}.mlp.fc2")
    if layer_scale:
        entries[f"{target}.attention_layer_scale"] = same(f"{source}.gamma1")
        entries[f"{target}.mlp_layer_scale"] = same(f"{source}.gamma2")
    return entries


def _hf_block(target: str, source: str, heads: int, layer_scale: bool) -> Entries:
    """A layer as transformers stores it: query, key and value apart, both layer scales in one tensor."""
    entries = {}
    attention = f"{source}.attention"
    for name in ("query", "key", "value"):
        key = f"{attention}.self.{name}"
        entries[f"{target}.attention.{name}.kernel"] = linear_heads(f"{key}.weight", heads)
        entries[f"{target}.attention.{name}.bias"] = bias_heads(f"{key}.bias", heads)
    entries |= _attention_rest(target, f"{attention}.self.rpb", f"{attention}.output.dense", heads)
    entries |= _norm(f"{target}.norm1", f"{source}.layernorm_before")
    entries |= _norm(f"{target}.norm2", f"{source}.layernorm_after")
    entries |= _linear(f"{target}.mlp_in", f"{source}.intermediate.dense")
    entries |= _linear(f"{target}.mlp_out", f"{source}.output.dense")
    if layer_scale:
        key = (f"{source}.layer_scale_parameters",)
        entries[f"{target}.attention_layer_scale"] = Entry(key, lambda scales: scales[0])
        entries[f"{target}.mlp_layer_scale"] = Entry(key, lambda scales: scales[1])
    return entries


def _attention_rest(target: str, bias: str, projection: str, heads: int) -> Entries:
    return {
        f"{target}.attention.relative_position_bias": same(bias),
        f"{target}.attention.out.kernel": linear_out(f"{projection}.weight", heads),
        f"{target}.attention.out.bias": same(f"{projection}.bias"),
    }


def _third(entry: Entry, part: int) -> Entry:
    """`entry` on one of three equal parts of the tensor's rows."""

    def convert(tensor: Any) -> Any:
        rows = tensor.shape[0] // 3
        return entry.convert(tensor[part * rows : (part + 1) * rows])

    return Entry(entry.sources, convert)


def _norm(target: str, source: str) -> Entries:
    return {f"{target}.scale": same(f"{source}.weight"), f"{target}.bias": same(f"{source}.bias")}


def _linear(target: str, source: str) -> Entries:
    return {
        f"{target}.kernel": linear(f"{source}.weight"),
        f"{target}.bias": same(f"{source}.bias"),
    }


def _conv(target: str, source: str) -> Entries:
    return {
        f"{target}.kernel": conv(f"{source}.weight"),
        f"{target}.bias": same(f"{source}.bias"),
    }


def _kept(target: str, layer: Any) -> Entries:
    """Parameters that stay what they are."""
    values = {name: getattr(layer, name).get_value() for name in ("kernel", "bias")}
    if any(isinstance(value, jax.ShapeDtypeStruct) for value in values.values()):
        raise ValueError(
            f"head=False keeps the values of the model's own {target}; got a model made by nnx.eval_shape, which has none;"
            " make it without nnx.eval_shape"
        )
    return {
        f"{target}.{name}": Entry((), functools.partial(lambda value: value, value))
        for name, value in values.items()
    }
