"""Make hdit.safetensors: a tiny HDiT with random weights, its inputs and its output, computed by plain torch.

    python tests/golden/export_hdit.py

torch 2.13.0 (CPU), safetensors 0.8.0, Python 3.11. The model is restated here from its published definition (arXiv 2401.11605
and k-diffusion's image_transformer_v2, whose parameter names it has), with neighborhood attention as dense attention under a
mask. Nothing of gna_jax is imported.

Tensors: `model.<k-diffusion's key>`, and without a prefix images [B, C, H, W], sigma, class_labels, augmentation,
condition, output.
"""

import math
import pathlib
import platform

import safetensors
import torch
from safetensors.torch import save_file

HEAD = 16
CHANNELS, PATCH, CLASSES, CONDITION = 3, 2, 5, 6
MAPPING_WIDTH, MAPPING_HIDDEN, MAPPING_DEPTH = 24, 40, 2
LEVELS = ((1, 16, 24, 3), (2, 32, 24, 3), (1, 48, 32, None))  # depth, width, hidden, window
LAYOUT = (16, 24)


def random_weights(generator):
    """Every tensor by its published key; also those that training starts at 0 or 1 are random."""
    weights = {}

    def draw(key, *shape, mean=0.0, deviation=None):
        deviation = 0.8 * shape[-1] ** -0.5 if deviation is None else deviation
        weights[key] = mean + deviation * torch.randn(*shape, generator=generator)

    def feed_forward(key, width, hidden):
        draw(f"{key}.up_proj.weight", 2 * hidden, width)
        draw(f"{key}.down_proj.weight", width, hidden)

    def layer(key, width, hidden):
        draw(f"{key}.self_attn.norm.linear.weight", width, MAPPING_WIDTH)
        draw(f"{key}.self_attn.qkv_proj.weight", 3 * width, width)
        draw(f"{key}.self_attn.scale", width // HEAD, mean=8.0, deviation=2.0)
        draw(f"{key}.self_attn.out_proj.weight", width, width)
        draw(f"{key}.ff.norm.linear.weight", width, MAPPING_WIDTH)
        feed_forward(f"{key}.ff", width, hidden)
        weights[f"{key}.self_attn.pos_emb.freqs"] = frequencies(width // HEAD).float()

    first, wide = LEVELS[0][1], MAPPING_WIDTH
    draw("patch_in.proj.weight", first, CHANNELS * PATCH**2)
    draw("time_emb.weight", wide // 2, 1, deviation=1.0)
    draw("time_in_proj.weight", wide, wide)
    draw("aug_emb.weight", wide // 2, 9, deviation=1.0)
    draw("aug_in_proj.weight", wide, wide)
    draw("class_emb.weight", CLASSES, wide, deviation=1.0)
    draw("mapping_cond_in_proj.weight", wide, CONDITION)
    for norm in ("in_norm", "out_norm"):
        draw(f"mapping.{norm}.scale", wide, mean=1.0, deviation=0.2)
    for i in range(MAPPING_DEPTH):
        draw(f"mapping.blocks.{i}.norm.scale", wide, mean=1.0, deviation=0.2)
        feed_forward(f"mapping.blocks.{i}", wide, MAPPING_HIDDEN)
    for i, (depth, width, hidden, _) in enumerate(LEVELS[:-1]):
        for j in range(depth):
            layer(f"down_levels.{i}.{j}", width, hidden)
            layer(f"up_levels.{i}.{j}", width, hidden)
        below = LEVELS[i + 1][1]
        draw(f"merges.{i}.proj.weight", below, 4 * width)
        draw(f"splits.{i}.proj.weight", 4 * width, below)
        draw(f"splits.{i}.fac", 1, mean=0.4, deviation=0.2)
    depth, width, hidden, _ = LEVELS[-1]
    for j in range(depth):
        layer(f"mid_level.{j}", width, hidden)
    draw("out_norm.scale", first, mean=1.0, deviation=0.2)
    draw("patch_out.proj.weight", CHANNELS * PATCH**2, first)
    return weights


def frequencies(heads):
    """Radians per unit of position: `pi * 10 ** (k / K)`, the k-th of all K = heads * HEAD / 8 to head k modulo heads."""
    count = heads * HEAD // 8
    every = math.pi * 10.0 ** (torch.arange(count, dtype=torch.float64) / count)
    return torch.stack([every[head::heads] for head in range(heads)])


def rms(x, scale):
    return x * scale * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


def geglu(x, weights, key):
    value, gate = (x @ weights[f"{key}.up_proj.weight"].T).chunk(2, dim=-1)
    hidden = value * gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2)))
    return hidden @ weights[f"{key}.down_proj.weight"].T


def sees(layout, window):
    """[tokens, tokens]: whether a query sees a key; a window moves inside where it would pass an edge."""
    if window is None:
        return torch.ones(math.prod(layout), math.prod(layout), dtype=torch.bool)
    axes = []
    for length in layout:
        start = (torch.arange(length) - window // 2).clamp(0, length - window)[:, None]
        at = torch.arange(length)[None]
        axes.append((at >= start) & (at < start + window))
    rows, columns = axes
    both = rows[:, None, :, None] & columns[None, :, None, :]
    return both.reshape(math.prod(layout), -1)


def turned(x, layout, heads):
    """Rotate the first half of each head [B, tokens, heads, HEAD]: a quarter of the pairs by row, a quarter by column."""
    box = [torch.linspace(-1, 1, 2 * n + 1, dtype=torch.float64)[1::2] for n in layout]
    box = [centers * n / max(layout) for centers, n in zip(box, layout, strict=True)]
    y, z = torch.meshgrid(*box, indexing="ij")
    rate = frequencies(heads)
    angle = torch.cat([p.reshape(-1, 1, 1) * rate for p in (y, z)], dim=-1).to(x.dtype)
    n = angle.shape[-1]
    a, b, rest = x[..., :n], x[..., n : 2 * n], x[..., 2 * n :]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


def layer(x, vector, weights, key, window):
    batch, height, width, features = x.shape
    heads, layout = features // HEAD, (height, width)

    def norm(x, part):
        scale = 1 + vector @ weights[f"{key}.{part}.norm.linear.weight"].T
        return rms(x, scale[:, None, None, :])

    qkv = norm(x, "self_attn") @ weights[f"{key}.self_attn.qkv_proj.weight"].T
    query, key_, value = qkv.reshape(batch, height * width, 3, heads, HEAD).unbind(2)
    root = weights[f"{key}.self_attn.scale"].sqrt()[:, None]
    query, key_ = (
        turned(v * root * (v.square().sum(-1, keepdim=True) + 1e-6).rsqrt(), layout, heads)
        for v in (query, key_)
    )
    scores = torch.einsum("bqnh,bknh->bnqk", query, key_)
    scores = scores.masked_fill(~sees(layout, window), -math.inf)
    out = torch.einsum("bnqk,bknh->bqnh", scores.softmax(-1), value).reshape(x.shape)
    x = x + out @ weights[f"{key}.self_attn.out_proj.weight"].T
    return x + geglu(norm(x, "ff"), weights, f"{key}.ff")


def tokens_of(x, patch):
    """[B, H, W, C] to [B, H / patch, W / patch, patch * patch * C]."""
    parts = [x[:, i::patch, j::patch] for i in range(patch) for j in range(patch)]
    return torch.cat(parts, dim=-1)


def pixels_of(x, patch):
    """The inverse of `tokens_of`."""
    batch, height, width, features = x.shape
    out = x.new_zeros(batch, height * patch, width * patch, features // patch**2)
    for number, part in enumerate(x.chunk(patch**2, dim=-1)):
        out[:, number // patch :: patch, number % patch :: patch] = part
    return out


def fourier(x, weight):
    angle = 2 * math.pi * x @ weight.T
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def mapped(w, sigma, class_labels, augmentation, condition):
    vector = fourier(sigma.log()[:, None] / 4, w["time_emb.weight"]) @ w["time_in_proj.weight"].T
    vector = vector + fourier(augmentation, w["aug_emb.weight"]) @ w["aug_in_proj.weight"].T
    vector = vector + w["class_emb.weight"][class_labels]
    vector = vector + condition @ w["mapping_cond_in_proj.weight"].T
    vector = rms(vector, w["mapping.in_norm.scale"])
    for i in range(MAPPING_DEPTH):
        block = f"mapping.blocks.{i}"
        vector = vector + geglu(rms(vector, w[f"{block}.norm.scale"]), w, block)
    return rms(vector, w["mapping.out_norm.scale"])


def model(w, images, **conditions):
    """[B, C, H, W] to [B, C, H, W]."""
    vector = mapped(w, **conditions)
    x = tokens_of(images.movedim(1, -1), PATCH) @ w["patch_in.proj.weight"].T
    skips = []
    for i, (depth, _, _, window) in enumerate(LEVELS[:-1]):
        for j in range(depth):
            x = layer(x, vector, w, f"down_levels.{i}.{j}", window)
        skips.append(x)
        x = tokens_of(x, 2) @ w[f"merges.{i}.proj.weight"].T
    for j in range(LEVELS[-1][0]):
        x = layer(x, vector, w, f"mid_level.{j}", LEVELS[-1][3])
    for i in reversed(range(len(skips))):
        fine = pixels_of(x @ w[f"splits.{i}.proj.weight"].T, 2)
        factor = w[f"splits.{i}.fac"]
        x = (1 - factor) * skips[i] + factor * fine
        for j in range(LEVELS[i][0]):
            x = layer(x, vector, w, f"up_levels.{i}.{j}", LEVELS[i][3])
    x = pixels_of(rms(x, w["out_norm.scale"]) @ w["patch_out.proj.weight"].T, PATCH)
    return x.movedim(-1, 1)


def main():
    generator = torch.Generator().manual_seed(0)
    weights = random_weights(generator)
    inputs = {
        "images": torch.randn(2, CHANNELS, *LAYOUT, generator=generator),
        "sigma": torch.tensor([0.05, 3.0]),
        "class_labels": torch.tensor([4, 1]),
        "augmentation": torch.randn(2, 9, generator=generator),
        "condition": torch.randn(2, CONDITION, generator=generator),
    }
    # In float64, so that the golden's own error does not count.
    exact = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    output = model({k: v.double() for k, v in weights.items()}, **exact).float()
    tensors = {f"model.{k}": v.contiguous() for k, v in weights.items()} | inputs
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "safetensors": safetensors.__version__,
    }
    path = pathlib.Path(__file__).with_name("hdit.safetensors")
    save_file(tensors | {"output": output.contiguous()}, path, metadata=versions)
    print(f"{path.name}: {path.stat().st_size} bytes, output deviation {output.std():.3f}")


if __name__ == "__main__":
    main()
