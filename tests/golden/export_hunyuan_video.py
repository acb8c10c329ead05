"""Writes hunyuan_video.safetensors: a tiny random HunyuanVideoTransformer3DModel of diffusers, its inputs and its outputs.

    python tests/golden/export_hunyuan_video.py

Ran with Python 3.11 and the versions in the file's metadata; needs torch, diffusers and safetensors. Keys: `weights.*` as
diffusers stores them, `inputs.*`, `outputs.*`. The two samples have texts of different lengths.
"""

import pathlib
import sys

import diffusers
import safetensors.torch
import torch

SIZE = {
    "in_channels": 3,
    "out_channels": 3,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
    "patch_size": 2,
    "patch_size_t": 1,
    "guidance_embeds": True,
    "text_embed_dim": 10,
    "pooled_projection_dim": 9,
    "rope_axes_dim": (4, 4, 4),
}
BATCH, FRAMES, HEIGHT, WIDTH, TEXT = 2, 3, 8, 6, 7
LENGTHS = (7, 3)


def main() -> None:
    """Make the model, run it, store it."""
    torch.manual_seed(0)
    model = diffusers.HunyuanVideoTransformer3DModel(**SIZE).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Away from the initial ones and zeros, so that no weight could be left out unnoticed.
            parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.ndim > 1 else 0.3))
    inputs = {
        "latents": torch.randn(BATCH, FRAMES, HEIGHT, WIDTH, SIZE["in_channels"]),
        "text": torch.randn(BATCH, TEXT, SIZE["text_embed_dim"]),
        "text_lengths": torch.tensor(LENGTHS, dtype=torch.int32),
        "pooled_text": torch.randn(BATCH, SIZE["pooled_projection_dim"]),
        "timestep": torch.tensor([250.0, 901.0]),
        "guidance": torch.tensor([6000.0, 1000.0]),
    }
    mask = torch.arange(TEXT)[None] < inputs["text_lengths"][:, None]
    with torch.no_grad():
        (velocity,) = model(
            hidden_states=inputs["latents"].permute(0, 4, 1, 2, 3),
            timestep=inputs["timestep"],
            encoder_hidden_states=inputs["text"],
            encoder_attention_mask=mask,
            pooled_projections=inputs["pooled_text"],
            guidance=inputs["guidance"],
            return_dict=False,
        )
    tensors = {f"weights.{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"inputs.{name}": value for name, value in inputs.items()}
    tensors["outputs.velocity"] = velocity.permute(0, 2, 3, 4, 1)
    versions = {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }
    path = pathlib.Path(__file__).with_name("hunyuan_video.safetensors")
    safetensors.torch.save_file(
        {name: value.contiguous() for name, value in tensors.items()}, path, metadata=versions
    )


if __name__ == "__main__":
    main()
