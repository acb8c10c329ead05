"""The first call: attention of every token to a window, its gradient, and which keys a query sees.

    python examples/01_first_call.py

Five seconds on two CPU cores. Last line: `equal to dense attention with the same mask: True`
"""

import jax
import jax.numpy as jnp
import numpy as np

from gna_jax import Neighborhood, explain, gna

LAYOUT, HEADS, DIM = (16, 16), 2, 32
WINDOW, STRIDE = (7, 7), (2, 2)

# Arrays are [batch, *space, heads, head_dim], with 1 to 3 spatial axes.
keys = jax.random.split(jax.random.key(0), 3)
q, k, v = (jax.random.normal(key, (1, *LAYOUT, HEADS, DIM)) for key in keys)

attend = jax.jit(lambda q, k, v: gna(q, k, v, window_size=WINDOW, stride=STRIDE))
out = attend(q, k, v)
print("out", out.shape, out.dtype)

gradients = jax.grad(lambda *qkv: (attend(*qkv) ** 2).sum(), argnums=(0, 1, 2))(q, k, v)
print("gradients", [g.shape for g in gradients])

# The rule itself, without arrays: the tokens that the query (2, 9) sees.
mask = Neighborhood.of(2, window_size=WINDOW, stride=STRIDE).mask(LAYOUT)
for row in mask[2, 9]:
    print("".join("#" if seen else "." for seen in row))

# Which implementation runs here, and why no other.
print(explain(q, k, v, window_size=WINDOW, stride=STRIDE))

# The same by dense attention over all pairs of tokens, most of them masked away.
tokens = LAYOUT[0] * LAYOUT[1]
flat = [x.reshape(1, tokens, HEADS, DIM) for x in (q, k, v)]
dense = jax.nn.dot_product_attention(*flat, mask=jnp.asarray(mask.reshape(1, 1, tokens, tokens)))
same = np.allclose(out, dense.reshape(out.shape), atol=1e-5)
print("equal to dense attention with the same mask:", same)
