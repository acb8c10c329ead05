"""Joint attention of image and text tokens: image tokens see their neighborhood and the text, text sees everything.

The attention of MM-DiT blocks (FLUX.1, HunyuanVideo), for those and for anyone's own. No parameters live here, and no
window rule; which layer uses which window at which step: `gna_jax.models.schedule`.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from gna_jax.attention import slab_attention
from gna_jax.device import DeviceSpec
from gna_jax.flax.partition import attention_over, check_spec, over_shards
from gna_jax.halo_exchange import as_names
from gna_jax.models.rotary import Rotation, rotate
from gna_jax.models.schedule import Rule, window_arguments
from gna_jax.neighborhood import WHOLE_GROUP, Flags, Sizes
from gna_jax.sharding import merge_over_mesh
from gna_jax.tiling import Tiles

_SCORES_BYTES = 256 << 20
"""Memory for the scores of the text queries that are computed at a time."""


def gna_joint(
    query: Float[ArrayLike, "B *space N H"],
    key: Float[ArrayLike, "B *space K H"],
    value: Float[ArrayLike, "B *space K V"],
    text_query: Float[ArrayLike, "B S N H"],
    text_key: Float[ArrayLike, "B S K H"],
    text_value: Float[ArrayLike, "B S K V"],
    *,
    window_size: Sizes,
    stride: Sizes = 1,
    dilation: Sizes = 1,
    is_causal: Flags = False,
    scale: float | None = None,
    text_lengths: Int[ArrayLike, " B"] | None = None,
    return_lse: bool = False,
    precision: Any = None,
    implementation: str | Sequence[str] | None = None,
    tiles: Tiles | None = None,
    device: str | DeviceSpec | None = None,
    spec: PartitionSpec | None = None,
) -> Any:
    """Attention over image tokens on a grid and text tokens of the same samples.

    An image token sees the keys of its window and its sample's text, in one softmax; a text token sees every image token
    and its sample's text. With `window_size=-1` this is dense attention over all tokens. Differentiable as `gna` is.

    The image part costs what `gna` costs with `S` additional keys. The text part costs `S * (tokens + S)` score pairs,
    `S / (tokens + S)` of dense joint attention, some text queries at a time by the backend "xla" ("reference" if that is the
    named implementation): memory is linear in the tokens, and neither keys nor values are concatenated.

    Args:
      query, key, value: image tokens, 1 to 3 spatial axes; K divides N. Position embeddings are the caller's, on both
        kinds of tokens.
      text_query, text_key, text_value: text tokens, same heads and head dims.
      text_lengths: how many of the `S` text tokens each sample has, 0 to S; the tokens after them are padding: no result
        and no gradient depends on them, whatever they hold. None: all.
      window_size, stride, dilation, is_causal: of the image tokens, as in `gna`.
      scale, precision, device: as in `gna`, of both parts.
      implementation, tiles: as in `gna`, of the image part.
      return_lse: also return the log-sum-exp of both parts.
      spec: sharding of the image tokens over the mesh of `jax.set_mesh`, as in `gna_sharded`; text is sharded as its batch
        and heads. Image queries exchange halos; text queries meet the image keys where they lie, and partial results are
        merged, so nothing is gathered. Head shards divide K. None: space is not sharded.

    Returns:
      `(out [B, *space, N, V], text_out [B, S, N, V])` in the query's dtype, or `(out, text_out, lse [B, *space, N],
      text_lse [B, S, N])`. For text tokens past their sample's length, out is 0, lse is -inf, and no gradient flows.

    Raises:
      ValueError: text of another batch, length, heads, head dim or dtype; and what `gna` raises.
      TypeError, NotImplementedError: what `gna` raises.

    >>> import jax
    >>> from gna_jax.models.joint import gna_joint
    >>> x, text = (jax.random.normal(jax.random.key(0), (1, *n, 2, 16)) for n in ((8, 8), (5,)))
    >>> out, text_out = gna_joint(x, x, x, text, text, text, window_size=3)
    >>> out.shape, text_out.shape
    ((1, 8, 8, 2, 16), (1, 5, 2, 16))
    """
    query, key, value = jnp.asarray(query), jnp.asarray(key), jnp.asarray(value)
    text = jnp.asarray(text_query), jnp.asarray(text_key), jnp.asarray(text_value)
    _check_text(query, key, value, text)
    lengths = as_text_lengths(text_lengths, *text[0].shape[:2])
    shared = {"scale": scale, "precision": precision, "device": device}
    out, lse = attention_over(spec)(
        query,
        key,
        value,
        window_size=window_size,
        stride=stride,
        dilation=dilation,
        is_causal=is_causal,
        additional_keys=text[1],
        additional_values=text[2],
        additional_lengths=lengths,
        return_lse=True,
        implementation=implementation,
        tiles=tiles,
        **shared,
    )
    attend_text = _attend_text if spec is None else functools.partial(_attend_text_over, spec)
    text_out, text_lse = attend_text(
        key,
        value,
        text,
        lengths,
        implementation="reference" if implementation == "reference" else "xla",
        **shared,
    )
    return (out, text_out, lse, text_lse) if return_lse else (out, text_out)


def as_text_lengths(text_lengths: Any, batch: int, tokens: int) -> Int[Array, " B"] | None:
    """Lengths as an array; ValueError unless they are integers, one per sample, 0 to `tokens` where that can be seen."""
    if text_lengths is None:
        return None
    lengths = jnp.asarray(text_lengths)
    if lengths.shape != (batch,) or not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise ValueError(
            f"text_lengths must be integers of shape [batch] = ({batch},);"
            f" got {lengths.dtype} of shape {tuple(lengths.shape)}"
        )
    if not isinstance(text_lengths, jax.Array) or (
        not isinstance(text_lengths, Tracer) and text_lengths.is_fully_addressable
    ):
        values = np.asarray(text_lengths)
        if ((values < 0) | (values > tokens)).any():
            raise ValueError(
                f"text_lengths must be 0 to {tokens}, the text tokens given; got text_lengths={values.tolist()};"
                " cut the lengths where the text was cut"
            )
    return lengths


@dataclasses.dataclass(frozen=True)
class JointAttention:
    """Rotation of the image's queries and keys, then `gna_joint`; hashable, because modules keep it as a static attribute."""

    implementation: str | tuple[str, ...] | None
    tiles: Tiles | None
    spec: PartitionSpec | None

    @classmethod
    def of(
        cls,
        implementation: str | Sequence[str] | None,
        tiles: Tiles | None,
        spec: PartitionSpec | None,
    ) -> "JointAttention":
        """The choices, a sequence of names as a tuple."""
        check_spec(spec)
        if implementation is not None and not isinstance(implementation, str):
            implementation = tuple(implementation)
        return cls(implementation, tiles, spec)

    def __call__(
        self,
        image: tuple[Array, Array, Array],
        text: tuple[Array, Array, Array],
        rotation: Rotation | None,
        text_lengths: Array | None,
        rule: Rule,
    ) -> tuple[Array, Array]:
        """Out of image and text, from `(query, key, value)` of both; the window `rule` is static, None: dense."""
        query, key, value = image
        check_spec(self.spec, query.ndim - 3)
        if rotation is not None:
            query, key = (rotate(x, rotation, interleaved=True) for x in (query, key))
        return gna_joint(
            query,
            key,
            value,
            *text,
            text_lengths=text_lengths,
            implementation=self.implementation,
            spec=self.spec,
            **window_arguments(rule, self.tiles),
        )


def text_mask(text_lengths: Int[Array, " B"], tokens: int) -> Array:
    """`[B, tokens]` bool: is the token text of its sample, and not padding?"""
    return jnp.arange(tokens, dtype=jnp.int32)[None, :] < text_lengths.astype(jnp.int32)[:, None]


def hide_padding(text: Float[Array, "B S C"], text_lengths: Any) -> Float[Array, "B S C"]:
    """Text tokens with zeros after each sample's length, so that nothing in a model computes with what padding holds."""
    if text_lengths is None:
        return text
    seen = text_mask(text_lengths, text.shape[1])
    return jnp.where(seen[..., None], text, jnp.zeros((), text.dtype))


def _attend_text_over(
    spec: PartitionSpec,
    key: Array,
    value: Array,
    text: tuple[Array, Array, Array],
    lengths: Array | None,
    **options: Any,
) -> tuple[Array, Array]:
    """`_attend_text` where image keys are spread over devices: each sees its own, the first one the text besides."""
    batch, *space, heads, _ = (*spec, *(None,) * (key.ndim - len(spec)))
    spread = tuple(name for entry in space for name in as_names(entry))

    def attend(
        key: Array, value: Array, text: tuple[Array, Array, Array], lengths: Array | None
    ) -> tuple[Array, Array]:
        if not spread:
            return _attend_text(key, value, text, lengths, **options)
        seen = jnp.full(len(key), text[0].shape[1], jnp.int32) if lengths is None else lengths
        seen = jnp.where(jax.lax.axis_index(spread) == 0, seen, jnp.zeros((), seen.dtype))
        out, lse = _attend_text(key, value, text, lengths, text_seen=seen, **options)
        return merge_over_mesh(out, lse, spread)

    rows = PartitionSpec(batch, None, heads)
    image = PartitionSpec(batch, *space, heads)
    specs = image, image, (rows,) * 3, None if lengths is None else PartitionSpec(batch)
    return over_shards(attend, specs, (rows, rows))(key, value, text, lengths)


def _attend_text(
    key: Array,
    value: Array,
    text: tuple[Array, Array, Array],
    lengths: Array | None,
    *,
    text_seen: Array | None = None,
    **options: Any,
) -> tuple[Array, Array]:
    """Text queries over all image keys and their text: a slab of queries, a slab of keys, and a window over both.

    `text_seen`: how many text tokens of each sample are keys, if not `lengths`.
    """
    query, text_key, text_value = text
    batch, tokens = query.shape[:2]
    flat_key = key.reshape(batch, -1, *key.shape[-2:])
    flat_value = value.reshape(batch, -1, *value.shape[-2:])
    if lengths is not None:
        # Padding may hold NaN, which 0 * NaN would carry into the gradients of keys and values.
        seen = text_mask(lengths, tokens)
        query = jnp.where(seen[..., None, None], query, jnp.zeros((), query.dtype))
    by_reference = options["implementation"] == "reference"
    row_bytes = 4 * batch * query.shape[2] * flat_key.shape[1]
    rows = max(1, min(tokens, _SCORES_BYTES // row_bytes))
    out, lse = slab_attention(
        query,
        flat_key,
        flat_value,
        (0,),
        (0,),
        global_layout=(max(tokens, flat_key.shape[1]),),
        window_size=WHOLE_GROUP,
        additional_keys=text_key,
        additional_values=text_value,
        additional_lengths=lengths if text_seen is None else text_seen,
        tiles=None if by_reference else Tiles(q=(rows,), kv=None),
        **options,
    )
    if lengths is None:
        return out, lse
    out = jnp.where(seen[..., None, None], out, jnp.zeros((), out.dtype))
    return out, jnp.where(seen[..., None], lse, -jnp.inf)


def _check_text(query: Array, key: Array, value: Array, text: tuple[Array, ...]) -> None:
    """Text must fit the image tokens; `gna` checks those."""
    named = zip(("text_query", "text_key", "text_value"), text, (query, key, value), strict=True)
    for name, array, like in named:
        if array.dtype != query.dtype:
            raise ValueError(
                f"{name} must have query's dtype; got query of {query.dtype}, {name} of {array.dtype};"
                f" cast with {name}.astype(query.dtype)"
            )
        tokens = text[0].shape[1] if text[0].ndim > 1 else "S"
        expected = (query.shape[0], tokens, *like.shape[-2:])
        if array.ndim != 4 or array.shape != expected:
            raise ValueError(
                f"{name} must be [batch, text tokens, heads, head_dim] = {expected}, as the image tokens;"
                f" got {name} of shape {tuple(array.shape)}"
            )
    if text[0].shape[1] == 0:
        raise ValueError(
            "joint attention needs at least one text token; got 0; without text, call gna_jax.gna"
        )
