"""Time and memory of gna against dense attention with the same mask, measured on the machine it runs on.

    python examples/compare_with_dense.py

Half a minute on two CPU cores. Dense means `jax.nn.dot_product_attention` with the neighborhood as a boolean mask:
the same result, computed over every pair of tokens.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from rich.console import Console
from rich.table import Table

from gna_jax import Neighborhood, gna

LAYOUT, WINDOW, HEADS, DIM = (64, 64), (13, 13), 2, 64
TOKENS = LAYOUT[0] * LAYOUT[1]

Volume = Float[Array, "1 64 64 2 64"]


def sparse(query: Volume, key: Volume, value: Volume) -> Volume:
    """Neighborhood attention."""
    return gna(query, key, value, window_size=WINDOW)


def dense(query: Volume, key: Volume, value: Volume) -> Volume:
    """The same by dense attention: every pair of tokens, most of them masked."""
    mask = Neighborhood.of(2, window_size=WINDOW).mask(LAYOUT).reshape(1, 1, TOKENS, TOKENS)
    query, key, value = (x.reshape(1, TOKENS, HEADS, DIM) for x in (query, key, value))
    out = jax.nn.dot_product_attention(query, key, value, mask=jnp.asarray(mask))
    return out.reshape(1, *LAYOUT, HEADS, DIM)


def with_gradients(attention: Callable[..., Volume]) -> Callable[..., tuple[Volume, ...]]:
    """The output and the gradients of query, key and value."""

    def run(query: Volume, key: Volume, value: Volume, cotangent: Volume) -> tuple[Volume, ...]:
        out, backward = jax.vjp(attention, query, key, value)
        return out, *backward(cotangent)

    return run


def compare_with_dense(rounds: int) -> Table:
    """Medians of `rounds` interleaved runs, the compiler's temporary memory, and how far the results differ."""
    draw = np.random.default_rng(0).standard_normal
    arrays = [draw((1, *LAYOUT, HEADS, DIM), dtype=np.float32) for _ in range(4)]
    times, memories, differences = [], [], []
    for functions, inputs in (
        ((sparse, dense), arrays[:3]),
        ((with_gradients(sparse), with_gradients(dense)), arrays),
    ):
        compiled = [jax.jit(f).lower(*inputs).compile() for f in functions]
        outputs = [jax.tree.leaves(f(*inputs)) for f in compiled]
        differences += [float(abs(a - b).max()) for a, b in zip(*outputs, strict=True)]
        times.append(interleaved_medians(compiled, inputs, rounds))
        memories.append([f.memory_analysis().temp_size_in_bytes / 2**20 for f in compiled])
    table = Table("", "forward", "and gradients", "memory", "and gradients")
    table.title = f"{LAYOUT[0]}x{LAYOUT[1]} tokens, window {WINDOW[0]}x{WINDOW[1]}, {HEADS} heads x {DIM}, float32"
    table.caption = f"{jax.devices()[0].device_kind}, median of {rounds}; results differ by {max(differences):.0e} at most"
    for row, name in enumerate(("gna", "dense, masked")):
        cells = [f"{1e3 * both[row]:.0f} ms" for both in times]
        cells += [f"{both[row]:.1f} MiB" for both in memories]
        table.add_row(name, *cells, end_section=row == 1)
    ratios = [f"{slow / fast:.1f}x faster" for fast, slow in times]
    ratios += [f"{large / small:.0f}x smaller" for small, large in memories]
    table.add_row("gna is", *ratios)
    return table


def interleaved_medians(functions: list[Any], inputs: list[Any], rounds: int) -> list[float]:
    """Seconds of each function, run turn by turn so that other work on the machine falls on all of them alike."""
    seconds: list[list[float]] = [[] for _ in functions]
    for _ in range(rounds):
        for function, mine in zip(functions, seconds, strict=True):
            started = time.perf_counter()
            jax.block_until_ready(function(*inputs))
            mine.append(time.perf_counter() - started)
    return [statistics.median(mine) for mine in seconds]


if __name__ == "__main__":
    Console().print(compare_with_dense(rounds=7))
