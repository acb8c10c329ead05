"""A Flax layer: `GNAttention` in a small network that learns to average each token's 3x3 neighbors.

    python examples/03_flax_layer.py

Five seconds on two CPU cores. Last line: `the loss fell to less than half: True`
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float

from gna_jax.flax import GNAttention

LAYOUT, FEATURES, STEPS = (12, 12), 16, 40


class Block(nnx.Module):
    """`x + attention(norm(x))` on a grid of tokens."""

    def __init__(self, features: int, *, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(features, rngs=rngs)
        self.attention = GNAttention(2, features, window_size=(3, 3), rngs=rngs)

    def __call__(self, x: Float[Array, "B Y X C"]) -> Float[Array, "B Y X C"]:
        """Tokens to tokens."""
        return x + self.attention(self.norm(x))


def batch(seed: int) -> tuple[Float[np.ndarray, "B Y X C"], Float[np.ndarray, "B Y X C"]]:
    """Noise, and its mean over 3x3 tokens."""
    noise = np.random.default_rng(seed).standard_normal((8, *LAYOUT, FEATURES), dtype=np.float32)
    padded = np.pad(noise, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifted = [padded[:, i : i + LAYOUT[0], j : j + LAYOUT[1]] for i in range(3) for j in range(3)]
    return noise, np.mean(shifted, axis=0, dtype=np.float32)


@nnx.jit
def step(model: Block, optimizer: nnx.Optimizer, x: Array, wanted: Array) -> Array:
    """One step of Adam; the loss before it."""
    loss, gradients = nnx.value_and_grad(lambda model: jnp.mean((model(x) - wanted) ** 2))(model)
    optimizer.update(model, gradients)
    return loss


model = Block(FEATURES, rngs=nnx.Rngs(0))
optimizer = nnx.Optimizer(model, optax.adam(3e-2), wrt=nnx.Param)
shapes = jax.tree.map(jnp.shape, nnx.to_pure_dict(nnx.state(model.attention, nnx.Param)))
print("parameters", shapes)
losses = [float(step(model, optimizer, *batch(seed))) for seed in range(STEPS)]
print(f"loss {losses[0]:.3f} at first, {losses[-1]:.3f} after {STEPS} steps")
print("the loss fell to less than half:", losses[-1] < losses[0] / 2)
