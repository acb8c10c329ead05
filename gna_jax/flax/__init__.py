"""Neighborhood attention in flax: `GNAttention` (nnx; its linen twin is `gna_jax.flax.linen.GNAttention`), `attention_fn`.

Nothing here imports flax until a module is asked for, so `attention_fn` costs no more than `gna`.
"""

import importlib
from typing import TYPE_CHECKING, Any

from gna_jax.flax.attention_fn import NeighborhoodAttentionFn, attention_fn

if TYPE_CHECKING:
    from gna_jax.flax import linen, nnx
    from gna_jax.flax.nnx import GNAttention

__all__ = ["GNAttention", "NeighborhoodAttentionFn", "attention_fn", "linen", "nnx"]


def __getattr__(name: str) -> Any:
    if name not in ("GNAttention", "linen", "nnx"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    stem = "linen" if name == "linen" else "nnx"
    try:
        module = importlib.import_module(f"{__name__}.{stem}")
    except ModuleNotFoundError as error:
        if error.name != "flax":
            raise
        raise ImportError(
            f"gna_jax.flax.{name} needs flax, which is not installed; pip install 'gna-jax[flax]'"
        ) from error
    return module.GNAttention if name == "GNAttention" else module
