"""Neighborhood attention for JAX. The public names; everything else may change.

Start with `gna`. Layers for Flax are in `gna_jax.flax`.
"""

from gna_jax.attention import gna as gna
from gna_jax.merge import merge_attentions as merge_attentions
