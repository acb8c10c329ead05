"""Schedules: which rule at which layer and step."""

import functools

import jax
import numpy as np
import pytest

from gna_jax import Neighborhood
from gna_jax.models.schedule import AttentionSchedule, preset_schedule, resolve_rules

WINDOW = Neighborhood.of(2, window_size=8, stride=4)
OTHER = Neighborhood.of(2, window_size=4)


def test_dense_for_the_first_steps_then_windows():
    schedule = AttentionSchedule.dense_then(
        WINDOW, num_layers=4, dense_steps=3, overrides={1: OTHER, 3: None}
    )
    for step in range(3):
        assert schedule.at(step) == (None,) * 4
    for step in (3, 4, np.int32(50)):
        assert schedule.at(step) == (WINDOW, OTHER, WINDOW, None)
    assert schedule.num_layers == 4
    assert AttentionSchedule.dense_then(WINDOW, num_layers=2).at(0) == (WINDOW, WINDOW)


def test_equal_schedules_are_equal_and_hashable():
    made = [
        AttentionSchedule.dense_then([WINDOW, None], num_layers=2, dense_steps=2) for _ in range(2)
    ]
    assert made[0] == made[1] and hash(made[0]) == hash(made[1])
    assert made[0].at(1) is made[0].at(0)


def test_a_sampling_loop_compiles_once_per_distinct_rules():
    schedule = AttentionSchedule(
        (
            (0, (None, None)),
            (2, (WINDOW, None)),
            (4, (WINDOW, OTHER)),
        )
    )
    traced = []

    @functools.partial(jax.jit, static_argnames="rules")
    def step(x, rules):
        traced.append(rules)
        return x + 1

    x = np.float32(0)
    for number in range(7):
        x = step(x, rules=schedule.at(number))
    assert traced == [(None, None), (WINDOW, None), (WINDOW, OTHER)]


def test_published_schedules():
    flux = preset_schedule("flux-4k", 57)
    assert flux.at(8) == (None,) * 57
    assert flux.at(9) == (Neighborhood.of(2, window_size=80, stride=16),) * 57
    video = preset_schedule("hunyuan-91", 60)
    assert video.at(14) == (None,) * 60
    assert video.at(15)[0] == Neighborhood.of(3, window_size=(18, 24, 24), stride=(16, 8, 8))
    sliding = preset_schedule("hunyuan-91", 60, stride=(1, 1, 1)).at(15)[0]
    assert sliding == Neighborhood.of(3, window_size=(18, 24, 24))
    cosmos = preset_schedule("cosmos-predict2-14b", 36)
    assert cosmos.at(0) is cosmos.at(34)
    assert cosmos.at(0)[27] is None and cosmos.at(0)[0].dilation == (1, 11, 5)
    assert [rule is None for rule in cosmos.at(0)].count(True) == 1


def test_one_rule_is_for_all_layers():
    assert resolve_rules(None, 2) == (None, None)
    assert resolve_rules(WINDOW, 2, layout=(9, 9)) == (WINDOW, WINDOW)
    assert resolve_rules([WINDOW, None], 2) == (WINDOW, None)


def test_wrong_rules_and_steps():
    schedule = AttentionSchedule.constant([WINDOW])
    with pytest.raises(TypeError, match=r"pass rules=schedule\.at\(step\)"):
        resolve_rules(schedule, 1)
    with pytest.raises(TypeError, match="a rule is a gna_jax.Neighborhood"):
        resolve_rules([8, 8], 2)
    with pytest.raises(ValueError, match="got 1 rules for 2 layers"):
        resolve_rules([WINDOW], 2)
    with pytest.raises(ValueError, match="got 2 axes at layer 1"):
        resolve_rules([None, WINDOW], 2, layout=(9, 9, 9))
    with pytest.raises(TypeError, match="got a traced value"):
        jax.jit(schedule.at)(3)
    with pytest.raises(TypeError, match=r"got step=1\.5"):
        schedule.at(1.5)
    with pytest.raises(ValueError, match="got step=-1"):
        schedule.at(-1)


def test_wrong_schedules():
    with pytest.raises(ValueError, match=r"got first steps \[1\]"):
        AttentionSchedule(((1, (WINDOW,)),))
    with pytest.raises(ValueError, match=r"got first steps \[0, 3, 2\]"):
        AttentionSchedule(((0, (None,)), (3, (WINDOW,)), (2, (OTHER,))))
    with pytest.raises(ValueError, match=r"got phases of \[1, 2\] layers"):
        AttentionSchedule(((0, (None,)), (3, (WINDOW, WINDOW))))
    with pytest.raises(ValueError, match="got layer 2; num_layers=2"):
        AttentionSchedule.dense_then(WINDOW, num_layers=2, overrides={2: None})
    with pytest.raises(ValueError, match="got dense_steps=-1"):
        AttentionSchedule.dense_then(WINDOW, num_layers=2, dense_steps=-1)
    with pytest.raises(ValueError, match="got 'nat-1'"):
        preset_schedule("nat-1", 57)
    with pytest.raises(ValueError, match=r"got stride=\(3, 3\)"):
        preset_schedule("flux-4k", 57, stride=(3, 3))
    with pytest.raises(ValueError, match="got 28 rules for 36 layers"):
        preset_schedule("cosmos-predict2-2b", 36)
