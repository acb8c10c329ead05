"""Neighborhood attention inside Flax's own `nnx.MultiHeadAttention`, without touching the model's code or its weights.

    python examples/04_multi_head_attention.py

Five seconds on two CPU cores. Last line: `the same weights give the same output in GNAttention: True`
"""

import jax
import numpy as np
from flax import nnx

import gna_jax
from gna_jax.flax import GNAttention

HEADS, FEATURES, WINDOW = 4, 32, (5, 5)

x = jax.random.normal(jax.random.key(0), (2, 16, 16, FEATURES))  # [batch, *space, features]

# Flax's layer flattens nothing, so the grid reaches attention_fn as it is.
layer = nnx.MultiHeadAttention(
    num_heads=HEADS,
    in_features=FEATURES,
    decode=False,
    attention_fn=gna_jax.attention_fn(window_size=WINDOW),
    rngs=nnx.Rngs(0),
)
out = layer(x)
print("out", out.shape)

# A layer that exists already, with the weights it has, changes by one assignment.
existing = nnx.MultiHeadAttention(
    num_heads=HEADS, in_features=FEATURES, decode=False, rngs=nnx.Rngs(0)
)
existing.attention_fn = gna_jax.attention_fn(window_size=WINDOW)
print("an existing layer, switched over:", np.allclose(existing(x), out, atol=1e-6))

# What neighborhood attention cannot honour, it refuses: it makes its own mask.
try:
    layer(x, mask=jax.numpy.ones((2, 16, HEADS, 16, 16), bool))
except ValueError as error:
    print("refused:", str(error)[:100], "..")

# GNAttention has the same parameters, and more options: relative position bias, registers, rotary embeddings.
ours = GNAttention(HEADS, FEATURES, window_size=WINDOW, rngs=nnx.Rngs(1))
nnx.update(ours, nnx.state(layer, nnx.Param))
same = np.allclose(ours(x), out, atol=1e-6)
print("the same weights give the same output in GNAttention:", same)
