"""The Triton kernels' values and gradients in Triton's interpreter (TRITON_INTERPRET=1), through `gna`, against the float64 oracle."""

import dataclasses

import numpy as np
import pytest
from attention_suite import (
    BIAS,
    case_1d,
    case_of,
    check_array,
    check_equal,
    oracle,
    same_bits,
)
from triton_calls import (
    BFLOAT16,
    CHOSEN,
    FLOAT16,
    HEAD_DIMS,
    LINE,
    ONE,
    PLANE,
    TOLERANCE,
    VOLUME,
    check,
    draw,
    interpret,
)
from triton_suite import INTERPRETED, problem_of, quick_interpreter

from gna_jax.backends.triton import calls
from gna_jax.problem import Operands
from gna_jax.tiling import Tiles

pytestmark = pytest.mark.triton


@pytest.mark.parametrize("seed", range(12))
def test_random_cases(seed):
    """Every rank in turn."""
    check(draw(seed, 180))


@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16], ids=str)
@pytest.mark.parametrize("seed", range(100, 103))
def test_random_cases_of_16_bits(seed, dtype):
    check(draw(seed, 120), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.dtype(np.float32), FLOAT16, BFLOAT16], ids=str)
@pytest.mark.parametrize("seed", range(1000, 1070))
def test_many_random_cases(seed, dtype):
    check(draw(seed, 400, HEAD_DIMS), dtype)


@pytest.mark.parametrize("number", range(len(HEAD_DIMS)))
def test_head_dims(number):
    """Every head dim beside another value dim, over the ranks; those that are no power of two have padded columns."""
    shapes = [
        case_1d(21, 5, stride=2, tiles=LINE),
        case_of((5, 4), (3, 4), is_causal=(False, True), tiles=PLANE),
        case_of((3, 2, 5), (2, 2, 3), tiles=VOLUME),
    ]
    dims = {"head_dim": HEAD_DIMS[number], "value_dim": HEAD_DIMS[::-1][number]}
    case = dataclasses.replace(shapes[number % 3], **dims, batch=1)
    check(case, (np.float32, FLOAT16)[number % 2])


@pytest.mark.parametrize("name", CHOSEN)
def test_chosen_cases(name):
    check(CHOSEN[name])


def test_clean_and_masked_tiles_of_large_tiles():
    """128 keys at a time: a window of several such tiles, the first and last of which are masked."""
    tiles = Tiles((32,), (128,), (128,), (64,))
    check(case_1d(700, 420, stride=7, tiles=tiles, batch=1, head_dim=64, value_dim=32))


@pytest.mark.parametrize("precision", [None, "default", "high", "highest"])
def test_precision_is_taken(precision):
    """The interpreter's products of float32 are exact whatever Triton is asked for."""
    check(case_1d(20, 5, tiles=LINE, **ONE), precision=precision)


def test_scores_that_grow_from_tile_to_tile():
    """What counts as a row's largest moves with every tile; scores of hundreds."""
    case = case_1d(90, 80, tiles=LINE, scale=20.0, **ONE)
    arrays, cotangents = case.inputs(np.float32), case.cotangents(np.float32)
    growth = np.linspace(0.01, 1, 90, dtype=np.float32)[None, :, None, None]
    arrays["key"] = arrays["key"] * growth
    got, want = interpret(case, arrays, cotangents), oracle(case, arrays, cotangents)
    check_array(got.lse, want.lse, 1e-6)
    check_array(got.out, want.out, 2e-4, "scores are rounded to 1e-7 of hundreds")


def test_bias_of_another_dtype():
    """A float32 table beside float16 tokens keeps its dtype and its gradient's."""
    case = case_1d(20, 5, has_bias=True, tiles=LINE, **ONE)
    arrays, cotangents = case.inputs(FLOAT16), case.cotangents(FLOAT16)
    arrays[BIAS] = case.inputs(np.float32)[BIAS]
    got = interpret(case, arrays, cotangents).gradients[BIAS]
    want = oracle(case, arrays, cotangents).gradients[BIAS]
    assert got.dtype == np.float32
    check_array(got, want, TOLERANCE[FLOAT16])


@pytest.mark.parametrize("is_lse", [False, True], ids=["out alone", "lse alone"])
def test_one_cotangent(is_lse):
    case = case_1d(20, 5, has_bias=True, num_additional=3, tiles=LINE, batch=1)
    arrays, (dout, dlse) = case.inputs(np.float32), case.cotangents(np.float32)
    cotangents = (np.zeros_like(dout), dlse) if is_lse else (dout, np.zeros_like(dlse))
    got = interpret(case, arrays, cotangents)
    want = oracle(case, arrays, cotangents)
    for name, gradient in got.gradients.items():
        check_array(gradient, want.gradients[name], TOLERANCE[np.dtype(np.float32)], name)
    if is_lse:
        assert not got.gradients["value"].any() and got.gradients["query"].any()


def test_twice_the_same_bits():
    case = draw(3, 160)
    arrays, cotangents = case.inputs(np.float32), case.cotangents(np.float32)
    check_equal(interpret(case, arrays, cotangents), interpret(case, arrays, cotangents))


def test_what_no_window_joins_does_not_matter():
    """Finite changes of keys that a query does not see leave the bits of its row alone, up to the largest number."""
    case = case_of((5, 7), (3, 4), is_causal=(False, True), tiles=PLANE, has_bias=True, **ONE)
    arrays, (dout, dlse) = case.inputs(np.float32), case.cotangents(np.float32)
    place = (2, 5)
    seen = case.neighborhood.mask(case.layout)[place]
    own = np.zeros(case.layout, bool)
    own[place] = True
    only = lambda x: np.where(own.reshape(1, *case.layout, *(1,) * (x.ndim - 3)), x, 0)
    cotangents = only(dout).astype(np.float32), only(dlse).astype(np.float32)
    before = interpret(case, arrays, cotangents)
    rng = np.random.default_rng(0)
    hidden = arrays.copy()
    for name in ("key", "value"):
        noise = rng.uniform(-3e37, 3e37, arrays[name].shape).astype(np.float32)
        hidden[name] = np.where(seen[None, ..., None, None], arrays[name], noise)
    after = interpret(case, hidden, cotangents)
    where = (slice(None), *place)
    for name in ("out", "lse", "d query"):
        same_bits(after.named()[name][where], before.named()[name][where], name)
    assert not np.array_equal(after.out, before.out), "something else must change"
    for name in ("key", "value"):
        gradients = (x.gradients[name][:, seen] for x in (after, before))
        same_bits(*gradients, f"d {name}")


def test_additional_rows_past_their_length():
    """NaN there is never used, and its gradients are exactly zero."""
    case = case_1d(18, 5, num_additional=20, lengths=(0, 17), tiles=LINE, heads_per_kv=1)
    arrays, cotangents = case.inputs(np.float32), case.cotangents(np.float32)
    hidden = (np.arange(20)[None] >= np.asarray(case.lengths)[:, None])[:, :, None, None]
    names = ("additional_keys", "additional_values")
    with_ = lambda x: arrays | {n: np.where(hidden, np.float32(x), arrays[n]) for n in names}
    clean, dirty = (interpret(case, with_(x), cotangents) for x in (0.0, np.nan))
    check_equal(dirty, clean)
    for name in names:
        gradient = dirty.gradients[name]
        assert (gradient[np.broadcast_to(hidden, gradient.shape)] == 0).all()
        assert (gradient[1, :17] != 0).any()


def test_memory_that_no_tile_may_read_never_shows():
    """The tile of tokens 48 to 63 sees 46 to 65: NaN right before and after, in keys and values for out and dQ, in queries for dK and dV."""
    problem = problem_of(
        (96,), {"window_size": 5}, 16, np.float32, heads=(1, 1), device=INTERPRETED
    )
    rng = np.random.default_rng(0)
    query, key, value, cotangent = rng.standard_normal((4, 2, 96, 1, 16)).astype(np.float32)
    delta = rng.standard_normal((2, 96, 1)).astype(np.float32)

    def dirty(array):
        array = array.copy()
        array[:, :46] = array[:, 66:] = np.nan
        return array

    def results(query, key, value, saved, visiting):
        with quick_interpreter():
            _, lse = calls.forward(problem, Operands(*clean), LINE)
            arguments = problem, Operands(query, key, value), LINE
            rows = calls.Saved(saved[0], visiting(np.asarray(lse)), saved[1])
            got = calls.forward(*arguments)[0], calls.query_gradient(*arguments, rows)
            got = (*got, *calls.key_gradients(*arguments, rows))
            return [np.asarray(array)[:, 48:64] for array in got]

    clean = query, key, value
    want = results(*clean, (cotangent, delta), lambda x: x)
    of_keys = results(query, dirty(key), dirty(value), (cotangent, delta), lambda x: x)
    np.testing.assert_equal(of_keys[:2], want[:2])
    of_queries = results(dirty(query), key, value, (dirty(cotangent), dirty(delta)), dirty)
    np.testing.assert_equal(of_queries[2:], want[2:])
