"""What runs in this process: gna by each implementation, cuDNN's dense attention through jax, tokamax on one axis.

torch's flex_attention: `torch_flex`. Each is compared with `gna_jax.verification.sampled_attention` before it is timed.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gna_jax import gna
from gna_jax.neighborhood import WHOLE_GROUP, Neighborhood
from gna_jax.verification import (
    relative_error,
    sample_tokens,
    sampled_attention,
    sampled_cotangents,
)
from published.cases import FORWARD, Case
from published.rounds import Unavailable

SEED = 0
SAMPLED_QUERIES = 16
SAMPLED_ENTRIES = 2
"""Batch entries that are compared."""

BIAS = "relative_position_bias"
COPIED_BYTES = {"gpu": 1 << 30}
"""Of a copy that is timed; elsewhere a megabyte."""

GRADIENTS_OF = {"cutlass": "mosaic"}
"""Implementations whose backward is another one's."""

Attention = Callable[..., jax.Array]


@dataclasses.dataclass(frozen=True)
class Queued:
    """`run()` queues a call and returns its outputs."""

    run: Callable[[], Any]
    errors: dict[str, float]

    def seconds_per_call(self, calls: int) -> float:
        """As `rounds.Prepared`."""
        jax.block_until_ready(self.run())
        started = time.perf_counter()
        for _ in range(calls):
            outputs = self.run()
        jax.block_until_ready(outputs)
        return (time.perf_counter() - started) / calls


class Gna:
    """gna by one implementation, its tiles its own choice."""

    is_ours, is_dense = True, False

    def __init__(self, implementation: str) -> None:
        self.implementation = implementation
        self.name = f"gna {implementation}"

    def prepare(self, case: Case, direction: str, seconds_left: float) -> Queued:
        """As `rounds.Contestant`."""
        if direction != FORWARD and self.implementation in GRADIENTS_OF:
            raise Unavailable(f"its backward is {GRADIENTS_OF[self.implementation]}'s")
        try:
            case.explain(self.implementation)
        except NotImplementedError as reason:  # no library, another generation: told in its row
            raise Unavailable(str(reason)) from reason
        rule = dataclasses.asdict(case.neighborhood)

        def attention(*arrays: jax.Array) -> jax.Array:
            query, key, value, *bias = arrays
            options = rule | {"relative_position_bias": bias[0]} if bias else rule
            return gna(query, key, value, **options, implementation=self.implementation)

        return prepared(case, direction, attention, case.neighborhood, case.layout)


class CudnnDense:
    """All tokens to all tokens: what a model without neighborhood attention runs."""

    name, is_ours, is_dense = "cuDNN dense", False, True

    def prepare(self, case: Case, direction: str, seconds_left: float) -> Queued:
        """As `rounds.Contestant`."""
        if jax.default_backend() != "gpu":
            raise Unavailable("needs a GPU")
        if case.has_bias:
            raise Unavailable("has no bias; its time without: the case without")
        attention = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
        everything = Neighborhood.of(1, window_size=WHOLE_GROUP)
        return prepared(case, direction, attention, everything, (case.tokens,))


class Tokamax:
    """tokamax's Hopper kernel, which skips keys outside one interval per query: neighborhood attention on one axis."""

    name, is_ours, is_dense = "tokamax", False, False

    def prepare(self, case: Case, direction: str, seconds_left: float) -> Queued:
        """As `rounds.Contestant`."""
        if len(case.layout) != 1:
            raise Unavailable("one axis only")
        try:
            from tokamax._src.ops.attention import api, base
        except ImportError as error:
            raise Unavailable("not installed") from error
        first, end = case.neighborhood.axes[0].keys(np.arange(case.tokens), case.tokens)
        bounds = [jnp.asarray(bound, jnp.int32)[None] for bound in (first, end)]
        mask = base.Mask(k_start=bounds[0], k_end=bounds[1])
        attention = functools.partial(api.IMPLEMENTATIONS["mosaic"], mask=mask)
        return prepared(case, direction, attention, case.neighborhood, case.layout)


def prepared(
    case: Case, direction: str, attention: Attention, rule: Neighborhood, layout: tuple[int, ...]
) -> Queued:
    """A compiled and compared `attention` of `[B, *layout, N, H]`: its forward, or its backward from saved residuals."""
    tokens = (case.batch, *layout)
    inputs = {
        name: x if name == BIAS else x.reshape(*tokens, *x.shape[-2:]) for name, x in arrays(case)
    }
    cotangent = inputs.pop("cotangent")
    sample = sample_tokens(layout, SAMPLED_QUERIES, SEED)
    operands = tuple(inputs.values())
    few, _ = sampled_cotangents(inputs, case.head_dim, sample, SEED)
    entries = np.unique(np.linspace(0, case.batch - 1, SAMPLED_ENTRIES).astype(int))
    parts = {name: x if name == BIAS else x[entries] for name, x in inputs.items()}
    # Of the other entries nothing is compared, and a bias' gradient sums over all.
    chosen = np.isin(np.arange(case.batch), entries).reshape(-1, *(1,) * (few.ndim - 1))
    few = jnp.where(jnp.broadcast_to(chosen, few.shape), few, jnp.zeros((), few.dtype))
    no_lse = jnp.zeros((len(entries), *layout, case.heads), jnp.float32)
    want = sampled_attention(parts, (few[entries], no_lse), rule, sample)
    if direction == FORWARD:
        forward = jax.jit(attention)
        out = _rows(forward(*operands)[entries], sample)
        return Queued(lambda: forward(*operands), {"out": relative_error(out, want["out"])})
    _, pull_back = jax.jit(lambda *operands: jax.vjp(attention, *operands))(*operands)
    backward = jax.jit(lambda pull_back, cotangent: pull_back(cotangent))
    got = dict(zip(inputs, backward(pull_back, few), strict=True))
    got = {name: x if name == BIAS else x[entries] for name, x in got.items()}
    got["query"] = _rows(got["query"], sample)
    errors = {f"d {name}": relative_error(x, want[f"d {name}"]) for name, x in got.items()}
    return Queued(lambda: backward(pull_back, cotangent), errors)


def _rows(array: jax.Array, sample: np.ndarray) -> jax.Array:
    """`[B, *layout, N, H]` at the sampled tokens: `[B, S, N, H]`."""
    flat = array.reshape(array.shape[0], -1, *array.shape[-2:])
    return flat[:, sample]


@functools.lru_cache(maxsize=1)
def arrays(case: Case) -> tuple[tuple[str, jax.Array], ...]:
    """Standard normal query, key, value and cotangent `[B, tokens, N, H]`, and the bias, the same for every contestant."""
    shape = (case.batch, case.tokens, case.heads, case.head_dim)
    shapes = dict.fromkeys(("query", "key", "value", "cotangent"), shape)
    if case.bias_shape is not None:
        shapes[BIAS] = case.bias_shape
    keys = jax.random.split(jax.random.key(SEED), len(shapes))
    return tuple(
        (name, jax.random.normal(key, shape, case.dtype))
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    )


def empty_call_seconds() -> float:
    """What queueing a call that computes nothing to speak of takes: times near it are those of the queue."""
    one = jax.numpy.zeros(8)
    call = jax.jit(lambda x: x + 1.0)
    queued = Queued(lambda: call(one), {})
    return min((queued.seconds_per_call(200) for _ in range(5)), default=math.nan)


def copied_bytes_per_second() -> float:
    """Bytes that a copy of a large array reads and writes in a second: what no kernel exceeds by much."""
    size = COPIED_BYTES.get(jax.default_backend(), 1 << 20)
    large = jnp.zeros(size // 4, jnp.float32)
    copy = jax.jit(lambda x: x + 1.0)
    queued = Queued(lambda: copy(large), {})
    return 2 * size / min(queued.seconds_per_call(20) for _ in range(5))
