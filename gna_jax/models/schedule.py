"""Which layer attends to which window at which sampling step: `AttentionSchedule`, and the paper's settings.

A rule is a `gna_jax.Neighborhood`, or None for dense attention. Models take the rules of one step, a tuple with one rule per
layer: it is hashable and static under jit, so a sampling loop compiles once per distinct tuple. Nothing here attends.
"""

import dataclasses
import operator
from collections.abc import Mapping, Sequence
from typing import Any

from jax.core import Tracer

from gna_jax.neighborhood import WHOLE_GROUP, Neighborhood
from gna_jax.simulator.presets import PRESETS
from gna_jax.tiling import Tiles

Rule = Neighborhood | None
"""Window of a layer; None: dense."""
Rules = tuple[Rule, ...]
"""One rule per layer."""


@dataclasses.dataclass(frozen=True)
class AttentionSchedule:
    """Rules per layer, from given steps on.

    Attributes:
      phases: `(first step, rules per layer)`, steps ascending from 0, every phase with the same number of layers.

    Raises:
      ValueError: for no phases, steps that do not ascend from 0, or phases that differ in layers or have none.
      TypeError: for a rule that is neither a `gna_jax.Neighborhood` nor None.

    >>> from gna_jax import Neighborhood
    >>> window = Neighborhood.of(2, window_size=80, stride=16)
    >>> schedule = AttentionSchedule.dense_then(window, num_layers=57, dense_steps=9)
    >>> schedule.at(8)[0], schedule.at(9)[0] == window
    (None, True)
    """

    phases: tuple[tuple[int, Rules], ...]

    def __post_init__(self):
        steps = [step for step, _ in self.phases]
        if not steps or steps[0] != 0 or steps != sorted(set(steps)):
            raise ValueError(f"phases must start at step 0 and ascend; got first steps {steps}")
        layers = {len(rules) for _, rules in self.phases}
        if len(layers) != 1 or 0 in layers:
            raise ValueError(
                f"every phase needs one rule per layer; got phases of {sorted(layers)} layers"
            )
        for _, rules in self.phases:
            resolve_rules(rules, len(rules))

    @classmethod
    def constant(cls, rules: Sequence[Rule]) -> "AttentionSchedule":
        """The same rules, one per layer, at every step."""
        return cls(((0, tuple(rules)),))

    @classmethod
    def dense_then(
        cls,
        rules: Rule | Sequence[Rule],
        *,
        num_layers: int,
        dense_steps: int = 0,
        overrides: Mapping[int, Rule] | None = None,
    ) -> "AttentionSchedule":
        """Dense for the first `dense_steps` steps, then windows.

        Args:
          rules: one for all layers, or one per layer.
          num_layers: layers of the model, in the order in which they run.
          dense_steps: sampling steps during which every layer is dense.
          overrides: rules of single layers after these steps, by layer number.

        Raises:
          ValueError: for another number of rules than layers, a layer that the model lacks, or negative steps.
        """
        then = list(resolve_rules(rules, num_layers))
        for layer, rule in (overrides or {}).items():
            if not 0 <= layer < num_layers:
                raise ValueError(
                    f"overrides name layers 0 to {num_layers - 1}; got layer {layer}; num_layers={num_layers}"
                )
            then[layer] = rule
        if dense_steps < 0:
            raise ValueError(f"dense_steps must be at least 0; got dense_steps={dense_steps}")
        if dense_steps == 0:
            return cls.constant(then)
        return cls(((0, (None,) * num_layers), (dense_steps, tuple(then))))

    @property
    def num_layers(self) -> int:
        """Layers that every phase has a rule for."""
        return len(self.phases[0][1])

    def at(self, step: Any) -> Rules:
        """The rules of a sampling step, counted from 0: equal steps of a phase give the very same tuple.

        Raises:
          TypeError: for a step that is traced or no integer.
          ValueError: for a negative step.
        """
        if isinstance(step, Tracer):
            raise TypeError(
                "step must be a Python int, because it chooses what is compiled; got a traced value;"
                " call schedule.at(step) outside of jit and pass the rules as a static argument"
            )
        try:
            step = operator.index(step)
        except TypeError:
            raise TypeError(f"step must be an integer; got step={step!r}") from None
        if step < 0:
            raise ValueError(f"step counts from 0; got step={step}")
        return [rules for first, rules in self.phases if first <= step][-1]


def resolve_rules(rules: Any, num_layers: int, layout: Sequence[int] | None = None) -> Rules:
    """One rule per layer, checked: from None (all dense), one rule for all layers, or a sequence of rules.

    Raises:
      TypeError: for anything else; a schedule needs a step first.
      ValueError: for another number of rules than layers, or a rule that does not fit the token grid `layout`, naming its layer.
    """
    if isinstance(rules, AttentionSchedule):
        raise TypeError(
            "a model takes the rules of one step; got an AttentionSchedule; pass rules=schedule.at(step)"
        )
    if rules is None or isinstance(rules, Neighborhood):
        rules = (rules,) * num_layers
    if not isinstance(rules, Sequence) or not all(
        rule is None or isinstance(rule, Neighborhood) for rule in rules
    ):
        raise TypeError(
            f"a rule is a gna_jax.Neighborhood, or None for dense attention; got rules={rules!r}"
        )
    if len(rules) != num_layers:
        raise ValueError(
            f"rules must be one for all layers, or one per layer; got {len(rules)} rules for {num_layers} layers"
        )
    if layout is None:
        return tuple(rules)
    for layer, rule in enumerate(rules):
        if rule is None:
            continue
        if rule.rank != len(layout):
            raise ValueError(
                f"rules must have the {len(layout)} spatial axes of the model; got {rule.rank} axes at layer {layer}: {rule}"
            )
        try:
            rule.check_layout(layout)
        except ValueError as error:
            raise ValueError(
                f"the rule of layer {layer} does not fit the token grid: {error}"
            ) from None
    return tuple(rules)


def window_arguments(rule: Rule, tiles: Tiles | None) -> dict[str, Any]:
    """A rule as arguments of `gna`; `tiles` are for windows, a dense layer chooses its own."""
    if rule is None:
        return {"window_size": WHOLE_GROUP}
    return dataclasses.asdict(rule) | {"tiles": tiles}


_PAPER_STRIDES = {
    "flux-4k": (16, 16),
    "hunyuan-91": (16, 8, 8),
    "hunyuan-58": (1, 32, 8),
    "cosmos-89": (1, 8, 16),
    "cosmos-56": (1, 8, 16),
}
"""Of each preset the stride that arXiv 2504.16922 reaches the FLOP-wise speedup with."""


def preset_schedule(
    name: str, num_layers: int, *, stride: Sequence[int] | None = None
) -> AttentionSchedule:
    """The published schedule of a preset of `gna-jax simulate`: `"flux-4k"`, `"hunyuan-91"`, `"cosmos-predict2-2b"`, ..

    FLUX.1 at 4K keeps 9 of 28 steps dense, HunyuanVideo 15 of 50, Cosmos 12 of 35; Cosmos-Predict2 has a rule per layer and
    no dense step.

    Args:
      name: a preset that a model was run with.
      num_layers: layers of the model.
      stride: one of the preset's strides. Default: the paper's perfectly block-sparse one.

    Raises:
      ValueError: for another name or stride, or another number of layers than a preset with rules per layer has.
    """
    preset = PRESETS.get(name)
    if preset is None or not (preset.dense_steps is not None or preset.rules[0].layers):
        known = [n for n, p in PRESETS.items() if p.dense_steps is not None or p.rules[0].layers]
        raise ValueError(f"preset must be one of {known}; got {name!r}")
    if preset.rules[0].layers:
        by_layer: dict[int, Rule] = dict.fromkeys(preset.dense_layers)
        for one in preset.rules:
            by_layer |= dict.fromkeys(one.layers, one.neighborhood)
        rules = [by_layer[layer] for layer in sorted(by_layer)]
        return AttentionSchedule.constant(resolve_rules(rules, num_layers))
    wanted = _PAPER_STRIDES[name] if stride is None else tuple(stride)
    found = [r.neighborhood for r in preset.rules if r.neighborhood.stride == wanted]
    if not found:
        strides = [r.neighborhood.stride for r in preset.rules]
        raise ValueError(f"stride must be one of {strides}; got stride={wanted}")
    return AttentionSchedule.dense_then(
        found[0], num_layers=num_layers, dense_steps=preset.dense_steps or 0
    )
