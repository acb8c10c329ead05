"""The calls that `verification` compares, on which arrays, and how far a right result may be off. Nothing is run here."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from gna_jax.neighborhood import Neighborhood, by
from gna_jax.problem import FLOAT8

TOLERANCE = {"bfloat16": 1.5e-2, "float16": 2.5e-3, "float32": 1e-5, "tf32": 3e-3}
"""Largest error of out and gradients, as a share of the array's largest entry: weights are rounded to 8 or 11 bits before a product;
in float32 nothing is, unless `precision` asks for TF32, which rounds all operands to 11 bits."""
FLOAT8_TOLERANCE = 6e-2
"""The same of out where operands, and with them the weights, are float8, of 4 bits: twice what rounding them does."""
LSE_TOLERANCE = 2e-5
"""The same of lse: float32 sums of exact products. A single key too many among ten thousand shows. With TF32 the products are not."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """One call of `gna` to compare, forward and backward. Names as `gna`'s arguments.

    Attributes:
      num_additional, additional_lengths: additional keys, and how many of them each sample sees.
      has_bias: whether it has a relative position bias.
      is_small: whether JAX's interpreter takes less than a minute for it.
    """

    layout: tuple[int, ...]
    window_size: int | tuple[int, ...]
    stride: int | tuple[int, ...] = 1
    dilation: int | tuple[int, ...] = 1
    is_causal: bool | tuple[bool, ...] = False
    _: dataclasses.KW_ONLY
    dtype: str = "bfloat16"
    batch: int = 1
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 64
    value_dim: int = 64
    num_additional: int = 0
    additional_lengths: tuple[int, ...] | None = None
    has_bias: bool = False
    precision: str | None = None
    is_small: bool = False

    @property
    def has_gradients(self) -> bool:
        """Whether the call can be differentiated: not in float8."""
        return self.dtype != FLOAT8

    @property
    def arithmetic(self) -> str:
        """What decides the errors: the dtype, or that of products of float32."""
        return "tf32" if (self.dtype, self.precision) == ("float32", "default") else self.dtype

    @property
    def neighborhood(self) -> Neighborhood:
        """The rule of every axis."""
        return Neighborhood.of(
            len(self.layout),
            window_size=self.window_size,
            stride=self.stride,
            dilation=self.dilation,
            is_causal=self.is_causal,
        )

    def __str__(self) -> str:
        """As it stands in the table: `30x48 w6x8 s2x8, 4/2 heads x 64`."""
        rule = self.neighborhood
        text = f"{by(self.layout)} w{by(rule.window_size)}"
        for letter, sizes in (("s", rule.stride), ("d", rule.dilation)):
            text += f" {letter}{by(sizes)}" if set(sizes) != {1} else ""
        text += f" causal{by(rule.is_causal)}" if any(rule.is_causal) else ""
        heads = str(self.heads) + (f"/{self.kv_heads}" if self.kv_heads != self.heads else "")
        dims = str(self.head_dim) + (
            f"/{self.value_dim}" if self.value_dim != self.head_dim else ""
        )
        more = f", {self.num_additional} more keys" if self.num_additional else ""
        bias = ", bias" if self.has_bias else ""
        return f"{text}, {heads} heads x {dims}{more}{bias}"

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of `gna`'s arrays by name, the additional lengths apart."""
        tokens, more = (self.batch, *self.layout), (self.batch, self.num_additional)
        shapes: dict[str, tuple[int, ...]] = {
            "query": (*tokens, self.heads, self.head_dim),
            "key": (*tokens, self.kv_heads, self.head_dim),
            "value": (*tokens, self.kv_heads, self.value_dim),
        }
        if self.num_additional:
            shapes["additional_keys"] = (*more, self.kv_heads, self.head_dim)
            shapes["additional_values"] = (*more, self.kv_heads, self.value_dim)
        if self.has_bias:
            axes = zip(self.neighborhood.axes, self.layout, strict=True)
            entries = (2 * axis.window_extent(length) - 1 for axis, length in axes)
            shapes["relative_position_bias"] = (self.heads, *entries)
        return shapes

    def operands(self, seed: int) -> dict[str, Any]:
        """Standard normal arrays by `gna`'s names, on the default device, and the additional lengths."""
        shapes = self.shapes()
        keys = jax.random.split(jax.random.key(seed), len(shapes))
        drawn = self.dtype if self.has_gradients else jnp.float32
        arrays: dict[str, Any] = {
            name: jax.random.normal(key, shape, drawn).astype(self.dtype)
            for key, (name, shape) in zip(keys, shapes.items(), strict=True)
        }
        if self.additional_lengths is not None:
            arrays["additional_lengths"] = jnp.asarray(self.additional_lengths, jnp.int32)
        return arrays


TRIALS = (
    Trial((70,), 9, heads=1, kv_heads=1, head_dim=32, value_dim=32, is_small=True),
    Trial((7, 12), (3, 5), (1, 2), (2, 1), (False, True), dtype="float16", kv_heads=1, is_small=True),
    Trial((3, 4, 6), (2, 3, 4), heads=1, kv_heads=1, num_additional=5, batch=2, additional_lengths=(0, 3), is_small=True),
    Trial((1111,), 300, heads=6, kv_heads=3, batch=2),
    Trial((8192,), 1021, head_dim=128, value_dim=128),
    Trial((5000,), 640, 64, 3, True, dtype="float16", heads=6, kv_heads=2),
    Trial((2048,), -1, is_causal=True, head_dim=128, value_dim=128),
    Trial((56, 56), 7, dtype="float16", batch=16, heads=4, kv_heads=4, head_dim=32, value_dim=32),
    Trial((61, 83), (9, 7), (2, 3), (3, 4), head_dim=32, value_dim=32),
    Trial((96, 96), 32, 16, head_dim=128, value_dim=128),
    Trial((70, 50), (20, 13), 1, 1, (True, False), dtype="float16", head_dim=48, value_dim=24),
    Trial((10, 24, 40), (6, 8, 8), (2, 8, 8), head_dim=128, value_dim=128, heads=4, kv_heads=4),
    Trial((11, 23, 29), (5, 8, 11), dtype="float16", head_dim=128, value_dim=128, heads=4),
    Trial((9, 30, 32), (4, 5, 7), (1, 2, 1), (1, 3, 2), (True, False, False), num_additional=77),
    Trial((6, 20, 24), (-1, 6, 8), batch=3, head_dim=32, value_dim=32, dtype="float16"),
)  # fmt: skip
"""What a kernel must get right: every rank, 16-bit dtype, head dim and option. The small ones first."""

FLOAT8_TRIALS = (
    Trial((3000,), 300, dilation=2, heads=4, batch=2, dtype=FLOAT8),
    Trial((61, 83), (9, 7), (2, 3), is_causal=(True, False), dtype=FLOAT8),
    Trial((10, 24, 40), (6, 8, 8), (2, 8, 8), head_dim=128, value_dim=128, dtype=FLOAT8),
)
"""And where it takes float8, forward alone."""
MORE_TRIALS = (
    Trial((6, 9), (3, 4), 1, (2, 1), dtype="float32", heads=1, kv_heads=1, head_dim=16, value_dim=16, has_bias=True, is_small=True),
    Trial((1500,), 200, 1, 3, True, dtype="float32", heads=4, num_additional=9),
    Trial((61, 83), (9, 7), (2, 3), dtype="float32", heads=4, has_bias=True),
    Trial((10, 24, 40), (6, 8, 8), (2, 8, 8), dtype="float32", precision="default", head_dim=128, value_dim=128),
    Trial((900,), 9, 1, 2, True, heads=4, head_dim=16, value_dim=16, has_bias=True),
    Trial((56, 56), 7, batch=16, head_dim=32, value_dim=32, has_bias=True),
    Trial((40, 42), (7, 5), 1, (3, 2), dtype="float16", heads=4, has_bias=True),
    Trial((9, 20, 22), (3, 5, 7), heads=4, head_dim=128, value_dim=128, num_additional=5, has_bias=True),
    Trial((30, 40), 7, head_dim=256, value_dim=256, has_bias=True),
    Trial((12, 30, 36), (6, 10, 12), head_dim=256, value_dim=256),
    Trial((3000,), 400, head_dim=16, value_dim=16, heads=4),
)  # fmt: skip
"""And what only some kernels offer: float32, exact and as TF32; a relative position bias; head dims of 16 and 256."""


def tolerance(name: str, arithmetic: str) -> float:
    """Largest error of an array of a trial, by its `arithmetic`."""
    if name == "lse" and arithmetic != "tf32":
        return LSE_TOLERANCE
    return FLOAT8_TOLERANCE if arithmetic == FLOAT8 else TOLERANCE[arithmetic]
