"""Neighborhood attention for JAX. The public names; everything else may change.

Start with `gna`. Layers for Flax are in `gna_jax.flax`.
"""

from typing import TYPE_CHECKING, Any

from gna_jax.attention import gna as gna
from gna_jax.backends import GnaPerformanceWarning as GnaPerformanceWarning
from gna_jax.device import DeviceSpec as DeviceSpec
from gna_jax.explanation import Explanation as Explanation
from gna_jax.explanation import explain as explain
from gna_jax.interpreter import interpret_gpu as interpret_gpu
from gna_jax.merge import merge_attentions as merge_attentions
from gna_jax.natten import na1d as na1d
from gna_jax.natten import na2d as na2d
from gna_jax.natten import na3d as na3d
from gna_jax.neighborhood import Neighborhood as Neighborhood
from gna_jax.sharding import gna_sharded as gna_sharded
from gna_jax.sharding import merge_over_mesh as merge_over_mesh
from gna_jax.sharding import shard_attention as shard_attention
from gna_jax.tiling import Tiles as Tiles

if TYPE_CHECKING:
    from gna_jax.flax.attention_fn import attention_fn as attention_fn

__version__ = "0.1.0"

__all__ = [
    "DeviceSpec",
    "Explanation",
    "GnaPerformanceWarning",
    "Neighborhood",
    "Tiles",
    "attention_fn",
    "explain",
    "gna",
    "gna_sharded",
    "interpret_gpu",
    "merge_attentions",
    "merge_over_mesh",
    "na1d",
    "na2d",
    "na3d",
    "shard_attention",
]


def __getattr__(name: str) -> Any:
    """`attention_fn` on first use: it lives with the Flax layers, and Flax is optional and slow to import."""
    if name == "attention_fn":
        from gna_jax.flax.attention_fn import attention_fn

        return attention_fn
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
