"""merge_attentions against one softmax over all keys in float64 numpy, its gradients, and rows that nothing sees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_suite import check_array

import gna_jax

ROWS, DIM = (3, 5), 4


def parts_of(seed, sizes):
    """Scores and values per part, in float64."""
    rng = np.random.default_rng(seed)
    scores = [rng.standard_normal((*ROWS, size)) * 3 for size in sizes]
    values = [rng.standard_normal((size, DIM)) for size in sizes]
    return scores, values


def attention(scores, values):
    """One softmax, float64."""
    peak = scores.max(-1, keepdims=True)
    weights = np.exp(scores - peak)
    total = weights.sum(-1, keepdims=True)
    return (weights / total) @ values, (peak + np.log(total))[..., 0]


def attention_float32(scores, values):
    lse = jax.nn.logsumexp(scores, axis=-1)
    weights = jnp.exp(scores - lse[..., None])
    return jnp.einsum("xyk,kv->xyv", weights, values, precision="highest"), lse


@jax.jit
def merged_and_gradients(outputs, lses):
    """Merged out and lse, and the gradients where both cotangents are 1."""
    (out, lse), pull = jax.vjp(gna_jax.merge_attentions, outputs, lses)
    return out, lse, pull((jnp.ones_like(out), jnp.ones_like(lse)))


@pytest.mark.parametrize("sizes", [(4,), (3, 5), (1, 7, 2, 4)])
def test_values_equal_one_softmax(sizes):
    scores, values = parts_of(0, sizes)
    want = attention(np.concatenate(scores, -1), np.concatenate(values))
    outputs, lses = zip(*map(attention, scores, values), strict=True)
    got = gna_jax.merge_attentions(
        [x.astype(np.float32) for x in outputs], [x.astype(np.float32) for x in lses]
    )
    assert got[0].dtype == got[1].dtype == np.float32
    for array, expected in zip(got, want, strict=True):
        check_array(array, expected, 1e-6)
    with jax.enable_x64(True):
        for array, expected in zip(gna_jax.merge_attentions(outputs, lses), want, strict=True):
            check_array(array, expected, 1e-14)


def test_gradients_equal_those_of_one_softmax():
    scores, values = parts_of(1, (3, 5, 2))
    rng = np.random.default_rng(2)
    dout, dlse = rng.standard_normal((*ROWS, DIM)), rng.standard_normal(ROWS)

    def merged(scores, values):
        parts = [attention_float32(s, v) for s, v in zip(scores, values, strict=True)]
        return gna_jax.merge_attentions(*zip(*parts, strict=True))

    def at_once(scores, values):
        return attention_float32(jnp.concatenate(scores, -1), jnp.concatenate(values))

    with jax.enable_x64(True):
        pull = lambda f: jax.jit(lambda s, v: jax.vjp(f, s, v)[1]((dout, dlse)))(scores, values)
        got, want = pull(merged), pull(at_once)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            check_array(a, b, 1e-13)


def test_order_and_nesting_do_not_matter():
    scores, values = parts_of(3, (3, 5, 2))
    parts = [attention(s, v) for s, v in zip(scores, values, strict=True)]
    with jax.enable_x64(True):
        merge = gna_jax.merge_attentions
        flat = merge(*zip(*parts, strict=True))
        backwards = merge(*zip(*parts[::-1], strict=True))
        nested = merge(*zip(merge(*zip(*parts[:2], strict=True)), parts[2], strict=True))
        for other in (backwards, nested):
            for a, b in zip(other, flat, strict=True):
                check_array(a, b, 1e-14)


@pytest.mark.parametrize("garbage", [0.0, np.nan, np.inf])
def test_rows_that_no_part_sees(garbage):
    """out 0, lse -inf, gradients zero, and a part that sees nothing adds nothing, whatever its out holds."""
    rng = np.random.default_rng(4)
    outputs = rng.standard_normal((2, *ROWS, DIM)).astype(np.float32)
    lses = rng.standard_normal((2, *ROWS)).astype(np.float32)
    lses[:, 0], outputs[:, 0] = -np.inf, garbage  # no part
    lses[1, 1], outputs[1, 1] = -np.inf, garbage  # the first part only
    out, lse, (douts, dlses) = merged_and_gradients(list(outputs), list(lses))
    np.testing.assert_array_equal(out[0], 0)
    np.testing.assert_array_equal(lse[0], -np.inf)
    np.testing.assert_array_equal(out[1], outputs[0, 1])
    np.testing.assert_array_equal(lse[1], lses[0, 1])
    douts, dlses = np.stack(douts), np.stack(dlses)
    assert np.isfinite(douts).all() and np.isfinite(dlses).all()
    np.testing.assert_array_equal(douts[:, 0], 0)
    np.testing.assert_array_equal(dlses[:, 0], 0)
    np.testing.assert_array_equal(douts[:, 1], [np.ones_like(out[1]), np.zeros_like(out[1])])
    np.testing.assert_array_equal(dlses[1, 1], 0)
    np.testing.assert_allclose(dlses[0, 1], 1, rtol=1e-6)


def test_nan_in_what_is_seen_is_not_hidden():
    outputs = np.ones((2, 1, 2), np.float32)
    for lses in ([[np.nan], [0.0]], [[0.0], [np.nan]]):
        out, lse = gna_jax.merge_attentions(list(outputs), list(np.asarray(lses, np.float32)))
        assert np.isnan(out).all() and np.isnan(lse).all()


@pytest.mark.parametrize("lses", [(0.0, 300.0), (-1e30, 1e30), (3e38, -3e38), (-3e38, -3e38)])
def test_lses_far_apart(lses):
    """Weights underflow to 0 or are equal; nothing overflows, forward or backward."""
    outputs = [np.full((1, 2), x, np.float32) for x in (2.0, 4.0)]
    lse_arrays = [np.full((1,), x, np.float32) for x in lses]
    out, lse, (douts, dlses) = merged_and_gradients(outputs, lse_arrays)
    share = np.asarray([0.5, 0.5] if lses[0] == lses[1] else np.asarray(lses) == max(lses), float)
    np.testing.assert_allclose(out, np.full((1, 2), share @ [2.0, 4.0]), rtol=1e-6)
    np.testing.assert_allclose(lse, [max(lses)], rtol=1e-6)
    np.testing.assert_allclose(np.stack(douts)[:, 0, 0], share, rtol=1e-6)
    # d lse plus, for each of the two columns, share * (out of the part - merged out).
    expected = share + 2 * share * (np.asarray([2.0, 4.0]) - share @ [2.0, 4.0])
    np.testing.assert_allclose(np.stack(dlses)[:, 0], expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_outputs_keep_their_dtype(dtype):
    scores, values = parts_of(5, (6, 3))
    outputs, lses = zip(*map(attention, scores, values), strict=True)
    outputs = [x.astype(dtype) for x in outputs]
    out, lse = gna_jax.merge_attentions(outputs, [x.astype(np.float32) for x in lses])
    assert out.dtype == dtype and lse.dtype == np.float32
    shares = np.exp(np.stack(lses) - np.logaddexp(*lses))[..., None]
    want = (shares * np.stack(outputs).astype(np.float64)).sum(0)
    check_array(out, want, float(jnp.finfo(dtype).eps))


def test_of_real_attentions_under_jit_and_vmap():
    """Layouts of any rank are rows; merging maps over leading axes."""
    rng = np.random.default_rng(6)
    outputs = rng.standard_normal((2, 4, 3, 2, 5)).astype(np.float32)
    lses = rng.standard_normal((2, 4, 3, 2)).astype(np.float32)
    whole = gna_jax.merge_attentions(outputs, lses)
    mapped = jax.jit(jax.vmap(lambda o, l: gna_jax.merge_attentions(list(o), list(l)), in_axes=1))
    for a, b in zip(mapped(outputs, lses), whole, strict=True):
        check_array(a, b, 1e-6)


@pytest.mark.parametrize(
    ("outputs", "lses", "message"),
    [
        ([], [], "as many lses as outputs, at least one; got 0 outputs, 0 lses"),
        ([(2, 3)], [], "got 1 outputs, 0 lses"),
        ([(2, 3), (2, 4)], [(2,), (2,)], r"must share one shape .* got outputs \[\(2, 3\), \(2, 4\)\]"),
        ([(2, 3), (2, 3)], [(2,), (3,)], r"lses \[\(2,\), \(3,\)\]"),
        ([(2, 3)], [(2, 3)], "without V"),
    ],
)  # fmt: skip
def test_errors(outputs, lses, message):
    with pytest.raises(ValueError, match=message):
        gna_jax.merge_attentions([np.zeros(x) for x in outputs], [np.zeros(x) for x in lses])
