"""Worker of the jax implementations: gna, and `jax.nn.dot_product_attention` with the neighborhood as a dense mask.

python benchmarks/peers_jax.py gna|masked MEMORY_LIMIT_BYTES       (started by `rounds.py`)
"""

import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from worker import FORWARD, Call, Task, limit_memory, serve

from gna_jax import gna

DTYPES = {"fp32": jnp.float32, "bf16": jnp.bfloat16}


def neighborhood(task: Task) -> Call:
    """gna on `[B, *space, N, H]`, everything it chooses left to it."""

    def attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return gna(query, key, value, window_size=task.window)

    return compiled(task, attention, task.load, ())


def masked(task: Task) -> Call:
    """Dense attention on `[B, tokens, N, H]`, its mask an argument: a constant would be folded while compiling."""

    def attention(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(query, key, value, mask=mask)

    return compiled(task, attention, task.flat, (jnp.asarray(task.visible()[None, None]),))


def compiled(
    task: Task,
    attention: Callable[..., jax.Array],
    load: Callable[[str], np.ndarray],
    rest: tuple[jax.Array, ...],
) -> Call:
    """`attention(query, key, value, *rest)` under jit, or its output together with the three gradients."""
    dtype = DTYPES[task.dtype]
    inputs = [jnp.asarray(load(name), dtype) for name in ("query", "key", "value")]

    def forward(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        return (attention(*arrays),)

    def forward_and_gradients(cotangent: jax.Array, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        inputs, rest = arrays[:3], arrays[3:]
        out, pull_back = jax.vjp(lambda *inputs: attention(*inputs, *rest), *inputs)
        return out, *pull_back(cotangent)

    if task.direction == FORWARD:
        function, arguments = jax.jit(forward), (*inputs, *rest)
    else:
        cotangent = jnp.asarray(load("cotangent"), dtype)
        function, arguments = jax.jit(forward_and_gradients), (cotangent, *inputs, *rest)

    def to_numpy(outputs: Any) -> list[np.ndarray]:
        return [np.asarray(x.astype(jnp.float32)) for x in outputs]

    return Call(lambda: jax.block_until_ready(function(*arguments)), to_numpy)


PEERS = {"gna": neighborhood, "masked": masked}

if __name__ == "__main__":
    limit_memory(int(sys.argv[2]))
    version = f"{jax.__version__} (Python {sys.version.split()[0]})"
    serve({"jax": version}, PEERS[sys.argv[1]])
