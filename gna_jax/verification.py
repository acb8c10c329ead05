"""Whether a kernel gives right results on this machine: fixed calls against float32 attention of a sample of their queries.

`gna-jax verify` runs the calls for one kernel, `gna-jax selfcheck` for all, each in a process of its own; where all are right both write
the stamp that lets the default take the kernel (`gna_jax.backends.verified`). The float32 side, `sampled_attention`, is dense over all
keys and shares nothing with the backends but the window rule; `benchmarks/attention.py` and the tests on a GPU compare with it too.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gna_jax.attention import gna
from gna_jax.device import DeviceSpec, resolve_device
from gna_jax.neighborhood import Neighborhood, by
from gna_jax.problem import FLOAT8

TOLERANCE = {"bfloat16": 1.5e-2, "float16": 2.5e-3}
"""Largest error of out and gradients, as a share of the array's largest entry: weights are rounded to 8 or 11 bits before a product."""
FLOAT8_TOLERANCE = 6e-2
"""The same of out where operands, and with them the weights, are float8, of 4 bits: twice what rounding them does."""
LSE_TOLERANCE = 2e-5
"""The same of lse: float32 sums of exact products. A single key too many among ten thousand shows."""

SAMPLE = 64
"""Queries compared per batch entry; their loss is the only one, so all keys' gradients are compared as well."""
SCORES_AT_A_TIME = 1 << 27


@dataclasses.dataclass(frozen=True)
class Trial:
    """One call of `gna` to compare, forward and backward. Names as `gna`'s arguments.

    Attributes:
      num_additional, additional_lengths: additional keys, and how many of them each sample sees.
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
    is_small: bool = False

    @property
    def has_gradients(self) -> bool:
        """Whether the call can be differentiated: not in float8."""
        return self.dtype != FLOAT8

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
        return f"{text}, {heads} heads x {dims}{more}"

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of `gna`'s arrays by name, the additional lengths apart."""
        tokens, more = (self.batch, *self.layout), (self.batch, self.num_additional)
        shapes = {
            "query": (*tokens, self.heads, self.head_dim),
            "key": (*tokens, self.kv_heads, self.head_dim),
            "value": (*tokens, self.kv_heads, self.value_dim),
        }
        if self.num_additional:
            shapes["additional_keys"] = (*more, self.kv_heads, self.head_dim)
            shapes["additional_values"] = (*more, self.kv_heads, self.value_dim)
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


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a trial.

    Attributes:
      errors: by array (`out`, `lse`, `d query`, ..), as a share of the largest entry.
      is_repeatable: whether a second run gave the same bits.
      failure: the error that ended it, else empty.
    """

    trial: Trial
    errors: dict[str, float]
    is_repeatable: bool = True
    failure: str = ""

    @property
    def is_right(self) -> bool:
        """Whether every array is within its tolerance (NaN is not), and the same twice."""
        within = (error <= tolerance(name, self.trial.dtype) for name, error in self.errors.items())
        return not self.failure and self.is_repeatable and bool(self.errors) and all(within)


def tolerance(name: str, dtype: str) -> float:
    """Largest error of an array of a trial."""
    if name == "lse":
        return LSE_TOLERANCE
    return FLOAT8_TOLERANCE if dtype == FLOAT8 else TOLERANCE[dtype]


def verify(
    implementation: str,
    trials: Sequence[Trial] = TRIALS,
    *,
    seed: int = 0,
    report: Callable[[Outcome], None] = lambda outcome: None,
) -> tuple[Outcome, ...]:
    """Run every trial with a named implementation on the default device.

    Args:
      implementation: a name of `gna`'s.
      trials: what to run.
      seed: of the data.
      report: called with every outcome as it comes.

    Raises:
      NotImplementedError: the implementation cannot run a trial on this device.
    """
    outcomes = []
    for number, trial in enumerate(trials):
        outcomes.append(attempt(trial, implementation, seed + number))
        report(outcomes[-1])
    return tuple(outcomes)


def one_line(error: BaseException) -> str:
    """An error as a report has it."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def attempt(trial: Trial, implementation: str, seed: int) -> Outcome:
    """One trial: two runs, compared with each other and with float32."""
    operands = trial.operands(seed)
    sample = sample_tokens(trial.layout, SAMPLE, seed)
    cotangents = sampled_cotangents(operands, trial.value_dim, sample, seed)
    static = {name: operands.pop(name) for name in ("additional_lengths",) if name in operands}
    rule = dataclasses.asdict(trial.neighborhood)

    @jax.jit
    def run(operands: Any, cotangents: Any) -> Any:
        def call(operands: Any) -> Any:
            arrays = operands | static
            return gna(**arrays, **rule, return_lse=True, implementation=implementation)

        if trial.has_gradients:
            outputs, pull_back = jax.vjp(call, operands)
            return outputs, pull_back(cotangents)[0]
        return call(operands), {}

    try:
        (out, lse), gradients = first = run(operands, cotangents)
        is_repeatable = same_bits(first, run(operands, cotangents))
    except NotImplementedError:
        raise
    except Exception as error:  # whatever ends a kernel is the answer, and belongs into the report
        return Outcome(trial, {}, failure=one_line(error))
    want = sampled_attention(operands | static, cotangents, trial.neighborhood, sample)
    space = math.prod(trial.layout)
    rows = lambda x: x.reshape(x.shape[0], space, *x.shape[1 + len(trial.layout) :])[:, sample]
    got = {"out": rows(out), "lse": rows(lse)}
    got |= {f"d {name}": gradient for name, gradient in gradients.items()}
    if trial.has_gradients:
        got["d query"] = rows(gradients["query"])
    return Outcome(
        trial,
        {name: relative_error(array, want[name], name == "lse") for name, array in got.items()},
        is_repeatable,
    )


def sample_tokens(layout: Sequence[int], number: int, seed: int) -> np.ndarray:
    """Row-major numbers of distinct tokens, increasing: the corners at both ends, and others at random."""
    tokens = math.prod(layout)
    inner = np.random.default_rng(seed).permutation(np.arange(1, tokens - 1))
    chosen = [0, tokens - 1, *inner[: max(0, number - 2)]]
    return np.unique(np.asarray(chosen, np.int64))


def sampled_cotangents(
    operands: dict[str, Any], value_dim: int, sample: np.ndarray, seed: int
) -> tuple[Float[Array, "B *space N V"], Float[Array, "B *space N"]]:
    """Of out and lse: standard normal at the sampled queries, zero elsewhere."""
    query = operands["query"]
    layout = query.shape[1:-2]
    chosen = np.zeros(math.prod(layout), bool)
    chosen[sample] = True
    where = jnp.asarray(chosen.reshape(1, *layout, 1))
    keys = jax.random.split(jax.random.key(seed + 1_000_000))
    wide = query.dtype if query.dtype.itemsize > 1 else jnp.bfloat16
    dout = jax.random.normal(keys[0], (*query.shape[:-1], value_dim), wide)
    dlse = jax.random.normal(keys[1], query.shape[:-1], jnp.float32)
    where = jnp.broadcast_to(where, dlse.shape)
    return jnp.where(where[..., None], dout, jnp.zeros((), wide)), jnp.where(where, dlse, 0.0)


def sampled_attention(
    operands: dict[str, Any],
    cotangents: tuple[Any, Any],
    neighborhood: Neighborhood,
    sample: np.ndarray,
    scale: float | None = None,
) -> dict[str, Array]:
    """Attention of the sampled queries to all keys they see in float32, and its gradients.

    Args:
      operands: by `gna`'s names, `query [B, *space, N, H]` and so on; additional keys as well.
      cotangents: of `out [B, *space, N, V]` and `lse [B, *space, N]`, zero but at the sampled queries.
      neighborhood: the rule.
      sample: numbers `[S]` of the queries.
      scale: default `H ** -0.5`.

    Returns:
      `out [B, S, N, V]`, `lse [B, S, N]`, `d query [B, S, N, H]`, and `d` of every other array, of its shape: all float32.
    """
    query, key, value = (operands[name] for name in ("query", "key", "value"))
    batch, *layout, heads, head_dim = query.shape
    space, more = math.prod(layout), operands.get("additional_keys")
    scale = head_dim**-0.5 if scale is None else scale
    num_additional = 0 if more is None else more.shape[1]
    lengths = operands.get("additional_lengths", [num_additional] * batch)
    flat = lambda array: array.reshape(batch, space, *array.shape[-2:])
    query, dout = flat(query), flat(cotangents[0])
    dlse = cotangents[1].reshape(batch, space, heads)
    key, value = flat(key), flat(value)
    if more is not None:
        key = jnp.concatenate([key, more], axis=1)
        value = jnp.concatenate([value, operands["additional_values"]], axis=1)
    at_a_time = max(1, SCORES_AT_A_TIME // (heads * (space + num_additional)))
    parts = np.array_split(sample, math.ceil(len(sample) / at_a_time))
    entries = []
    for entry in range(batch):
        rows, dkey, dvalue = [], 0.0, 0.0
        for part in parts:
            own, *theirs = _attend_rows(
                *(x[entry, part] for x in (query, dout, dlse)),
                key[entry],
                value[entry],
                jnp.asarray(_seen(neighborhood, layout, part, num_additional, int(lengths[entry]))),
                scale,
            )
            rows.append(own)
            dkey, dvalue = dkey + theirs[0], dvalue + theirs[1]
        joined = jax.tree.map(lambda *x: jnp.concatenate(x), *rows)
        entries.append((joined, dkey, dvalue))
    rows, dkey, dvalue = jax.tree.map(lambda *x: jnp.stack(x), *entries)
    want: dict[str, Array] = {"out": rows[0], "lse": rows[1], "d query": rows[2]}
    want["d key"] = dkey[:, :space].reshape(operands["key"].shape)
    want["d value"] = dvalue[:, :space].reshape(operands["value"].shape)
    if more is not None:
        want |= {"d additional_keys": dkey[:, space:], "d additional_values": dvalue[:, space:]}
    return want


def _seen(
    neighborhood: Neighborhood,
    layout: Sequence[int],
    queries: np.ndarray,
    num_additional: int,
    length: int,
) -> np.ndarray:
    """`[queries, keys]` bool, the additional keys last."""
    rank = len(layout)
    mask = np.ones((len(queries),) + (1,) * rank, bool)
    places = np.unravel_index(queries, tuple(layout))
    for number, (axis, size) in enumerate(zip(neighborhood.axes, layout, strict=True)):
        row = axis.sees(places[number][:, None], np.arange(size)[None], size)
        shape = [len(queries)] + [1] * rank
        shape[1 + number] = size
        mask = mask & row.reshape(shape)
    more = np.broadcast_to(np.arange(num_additional) < length, (len(queries), num_additional))
    return np.concatenate([mask.reshape(len(queries), -1), more], axis=1)


@jax.jit
def _attend_rows(
    query: Array, dout: Array, dlse: Array, key: Array, value: Array, seen: Array, scale: Any
) -> Any:
    """Queries `[S, N, H]` of one batch entry against keys `[T, K, H]`: `(out, lse, dquery), dkey, dvalue`, float32."""
    wide = [x.astype(jnp.float32) for x in (query, dout, key, value)]
    query, dout, key, value = wide
    rows, heads, kv_heads = query.shape[0], query.shape[1], key.shape[1]
    group = lambda x: x.reshape(rows, kv_heads, heads // kv_heads, -1)
    ungroup = lambda x: x.reshape(rows, heads, -1)
    query, dout, dlse = group(query), group(dout), group(dlse)
    product = lambda spec, a, b: jnp.einsum(spec, a, b, precision="highest")
    scores = product("skrh,tkh->skrt", query, key) * scale
    scores = jnp.where(seen[:, None, None, :], scores, -jnp.inf)
    lse = jax.nn.logsumexp(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - lse)
    out = product("skrt,tkv->skrv", weights, value)
    dweights = product("skrv,tkv->skrt", dout, value)
    delta = jnp.sum(weights * dweights, axis=-1, keepdims=True)
    dscores = weights * (dweights - delta + dlse)
    own = out, lse, product("skrt,tkh->skrh", dscores, key) * scale
    dkey = product("skrt,skrh->tkh", dscores, query) * scale
    dvalue = product("skrt,skrv->tkv", weights, dout)
    out, lse, dquery = (ungroup(x) for x in own)
    return (out, lse[..., 0], dquery), dkey, dvalue


def relative_error(got: Any, want: Any, is_lse: bool = False) -> float:
    """Largest difference over the largest wanted entry, for lse at least 1; NaN where either has one."""
    got, want = got.astype(jnp.float32), want.astype(jnp.float32)
    largest = jnp.max(jnp.abs(want))
    largest = jnp.maximum(largest, 1.0) if is_lse else largest
    return float(jnp.max(jnp.abs(got - want)) / largest)


def same_bits(first: Any, second: Any) -> bool:
    """Whether two trees of arrays are equal bit for bit, NaNs apart."""
    pairs = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    return all(bool(jnp.array_equal(a, b)) for a, b in pairs)


def this_gpu() -> DeviceSpec:
    """The default device.

    Raises:
      RuntimeError: where it is no NVIDIA GPU.
    """
    device = resolve_device(None)
    if device.platform != "cuda":
        raise RuntimeError(
            f"a kernel is verified by running it on an NVIDIA GPU; JAX's default device here is {device.kind}:"
            " install gna-jax[cuda13] on a machine with one, or pass --interpret h200, which runs the small calls in JAX's"
            " interpreter and writes no stamp"
        )
    return device
