"""Cosmos-Predict2's published windows, a rule per layer, on any token grid: how they scale is written here.

The rules themselves are presets of the simulator (`gna_jax.simulator.PRESETS`), so what it predicts is what runs. The schedule
of Cosmos-Predict1, whose windows do not scale: `preset_schedule("cosmos-56", 28)` of `gna_jax.models.schedule`.
"""

from collections.abc import Sequence

from gna_jax.models.schedule import AttentionSchedule, preset_schedule
from gna_jax.neighborhood import WHOLE_GROUP, Neighborhood, Sizes, per_axis

BASE_SIZE = (WHOLE_GROUP, 44, 80)
"""Token grid that Cosmos-Predict2's windows are meant for, 720p: any number of frames, 44 x 80 tokens each."""
PREDICT2_LAYERS = {"2b": 28, "14b": 36}
"""Layers of each size."""
_SMALLEST_WINDOW = 2


def scale_rule(
    rule: Neighborhood, layout: Sequence[int], base_size: Sizes = BASE_SIZE
) -> Neighborhood:
    """A window for a grid of `base_size`, on another grid: window, stride and dilation times `layout / base_size`, rounded.

    As Cosmos-Predict2 does it, axis by axis: half-way cases to the even number; the window at least 2 and at most the axis,
    the stride at least 1 and at most the window, the dilation at least 1 and no larger than fits the window.

    Args:
      rule: a whole axis (`window_size=-1`) stays whole, without dilation.
      layout: token grid.
      base_size: grid that `rule` is meant for; -1 on an axis: the layout's, so nothing scales there.

    Raises:
      ValueError: sizes for another number of axes, or a base size of 0 or below -1.

    >>> rule = Neighborhood.of(3, window_size=(-1, 12, 24), stride=(1, 4, 8))
    >>> scale_rule(rule, (24, 22, 40))
    Neighborhood(window_size=(-1, 6, 12), stride=(1, 2, 4), dilation=(1, 1, 1), is_causal=(False, False, False))
    """
    layout = per_axis("layout", layout, rule.rank)
    base = per_axis("base_size", base_size, rule.rank)
    if any(b < 1 and b != WHOLE_GROUP for b in base):
        raise ValueError(
            f"base_size must be at least 1 on every axis, or -1 for the layout's; got base_size={base}"
        )
    scaled = []
    for axis, length, meant in zip(rule.axes, layout, base, strict=True):
        factor = 1.0 if meant == WHOLE_GROUP else length / meant
        if axis.window == WHOLE_GROUP:
            window, extent, room = WHOLE_GROUP, length, 1
        else:
            window = min(max(_SMALLEST_WINDOW, round(axis.window * factor)), length)
            extent, room = window, length // window
        stride = min(max(1, round(axis.stride * factor)), extent)
        scaled.append((window, stride, min(max(1, round(axis.dilation * factor)), room)))
    window, stride, dilation = zip(*scaled, strict=True)
    return Neighborhood.of(
        rule.rank,
        window_size=window,
        stride=stride,
        dilation=dilation,
        is_causal=rule.is_causal,
    )


def predict2_schedule(
    size: str, layout: Sequence[int], base_size: Sizes = BASE_SIZE
) -> AttentionSchedule:
    """Cosmos-Predict2's rule of every layer for a token grid, at every step; dense for an image, a grid of one frame.

    Args:
      size: `"2b"` or `"14b"`.
      layout: token grid (T, Y, X).
      base_size: as in `scale_rule`.

    Raises:
      ValueError: for another size, or a layout that is not three axes.
    """
    if size not in PREDICT2_LAYERS:
        raise ValueError(f"size must be one of {sorted(PREDICT2_LAYERS)}; got size={size!r}")
    layout = per_axis("layout", layout, 3)
    published = preset_schedule(f"cosmos-predict2-{size}", PREDICT2_LAYERS[size]).at(0)
    if layout[0] == 1:
        return AttentionSchedule.constant([None] * len(published))
    return AttentionSchedule.constant(
        [None if rule is None else scale_rule(rule, layout, base_size) for rule in published]
    )
