"""A layer that trains on eight devices: data, heads and rows of the image sharded together, by one `spec`.

    python examples/07_shard_over_space.py

Ten seconds on two CPU cores, which play eight devices where there are fewer. Last line: `equal to one device: True`
"""

import os

if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    # Eight devices on a machine that has only a CPU. jax reads this when it starts.
    flags = "--xla_force_host_platform_device_count=8"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import PartitionSpec as P

from gna_jax.flax import GNAttention

mesh = jax.make_mesh((2, 2, 2), ("data", "rows", "heads"), devices=jax.devices()[:8])
spec = P("data", "rows", None, "heads", None)  # of [batch, y, x, heads, head_dim]
images = jax.random.normal(jax.random.key(0), (4, 16, 16, 32))  # [batch, y, x, features]


def make(spec):
    """Four heads. With a spec that shards heads, so are the weights of the projections."""
    return GNAttention(4, 32, window_size=(5, 5), spec=spec, rngs=nnx.Rngs(0))


@nnx.jit
def step(layer, optimizer, images):
    """One step of training; nothing in it knows how many devices there are."""
    loss, gradients = nnx.value_and_grad(lambda m: jnp.mean((m(images) - images) ** 2))(layer)
    optimizer.update(layer, gradients)
    return loss


def train(layer, images):
    """Losses of two steps."""
    optimizer = nnx.Optimizer(layer, optax.sgd(0.1, momentum=0.9), wrt=nnx.Param)
    return [step(layer, optimizer, images) for _ in range(2)]


with jax.set_mesh(mesh):
    # 1. Parameters are sharded where they are made, images where they are put.
    layer, sharded = make(spec), jax.device_put(images, P("data", "rows"))
    losses = train(layer, sharded)
    # 2. Rows that a window reaches beyond its own come from the neighbours: a permute, no gather.
    text = jax.jit(lambda x: layer(x)).lower(sharded).compile().as_text()
print("weights after training:", layer.query.kernel[...].sharding.spec)
print("collectives:", [n for n in ("all-gather", "all-reduce", "collective-permute") if n in text])
print("equal to one device:", np.allclose(losses, train(make(None), images), rtol=1e-5))
