"""Layers of HDiT: conditioned norm, cosine-similarity attention, GEGLU, token merging and splitting, rotation by position.

The model that they make up is in `hdit_model`.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Dtype
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from gna_jax.flax.partition import attention_over, out_of_heads, over_heads, summed_over
from gna_jax.models.rotary import Rotation, axial_rotation, rotate

GLOBAL = -1
"""As a level's window: every token sees every other."""
_EPSILON = 1e-6
_ZEROS = nnx.initializers.zeros_init()


@dataclasses.dataclass(frozen=True)
class Level:
    """One resolution of the hourglass.

    Args:
      depth: layers on the way down and again on the way up; the last level has them once.
      width: features of a token.
      window_size: keys per query on each axis, or `GLOBAL`.
      feed_forward: hidden features of the feed-forward; default three times `width`.
      head_dim: features of a head, a multiple of 8 that divides `width`.
      dropout: rate before each block's output projection.
    """

    depth: int
    width: int
    window_size: int = 7
    feed_forward: int | None = None
    head_dim: int = 64
    dropout: float = 0.0

    def __post_init__(self):
        if self.head_dim % 8 or self.width % self.head_dim:
            raise ValueError(
                "head_dim must be a multiple of 8 (two axes rotate a quarter of it each, in pairs) that divides width;"
                f" got head_dim={self.head_dim}, width={self.width}"
            )

    @property
    def hidden(self) -> int:
        """Hidden features of the feed-forward."""
        return 3 * self.width if self.feed_forward is None else self.feed_forward


@dataclasses.dataclass(frozen=True)
class Mapping:
    """The network from noise level and condition to the vector that `AdaRMSNorm` reads."""

    depth: int = 2
    width: int = 256
    feed_forward: int = 768
    dropout: float = 0.0


class Fixed(nnx.Variable):
    """Random numbers that belong to a model and are never trained."""


class FourierFeatures(nnx.Module):
    """`cos` and `sin` of `2 pi W x` with a fixed random `W [in_features, out_features / 2]`, float32."""

    def __init__(self, in_features: int, out_features: int, *, rngs: nnx.Rngs):
        self.weight = Fixed(rngs.params.normal((in_features, out_features // 2)))

    def __call__(self, x: Float[Array, "B in_features"]) -> Float[Array, "B out_features"]:
        """Features of each vector."""
        angles = 2 * math.pi * jnp.dot(x, self.weight[...], precision="highest")
        return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class MappingNetwork(nnx.Module):
    """RMSNorm, residual feed-forwards, RMSNorm."""

    def __init__(self, mapping: Mapping, *, dtype: Dtype, param_dtype: Dtype, rngs: nnx.Rngs):
        kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        norm = functools.partial(RMSNorm, mapping.width, param_dtype=param_dtype)
        self.in_norm, self.out_norm = norm(), norm()
        self.norms = nnx.List([norm() for _ in range(mapping.depth)])
        self.feed_forwards = nnx.List(
            [
                FeedForward(mapping.width, mapping.feed_forward, mapping.dropout, **kinds)
                for _ in range(mapping.depth)
            ]
        )

    def __call__(
        self, vector: Float[Array, "B width"], deterministic: bool, rngs: nnx.Rngs | None
    ) -> Float[Array, "B width"]:
        """Vector to vector."""
        vector = self.in_norm(vector)
        for norm, feed_forward in zip(self.norms, self.feed_forwards, strict=True):
            vector += feed_forward(norm(vector), deterministic, rngs)
        return self.out_norm(vector)


class FeedForward(nnx.Module):
    """GEGLU: `contract(a * gelu(b))` with `a, b = expand(x)`; zero at first."""

    def __init__(
        self,
        width: int,
        hidden: int,
        dropout: float,
        *,
        spec: PartitionSpec | None = None,
        dtype: Any,
        param_dtype: Any,
        rngs: Any,
    ):
        self.spec = spec
        linear = functools.partial(
            nnx.Linear, use_bias=False, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.expand = linear(width, 2 * hidden)
        self.contract = linear(hidden, width, kernel_init=_ZEROS)
        self.dropout = nnx.Dropout(dropout, rngs=rngs) if dropout > 0.0 else None

    def __call__(
        self, x: Float[Array, "*tokens width"], deterministic: bool, rngs: nnx.Rngs | None
    ) -> Float[Array, "*tokens width"]:
        """What is added to the tokens."""
        tokens = x.reshape(-1, x.shape[-1]) if self.spec is None else x
        value, gate = jnp.split(self.expand(tokens), 2, axis=-1)
        # The exact gelu. jax.nn.gelu writes it with erfc, on a CPU a sixth to a quarter slower for the whole feed-forward.
        hidden = value * (0.5 * gate * (1 + jax.lax.erf(gate * math.sqrt(0.5))))
        if self.dropout is not None:
            hidden = self.dropout(hidden, deterministic=deterministic, rngs=rngs)
        return self.contract(hidden).reshape(x.shape)


class RMSNorm(nnx.Module):
    """Every vector divided by the root of its mean square, times a learned scale; statistics in float32."""

    def __init__(self, width: int, *, param_dtype: Dtype):
        self.scale = nnx.Param(jnp.ones((width,), param_dtype))

    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        """Norm of each vector."""
        scale = self.scale[...].astype(jnp.float32)
        return _normed(x, scale.reshape(*(1,) * (x.ndim - 1), -1))


class AdaRMSNorm(nnx.Module):
    """RMSNorm whose scale is 1 plus a linear function of the conditioning vector, 0 at first; statistics in float32."""

    def __init__(
        self,
        width: int,
        condition_width: int,
        *,
        dtype: Dtype,
        param_dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        self.scale = nnx.Linear(
            condition_width,
            width,
            use_bias=False,
            kernel_init=_ZEROS,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )

    def __call__(
        self, x: Float[Array, "B *space width"], vector: Float[Array, "B condition_width"]
    ) -> Float[Array, "B *space width"]:
        """Norm of each token."""
        scale = self.scale(vector).astype(jnp.float32) + 1
        scale = scale.reshape(len(scale), *(1,) * (x.ndim - 2), -1)
        return _normed(x, scale)


class CosineAttention(nnx.Module):
    """Attention by the cosine of query and key, times a learned scale per head.

    Query and key are normalized, each multiplied with the root of the scale, and rotated. `spec` is as in `HDiT`.
    """

    def __init__(
        self,
        level: Level,
        *,
        implementation: str | Sequence[str] | None,
        spec: PartitionSpec | None = None,
        dtype: Dtype,
        param_dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        self.spec = spec
        self.window_size = level.window_size
        self.implementation = (
            implementation
            if implementation is None or isinstance(implementation, str)
            else tuple(implementation)
        )
        heads = level.width // level.head_dim
        linear = functools.partial(
            nnx.LinearGeneral, use_bias=False, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        metadata = over_heads(spec, 2, 4)
        self.qkv = linear(level.width, (3, heads, level.head_dim), kernel_metadata=metadata)
        self.scale = nnx.Param(jnp.full((heads,), 10.0, param_dtype), **over_heads(spec, 0, 1))
        self.out = linear(
            (heads, level.head_dim),
            level.width,
            axis=(-2, -1),
            kernel_init=_ZEROS,
            **out_of_heads(spec),
        )
        self.dropout = nnx.Dropout(level.dropout, rngs=rngs) if level.dropout > 0.0 else None

    def __call__(
        self,
        x: Float[Array, "B Y X width"],
        rotation: Rotation,
        deterministic: bool,
        rngs: nnx.Rngs | None,
    ) -> Float[Array, "B Y X width"]:
        """What is added to the tokens."""
        query, key, value = jnp.moveaxis(rows(self.qkv, x, self.spec), -3, 0)
        root = jnp.sqrt(self.scale[...].astype(jnp.float32))
        query, key = (
            rotate(_unit(part, root), rotation, interleaved=False) for part in (query, key)
        )
        heads = self._attend(query, key, value)
        if self.dropout is not None:
            heads = self.dropout(heads, deterministic=deterministic, rngs=rngs)
        if self.spec is not None:
            return summed_over(self.out, heads, 2)
        return self.out(heads.reshape(-1, *heads.shape[-2:])).reshape(x.shape)

    def _attend(self, query: Array, key: Array, value: Array) -> Array:
        if self.window_size == GLOBAL and self.spec is None:
            # Without a window there is nothing for gna to save; on a CPU it takes 1.1 to 1.7 times as long here.
            flat = (x.reshape(len(x), -1, *x.shape[3:]) for x in (query, key, value))
            return jax.nn.dot_product_attention(*flat, scale=1.0).reshape(value.shape)
        return attention_over(self.spec)(
            query,
            key,
            value,
            window_size=self.window_size,
            scale=1.0,
            implementation=self.implementation,
        )


class Layer(nnx.Module):
    """`x + attention(norm(x))`, then `x + feed_forward(norm(x))`, the norms told the conditioning vector."""

    def __init__(
        self,
        level: Level,
        condition_width: int,
        *,
        remat: bool,
        implementation: str | Sequence[str] | None,
        spec: PartitionSpec | None = None,
        dtype: Dtype,
        param_dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.remat = remat
        self.attention_norm = AdaRMSNorm(level.width, condition_width, **kinds)
        self.attention = CosineAttention(level, implementation=implementation, spec=spec, **kinds)
        self.feed_forward_norm = AdaRMSNorm(level.width, condition_width, **kinds)
        self.feed_forward = FeedForward(
            level.width, level.hidden, level.dropout, spec=spec, **kinds
        )

    def __call__(
        self,
        x: Float[Array, "B Y X width"],
        vector: Float[Array, "B condition_width"],
        rotation: Rotation,
        deterministic: bool,
        rngs: nnx.Rngs | None,
    ) -> Float[Array, "B Y X width"]:
        """Tokens to tokens."""
        x += self.attention(self.attention_norm(x, vector), rotation, deterministic, rngs)
        return x + self.feed_forward(self.feed_forward_norm(x, vector), deterministic, rngs)


class Split(nnx.Module):
    """Every token becomes 2x2, interpolated to the skip connection by a learned factor, one half at first."""

    def __init__(
        self,
        in_width: int,
        out_width: int,
        *,
        spec: PartitionSpec | None = None,
        dtype: Dtype,
        param_dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        self.spec = spec
        self.projection = nnx.Linear(
            in_width, 4 * out_width, use_bias=False, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.factor = nnx.Param(jnp.full((1,), 0.5, param_dtype))

    def __call__(
        self, x: Float[Array, "B Y X in_width"], skip: Float[Array, "B 2Y 2X out_width"]
    ) -> Float[Array, "B 2Y 2X out_width"]:
        """Coarse tokens to fine ones."""
        fine = depth_to_space(rows(self.projection, x, self.spec), (2, 2))
        return skip + self.factor[0].astype(fine.dtype) * (fine - skip)


def space_to_depth(
    x: Float[Array, "B H W C"], patch: tuple[int, int]
) -> Float[Array, "B Y X features"]:
    """Every patch becomes one token of its rows, one after the other."""
    batch, height, width, channels = x.shape
    y, z = patch
    x = x.reshape(batch, height // y, y, width // z, z, channels).swapaxes(2, 3)
    return x.reshape(batch, height // y, width // z, y * z * channels)


def depth_to_space(
    x: Float[Array, "B Y X features"], patch: tuple[int, int]
) -> Float[Array, "B H W C"]:
    """The inverse of `space_to_depth`."""
    batch, height, width, features = x.shape
    y, z = patch
    x = x.reshape(batch, height, width, y, z, features // (y * z)).swapaxes(2, 3)
    return x.reshape(batch, height * y, width * z, features // (y * z))


def head_frequencies(heads: int, head_dim: int) -> np.ndarray:
    """`[heads, head_dim / 8]`: from pi up to 10 pi in equal ratios, dealt to the heads in turn; 10 pi is left out."""
    count = heads * head_dim // 8
    logs = math.log(math.pi) + math.log(10.0) * np.arange(count) / count
    return np.exp(logs).reshape(-1, heads).T


def level_rotation(layout: Sequence[int], level: Level) -> Rotation:
    """Angles of a level's tokens: centers of cells of a box as wide and high as the image, its longer side from -1 to 1."""
    longest = max(layout)
    centers = [(2 * np.arange(size) + 1 - size) / longest for size in layout]
    frequencies = head_frequencies(level.width // level.head_dim, level.head_dim)
    return axial_rotation(centers, [frequencies, frequencies])


def rows(linear: Any, x: Array, spec: PartitionSpec | None) -> Array:
    """A linear layer on tokens as the rows of one matrix, whose gradient XLA's CPU backend finds three times faster.

    With a spec the tokens stay on their grid: rows of one matrix could not be sharded as a grid is.
    """
    if spec is not None:
        return linear(x)
    out = linear(x.reshape(-1, x.shape[-1]))
    return out.reshape(*x.shape[:-1], *out.shape[1:])


def _normed(x: Array, scale: Array) -> Array:
    square = jnp.square(x.astype(jnp.float32)).mean(axis=-1, keepdims=True)
    return x * (scale * jax.lax.rsqrt(square + _EPSILON)).astype(x.dtype)


def _unit(x: Float[Array, "B Y X N H"], length: Float[Array, " N"]) -> Float[Array, "B Y X N H"]:
    """Every head's vector scaled to the length of its head."""
    square = jnp.square(x.astype(jnp.float32)).sum(axis=-1, keepdims=True)
    return x * (length[None, None, None, :, None] * jax.lax.rsqrt(square + _EPSILON)).astype(
        x.dtype
    )
