"""Export tests/golden/cosmos_predict1.safetensors and cosmos_predict2.safetensors: tiny Cosmos transformers of diffusers.

    pip install torch==2.13.0 diffusers==0.42.1 safetensors     # CPU builds; Python 3.11
    python tests/golden/export_cosmos.py

Random weights, inputs, and outputs of `diffusers.CosmosTransformer3DModel`: with its own dense self-attention (`output`), and
with a neighborhood's mask in it, written below as loops over one axis (`output_windowed`). Tensors keep diffusers' layout;
the weights' keys have the prefix `weights.`. The metadata holds configuration, windows and versions.
"""

import itertools
import json
import sys
import types
from pathlib import Path

import diffusers
import numpy as np
import safetensors
import torch
from diffusers import CosmosTransformer3DModel
from diffusers.models.transformers import transformer_cosmos
from safetensors.torch import save_file

FOLDER = Path(__file__).parent
TINY = {
    "in_channels": 4,
    "out_channels": 3,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 2,
    "mlp_ratio": 2.0,
    "text_embed_dim": 12,
    "adaln_lora_dim": 4,
    "max_size": (8, 16, 16),
    "patch_size": (1, 2, 2),
}
CONFIGS = {
    "predict1": TINY | {"rope_scale": (2.0, 1.0, 1.5), "extra_pos_embed_type": "learnable"},
    "predict2": TINY | {"rope_scale": (20 / 24, 2.0, 3.0), "extra_pos_embed_type": None},
}
VIDEO = (3, 8, 12)  # latents
GRID = (3, 4, 6)  # tokens
# Per layer: window, stride, dilation of each axis. Whole axes are written out.
WINDOWS = {
    "predict1": [((3, 3, 3), (1, 1, 1), (1, 1, 1)), ((2, 2, 4), (1, 2, 2), (1, 1, 1))],
    "predict2": [((3, 2, 3), (1, 1, 2), (1, 2, 2)), ((3, 3, 4), (1, 2, 3), (1, 1, 1))],
}


def sees(query: int, length: int, window: int, stride: int, dilation: int) -> set[int]:
    """Keys that a query sees on one axis."""
    group = [position for position in range(length) if position % dilation == query % dilation]
    place = group.index(query)
    leader = min(place // stride * stride + stride // 2, len(group) - 1)
    first = min(max(leader - window // 2, 0), len(group) - window)
    return set(group[first : first + window])


def mask(rule) -> torch.Tensor:
    """Which token of the grid sees which, over all pairs."""
    tokens = list(itertools.product(*map(range, GRID)))
    seen = [
        [
            all(
                key[axis] in sees(query[axis], GRID[axis], *(part[axis] for part in rule))
                for axis in range(3)
            )
            for key in tokens
        ]
        for query in tokens
    ]
    return torch.tensor(seen)


class Masked(transformer_cosmos.CosmosAttnProcessor2_0):
    """diffusers' attention with a mask that its blocks do not pass on."""

    def __init__(self, allowed: torch.Tensor):
        super().__init__()
        self.allowed = allowed

    def __call__(
        self,
        attn,
        hidden_states,
        encoder_hidden_states=None,
        attention_mask=None,
        image_rotary_emb=None,
    ):
        return super().__call__(
            attn, hidden_states, encoder_hidden_states, self.allowed, image_rotary_emb
        )


def nearest(image: torch.Tensor, size: list[int], interpolation=None) -> torch.Tensor:
    """torchvision's resize of a tensor to the nearest pixel, which is this call; torchvision itself is not needed then."""
    return torch.nn.functional.interpolate(image, size=size, mode="nearest")


def random_weights(model: torch.nn.Module, generator: torch.Generator) -> None:
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        near_one = "norm" in name and parameter.ndim == 1
        fan_in = parameter.shape[-1] if parameter.ndim == 2 else 1
        parameter.data = 1 + 0.2 * noise if near_one else noise / fan_in**0.5


def export(name: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=generator)
    model = CosmosTransformer3DModel(**CONFIGS[name]).eval()
    random_weights(model, generator)
    t, y, x = VIDEO
    if name == "predict1":
        given = {"hidden_states": draw(2, 4, t, y, x), "timestep": torch.tensor([0.7, 310.0])}
        options = {"fps": 12}
    else:
        given = {
            "hidden_states": draw(2, 3, t, y, x),
            "condition_mask": torch.randint(0, 2, (2, 1, t, y, x), generator=generator).float(),
            "timestep": 0.9 * torch.rand((2, 1, t, 1, 1), generator=generator),
            "attention_mask": torch.arange(5)[None] < torch.tensor([[5], [2]]),
        }
        options = {"fps": 16}
    given["encoder_hidden_states"] = draw(2, 5, 12)
    given["padding_mask"] = torch.randint(0, 2, (1, 1, 19, 23), generator=generator).float()
    with torch.no_grad():
        output = model(**given, **options).sample
        for block, rule in zip(model.transformer_blocks, WINDOWS[name], strict=True):
            block.attn1.set_processor(Masked(mask(rule)))
        windowed = model(**given, **options).sample
    tensors = {f"weights.{key}": value for key, value in model.state_dict().items()}
    tensors |= given | {"output": output, "output_windowed": windowed}
    versions = {m.__name__: m.__version__ for m in (torch, diffusers, safetensors, np)}
    metadata = {
        "config": CONFIGS[name],
        "options": options,
        "windows": WINDOWS[name],
        "versions": versions | {"python": sys.version.split()[0]},
    }
    path = FOLDER / f"cosmos_{name}.safetensors"
    save_file(
        {key: value.contiguous() for key, value in tensors.items()},
        path,
        {key: json.dumps(value) for key, value in metadata.items()},
    )
    print(path.name, f"{path.stat().st_size / 1e3:.0f} kB, output {output.std():.3f},", end=" ")
    print(f"windowed differs by {(output - windowed).abs().max():.3f}")


def count_parameters() -> None:
    """Parameters of the published models, as diffusers makes them without memory for them."""
    large = {"num_attention_heads": 40, "num_layers": 36}
    without = {"extra_pos_embed_type": None}
    sizes = {
        "predict1-7b": {},
        "predict1-14b": large,
        "predict2-2b": {"num_attention_heads": 16, **without},
        "predict2-14b": large | without,
    }
    for size, options in sizes.items():
        for channels in (16, 17):
            with torch.device("meta"):
                model = CosmosTransformer3DModel(in_channels=channels, **options)
            print(size, channels, sum(parameter.numel() for parameter in model.parameters()))


if __name__ == "__main__":
    transformer_cosmos.transforms = types.SimpleNamespace(
        functional=types.SimpleNamespace(resize=nearest),
        InterpolationMode=types.SimpleNamespace(NEAREST="nearest"),
    )
    if "--count" in sys.argv:
        count_parameters()
    else:
        export("predict1", seed=1)
        export("predict2", seed=2)
