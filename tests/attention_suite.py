"""Shared by the tests of the attention core: seeded cases, a float64 oracle in numpy, and how results are compared.

The oracle takes who-sees-whom from `Neighborhood.mask` (proved in `neighborhood_test.py`); everything else, gradients
included, is written out here in numpy float64 and shares no arithmetic with the package.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gna_jax import gna
from gna_jax.backends.xla.tile_classes import build_classes
from gna_jax.device import KNOWN_DEVICES
from gna_jax.neighborhood import Neighborhood
from gna_jax.problem import Operands, Problem, describe
from gna_jax.tiling import Tiles

LENGTHS = "additional_lengths"
BIAS = "relative_position_bias"
Arrays = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Case:
    """One call: its geometry, shapes, options, and the seed of its data."""

    layout: tuple[int, ...]
    window_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    is_causal: tuple[bool, ...]
    _: dataclasses.KW_ONLY
    batch: int = 2
    kv_heads: int = 1
    heads_per_kv: int = 2
    head_dim: int = 8
    value_dim: int = 8
    num_additional: int = 0
    lengths: tuple[int, ...] | None = None
    has_bias: bool = False
    scale: float | None = None
    tiles: Tiles | None = None
    seed: int = 0

    def __str__(self) -> str:
        """Short, for names of tests."""
        text = "x".join(map(str, self.layout)) + "-w" + "x".join(map(str, self.window_size))
        for letter, sizes in (("s", self.stride), ("d", self.dilation)):
            text += "" if set(sizes) == {1} else f"-{letter}" + "x".join(map(str, sizes))
        text += "-causal" if any(self.is_causal) else ""
        text += f"-{self.num_additional}more" if self.num_additional else ""
        return text + ("-bias" if self.has_bias else "")

    @property
    def neighborhood(self) -> Neighborhood:
        return Neighborhood(self.window_size, self.stride, self.dilation, self.is_causal)

    @property
    def extents(self) -> tuple[int, ...]:
        """Keys of a window per axis, -1 written out."""
        return tuple(
            -(-length // d) if w == -1 else w
            for length, w, d in zip(self.layout, self.window_size, self.dilation, strict=True)
        )

    @property
    def query_heads(self) -> int:
        return self.kv_heads * self.heads_per_kv

    @property
    def geometry(self) -> dict[str, Any]:
        """The static arguments of `gna` that belong to the case."""
        return {
            "window_size": self.window_size,
            "stride": self.stride,
            "dilation": self.dilation,
            "is_causal": self.is_causal,
            "scale": self.scale,
        }

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the floating operands by `gna`'s argument names."""
        space, kv = (self.batch, *self.layout), self.kv_heads
        shapes = {
            "query": (*space, self.query_heads, self.head_dim),
            "key": (*space, kv, self.head_dim),
            "value": (*space, kv, self.value_dim),
        }
        if self.num_additional:
            more = (self.batch, self.num_additional, kv)
            shapes["additional_keys"] = (*more, self.head_dim)
            shapes["additional_values"] = (*more, self.value_dim)
        if self.has_bias:
            shapes[BIAS] = (self.query_heads, *(2 * w - 1 for w in self.extents))
        return shapes

    def inputs(self, dtype: Any) -> Arrays:
        """Standard normal operands in `dtype`, and the additional lengths."""
        rng = np.random.default_rng(self.seed)
        arrays: Arrays = {
            name: rng.standard_normal(shape).astype(dtype) for name, shape in self.shapes().items()
        }
        if self.lengths is not None:
            arrays[LENGTHS] = np.asarray(self.lengths, np.int32)
        return arrays

    def cotangents(self, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
        """Of out, in `dtype`, and of lse, in its accumulator."""
        rng = np.random.default_rng(self.seed + 1)
        rows = (self.batch, *self.layout, self.query_heads)
        dout = rng.standard_normal((*rows, self.value_dim)).astype(dtype)
        return dout, rng.standard_normal(rows).astype(accumulator(dtype))

    def problem(self, dtype: Any = np.float32) -> Problem:
        arrays = self.inputs(dtype)
        operands = Operands(
            arrays["query"],
            arrays["key"],
            arrays["value"],
            None,
            None,
            arrays.get("additional_keys"),
            arrays.get("additional_values"),
            arrays.get(LENGTHS),
            arrays.get(BIAS),
        )
        device = KNOWN_DEVICES["cpu"]
        return describe(operands, self.neighborhood, scale=None, precision=None, device=device)


def stacked(
    case: Case, names: Sequence[str], size: int, axis: int = 0
) -> tuple[Arrays, list[Arrays]]:
    """A case's inputs whose `names` carry a mapped axis of `size` at `axis`; and the inputs of each entry."""
    rng = np.random.default_rng(11)
    arrays, entries = case.inputs(np.float32), []
    for _ in range(size):
        entry = dict(arrays)
        for name in names:
            if name == LENGTHS:
                entry[name] = rng.integers(0, case.num_additional + 1, case.batch).astype(np.int32)
            else:
                entry[name] = rng.standard_normal(arrays[name].shape).astype(np.float32)
        entries.append(entry)
    joined = arrays | {name: np.stack([e[name] for e in entries], axis) for name in names}
    return joined, entries


def accumulator(dtype: Any) -> Any:
    return np.float64 if np.dtype(dtype) == np.float64 else np.float32


def case_1d(length: int, window: int, stride: int = 1, dilation: int = 1, **options: Any) -> Case:
    """A case of one axis, with `is_causal` among the options."""
    is_causal = (options.pop("is_causal", False),)
    return Case((length,), (window,), (stride,), (dilation,), is_causal, **options)


def case_of(layout: tuple[int, ...], window_size: tuple[int, ...], **options: Any) -> Case:
    """A case of any rank; stride, dilation and is_causal default to plain sliding windows."""
    rank = len(layout)
    stride, dilation = options.pop("stride", (1,) * rank), options.pop("dilation", (1,) * rank)
    is_causal = options.pop("is_causal", (False,) * rank)
    return Case(layout, window_size, stride, dilation, is_causal, **options)


_LONGEST = {1: 64, 2: 13, 3: 7}
_HEAD_DIMS = (1, 2, 3, 4, 7, 8, 12, 16, 24, 32)
_SCALES = (None, None, None, 1.0, -0.3, 0.0)


def random_case(seed: int, *, max_tokens: int = 200, max_loops: int = 4) -> Case:
    """A random small call of any feature mix. `max_loops` bounds the loops of explicit tiles: compile time."""
    rng = np.random.default_rng([20260, seed])
    while True:
        case = _draw(rng, seed)
        if math.prod(case.layout) <= max_tokens and _num_loops(case) <= max_loops:
            return case


def _draw(rng: np.random.Generator, seed: int) -> Case:
    def one_of(*options: Any) -> Any:
        return options[rng.integers(len(options))]

    def up_to(limit: int) -> int:
        return int(rng.integers(1, limit + 1))

    rank = up_to(3)
    layout = tuple(1 + up_to(_LONGEST[rank] - 1) for _ in range(rank))
    dilation = tuple(one_of(1, up_to(max(1, length // 2))) for length in layout)
    group = [length // d for length, d in zip(layout, dilation, strict=True)]
    window = tuple(one_of(up_to(n), up_to(n), up_to(n), up_to(min(n, 5)), 1, -1) for n in group)
    limit = [n if w == -1 else w for n, w in zip(group, window, strict=True)]
    has_additional, rows = bool(rng.integers(2)), int(rng.integers(1, 5))
    batch = up_to(2)
    return Case(
        layout,
        window,
        tuple(one_of(1, 1, up_to(w), w) for w in limit),
        dilation,
        tuple(bool(rng.integers(3) == 0) for _ in layout),
        batch=batch,
        kv_heads=up_to(3),
        heads_per_kv=up_to(3),
        head_dim=one_of(*_HEAD_DIMS),
        value_dim=one_of(*_HEAD_DIMS),
        num_additional=rows if has_additional else 0,
        lengths=one_of(None, *(2 * [tuple(int(n) for n in rng.integers(0, rows + 1, batch))]))
        if has_additional
        else None,
        has_bias=bool(rng.integers(5) < 2),
        scale=one_of(*_SCALES),
        tiles=one_of(None, _random_tiles(rng, layout)),
        seed=seed,
    )


def _random_tiles(rng: np.random.Generator, layout: tuple[int, ...]) -> Tiles:
    shapes = [tuple(int(rng.integers(1, min(n, 9) + 1)) for n in layout) for _ in range(2)]
    return Tiles(q=shapes[0], kv=None, backward_q=shapes[1] if rng.integers(2) else None)


def _num_loops(case: Case) -> int:
    if case.tiles is None:
        return 1
    problem = case.problem()
    shapes = [case.tiles.q, case.tiles.backward_q or case.tiles.q]
    tiles = [tuple((size, True) for size in shape) for shape in shapes]
    return max(math.prod(map(len, build_classes(problem, shape))) for shape in tiles)


@dataclasses.dataclass(frozen=True)
class Results:
    """out, lse, and gradients by argument name."""

    out: Any
    lse: Any
    gradients: dict[str, Any]

    def named(self) -> dict[str, np.ndarray]:
        """Everything by name, gradients as `d key`."""
        arrays = {"out": self.out, "lse": self.lse}
        arrays |= {f"d {name}": array for name, array in self.gradients.items()}
        return {name: np.asarray(array) for name, array in arrays.items()}


jax.tree_util.register_dataclass(Results, ["out", "lse", "gradients"], [])


def attend(case: Case, arrays: Arrays, **options: Any) -> tuple[jax.Array, jax.Array]:
    """`gna` on a case: out and lse."""
    options = {"precision": "highest", "tiles": case.tiles, "implementation": "xla"} | options
    return gna(**arrays, **case.geometry, return_lse=True, **options)


def differentiate(function: Any, arrays: Arrays, cotangents: Any) -> Results:
    """Out, lse and the gradients of every floating array of `function(arrays) -> (out, lse)`."""
    static = {name: arrays[name] for name in (LENGTHS,) if name in arrays}
    floating = {name: array for name, array in arrays.items() if name not in static}
    (out, lse), pull = jax.vjp(lambda floating: function({**floating, **static}), floating)
    return Results(out, lse, pull(cotangents)[0])


def compiled(case: Case, dtype: Any = np.float32, **options: Any) -> Any:
    """One program for `case`: `run(arrays, (dout, dlse)) -> Results`."""

    def run(arrays: Arrays, cotangents: Any) -> Results:
        return differentiate(lambda a: attend(case, a, **options), arrays, cotangents)

    return jax.jit(run).lower(case.inputs(dtype), case.cotangents(dtype)).compile()


def oracle(case: Case, arrays: Arrays, cotangents: tuple[Any, Any]) -> Results:
    """`attend` and its gradients in float64 numpy."""
    mask, index = pairs_of(case, places(case.layout), places(case.layout))
    return dense(arrays, cotangents, mask, index, case.scale)


def places(layout: tuple[int, ...], origin: Any = None) -> np.ndarray:
    """`[rank, tokens]`: positions in the volume of a slab's tokens, row-major."""
    places = np.indices(layout).reshape(len(layout), -1)
    return places if origin is None else places + np.asarray(origin)[:, None]


def pairs_of(
    case: Case, queries: np.ndarray, keys: np.ndarray
) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """For tokens at these places of the volume, in or out of it: who sees whom, and each pair's bias entry.

    Returns `[queries, keys]` bool, and per axis `[queries, keys]` ints, clipped where the pair does not attend.
    """
    whole = case.neighborhood.mask(case.layout).reshape(math.prod(case.layout), -1)
    size = np.asarray(case.layout)[:, None]
    inside = [((x >= 0) & (x < size)).all(0) for x in (queries, keys)]
    flat = [
        np.ravel_multi_index(tuple(np.clip(x, 0, size - 1)), case.layout) for x in (queries, keys)
    ]
    mask = whole[np.ix_(*flat)] & inside[0][:, None] & inside[1][None, :]
    index = []
    for i, j, d, w in zip(queries, keys, case.dilation, case.extents, strict=True):
        offset = j[None, :] // d - i[:, None] // d + w - 1
        index.append(np.clip(offset, 0, 2 * w - 2))
    return mask, tuple(index)


def dense(
    arrays: Arrays,
    cotangents: tuple[Any, Any],
    mask: np.ndarray,
    index: tuple[np.ndarray, ...],
    scale: float | None,
) -> Results:
    """Attention over `mask [queries, keys]` in float64 with closed-form gradients; a row without a key gives 0, -inf.

    `arrays` and `cotangents` as of `gna`, any layout; `index` says which bias entry a pair uses.
    """
    query, key, value = (_flat(arrays[name]) for name in ("query", "key", "value"))
    batch, queries, heads, dim = query.shape
    kv_heads, scale = key.shape[2], dim**-0.5 if scale is None else scale
    keys = key.shape[1]
    seen = np.broadcast_to(mask, (batch, *mask.shape))
    if "additional_keys" in arrays:
        more = np.asarray(arrays["additional_keys"], np.float64)
        lengths = np.asarray(arrays.get(LENGTHS, [more.shape[1]] * batch))
        visible = np.arange(more.shape[1])[None] < lengths[:, None]
        more_values = np.asarray(arrays["additional_values"], np.float64)
        key, value = np.concatenate([key, more], 1), np.concatenate([value, more_values], 1)
        visible = np.broadcast_to(visible[:, None], (batch, queries, more.shape[1]))
        seen = np.concatenate([seen, visible], -1)
    spread = [np.repeat(x, heads // kv_heads, axis=2) for x in (key, value)]
    scores = np.einsum("bqnh,bsnh->bnqs", query, spread[0]) * scale
    if BIAS in arrays:
        bias = np.asarray(arrays[BIAS], np.float64)
        scores[..., :keys] += bias[(slice(None), *index)][None]
    scores = np.where(seen[:, None], scores, -np.inf)
    peak = scores.max(-1, keepdims=True)
    peak = np.where(np.isfinite(peak), peak, 0.0)
    exp = np.exp(scores - peak)
    total = exp.sum(-1, keepdims=True)
    weights = exp / np.where(total == 0, 1, total)
    with np.errstate(divide="ignore"):
        lse = (peak + np.log(total))[..., 0]
    out = np.einsum("bnqs,bsnv->bqnv", weights, spread[1])

    dout, dlse = (np.asarray(x, np.float64) for x in cotangents)
    dout, dlse = dout.reshape(out.shape), dlse.reshape(batch, queries, heads)
    dweights = np.einsum("bqnv,bsnv->bnqs", dout, spread[1])
    mean = (weights * dweights).sum(-1, keepdims=True)
    dscores = weights * (dweights - mean + dlse.transpose(0, 2, 1)[..., None])
    dkey = np.einsum("bnqs,bqnh->bsnh", dscores, query) * scale
    dvalue = np.einsum("bnqs,bqnv->bsnv", weights, dout)
    dkey, dvalue = (
        x.reshape(*x.shape[:2], kv_heads, heads // kv_heads, -1).sum(3) for x in (dkey, dvalue)
    )
    gradients = {
        "query": np.einsum("bnqs,bsnh->bqnh", dscores, spread[0]) * scale,
        "key": dkey[:, :keys],
        "value": dvalue[:, :keys],
        "additional_keys": dkey[:, keys:],
        "additional_values": dvalue[:, keys:],
    }
    if BIAS in arrays:
        gradients[BIAS] = np.zeros(bias.shape)
        pairs = dscores[..., :keys].sum(0)
        np.add.at(gradients[BIAS], (slice(None), *index), np.where(mask[None], pairs, 0.0))
    rows = arrays["query"].shape[:-1]
    return Results(
        out.reshape(*rows, -1),
        lse.transpose(0, 2, 1).reshape(rows),
        {name: gradients[name].reshape(x.shape) for name, x in arrays.items() if name in gradients},
    )


def _flat(tokens: Any) -> np.ndarray:
    tokens = np.asarray(tokens, np.float64)
    return tokens.reshape(tokens.shape[0], -1, *tokens.shape[-2:])


def dense_peer(case: Case, arrays: Arrays) -> tuple[jax.Array, jax.Array]:
    """Dense attention as one writes it in the inputs' dtype: products accumulate in float32, probabilities are cast.

    The yardstick of low precision; JAX differentiates it.
    """
    query, key, value = arrays["query"], arrays["key"], arrays["value"]
    tokens, batch = math.prod(case.layout), case.batch
    mask, index = pairs_of(case, places(case.layout), places(case.layout))
    query = query.reshape(batch, tokens, case.kv_heads, case.heads_per_kv, -1)
    key, value = (x.reshape(batch, tokens, *x.shape[-2:]) for x in (key, value))
    scale = case.head_dim**-0.5 if case.scale is None else case.scale

    def product(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.einsum(spec, a, b, precision="highest", preferred_element_type=jnp.float32)

    scores = product("bqkrh,bskh->bkrqs", query, key) * scale
    if case.has_bias:
        bias = arrays[BIAS].astype(jnp.float32)[(slice(None), *index)]
        scores = scores + bias.reshape(1, *scores.shape[1:])
    scores = jnp.where(mask[None, None, None], scores, -jnp.inf)
    if case.num_additional:
        more = product("bqkrh,bskh->bkrqs", query, arrays["additional_keys"]) * scale
        if case.lengths is not None:
            visible = np.arange(case.num_additional)[None] < np.asarray(case.lengths)[:, None]
            more = jnp.where(visible[:, None, None, None], more, -jnp.inf)
        scores = jnp.concatenate([scores, more], axis=-1)
        value = jnp.concatenate([value, arrays["additional_values"]], axis=1)
    lse = jax.nn.logsumexp(scores, axis=-1)
    weights = jnp.exp(scores - lse[..., None]).astype(value.dtype)
    out = product("bkrqs,bskh->bqkrh", weights, value).astype(value.dtype)
    rows = (batch, *case.layout, case.query_heads)
    return out.reshape(*rows, -1), lse.transpose(0, 3, 1, 2).reshape(rows)


def check_close(got: Results, want: Results, tolerance: float, what: Any = "") -> None:
    """Every array within `tolerance * max(1, max|want|)`, infinities and NaNs where `want` has them."""
    got_arrays, want_arrays = got.named(), want.named()
    assert got_arrays.keys() == want_arrays.keys()
    for name, array in got_arrays.items():
        check_array(array, want_arrays[name], tolerance, f"{name} {what}")


def check_array(got: Any, want: Any, tolerance: float, what: Any = "") -> None:
    """One array within `tolerance * max(1, max|want|)` of `want`."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, what
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(want), err_msg=str(what))
    np.testing.assert_array_equal(got[~np.isfinite(got)], want[~np.isfinite(want)], str(what))
    error, largest = max_error(got, want)
    limit = tolerance * max(1.0, largest)
    place = np.unravel_index(np.argmax(_difference(got, want)), want.shape)
    assert error <= limit, (
        f"{what}: error {error:.3g} > {limit:.3g} at {place}: got {got[place]}, want {want[place]}"
    )


def max_error(got: Any, want: Any) -> tuple[float, float]:
    """Largest absolute difference, and largest |want|, over finite entries."""
    want = np.asarray(want, np.float64)
    finite = np.where(np.isfinite(want), want, 0.0)
    return float(_difference(got, want).max()), float(np.abs(finite).max())


def _difference(got: Any, want: Any) -> np.ndarray:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    finite = np.isfinite(want)
    return np.abs(np.where(finite, got, 0.0) - np.where(finite, want, 0.0))


def check_equal(got: Results, want: Results, what: Any = "") -> None:
    """Bit-equal."""
    for name, array in got.named().items():
        same_bits(array, want.named()[name], f"{name} {what}")


def same_bits(got: Any, want: Any, what: Any = "") -> None:
    """Equal bit for bit, apart from the sign of zero; NaN equals nothing."""
    got, want = np.asarray(got), np.asarray(want)
    assert got.dtype == want.dtype and got.shape == want.shape, what
    wide = np.float64 if got.dtype.itemsize == 8 else np.float32  # numpy compares bfloat16 slowly
    differ = ~(got.astype(wide) == want.astype(wide))
    assert not differ.any(), f"{what}: {differ.sum()} of {differ.size} entries differ"
