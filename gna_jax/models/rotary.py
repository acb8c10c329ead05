"""Rotary position embeddings: frequencies, axial tables of cosines and sines, and the rotation of feature pairs.

Everything a model's embedding is made of, nothing of a particular model: positions, frequencies and the pairing of
features are arguments.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float


class Rotation(NamedTuple):
    """Cosine and sine of every token's angles, float32: `[*space, F]`, or `[*space, N, F]` with angles per head.

    `F` pairs of features are rotated. A pytree, so it passes through jit like an array.
    """

    cos: Float[Array, "*space F"]
    sin: Float[Array, "*space F"]


def inverse_frequencies(dim: int, theta: float = 10000.0) -> np.ndarray:
    """`theta ** (-2 i / dim)` for `i` in `0 .. dim / 2 - 1`, float64: radians per position of each pair.

    Raises:
      ValueError: for an odd or empty `dim`.
    """
    if dim < 2 or dim % 2:
        raise ValueError(
            f"rotary features come in pairs; got dim={dim}; use an even number of features per axis"
        )
    return theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)


def axial_rotation(positions: Sequence[Any], frequencies: Sequence[Any]) -> Rotation:
    """The table of a grid: along axis `a`, token `p` turns its share of the pairs by `positions[a][p] * frequencies[a]`.

    Pairs of the first axis come first. Angles of concrete arguments are made in float64 on the host, one small table
    per axis; only their spread over the grid is left to the device, so no large constant enters a program.

    Args:
      positions: per axis `[L_a]`. Any unit; traced values are fine.
      frequencies: per axis `[F_a]`, or `[N, F_a]` for other frequencies per head.

    Returns:
      `[L_0, L_1, .., sum of F_a]`, with the heads before the last axis if the frequencies have them.

    Raises:
      ValueError: for different numbers of axes, or shapes other than these.
    """
    if not positions or len(positions) != len(frequencies):
        raise ValueError(
            "axial_rotation needs positions and frequencies for each axis;"
            f" got {len(positions)} positions, {len(frequencies)} frequencies"
        )
    ranks = {np.ndim(f) for f in frequencies}
    if any(np.ndim(p) != 1 for p in positions) or ranks not in ({1}, {2}):
        raise ValueError(
            "positions must be [length] and frequencies [pairs] or [heads, pairs], alike on every axis; got positions"
            f" {[np.shape(p) for p in positions]}, frequencies {[np.shape(f) for f in frequencies]}"
        )
    layout = tuple(np.shape(p)[0] for p in positions)
    tables = [_axis_table(p, f) for p, f in zip(positions, frequencies, strict=True)]

    def on_the_grid(parts: list[Array]) -> Array:
        spread = []
        for axis, part in enumerate(parts):
            ones = [1] * len(layout)
            ones[axis] = layout[axis]
            shaped = part.reshape(*ones, *part.shape[1:])
            spread.append(jnp.broadcast_to(shaped, (*layout, *part.shape[1:])))
        return jnp.concatenate(spread, axis=-1)

    return Rotation(*(on_the_grid([table[i] for table in tables]) for i in range(2)))


def rotate(
    x: Float[Array, "B *space N H"], rotation: Rotation, *, interleaved: bool
) -> Float[Array, "B *space N H"]:
    """Turn each pair of features by its token's angle: `(a, b) -> (a cos - b sin, b cos + a sin)`, in float32.

    Args:
      x: queries or keys.
      rotation: table of the same `*space`, with `F <= H / 2` pairs.
      interleaved: pairs are features `(2 i, 2 i + 1)` if True, `(i, F + i)` if False. Features from `2 F` on stay.

    Returns:
      `x` rotated, in its dtype.

    Raises:
      ValueError: for a table of another layout or with more pairs than features.
    """
    cos, sin = rotation
    space = x.shape[1:-2]
    pairs = cos.shape[-1]
    tables = (space, (*space, x.shape[-2]))
    if cos.shape[:-1] not in tables or sin.shape != cos.shape or 2 * pairs > x.shape[-1]:
        raise ValueError(
            f"a rotation must be [*space, pairs] or [*space, heads, pairs] with 2 * pairs <= {x.shape[-1]} features;"
            f" got x of shape {tuple(x.shape)}, rotation of shape {tuple(cos.shape)}"
        )
    if cos.ndim == len(space) + 1:
        cos, sin = cos[..., None, :], sin[..., None, :]
    cos, sin = cos[None], sin[None]
    turned = x[..., : 2 * pairs].astype(jnp.float32)
    if interleaved:
        split = turned.reshape(*turned.shape[:-1], pairs, 2)
        first, second = split[..., 0], split[..., 1]
    else:
        first, second = turned[..., :pairs], turned[..., pairs:]
    one, other = first * cos - second * sin, second * cos + first * sin
    if interleaved:
        turned = jnp.stack([one, other], axis=-1).reshape(turned.shape)
    else:
        turned = jnp.concatenate([one, other], axis=-1)
    return jnp.concatenate([turned.astype(x.dtype), x[..., 2 * pairs :]], axis=-1)


def _axis_table(positions: Any, frequencies: Any) -> tuple[Array, Array]:
    """Cosine and sine `[L, *frequencies.shape]`, float32."""
    if isinstance(positions, Tracer) or isinstance(frequencies, Tracer):
        xp, dtype = jnp, jnp.float32
    else:
        xp, dtype = np, np.float64
    turns = xp.asarray(frequencies, dtype)
    at = xp.asarray(positions, dtype).reshape(-1, *(1,) * turns.ndim)
    angles = at * turns[None]
    if xp is np:
        angles = np.remainder(angles, 2 * math.pi)
    return jnp.asarray(xp.cos(angles), jnp.float32), jnp.asarray(xp.sin(angles), jnp.float32)
