"""Slots of shared memory that are filled again and again: when a slot is free, and the end of it. Of any generation."""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


def wait_for_slot(free: Any, step: Any, stages: int) -> None:
    """Waits until what step `step - stages` put into its slot has been read for the last time."""

    @pl.when(step >= stages)
    def _():
        plgpu.barrier_wait(free.at[lax.rem(step, jnp.int32(stages))])


def drain_slots(last: Any, stages: int, *barriers: Any) -> None:
    """Waits for the last phase of every slot's barriers: the interpreter of jax 0.11 insists that somebody does."""

    @pl.loop(jnp.maximum(last - stages, 0), last)
    def _(step):
        for free in barriers:
            plgpu.barrier_wait(free.at[lax.rem(step, jnp.int32(stages))])
