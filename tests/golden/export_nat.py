"""Goldens of NAT and DiNAT from PyTorch: a restatement with dense masks, and transformers' Dinat with dense attention.

Writes `nat.safetensors` (per case: weights, images, logits, the levels' maps) and `nat_keys.json` (keys and shapes of the
published sizes; `0-17` in a key stands for 0 to 17). Run in the repository's root, Python 3.11, with
torch 2.13.0 (CPU), transformers 5.23.0, safetensors 0.8.0, none of which the tests need:

    python tests/golden/export_nat.py
"""

import json
import math
import pathlib
import re

import safetensors
import safetensors.torch
import torch
import transformers
from torch import nn
from torch.nn import functional
from transformers.models.dinat import modeling_dinat

HERE = pathlib.Path(__file__).parent
SWIN, ISOTROPIC = "swin", "isotropic"


def axis_window(length, kernel, dilation):
    """Keys that each query of an axis sees [length, length], and the index of their bias."""
    seen = torch.zeros(length, length, dtype=torch.bool)
    for query in range(length):
        group = list(range(query % dilation, length, dilation))
        start = min(max(group.index(query) - kernel // 2, 0), len(group) - kernel)
        seen[query, group[start : start + kernel]] = True
    offsets = torch.arange(length)[None, :] - torch.arange(length)[:, None]
    return seen, torch.where(seen, offsets // dilation + kernel - 1, 0)


def dense_neighborhood(query, key, value, rpb, kernel, dilation):
    """Attention of [B, heads, H, W, D] in the neighborhoods, over all pairs of tokens with a mask."""
    height, width = query.shape[2:4]
    rows, row_bias = axis_window(height, kernel, dilation)
    columns, column_bias = axis_window(width, kernel, dilation)
    scores = torch.einsum("bhyxd,bhvud->bhyxvu", query * query.shape[-1] ** -0.5, key)
    scores = scores + rpb[:, row_bias[:, None, :, None], column_bias[None, :, None, :]]
    seen = rows[:, None, :, None] & columns[None, :, None, :]
    scores = scores.masked_fill(~seen, -math.inf).flatten(4)
    return torch.einsum("bhyxs,bhsd->bhyxd", scores.softmax(-1), value.flatten(2, 3))


class Attention(nn.Module):
    def __init__(self, dim, heads, kernel, dilation):
        super().__init__()
        self.heads, self.kernel, self.dilation = heads, kernel, dilation
        self.qkv = nn.Linear(dim, 3 * dim)
        self.rpb = nn.Parameter(torch.zeros(heads, 2 * kernel - 1, 2 * kernel - 1))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        height, width, dim = x.shape[1:]
        reach = self.kernel * self.dilation
        x = functional.pad(x, (0, 0, 0, max(0, reach - width), 0, max(0, reach - height)))
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, dim // self.heads))
        query, key, value = qkv.permute(3, 0, 4, 1, 2, 5)
        out = dense_neighborhood(query, key, value, self.rpb, self.kernel, self.dilation)
        return self.proj(out.permute(0, 2, 3, 1, 4).flatten(3)[:, :height, :width])


class Mlp(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(functional.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, dim, heads, kernel, dilation, mlp_ratio, layer_scale):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, heads, kernel, dilation)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        if layer_scale:
            self.gamma1 = nn.Parameter(torch.ones(dim))
            self.gamma2 = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        x = x + getattr(self, "gamma1", 1.0) * self.attn(self.norm1(x))
        return x + getattr(self, "gamma2", 1.0) * self.mlp(self.norm2(x))


class Downsample(nn.Module):
    """The next level's map: a strided convolution and a norm, or a norm and a linear map of 2x2 tokens."""

    def __init__(self, dim, merging):
        super().__init__()
        self.merging = merging
        if merging:
            self.norm = nn.LayerNorm(4 * dim)
            self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        else:
            self.reduction = nn.Conv2d(dim, 2 * dim, 3, stride=2, padding=1, bias=False)
            self.norm = nn.LayerNorm(2 * dim)

    def forward(self, x):
        if not self.merging:
            return self.norm(self.reduction(x.movedim(-1, 1)).movedim(1, -1))
        x = functional.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        corners = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.reduction(self.norm(torch.cat(corners, -1)))


class Level(nn.Module):
    def __init__(self, dim, heads, kernel, dilations, mlp_ratio, layer_scale, downsample):
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(dim, heads, kernel, dilation, mlp_ratio, layer_scale) for dilation in dilations
        )
        self.downsample = downsample

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Stem(nn.Module):
    def __init__(self, dim, patch):
        super().__init__()
        self.patch = patch
        if patch:
            self.proj = nn.Conv2d(3, dim, patch, stride=patch)
        else:
            self.proj = nn.Sequential(
                nn.Conv2d(3, dim // 2, 3, stride=2, padding=1),
                nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1),
            )
        self.norm = nn.LayerNorm(dim)

    def forward(self, images):
        if self.patch:
            height, width = images.shape[2:]
            images = functional.pad(images, (0, -width % self.patch, 0, -height % self.patch))
        return self.norm(self.proj(images).movedim(1, -1))


class Nat(nn.Module):
    """All variants; attributes are named as the keys of the authors' checkpoints."""

    def __init__(
        self, dim, depths, heads, mlp_ratio, kernel=7, dilations=None, layer_scale=False, layout=None, patch=None, classes=1000
    ):  # fmt: skip
        super().__init__()
        dilations = dilations or [[1] * depth for depth in depths]
        self.layout = layout
        self.patch_embed = Stem(dim, patch)
        levels = [
            Level(
                dim * 2**i,
                heads[i],
                kernel,
                dilations[i],
                mlp_ratio,
                layer_scale,
                Downsample(dim * 2**i, layout == SWIN) if i + 1 < len(depths) else None,
            )
            for i in range(len(depths))
        ]
        if layout == ISOTROPIC:
            self.layers = levels[0].blocks
        elif layout == SWIN:
            self.layers = nn.ModuleList(levels)
        else:
            self.levels = nn.ModuleList(levels)
        self.norm = nn.LayerNorm(dim * 2 ** (len(depths) - 1))
        self.head = nn.Linear(dim * 2 ** (len(depths) - 1), classes)

    def forward(self, images):
        """Logits, and the map of every level before it is halved."""
        x, maps = self.patch_embed(images), []
        if self.layout == ISOTROPIC:
            for block in self.layers:
                x = block(x)
            maps = [x]
        for level in () if self.layout == ISOTROPIC else getattr(self, self.levels_name):
            x = level(x)
            maps.append(x)
            x = x if level.downsample is None else level.downsample(x)
        return self.head(self.norm(x).mean((1, 2))), maps

    @property
    def levels_name(self):
        return "layers" if self.layout == SWIN else "levels"


CASES = {
    "nat": (
        {"dim": 8, "depths": (1, 1), "heads": (2, 4), "mlp_ratio": 3, "kernel": 3},
        (24, 20),
    ),
    "nat_layer_scale": (
        {"dim": 8, "depths": (1, 1), "heads": (1, 2), "mlp_ratio": 2, "kernel": 5, "layer_scale": True},
        (40, 36),
    ),
    # Maps 7x5 and 4x3 under reaches of 3 and 6: one axis padded, both, and none.
    "dinat": (
        {"dim": 8, "depths": (2, 2), "heads": (2, 2), "mlp_ratio": 3, "kernel": 3, "dilations": ((1, 2), (1, 2))},
        (28, 20),
    ),
    # Images that are no multiple of the patch, and an odd map to merge.
    "dinat_s": (
        {"dim": 8, "depths": (1, 1), "heads": (2, 2), "mlp_ratio": 4, "kernel": 3, "dilations": ((2,), (1,)), "layout": SWIN, "patch": 4},
        (26, 19),
    ),
    "isotropic": (
        {"dim": 8, "depths": (2,), "heads": (2,), "mlp_ratio": 4, "kernel": 3, "dilations": ((1, 2),), "layout": ISOTROPIC, "patch": 4},
        (32, 24),
    ),
    "transformers": (
        {"dim": 8, "depths": (1, 1), "heads": (2, 4), "mlp_ratio": 2, "kernel": 3, "dilations": ((2,), (1,)), "layer_scale": True},
        (28, 20),
    ),
}  # fmt: skip
CLASSES = 5
PLAIN = (3, 4, 18, 5)
SIZES = {
    "mini": {"dim": 64, "depths": (3, 4, 6, 5), "heads": (2, 4, 8, 16), "mlp_ratio": 3},
    "tiny": {"dim": 64, "depths": PLAIN, "heads": (2, 4, 8, 16), "mlp_ratio": 3},
    "nat_small": {"dim": 96, "depths": PLAIN, "heads": (3, 6, 12, 24), "mlp_ratio": 2, "layer_scale": True},
    "dinat_small": {"dim": 96, "depths": PLAIN, "heads": (3, 6, 12, 24), "mlp_ratio": 2},
    "base": {"dim": 128, "depths": PLAIN, "heads": (4, 8, 16, 32), "mlp_ratio": 2, "layer_scale": True},
    "large": {"dim": 192, "depths": PLAIN, "heads": (6, 12, 24, 48), "mlp_ratio": 2},
    "large_11x11": {"dim": 192, "depths": PLAIN, "heads": (6, 12, 24, 48), "mlp_ratio": 2, "kernel": 11},
    "s_tiny": {"dim": 96, "depths": (2, 2, 6, 2), "heads": (3, 6, 12, 24), "mlp_ratio": 4, "layout": SWIN, "patch": 4},
    "s_small": {"dim": 96, "depths": (2, 2, 18, 2), "heads": (3, 6, 12, 24), "mlp_ratio": 4, "layout": SWIN, "patch": 4},
    "s_base": {"dim": 128, "depths": (2, 2, 18, 2), "heads": (4, 8, 16, 32), "mlp_ratio": 4, "layout": SWIN, "patch": 4},
    "s_large": {"dim": 192, "depths": (2, 2, 18, 2), "heads": (4, 8, 16, 32), "mlp_ratio": 4, "layout": SWIN, "patch": 4},
    "isotropic_small": {"dim": 384, "depths": (12,), "heads": (12,), "mlp_ratio": 4, "layout": ISOTROPIC, "patch": 16},
    "isotropic_base": {"dim": 768, "depths": (12,), "heads": (24,), "mlp_ratio": 4, "layout": ISOTROPIC, "patch": 16},
}  # fmt: skip
"""Published sizes that differ in a key or a shape."""


def dinat_of_transformers(dim, depths, heads, mlp_ratio, kernel=7, dilations=None, layer_scale=False, classes=1000):  # fmt: skip
    """`DinatForImageClassification`, which asks for a package that is no more; only its attention is replaced."""
    modeling_dinat.requires_backends = lambda *_: None
    modeling_dinat.NeighborhoodAttention.forward = attention_of_transformers
    config = transformers.DinatConfig(
        embed_dim=dim,
        depths=list(depths),
        num_heads=list(heads),
        mlp_ratio=float(mlp_ratio),
        kernel_size=kernel,
        dilations=[list(d) for d in dilations] if dilations else [[1] * d for d in depths],
        layer_scale_init_value=1.0 if layer_scale else 0.0,
        num_labels=classes,
    )
    return modeling_dinat.DinatForImageClassification(config)


def attention_of_transformers(self, hidden_states, output_attentions=False):
    heads = (self.num_attention_heads, self.attention_head_size)
    query, key, value = (
        layer(hidden_states).unflatten(-1, heads).permute(0, 3, 1, 2, 4)
        for layer in (self.query, self.key, self.value)
    )
    out = dense_neighborhood(query, key, value, self.rpb, self.kernel_size, self.dilation)
    return (out.permute(0, 2, 3, 1, 4).flatten(3),)


@torch.no_grad()
def randomize(model, seed):
    """Every parameter random, so that none can be left out or swapped unseen; small enough for sane activations."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        is_norm = "norm" in name and name.endswith("weight")
        spread = 1.0 if name.endswith("rpb") else 0.3
        parameter.copy_(float(is_norm) + spread * torch.randn(parameter.shape))


@torch.no_grad()
def run(name, options, size, seed):
    """Tensors of one case."""
    if name == "transformers":
        model = dinat_of_transformers(**options, classes=CLASSES).eval()
    else:
        model = Nat(**options, classes=CLASSES).eval()
    randomize(model, seed)
    images = torch.randn(2, 3, *size)
    tensors = {f"weights/{key}": value for key, value in model.state_dict().items()}
    if name == "transformers":
        logits = model(images).logits
        maps = []
    else:
        logits, maps = model(images)
    tensors |= {"images": images.movedim(1, -1).contiguous(), "logits": logits}
    tensors |= {f"maps/{level}": x.contiguous() for level, x in enumerate(maps)}
    return {f"{name}/{key}": value for key, value in tensors.items()}


LAYER = re.compile(r"(blocks\.|\d\.layers\.|^layers\.)(\d+)(?=\.(?!blocks|downsample))")


def short(state):
    """Shape by key, as `32x3x3x3`, with one line for all layers of a level."""
    runs = {}
    for key, tensor in state.items():
        found = LAYER.search(key)
        run = (LAYER.sub(r"\1*", key), "x".join(map(str, tensor.shape)))
        runs.setdefault(run, []).append(int(found[2]) if found else 0)
    assert all(indices == list(range(len(indices))) for indices in runs.values())
    return {
        key.replace("*", f"0-{len(indices) - 1}"): shape for (key, shape), indices in runs.items()
    }


def main():
    versions = {m.__name__: m.__version__ for m in (torch, transformers, safetensors)}
    tensors = {}
    for seed, (name, (options, size)) in enumerate(CASES.items()):
        tensors |= run(name, options, size, seed)
    metadata = {"versions": json.dumps(versions), "cases": json.dumps(CASES)}
    safetensors.torch.save_file(tensors, HERE / "nat.safetensors", metadata)
    keys = {}
    with torch.device("meta"):
        for size, options in SIZES.items():
            keys[f"authors/{size}"] = short(Nat(**options).state_dict())
            if "layout" not in options:
                keys[f"transformers/{size}"] = short(dinat_of_transformers(**options).state_dict())
    (HERE / "nat_keys.json").write_text(json.dumps({"versions": versions, **keys}, indent=0) + "\n")


if __name__ == "__main__":
    main()
