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
from gna_jax.neighborhood import Neighborhood
from gna_jax.trials import FLOAT8_TRIALS, MORE_TRIALS, TRIALS, Trial, tolerance

OPTIONAL_TRIALS = FLOAT8_TRIALS + MORE_TRIALS
"""What a kernel need not take; where it does, it must be right in them as well."""
SAMPLE = 64
"""Queries compared per batch entry; their loss is the only one, so all keys' gradients are compared as well."""
SCORES_AT_A_TIME = 1 << 27


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
        allowed = lambda name: tolerance(name, self.trial.arithmetic)
        within = (error <= allowed(name) for name, error in self.errors.items())
        return not self.failure and self.is_repeatable and bool(self.errors) and all(within)


def trials_with(optional: Sequence[Trial], is_interpreted: bool) -> tuple[Trial, ...]:
    """All of `TRIALS`, and the optional ones that an implementation takes; interpreted, the small ones."""
    trials = (*TRIALS, *optional)
    return tuple(trial for trial in trials if trial.is_small or not is_interpreted)


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
    options: dict[str, Any] = dataclasses.asdict(trial.neighborhood)
    options["precision"] = trial.precision

    @jax.jit
    def run(operands: Any, cotangents: Any) -> Any:
        def call(operands: Any) -> Any:
            arrays = operands | static
            return gna(**arrays, **options, return_lse=True, implementation=implementation)

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
      operands: by `gna`'s names, `query [B, *space, N, H]` and so on; additional keys and the bias as well.
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
    bias = operands.get("relative_position_bias")
    at_a_time = max(1, SCORES_AT_A_TIME // (heads * (space + num_additional)))
    parts = np.array_split(sample, math.ceil(len(sample) / at_a_time))
    entries = []
    for entry in range(batch):
        rows, sums = [], None
        for part in parts:
            biased = None if bias is None else (bias, _bias_entries(neighborhood, layout, part))
            own, theirs = _attend_rows(
                *(x[entry, part] for x in (query, dout, dlse)),
                key[entry],
                value[entry],
                jnp.asarray(_seen(neighborhood, layout, part, num_additional, int(lengths[entry]))),
                scale,
                biased,
            )
            rows.append(own)
            sums = theirs if sums is None else jax.tree.map(jnp.add, sums, theirs)
        joined = jax.tree.map(lambda *x: jnp.concatenate(x), *rows)
        entries.append((joined, sums))
    rows, (dkey, dvalue, dbias) = jax.tree.map(lambda *x: jnp.stack(x), *entries)
    want: dict[str, Array] = {"out": rows[0], "lse": rows[1], "d query": rows[2]}
    want["d key"] = dkey[:, :space].reshape(operands["key"].shape)
    want["d value"] = dvalue[:, :space].reshape(operands["value"].shape)
    if more is not None:
        want |= {"d additional_keys": dkey[:, space:], "d additional_values": dvalue[:, space:]}
    if bias is not None:
        want["d relative_position_bias"] = dbias.sum(axis=0)
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


def _bias_entries(
    neighborhood: Neighborhood, layout: Sequence[int], queries: np.ndarray
) -> np.ndarray:
    """`[queries, keys]`: numbers of the pairs' bias entries in one head's table, any where they do not attend."""
    extents = [a.window_extent(n) for a, n in zip(neighborhood.axes, layout, strict=True)]
    places = [
        np.stack(np.unravel_index(tokens, tuple(layout)))
        for tokens in (queries, np.arange(math.prod(layout)))
    ]
    entries = []
    for i, j, dilation, extent in zip(*places, neighborhood.dilation, extents, strict=True):
        entry = (j[None, :] - i[:, None]) // dilation + extent - 1
        entries.append(np.clip(entry, 0, 2 * extent - 2))
    sizes = tuple(2 * extent - 1 for extent in extents)
    return np.asarray(np.ravel_multi_index(tuple(entries), sizes))


@jax.jit
def _attend_rows(
    query: Array,
    dout: Array,
    dlse: Array,
    key: Array,
    value: Array,
    seen: Array,
    scale: Any,
    biased: tuple[Array, Array] | None,
) -> Any:
    """Queries `[S, N, H]` of one batch entry against keys `[T, K, H]`: `(out, lse, dquery), (dkey, dvalue, dbias)`, float32.

    `biased`: a bias `[N, ..]`, and `[S, space]` numbers of the entry that a pair takes; additional keys, the last, take none.
    """
    wide = [x.astype(jnp.float32) for x in (query, dout, key, value)]
    query, dout, key, value = wide
    rows, heads, kv_heads = query.shape[0], query.shape[1], key.shape[1]
    group = lambda x: x.reshape(rows, kv_heads, heads // kv_heads, -1)
    ungroup = lambda x: x.reshape(rows, heads, -1)
    query, dout, dlse = group(query), group(dout), group(dlse)
    product = lambda spec, a, b: jnp.einsum(spec, a, b, precision="highest")
    scores = product("skrh,tkh->skrt", query, key) * scale
    if biased is not None:
        table = biased[0].astype(jnp.float32).reshape(kv_heads, heads // kv_heads, -1)
        space = biased[1].shape[1]
        scores = scores.at[..., :space].add(jnp.moveaxis(table[:, :, biased[1]], 2, 0))
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
    dbias = None
    if biased is not None:
        pairs = jnp.moveaxis(dscores[..., : biased[1].shape[1]], 0, 2)
        zeros = jnp.zeros((kv_heads, heads // kv_heads, biased[0][0].size), jnp.float32)
        dbias = zeros.at[:, :, biased[1]].add(pairs).reshape(biased[0].shape)
    return (out, lse[..., 0], dquery), (dkey, dvalue, dbias)


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
