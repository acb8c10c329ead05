"""Writes flux.safetensors: a tiny random FluxTransformer2DModel of diffusers, its inputs and its outputs.

    python tests/golden/export_flux.py

Ran with Python 3.11 and the versions in the file's metadata; needs torch, diffusers and safetensors. Keys: `weights.*` as
diffusers stores them, `inputs.*`, `outputs.*`.
"""

import pathlib
import sys

import diffusers
import safetensors.torch
import torch

SIZE = {
    "in_channels": 8,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 12,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "pooled_projection_dim": 10,
    "guidance_embeds": True,
    "axes_dims_rope": (4, 4, 4),
}
BATCH, HEIGHT, WIDTH, TEXT = 2, 6, 5, 7


def main() -> None:
    """Make the model, run it, store it."""
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(**SIZE).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Away from the initial ones and zeros, so that no weight could be left out unnoticed.
            parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.ndim > 1 else 0.3))
    inputs = {
        "latents": torch.randn(BATCH, HEIGHT, WIDTH, SIZE["in_channels"]),
        "text": torch.randn(BATCH, TEXT, SIZE["joint_attention_dim"]),
        "pooled_text": torch.randn(BATCH, SIZE["pooled_projection_dim"]),
        "timestep": torch.tensor([0.25, 0.9]),
        "guidance": torch.tensor([3.5, 1.0]),
    }
    rows, columns = torch.meshgrid(torch.arange(HEIGHT), torch.arange(WIDTH), indexing="ij")
    places = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).float()
    with torch.no_grad():
        (velocity,) = model(
            hidden_states=inputs["latents"].flatten(1, 2),
            encoder_hidden_states=inputs["text"],
            pooled_projections=inputs["pooled_text"],
            timestep=inputs["timestep"],
            guidance=inputs["guidance"],
            img_ids=places,
            txt_ids=torch.zeros(TEXT, 3),
            return_dict=False,
        )
    tensors = {f"weights.{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"inputs.{name}": value for name, value in inputs.items()}
    tensors["outputs.velocity"] = velocity.unflatten(1, (HEIGHT, WIDTH))
    versions = {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }
    path = pathlib.Path(__file__).with_name("flux.safetensors")
    safetensors.torch.save_file(
        {name: value.contiguous() for name, value in tensors.items()}, path, metadata=versions
    )


if __name__ == "__main__":
    main()
