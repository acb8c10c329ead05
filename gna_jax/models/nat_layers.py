"""The parts of NAT and DiNAT: stems, layers of attention and MLP, and what halves a map between levels.

`nat_model` puts them together.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer, PrecisionLike
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from gna_jax.flax.nnx import GNAttention
from gna_jax.flax.partition import into_hidden, out_of_hidden, summed_over
from gna_jax.models.nat_presets import NATConfig
from gna_jax.models.remat import KEEP_ATTENTION

PUBLISHED_INITIAL = nnx.initializers.normal(0.02)
"""What the published models' matrices and biases of positions start from."""
_INITIAL_CONVOLUTION = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
"""PyTorch's default, which the published models keep for convolutions."""
_EPSILON = 1e-5
Rngs = nnx.Rngs | nnx.RngStream | jax.Array


@dataclasses.dataclass(frozen=True)
class Layers:
    """Makes the layers of a model, all with its dtypes, precision and implementation."""

    dtype: Dtype | None
    param_dtype: Dtype
    precision: PrecisionLike
    implementation: str | Sequence[str] | None
    deterministic: bool | None
    kernel_init: Initializer
    rngs: nnx.Rngs
    spec: PartitionSpec | None = None

    @property
    def _dtypes(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "param_dtype": self.param_dtype, "rngs": self.rngs}

    def linear(
        self, in_features: int, out_features: int, *, use_bias: bool = True, **metadata: Any
    ) -> nnx.Linear:
        """On the last axis."""
        return nnx.Linear(
            in_features,
            out_features,
            use_bias=use_bias,
            kernel_init=self.kernel_init,
            precision=self.precision,
            **metadata,
            **self._dtypes,
        )

    def norm(self, features: int) -> "Norm":
        """Over the last axis."""
        return Norm(
            features,
            epsilon=_EPSILON,
            use_fast_variance=False,
            dtype=jnp.float32,
            param_dtype=self.param_dtype,
            rngs=self.rngs,
        )

    def conv(
        self,
        in_features: int,
        out_features: int,
        window: int,
        *,
        stride: int,
        padding: int,
        use_bias: bool = True,
    ) -> nnx.Conv:
        """Square windows over height and width."""
        return nnx.Conv(
            in_features,
            out_features,
            (window, window),
            strides=stride,
            padding=padding,
            use_bias=use_bias,
            kernel_init=_INITIAL_CONVOLUTION,
            precision=self.precision,
            **self._dtypes,
        )

    def attention(self, features: int, heads: int, window_size: int, dilation: int) -> GNAttention:
        """Square windows and a relative position bias, which starts random as the published one."""
        attention = GNAttention(
            heads,
            features,
            window_size=(window_size, window_size),
            dilation=dilation,
            relative_position_bias=True,
            kernel_init=self.kernel_init,
            precision=self.precision,
            implementation=self.implementation,
            spec=self.spec,
            **self._dtypes,
        )
        bias = attention.relative_position_bias
        if bias is not None:
            initial = PUBLISHED_INITIAL(self.rngs.params(), bias.shape, self.param_dtype)
            # Made anew: flax shards a parameter as its metadata says when it is made, not when its value is set.
            metadata = bias.get_metadata(exclude_required=True)
            attention.relative_position_bias = nnx.Param(initial, **metadata)
        return attention

    def drop_path(self, rate: float) -> nnx.Dropout | None:
        """Drops a residual branch of whole samples."""
        if rate == 0.0:
            return None
        return nnx.Dropout(
            rate, broadcast_dims=(1, 2, 3), deterministic=self.deterministic, rngs=self.rngs
        )

    def layer_scale(self, features: int, initial: float | None) -> nnx.Param | None:
        """A factor per feature."""
        if initial is None:
            return None
        return nnx.Param(jnp.full((features,), initial, self.param_dtype))


class Norm(nnx.LayerNorm):
    """Layer norm in float32, whatever the inputs' dtype, which the result has again."""

    def __call__(self, x: Float[Array, "*batch_space C"], *, mask: Array | None = None) -> Array:
        """As in `nnx.LayerNorm`."""
        return super().__call__(x.astype(jnp.float32), mask=mask).astype(x.dtype)


class ConvolutionStem(nnx.Module):
    """Two 3x3 convolutions of stride 2 with nothing in between, and a norm."""

    def __init__(self, layers: Layers, in_channels: int, dim: int):
        self.conv1 = layers.conv(in_channels, dim // 2, 3, stride=2, padding=1)
        self.conv2 = layers.conv(dim // 2, dim, 3, stride=2, padding=1)
        self.norm = layers.norm(dim)

    def __call__(
        self, images: Float[Array, "B height width C"]
    ) -> Float[Array, "B rows columns D"]:
        """Images to tokens."""
        return self.norm(self.conv2(self.conv1(images)))


class PatchStem(nnx.Module):
    """One token per patch, images padded on the right and the bottom to whole patches."""

    def __init__(self, layers: Layers, in_channels: int, dim: int, patch_size: int):
        self.patch_size = patch_size
        self.conv = layers.conv(in_channels, dim, patch_size, stride=patch_size, padding=0)
        self.norm = layers.norm(dim)

    def __call__(
        self, images: Float[Array, "B height width C"]
    ) -> Float[Array, "B rows columns D"]:
        """Images to tokens."""
        rows, columns = (-length % self.patch_size for length in images.shape[1:3])
        return self.norm(self.conv(_padded(images, rows, columns)))


class _ConvolutionDownsample(nnx.Module):
    """Half the map, twice the features, by an overlapping 3x3 convolution."""

    def __init__(self, layers: Layers, dim: int):
        self.reduction = layers.conv(dim, 2 * dim, 3, stride=2, padding=1, use_bias=False)
        self.norm = layers.norm(2 * dim)

    def __call__(self, x: Array) -> Array:
        return self.norm(self.reduction(x))


class _Merging(nnx.Module):
    """Half the map, twice the features, by a linear map of 2x2 tokens; odd maps are padded."""

    def __init__(self, layers: Layers, dim: int):
        self.norm = layers.norm(4 * dim)
        self.reduction = layers.linear(4 * dim, 2 * dim, use_bias=False)

    def __call__(self, x: Array) -> Array:
        x = _padded(x, x.shape[1] % 2, x.shape[2] % 2)
        batch, rows, columns, dim = x.shape
        x = x.reshape(batch, rows // 2, 2, columns // 2, 2, dim)
        # Tokens of a square in the published order: down the left column, then down the right one.
        x = x.transpose(0, 1, 3, 4, 2, 5).reshape(batch, rows // 2, columns // 2, 4 * dim)
        return self.reduction(self.norm(x))


class Level(nnx.Module):
    """Layers on maps of one size, and what makes the next level's map of theirs."""

    def __init__(self, layers: Layers, config: NATConfig, level: int, remat: bool):
        dim = config.level_dims[level]
        self.remat = remat
        self.blocks = nnx.List(
            _Block(layers, config, dim, config.num_heads[level], dilation, drop_path)
            for dilation, drop_path in config.layers(level)
        )
        make = _ConvolutionDownsample if config.patch_size is None else _Merging
        last = level + 1 == len(config.depths)
        self.downsample = None if last else make(layers, dim)

    def __call__(self, x: Array, deterministic: bool | None, rngs: Rngs | None) -> Array:
        """The map after all layers; `downsample`, None in the last level, makes the next level's of it."""
        run = _run_again if self.remat else _run
        for block in self.blocks:
            x = run(block, x, rngs, deterministic)
        return x


class _Block(nnx.Module):
    """Attention and MLP, each normed before, added to what came in."""

    def __init__(
        self,
        layers: Layers,
        config: NATConfig,
        dim: int,
        heads: int,
        dilation: int,
        drop_path: float,
    ):
        self.reach = config.window_size * dilation
        self.norm1 = layers.norm(dim)
        self.attention = layers.attention(dim, heads, config.window_size, dilation)
        self.norm2 = layers.norm(dim)
        hidden = int(dim * config.mlp_ratio)
        self.mlp_in = layers.linear(dim, hidden, **into_hidden(layers.spec))
        self.mlp_out = layers.linear(hidden, dim, **out_of_hidden(layers.spec))
        self.attention_layer_scale = layers.layer_scale(dim, config.layer_scale)
        self.mlp_layer_scale = layers.layer_scale(dim, config.layer_scale)
        self.drop_path = layers.drop_path(drop_path)

    def __call__(self, x: Array, deterministic: bool | None, rngs: Rngs | None) -> Array:
        def residual(branch: Array, layer_scale: nnx.Param | None) -> Array:
            if layer_scale is not None:
                scale = layer_scale[...].astype(branch.dtype)
                branch = branch * scale.reshape(1, 1, 1, -1)
            if self.drop_path is not None:
                branch = self.drop_path(branch, deterministic=deterministic, rngs=rngs)
            return branch

        x = x + residual(self._attend(self.norm1(x)), self.attention_layer_scale)
        hidden = jax.nn.gelu(self.mlp_in(self.norm2(x)), approximate=False)
        return x + residual(summed_over(self.mlp_out, hidden), self.mlp_layer_scale)

    def _attend(self, x: Array) -> Array:
        height, width = x.shape[1:3]
        x = _padded(x, max(0, self.reach - height), max(0, self.reach - width))
        return self.attention(x)[:, :height, :width]


def _run(block: _Block, x: Array, rngs: Rngs | None, deterministic: bool | None) -> Array:
    return block(x, deterministic, rngs)


_run_again = nnx.remat(
    _run,
    static_argnums=(3,),
    policy=KEEP_ATTENTION,
)


def _padded(x: Array, rows: int, columns: int) -> Array:
    """Zeros below and to the right."""
    return jnp.pad(x, ((0, 0), (0, rows), (0, columns), (0, 0))) if rows or columns else x
