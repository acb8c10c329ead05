"""Joint attention of image and text against dense attention under a mask."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from gna_jax import Neighborhood, Tiles
from gna_jax.models import joint
from gna_jax.models.joint import gna_joint

LENGTHS = np.array([3, 0, 5], np.int32)


def _operands(seed, layout, text=5, heads=4, kv_heads=2, head_dim=8, value_dim=6):
    rng = np.random.default_rng(seed)
    kinds = ((heads, head_dim), (kv_heads, head_dim), (kv_heads, value_dim))
    shapes = [(len(LENGTHS), *tokens, *kind) for tokens in (layout, (text,)) for kind in kinds]
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def _joint(*operands, **options):
    static = {k: v for k, v in options.items() if k != "text_lengths"}

    def run(operands, lengths):
        return gna_joint(*operands, text_lengths=lengths, **static)

    return jax.jit(run)(operands, options.get("text_lengths"))


def _masked(operands, mask, scale=None, xp=np):
    """Dense attention over `[image, text]` under `mask [B, L + S, L + S]`, split again; with lse. float64 in numpy."""
    if xp is np:
        operands = [np.asarray(x, np.float64) for x in operands]
    image, text = operands[:3], operands[3:]
    batch, *layout, heads, head_dim = image[0].shape
    flat = [x.reshape(batch, -1, *x.shape[-2:]) for x in image]
    q, k, v = (xp.concatenate(pair, axis=1) for pair in zip(flat, text, strict=True))
    k, v = (xp.repeat(x, heads // x.shape[2], axis=2) for x in (k, v))
    scores = xp.einsum("bqnh,bknh->bnqk", q, k) * (head_dim**-0.5 if scale is None else scale)
    weights = xp.where(mask[:, None], xp.exp(scores), 0)
    total = weights.sum(axis=-1)
    seen = mask.any(axis=-1)[:, None]
    lse = xp.where(seen, xp.log(xp.where(seen, total, 1)), -np.inf).swapaxes(1, 2)
    weights = weights / xp.where(seen, total, 1)[..., None]
    out = xp.einsum("bnqk,bknv->bqnv", weights, v)
    tokens = flat[0].shape[1]
    return (
        out[:, :tokens].reshape(batch, *layout, heads, -1),
        out[:, tokens:],
        lse[:, :tokens].reshape(batch, *layout, heads),
        lse[:, tokens:],
    )


def _mask(rule, layout, text, lengths):
    """Image rows see their window and the sample's text, text rows everything; padding rows see nothing."""
    tokens = int(np.prod(layout))
    mask = np.zeros((len(lengths), tokens + text, tokens + text), bool)
    mask[:, :tokens, :tokens] = rule.mask(layout).reshape(tokens, tokens)
    for sample, length in enumerate(lengths):
        mask[sample, :tokens, tokens : tokens + length] = True
        mask[sample, tokens : tokens + length, : tokens + length] = True
    return mask


RULES = {
    "1-D causal": ((12,), {"window_size": 4, "is_causal": True}),
    "2-D": ((6, 8), {"window_size": (3, 4), "stride": (1, 2), "dilation": (2, 1)}),
    "3-D": ((2, 4, 5), {"window_size": (2, 3, -1), "stride": (2, 1, 1)}),
    "whole": ((4, 5), {"window_size": -1}),
}


@pytest.mark.parametrize("name", RULES)
def test_equals_dense_attention_under_the_mask(name):
    layout, options = RULES[name]
    operands = _operands(0, layout)
    rule = Neighborhood.of(len(layout), **options)
    want = _masked(operands, _mask(rule, layout, 5, LENGTHS))
    got = _joint(*operands, text_lengths=LENGTHS, return_lse=True, **options)
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6)
    assert np.all(np.isneginf(got[3][1])) and not np.any(got[1][1])


def test_reference_and_no_lengths():
    operands = _operands(1, (4, 5))
    rule = Neighborhood.of(2, window_size=3)
    want = _masked(operands, _mask(rule, (4, 5), 5, [5, 5, 5]), scale=0.2)[:2]
    for implementation in ("xla", "reference"):
        got = _joint(*operands, window_size=3, scale=0.2, implementation=implementation)
        for one, other in zip(got, want, strict=True):
            np.testing.assert_allclose(one, other, atol=2e-6)


@pytest.mark.parametrize("score_bytes", [1, 4 * 3 * 4 * 30 * 2])
def test_text_queries_in_several_blocks(score_bytes, monkeypatch):
    """More text than image, one and two queries at a time."""
    operands = _operands(2, (5, 6), text=31)
    lengths = np.array([31, 2, 17], np.int32)
    mask = _mask(Neighborhood.of(2, window_size=3), (5, 6), 31, lengths)
    want = _masked(operands, mask)
    monkeypatch.setattr(joint, "_SCORES_BYTES", score_bytes)
    got = _joint(*operands, text_lengths=lengths, window_size=3)
    np.testing.assert_allclose(got[1], want[1], atol=2e-6)


def _loss(attend):
    rng = np.random.default_rng(9)

    def loss(operands):
        outputs = attend(operands)
        return sum(jnp.sum(rng.normal(size=x.shape).astype(np.float32) * x) for x in outputs)

    return jax.jit(jax.grad(loss))


def test_gradients_are_those_of_masked_attention_and_padding_has_none():
    layout = (4, 6)
    operands = _operands(3, layout)
    padding = np.arange(5)[None] >= LENGTHS[:, None]
    rule = Neighborhood.of(2, window_size=3, stride=(1, 2))
    mask = _mask(rule, layout, 5, LENGTHS)

    def oracle(operands):
        return _masked(operands, mask, xp=jnp)[:2]

    want = _loss(oracle)(operands)
    poisoned = operands[:3] + [
        np.where(padding[..., None, None], np.float32(np.nan), x) for x in operands[3:]
    ]
    attend = _loss(lambda x: gna_joint(*x, text_lengths=LENGTHS, window_size=3, stride=(1, 2)))
    got = attend(poisoned)
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, atol=5e-6)
    for one in got[3:]:
        assert not np.any(np.asarray(one)[padding])


def test_bfloat16_keeps_its_dtype():
    operands = [x.astype(ml_dtypes.bfloat16) for x in _operands(4, (4, 5))]
    got = _joint(*operands, text_lengths=LENGTHS, window_size=3, return_lse=True)
    assert [x.dtype.name for x in got] == ["bfloat16", "bfloat16", "float32", "float32"]
    mask = _mask(Neighborhood.of(2, window_size=3), (4, 5), 5, LENGTHS)
    want = _masked(operands, mask)[:2]
    for one, other in zip(got[:2], want, strict=True):
        np.testing.assert_allclose(np.float32(one), other, atol=2e-2)


def test_text_needs_no_memory_for_all_its_scores():
    """8 heads, 512 text tokens over 65536 image tokens: their scores are 1 GiB, the blocks 256 MiB."""
    jax.config.update("jax_disable_most_optimizations", False)
    image, text = (
        jax.ShapeDtypeStruct((1, *tokens, 8, 16), jnp.float32) for tokens in ((256, 256), (512,))
    )

    def text_out(image, text):
        return gna_joint(image, image, image, text, text, text, window_size=1)[1]

    memory = jax.jit(text_out).lower(image, text).compile().memory_analysis()
    keys_and_values = 2 * 4 * 8 * 16 * 256 * 256
    assert memory.temp_size_in_bytes < 2.2 * joint._SCORES_BYTES + 2 * keys_and_values


def test_tiles_and_implementation_reach_gna():
    operands = _operands(5, (4, 5))
    with pytest.raises(NotImplementedError, match="xla reads the key box"):
        gna_joint(*operands, window_size=3, implementation="xla", tiles=Tiles(q=(2, 2), kv=(2, 2)))
    with pytest.raises(ValueError, match="got implementation='fast'"):
        gna_joint(*operands, window_size=3, implementation="fast")
    with pytest.raises(ValueError, match="window_size must not exceed the layout"):
        gna_joint(*operands, window_size=(5, 5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({3: (3, 5, 4, 7)}, r"text_query must be .* = \(3, 5, 4, 8\), .* got text_query of shape"),
        ({4: (3, 4, 2, 8)}, r"text_key must be .* = \(3, 5, 2, 8\)"),
        ({5: (2, 5, 2, 6)}, r"text_value must be .* = \(3, 5, 2, 6\)"),
        ({3: (3, 0, 4, 8), 4: (3, 0, 2, 8), 5: (3, 0, 2, 6)}, "at least one text token"),
    ],
)
def test_text_of_a_wrong_shape(change, message):
    operands = _operands(6, (4, 5))
    for place, shape in change.items():
        operands[place] = np.zeros(shape, np.float32)
    with pytest.raises(ValueError, match=message):
        gna_joint(*operands, window_size=3)


def test_text_of_a_wrong_dtype_or_lengths():
    operands = _operands(7, (4, 5))
    wrong = [*operands[:4], operands[4].astype(ml_dtypes.bfloat16), operands[5]]
    with pytest.raises(ValueError, match="text_key must have query's dtype; got query of float32"):
        gna_joint(*wrong, window_size=3)
    for lengths in (np.array([1, 2]), np.array([1.0, 2.0, 3.0])):
        with pytest.raises(ValueError, match=r"text_lengths must be integers of shape \[batch\]"):
            gna_joint(*operands, text_lengths=lengths, window_size=3)
