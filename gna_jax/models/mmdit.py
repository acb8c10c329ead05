"""The blocks of multimodal diffusion transformers (MM-DiT): image and text tokens that attend to each other.

`DoubleStreamBlock` keeps separate weights per kind of token, `SingleStreamBlock` shares them. FLUX.1 and HunyuanVideo are made
of these; their embeddings and outputs are theirs. Attention itself: `gna_jax.models.joint`.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from gna_jax.flax import partition
from gna_jax.models.joint import JointAttention
from gna_jax.models.remat import run_block
from gna_jax.models.rotary import Rotation
from gna_jax.models.schedule import Rule
from gna_jax.models.timestep import VectorEmbedder, sinusoidal_features
from gna_jax.tiling import Tiles

_EPSILON = 1e-6
TIME_FEATURES = 256
"""Sinusoids of a timestep."""


class Modulation(nnx.Module):
    """`parts` vectors per sample from the condition, `linear(silu(vector))`: shifts, scales and gates."""

    def __init__(self, features: int, parts: int, **linear: Any):
        self.parts = parts
        self.linear = nnx.Linear(features, parts * features, **linear)

    def __call__(self, vector: Float[Array, "B C"]) -> list[Float[Array, "B C"]]:
        """The parts, in the order of the kernel's columns."""
        return jnp.split(self.linear(nnx.silu(vector)), self.parts, axis=-1)


class Heads(nnx.Module):
    """Queries, keys and values of one kind of token: projections, then RMS norm of queries and keys per head."""

    def __init__(
        self,
        features: int,
        num_heads: int,
        head_dim: int,
        spec: PartitionSpec | None,
        **linear: Any,
    ):
        heads = linear | partition.into_heads(spec)
        project = functools.partial(nnx.LinearGeneral, features, (num_heads, head_dim), **heads)
        self.query, self.key, self.value = project(), project(), project()
        norm = functools.partial(nnx.RMSNorm, head_dim, epsilon=_EPSILON, **linear)
        self.query_norm, self.key_norm = norm(), norm()

    def __call__(self, x: Float[Array, "*tokens C"]) -> tuple[Array, Array, Array]:
        """`(query, key, value)`, each `[*tokens, heads, head_dim]`."""
        return self.query_norm(self.query(x)), self.key_norm(self.key(x)), self.value(x)


class Stream(nnx.Module):
    """What a double-stream block holds for one kind of token: modulation, heads, output projection, MLP."""

    def __init__(
        self,
        features: int,
        num_heads: int,
        head_dim: int,
        mlp_features: int,
        spec: PartitionSpec | None,
        **linear: Any,
    ):
        self.modulation = Modulation(features, 6, **linear)
        self.heads = Heads(features, num_heads, head_dim, spec, **linear)
        self.out = nnx.LinearGeneral(
            (num_heads, head_dim), features, axis=(-2, -1), **linear, **partition.out_of_heads(spec)
        )
        self.mlp_in = nnx.Linear(features, mlp_features, **linear, **partition.into_hidden(spec))
        self.mlp_out = nnx.Linear(mlp_features, features, **linear, **partition.out_of_hidden(spec))

    def mlp(self, x: Float[Array, "*tokens C"]) -> Float[Array, "*tokens C"]:
        """Two layers with tanh-GELU."""
        return partition.summed_over(self.mlp_out, nnx.gelu(self.mlp_in(x), approximate=True))


class DoubleStreamBlock(nnx.Module):
    """Joint attention and an MLP per kind of token, each modulated and gated by the condition.

    Args:
      features: width of both streams.
      num_heads, head_dim: of the attention.
      mlp_features: width of the MLPs.
      implementation: as in `gna_joint`.
      tiles: as in `gna_joint`, for layers with a window; dense ones choose their own.
      spec: sharding of `[B, *space, heads, head_dim]`, one entry per axis, as in `gna_joint`; where it shards heads, weights
        are sharded alike (`gna_jax.flax.partition`). None: space is not sharded.
      dtype, param_dtype: of the computation (None: the common dtype of inputs and parameters) and of the parameters.
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        head_dim: int,
        mlp_features: int,
        *,
        implementation: str | Sequence[str] | None = None,
        tiles: Tiles | None = None,
        spec: PartitionSpec | None = None,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        linear = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.attend = JointAttention.of(implementation, tiles, spec)
        self.image = Stream(features, num_heads, head_dim, mlp_features, spec, **linear)
        self.text = Stream(features, num_heads, head_dim, mlp_features, spec, **linear)

    def __call__(
        self,
        image: Float[Array, "B *space C"],
        text: Float[Array, "B S C"],
        vector: Float[Array, "B C"],
        rotation: Rotation | None = None,
        text_lengths: Int[Array, " B"] | None = None,
        *,
        rule: Rule = None,
    ) -> tuple[Float[Array, "B *space C"], Float[Array, "B S C"]]:
        """One block.

        Args:
          image, text: tokens of both kinds.
          vector: the condition (time, guidance, pooled text).
          rotation: of the image's queries and keys; text is not rotated.
          text_lengths: text tokens of each sample; None: all.
          rule: window of the image tokens, static; None: dense.
        """
        tokens = image, text
        streams = self.image, self.text
        parts = [stream.modulation(vector) for stream in streams]
        heads = [
            s.heads(modulate(x, p[0], p[1])) for s, x, p in zip(streams, tokens, parts, strict=True)
        ]
        attended = self.attend(heads[0], heads[1], rotation, text_lengths, rule)
        results = []
        for stream, x, part, out in zip(streams, tokens, parts, attended, strict=True):
            x = x + per_sample(part[2], x) * partition.summed_over(stream.out, out, 2)
            x = x + per_sample(part[5], x) * stream.mlp(modulate(x, part[3], part[4]))
            results.append(x)
        return results[0], results[1]


class SingleStreamBlock(nnx.Module):
    """Joint attention beside an MLP, both from the same normalized tokens, with the same weights for image and text.

    Arguments as in `DoubleStreamBlock`.
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        head_dim: int,
        mlp_features: int,
        *,
        implementation: str | Sequence[str] | None = None,
        tiles: Tiles | None = None,
        spec: PartitionSpec | None = None,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        linear = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.attend = JointAttention.of(implementation, tiles, spec)
        self.modulation = Modulation(features, 3, **linear)
        self.heads = Heads(features, num_heads, head_dim, spec, **linear)
        self.mlp_in = nnx.Linear(features, mlp_features, **linear, **partition.into_hidden(spec))
        # One linear layer over both in the published weights, split here: its bias is mlp_out's.
        self.out = nnx.LinearGeneral(
            (num_heads, head_dim),
            features,
            axis=(-2, -1),
            use_bias=False,
            **linear,
            **partition.out_of_heads(spec),
        )
        self.mlp_out = nnx.Linear(mlp_features, features, **linear, **partition.out_of_hidden(spec))

    def __call__(
        self,
        image: Float[Array, "B *space C"],
        text: Float[Array, "B S C"],
        vector: Float[Array, "B C"],
        rotation: Rotation | None = None,
        text_lengths: Int[Array, " B"] | None = None,
        *,
        rule: Rule = None,
    ) -> tuple[Float[Array, "B *space C"], Float[Array, "B S C"]]:
        """One block; arguments as in `DoubleStreamBlock`."""
        shift, scale, gate = self.modulation(vector)
        tokens = image, text
        normalized = [modulate(x, shift, scale) for x in tokens]
        heads = [self.heads(x) for x in normalized]
        attended = self.attend(heads[0], heads[1], rotation, text_lengths, rule)
        results = []
        for x, norm, out in zip(tokens, normalized, attended, strict=True):
            mlp = partition.summed_over(self.mlp_out, nnx.gelu(self.mlp_in(norm), approximate=True))
            results.append(
                x + per_sample(gate, x) * (partition.summed_over(self.out, out, 2) + mlp)
            )
        return results[0], results[1]


class ModulatedOutput(nnx.Module):
    """The last layer: layer norm modulated by the condition, then a linear layer to `out_features`."""

    def __init__(self, features: int, out_features: int, **linear: Any):
        self.modulation = Modulation(features, 2, **linear)
        self.linear = nnx.Linear(features, out_features, **linear)

    def __call__(self, x: Float[Array, "B *space C"], vector: Float[Array, "B C"]) -> Array:
        """`[B, *space, out_features]`. Here the scale comes before the shift."""
        scale, shift = self.modulation(vector)
        return self.linear(modulate(x, shift, scale))


class JointTransformer(nnx.Module):
    """What the models made of these blocks share: embedders of the condition, the blocks, the last layer.

    A model adds how its tokens come in and go out. `config` has `features`, `num_double`, `num_single`, `num_heads`,
    `head_dim`, `mlp_ratio`, `pooled_features` and `guidance`; `made` are `dtype`, `param_dtype` and `rngs`.
    """

    TIME_FACTOR = 1.0
    """On timesteps and guidance scales before their sinusoids."""

    def __init__(
        self,
        config: Any,
        out_features: int,
        *,
        implementation: str | Sequence[str] | None,
        tiles: Tiles | None,
        spec: PartitionSpec | None,
        remat: bool,
        **made: Any,
    ):
        self.config = config
        self.remat = remat
        width = config.features
        sizes = width, config.num_heads, config.head_dim, int(width * config.mlp_ratio)
        block = made | {"implementation": implementation, "tiles": tiles, "spec": spec}
        self.time_embedder = VectorEmbedder(TIME_FEATURES, width, **made)
        self.pooled_embedder = VectorEmbedder(config.pooled_features, width, **made)
        self.guidance_embedder = (
            VectorEmbedder(TIME_FEATURES, width, **made) if config.guidance else None
        )
        self.double_blocks = nnx.List(
            [DoubleStreamBlock(*sizes, **block) for _ in range(config.num_double)]
        )
        self.single_blocks = nnx.List(
            [SingleStreamBlock(*sizes, **block) for _ in range(config.num_single)]
        )
        self.output = ModulatedOutput(width, out_features, **made)

    @property
    def num_layers(self) -> int:
        """Attention layers: double blocks, then single ones."""
        return self.config.num_double + self.config.num_single

    def condition(
        self,
        pooled_text: Float[Array, "B pooled_features"],
        timestep: Float[Array, " B"],
        guidance: Float[Array, " B"] | None,
    ) -> Float[Array, "B C"]:
        """The vector that modulates every block. ValueError for guidance that is missing or unasked for."""
        check_guidance(guidance, self.config.guidance)

        def features(scalars: Array) -> Array:
            wide = sinusoidal_features(scalars, TIME_FEATURES, factor=self.TIME_FACTOR)
            return wide.astype(pooled_text.dtype)

        vector = self.time_embedder(features(timestep)) + self.pooled_embedder(pooled_text)
        if self.guidance_embedder is None or guidance is None:
            return vector
        return vector + self.guidance_embedder(features(guidance))

    def run_blocks(
        self,
        image: Float[Array, "B *space C"],
        text: Float[Array, "B S C"],
        vector: Float[Array, "B C"],
        rotation: Rotation,
        text_lengths: Int[Array, " B"] | None,
        rules: Sequence[Rule],
    ) -> Float[Array, "B *space C"]:
        """The image tokens after all blocks, each with its rule."""
        blocks = [*self.double_blocks, *self.single_blocks]
        for block, rule in zip(blocks, rules, strict=True):
            image, text = run_block(
                block, self.remat, image, text, vector, rotation, text_lengths, rule=rule
            )
        return image


def modulate(
    x: Float[Array, "B *tokens C"], shift: Float[Array, "B C"], scale: Float[Array, "B C"]
) -> Float[Array, "B *tokens C"]:
    """`layer_norm(x) * (1 + scale) + shift`: no weights of its own, mean and variance in float32."""
    wide = x.astype(statistics_dtype(x.dtype))
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    normalized = (centred * jax.lax.rsqrt(variance + _EPSILON)).astype(x.dtype)
    return normalized * (1 + per_sample(scale, x)) + per_sample(shift, x)


def statistics_dtype(dtype: Any) -> Any:
    """What sums over features and tokens are kept in: float32, or float64 for float64."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def per_sample(vector: Float[Array, "B C"], x: Float[Array, "B *tokens C"]) -> Array:
    """`vector` as `[B, 1, .., C]`, beside `x`."""
    return vector.reshape(vector.shape[0], *(1,) * (x.ndim - 2), vector.shape[-1])


def check_width(name: str, x: Any, axes: int, width: int) -> None:
    """ValueError unless `x` has so many axes, the last one `width` wide."""
    if jnp.ndim(x) != axes or x.shape[-1] != width:
        raise ValueError(
            f"{name} must have {axes} axes, the last of {width} features; got shape {tuple(jnp.shape(x))}"
        )


def check_batch(batch: int, **named: Any) -> None:
    """ValueError unless each array, if given, has `batch` samples; other numbers would be repeated unnoticed."""
    for name, x in named.items():
        if x is not None and jnp.shape(x)[:1] != (batch,):
            raise ValueError(
                f"{name} must have one entry per sample, {batch}; got shape {jnp.shape(x)};"
                f" repeat one for all with jnp.broadcast_to({name}, {(batch, *jnp.shape(x)[1:])})"
            )


def check_rotary_dims(dims: tuple[int, ...], head_dim: int) -> None:
    """ValueError unless the axes' features, each even, make up the head."""
    if sum(dims) != head_dim or any(dim % 2 for dim in dims):
        raise ValueError(
            f"rotary_dims must be even and add up to head_dim; got rotary_dims={dims}, head_dim={head_dim}"
        )


def check_guidance(guidance: Any, embedded: bool) -> None:
    """ValueError unless the guidance scale is given exactly where the model embeds it."""
    if (guidance is not None) != embedded:
        wanted = "needs guidance, one scale per sample" if embedded else "takes no guidance"
        raise ValueError(
            f"a model of config.guidance={embedded} {wanted}; got {'none' if guidance is None else 'one'}"
        )
