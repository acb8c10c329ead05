"""Real problems by name: layouts, heads and rules of models, with where each number comes from. Nothing is computed here."""

import dataclasses

from gna_jax.neighborhood import WHOLE_GROUP, Neighborhood


@dataclasses.dataclass(frozen=True)
class PresetRule:
    """One window rule of a preset.

    Attributes:
      neighborhood: the rule.
      layers: layers of the model that use it; empty where it is one of several settings for all layers.
    """

    neighborhood: Neighborhood
    layers: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Preset:
    """A published use of neighborhood attention.

    Attributes:
      name: what the command line takes.
      title: for people.
      layout: tokens per axis.
      heads, kv_heads, head_dim: query heads, key/value heads, size of each.
      dtype: of queries, keys and values.
      rules: every published rule.
      source: paper, table or file of each number.
      batch: sequences per call.
      attention_share: share of a dense run's time that is self attention; None where not published.
      steps: sampling steps of a run; None where not published.
      dense_steps: those that keep dense attention in the published quality setting; None where not published.
      dense_layers: layers that keep dense attention.
    """

    name: str
    title: str
    layout: tuple[int, ...]
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    rules: tuple[PresetRule, ...]
    source: str
    batch: int = 1
    attention_share: float | None = None
    steps: int | None = None
    dense_steps: int | None = None
    dense_layers: tuple[int, ...] = ()

    @property
    def stride_1_rules(self) -> tuple[Neighborhood, ...]:
        """The distinct rules with their strides set to 1: the sliding windows they stand for."""
        rank = len(self.layout)
        sliding = (dataclasses.replace(r.neighborhood, stride=(1,) * rank) for r in self.rules)
        return tuple(dict.fromkeys(sliding))


def _strides(
    window_size: tuple[int, ...], *strides: int | tuple[int, ...]
) -> tuple[PresetRule, ...]:
    rank = len(window_size)
    return tuple(
        PresetRule(Neighborhood.of(rank, window_size=window_size, stride=stride))
        for stride in strides
    )


def _layers(
    *layers: int | range,
    window_size: tuple[int, ...],
    stride: int | tuple[int, ...] = 1,
    dilation: int | tuple[int, ...] = 1,
) -> PresetRule:
    numbers = (n for part in layers for n in ([part] if isinstance(part, int) else part))
    rule = Neighborhood.of(3, window_size=window_size, stride=stride, dilation=dilation)
    return PresetRule(rule, tuple(numbers))


# The five patterns of Cosmos-Predict2, sparsest first. Time is always whole.
_DILATED = {"window_size": (WHOLE_GROUP, 4, 16), "dilation": (1, 11, 5)}
_COLUMNS = {"window_size": (WHOLE_GROUP, 12, 16), "stride": (1, 4, 1), "dilation": (1, 1, 5)}
_LOCAL_92 = {"window_size": (WHOLE_GROUP, 12, 24), "stride": (1, 4, 8)}
_LOCAL_77 = {"window_size": (WHOLE_GROUP, 20, 40), "stride": (1, 4, 8)}
_LOCAL_55 = {"window_size": (WHOLE_GROUP, 28, 56), "stride": (1, 4, 8)}

_GNA = (
    "arXiv 2504.16922: use cases, share of attention (table 1), strides and steps (tables 2 to 5)"
)
_HUNYUAN = {
    "layout": (30, 48, 80),
    "heads": 24,
    "kv_heads": 24,
    "head_dim": 128,
    "dtype": "bfloat16",
    "source": f"{_GNA}; heads: HunyuanVideo repository, hyvideo/config.py",
    "attention_share": 0.607,
    "steps": 50,
    "dense_steps": 15,
}
_COSMOS = {
    "layout": (16, 44, 80),
    "heads": 32,
    "kv_heads": 32,
    "head_dim": 128,
    "dtype": "bfloat16",
    "source": f"{_GNA}; heads: cosmos-predict1 repository, cosmos_predict1/diffusion/config/base/net.py",
    "attention_share": 0.587,
    "steps": 35,
    "dense_steps": 12,
}
_PREDICT2_SOURCE = (
    "cosmos-predict2 repository, cosmos_predict2/configs/base/config_natten.py: rule of every layer for a grid of 44 x 80;"
    " 24 latent frames are 720p at 16 frames per second"
)

PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            name="flux-4k",
            title="FLUX.1-dev, 4K image",
            layout=(256, 256),
            heads=24,
            kv_heads=24,
            head_dim=128,
            dtype="bfloat16",
            rules=_strides((80, 80), 1, (16, 1), 16),
            source=f"{_GNA}; heads: flux repository, src/flux/util.py",
            attention_share=0.518,
            steps=28,
            dense_steps=9,
        ),
        Preset(
            name="hunyuan-91",
            title="HunyuanVideo, 5 s of 720p, 91 % sparse",
            rules=_strides(
                (18, 24, 24),
                1,
                (2, 1, 1),
                (1, 1, 8),
                (2, 1, 8),
                (1, 8, 8),
                (2, 8, 8),
                (16, 8, 8),
                (18, 24, 24),
            ),
            **_HUNYUAN,
        ),
        Preset(
            name="hunyuan-58",
            title="HunyuanVideo, 5 s of 720p, 58 % sparse",
            rules=_strides((30, 40, 40), 1, (1, 1, 8), (1, 32, 8), (30, 40, 40)),
            **_HUNYUAN,
        ),
        Preset(
            name="cosmos-89",
            title="Cosmos 7B, 5 s of 720p, 89 % sparse",
            rules=_strides((16, 24, 16), 1, (1, 8, 1), (1, 1, 16), (1, 8, 16)),
            **_COSMOS,
        ),
        Preset(
            name="cosmos-56",
            title="Cosmos 7B, 5 s of 720p, 56 % sparse",
            rules=_strides((16, 32, 48), 1, (1, 8, 1), (1, 1, 16), (1, 8, 16)),
            **_COSMOS,
        ),
        Preset(
            name="cosmos-predict2-2b",
            title="Cosmos-Predict2 2B, 720p, rules per layer",
            layout=(24, 44, 80),
            heads=16,
            kv_heads=16,
            head_dim=128,
            dtype="bfloat16",
            rules=(
                _layers(0, 1, **_DILATED),
                _layers(2, 5, 10, **_COLUMNS),
                _layers(3, 4, range(6, 10), 27, **_LOCAL_92),
                _layers(range(11, 23), range(24, 27), **_LOCAL_77),
                _layers(23, **_LOCAL_55),
            ),
            source=_PREDICT2_SOURCE,
        ),
        Preset(
            name="cosmos-predict2-14b",
            title="Cosmos-Predict2 14B, 720p, rules per layer",
            layout=(24, 44, 80),
            heads=40,
            kv_heads=40,
            head_dim=128,
            dtype="bfloat16",
            rules=(
                _layers(range(11), **_DILATED),
                _layers(11, 12, **_COLUMNS),
                _layers(range(13, 23), **_LOCAL_92),
                _layers(23, 25, 29, 30, 33, 35, **_LOCAL_77),
                _layers(24, 26, 28, 31, 32, 34, **_LOCAL_55),
            ),
            source=_PREDICT2_SOURCE,
            dense_layers=(27,),
        ),
        Preset(
            name="1d-32k",
            title="1-D, 32768 tokens, one head",
            layout=(32768,),
            heads=1,
            kv_heads=1,
            head_dim=128,
            dtype="float16",
            rules=_strides((2048,), 1, 256, 2048),
            source="NATTEN repository, docs/profiler.md",
        ),
        Preset(
            name="nat-1",
            title="NAT-Base and DiNAT-Base, first level, 224 x 224 images",
            layout=(56, 56),
            heads=4,
            kv_heads=4,
            head_dim=32,
            dtype="float16",
            rules=(
                PresetRule(Neighborhood.of(2, window_size=7)),
                PresetRule(Neighborhood.of(2, window_size=7, dilation=8)),
            ),
            source="NAT, arXiv 2204.07143, and DiNAT, arXiv 2209.15001: dilation 8 in every second layer",
            batch=128,
        ),
    )
}
"""Every preset by its name."""
