"""Attention on several devices, each with its own heads: by `jax.shard_map`, and by nothing but sharded arrays.

    python examples/06_shard_over_heads.py

Five seconds on two CPU cores, which play two devices where there are no more. Last line: `equal to one device: True`
"""

import os

if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    # Two devices on a machine that has only a CPU. jax reads this when it starts.
    flags = "--xla_force_host_platform_device_count=2"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gna_jax import gna

DEVICES = 2
HEADS = 4

if len(jax.devices()) < DEVICES:
    raise SystemExit(f"this example needs {DEVICES} devices; jax sees {jax.devices()}")

mesh = jax.make_mesh((DEVICES,), ("heads",), devices=jax.devices()[:DEVICES])
over_heads = P(None, None, None, "heads", None)  # of [batch, y, x, heads, head_dim]

keys = jax.random.split(jax.random.key(0), 3)
q, k, v = (jax.random.normal(key, (2, 16, 16, HEADS, 32)) for key in keys)
sharded = [jax.device_put(x, NamedSharding(mesh, over_heads)) for x in (q, k, v)]


def attend(q, k, v):
    """Neighborhood attention; under shard_map, of the heads of one device."""
    return gna(q, k, v, window_size=(5, 5))


# 1. shard_map: the function sees one device's heads. No device waits for another.
by_hand = jax.jit(
    jax.shard_map(attend, mesh=mesh, in_specs=(over_heads,) * 3, out_specs=over_heads)
)
out = by_hand(*sharded)
print("each device holds", out.addressable_shards[0].data.shape, "of", out.shape)

# 2. Plain jit: gna keeps the sharding of the arrays, in its gradients too.
loss = lambda q, k, v: jnp.sum(attend(q, k, v) ** 2)
gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*sharded)
print("gradients are sharded as the arrays:", [g.sharding.spec == over_heads for g in gradients])

text = by_hand.lower(*sharded).compile().as_text()
collectives = [name for name in ("all-gather", "all-reduce", "all-to-all") if name in text]
print("collectives in the program:", collectives)

print("equal to one device:", np.allclose(out, attend(q, k, v), atol=1e-5))
