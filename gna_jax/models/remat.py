"""Recomputing blocks in the backward pass, except the attention inside: what `remat=True` of every model means."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from gna_jax.models.schedule import Rule
from gna_jax.vjp import LSE_NAME, OUT_NAME

KEEP_ATTENTION = jax.checkpoint_policies.save_only_these_names(OUT_NAME, LSE_NAME)
"""Policy of `jax.checkpoint` and `nnx.remat`: `gna`'s out and log-sum-exp are kept, everything else is computed again."""


def run_block(block: Callable[..., Any], remat: bool, *arguments: Any, rule: Rule) -> Any:
    """`block(*arguments, rule=rule)`; with `remat` its backward recomputes all but the attention's out and log-sum-exp."""
    if not remat:
        return block(*arguments, rule=rule)
    run = nnx.remat(lambda block, *given: block(*given, rule=rule), policy=KEEP_ATTENTION)
    return run(block, *arguments)
