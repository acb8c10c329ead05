"""Architecture of NAT and DiNAT as data: `NATConfig`, and the published sizes. No arrays here."""

import dataclasses
from collections.abc import Mapping

import numpy as np


@dataclasses.dataclass(frozen=True)
class NATConfig:
    """Architecture of a NAT or DiNAT; hashable.

    Args:
      dim: features of the first level; each level has twice as many as the one before.
      depths: layers per level.
      num_heads: heads per level.
      mlp_ratio: hidden features of the MLP, as a multiple of its input.
      window_size: of every layer, on both axes.
      dilations: per level, one per layer. None: 1 everywhere, which is NAT.
      layer_scale: what the learned factors on both branches of a layer start at. None: no such factors.
      drop_path: rate of the last layer; layers before it have linearly less, the first none.
      patch_size: None: overlapping 3x3 convolutions of stride 2 make the tokens (two, so 4x4 pixels per token) and halve the map
        between levels. A number: patches of so many pixels squared, and levels that merge 2x2 tokens, as in Swin and ViT.

    Raises:
      ValueError: where levels and layers do not agree in number, or heads do not divide features.
    """

    dim: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    mlp_ratio: float
    window_size: int = 7
    dilations: tuple[tuple[int, ...], ...] | None = None
    layer_scale: float | None = None
    drop_path: float = 0.0
    patch_size: int | None = None

    def __post_init__(self) -> None:
        if len(self.num_heads) != len(self.depths):
            raise ValueError(
                f"num_heads must have one number per level; got num_heads={self.num_heads}, depths={self.depths}"
            )
        if self.dilations is not None and tuple(map(len, self.dilations)) != tuple(self.depths):
            raise ValueError(
                "dilations must have one number per layer of each level;"
                f" got dilations={self.dilations}, depths={self.depths}; None is 1 everywhere"
            )
        for features, heads in zip(self.level_dims, self.num_heads, strict=True):
            if features % heads:
                raise ValueError(
                    f"num_heads must divide the features of its level; got {heads} heads for {features} features"
                    f" (dim={self.dim}, doubled per level)"
                )

    @property
    def level_dims(self) -> tuple[int, ...]:
        """Features of each level."""
        return tuple(self.dim * 2**level for level in range(len(self.depths)))

    def layers(self, level: int) -> list[tuple[int, float]]:
        """Dilation and drop-path rate of each layer of a level."""
        depth = self.depths[level]
        before = sum(self.depths[:level])
        rates = np.linspace(0.0, self.drop_path, sum(self.depths))[before : before + depth]
        dilations = (1,) * depth if self.dilations is None else self.dilations[level]
        return [(dilation, float(rate)) for dilation, rate in zip(dilations, rates, strict=True)]


_MINI, _DEPTHS = (3, 4, 6, 5), (3, 4, 18, 5)
_TINY = NATConfig(64, _DEPTHS, (2, 4, 8, 16), 3, drop_path=0.2)
_SMALL = NATConfig(96, _DEPTHS, (3, 6, 12, 24), 2, drop_path=0.3)
_BASE = NATConfig(128, _DEPTHS, (4, 8, 16, 32), 2, drop_path=0.5, layer_scale=1e-5)
_LARGE = NATConfig(192, _DEPTHS, (6, 12, 24, 48), 2, drop_path=0.35)

_S_DEPTHS, _S_HEADS = (2, 2, 18, 2), (4, 8, 16, 32)
_S_LARGE = NATConfig(192, _S_DEPTHS, _S_HEADS, 4, drop_path=0.35, patch_size=4)


def _dilated(config: NATConfig, *dilations: int) -> NATConfig:
    """Every other layer of a level with its dilation, as at 224 pixels if none are given."""
    levels = zip(config.depths, dilations or (8, 4, 2, 1), strict=True)
    return dataclasses.replace(
        config, dilations=tuple(tuple((1, d)[i % 2] for i in range(depth)) for depth, d in levels)
    )


NAT_SIZES: Mapping[str, NATConfig] = {
    "mini": dataclasses.replace(_TINY, depths=_MINI),
    "tiny": _TINY,
    "small": dataclasses.replace(_SMALL, layer_scale=1e-5),
    "base": _BASE,
}
DINAT_SIZES: Mapping[str, NATConfig] = {
    "mini": _dilated(dataclasses.replace(_TINY, depths=_MINI)),
    "tiny": _dilated(_TINY),
    "small": _dilated(_SMALL),
    "base": _dilated(_BASE),
    "large": _dilated(_LARGE),
    "large_21k": _dilated(dataclasses.replace(_LARGE, drop_path=0.2)),
    "large_21k_11x11": _dilated(dataclasses.replace(_LARGE, drop_path=0.2, window_size=11)),
    "large_384": _dilated(_LARGE, 13, 6, 3, 1),
    "large_384_11x11": _dilated(dataclasses.replace(_LARGE, window_size=11)),
}
DINAT_S_SIZES: Mapping[str, NATConfig] = {
    "tiny": _dilated(NATConfig(96, (2, 2, 6, 2), (3, 6, 12, 24), 4, drop_path=0.2, patch_size=4)),
    "small": _dilated(NATConfig(96, _S_DEPTHS, (3, 6, 12, 24), 4, drop_path=0.3, patch_size=4)),
    "base": _dilated(NATConfig(128, _S_DEPTHS, _S_HEADS, 4, drop_path=0.5, patch_size=4)),
    "large": _dilated(_S_LARGE),
    "large_21k": _dilated(dataclasses.replace(_S_LARGE, drop_path=0.2)),
    "large_384": _dilated(_S_LARGE, 13, 6, 3, 1),
}
NAT_ISOTROPIC_SIZES: Mapping[str, NATConfig] = {
    "small": NATConfig(384, (12,), (12,), 4, drop_path=0.1, patch_size=16),
    "base": NATConfig(768, (12,), (24,), 4, drop_path=0.4, patch_size=16),
}
DINAT_ISOTROPIC_SIZES: Mapping[str, NATConfig] = {
    size: _dilated(config, 2) for size, config in NAT_ISOTROPIC_SIZES.items()
}
