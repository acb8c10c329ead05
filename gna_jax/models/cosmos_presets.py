"""Sizes of the Cosmos-Predict diffusion transformers, and the published ones by name. Nothing is computed here."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class CosmosConfig:
    """Sizes of a Cosmos transformer.

    Attributes:
      num_layers, num_heads, head_dim: blocks, attention heads, features of a head.
      in_channels: channels of the latents, with the condition mask's (video2world models) and without the padding mask's.
      out_channels: channels that are predicted.
      patch_size: latents per token along T, Y and X.
      mlp_ratio: width of the MLPs over the width.
      text_features: features of a text token.
      modulation_rank: rank of the maps from time to shifts, scales and gates.
      max_size: largest video the embeddings know, in latents along T, Y and X.
      rope_scale: extrapolation of the rotary embedding along T, Y and X: factor on its longest period.
      padding_mask: whether a mask of padded pixels is one more input channel.
      learned_positions: whether learned positions are added to the tokens in every block (Cosmos-Predict1).
    """

    num_layers: int
    num_heads: int
    head_dim: int = 128
    in_channels: int = 16
    out_channels: int = 16
    patch_size: tuple[int, int, int] = (1, 2, 2)
    mlp_ratio: float = 4.0
    text_features: int = 1024
    modulation_rank: int = 256
    max_size: tuple[int, int, int] = (128, 240, 240)
    rope_scale: tuple[float, float, float] = (1.0, 1.0, 1.0)
    padding_mask: bool = True
    learned_positions: bool = False

    def __post_init__(self):
        if self.head_dim % 2 or self.head_dim < 12:
            raise ValueError(
                "head_dim must be even and at least 12, so that every axis has rotary frequencies that a scale can stretch;"
                f" got head_dim={self.head_dim}"
            )

    @property
    def features(self) -> int:
        """Width of the transformer."""
        return self.num_heads * self.head_dim

    @property
    def max_layout(self) -> tuple[int, ...]:
        """Largest token grid."""
        return tuple(n // p for n, p in zip(self.max_size, self.patch_size, strict=True))


def _predict1(
    layers: int, heads: int, rope_scale: tuple[float, float, float], **sizes: Any
) -> CosmosConfig:
    return CosmosConfig(layers, heads, rope_scale=rope_scale, learned_positions=True, **sizes)


COSMOS = {
    "predict1-7b-text2world": _predict1(28, 32, (2.0, 1.0, 1.0)),
    "predict1-7b-video2world": _predict1(28, 32, (2.0, 1.0, 1.0), in_channels=17),
    "predict1-14b-text2world": _predict1(36, 40, (2.0, 2.0, 2.0)),
    "predict1-14b-video2world": _predict1(36, 40, (2.0, 2.0, 2.0), in_channels=17),
    "predict2-2b-text2image": CosmosConfig(28, 16, rope_scale=(1.0, 4.0, 4.0)),
    "predict2-2b-video2world": CosmosConfig(28, 16, rope_scale=(1.0, 3.0, 3.0), in_channels=17),
    "predict2-14b-text2image": CosmosConfig(36, 40, rope_scale=(1.0, 4.0, 4.0)),
    "predict2-14b-video2world": CosmosConfig(
        36, 40, rope_scale=(20 / 24, 2.0, 2.0), in_channels=17
    ),
}
"""Published models, as in the diffusers repository, scripts/convert_cosmos_to_diffusers.py."""
