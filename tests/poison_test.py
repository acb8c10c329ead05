"""What a query must not depend on: finite changes outside its window bit for bit, NaN where no tile may read."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_suite import (
    BIAS,
    attend,
    case_1d,
    case_of,
    compiled,
    differentiate,
    places,
    random_case,
    same_bits,
)

from gna_jax.attention import slab_attention
from gna_jax.backends.xla import query_tile
from gna_jax.backends.xla.tile_classes import build_classes
from gna_jax.tiling import Tiles

CASES = [
    case_1d(26, 5, tiles=Tiles(q=(7,), kv=None, backward_q=(9,)), has_bias=True),
    case_1d(24, 6, stride=3, dilation=2, kv_heads=2, num_additional=2, lengths=(0, 2)),
    case_of((6, 7), (3, 4), is_causal=(True, False), tiles=Tiles(q=(4, 3), kv=None)),
    case_of((7, 6), (3, 3), stride=(3, 2), num_additional=1, has_bias=True),
    case_of((4, 4, 5), (2, 3, -1), stride=(2, 1, 1), dilation=(2, 1, 1)),
]


def poisoned(rng, arrays, hidden, dtype):
    """`arrays` with key and value tokens replaced where `hidden` [tokens], by values up to 0.9 of the dtype's largest."""
    changed = dict(arrays)
    largest = float(jnp.finfo(dtype).max)
    for name in ("key", "value"):
        array = arrays[name]
        noise = (rng.uniform(-0.9, 0.9, array.shape) * largest).astype(dtype)
        where = hidden.reshape(1, *array.shape[1:-2], 1, 1)
        changed[name] = np.where(where, noise, array)
    return changed


def loss_on(case, cotangents, token):
    """Cotangents that are zero but at one query token."""
    one = np.zeros(math.prod(case.layout), bool)
    one[token] = True
    dout, dlse = cotangents
    where = one.reshape(1, *case.layout, 1)
    zero = dout.dtype.type(0)
    return np.where(where[..., None], dout, zero), np.where(where, dlse, np.zeros_like(dlse))


def tokens_first(array):
    """`[B, *space, ..]` -> `[tokens, B, ..]` for a layout given by the array's leading axes."""
    array = np.asarray(array)
    return np.moveaxis(array.reshape(array.shape[0], -1, *array.shape[-2:]), 1, 0)


def check_untouched(case, dtype, run, arrays, with_bias):
    """Per query: everything it and its loss alone give is bit-equal whatever stands outside its window."""
    rng = np.random.default_rng(case.seed)
    cotangents = case.cotangents(dtype)
    tokens = math.prod(case.layout)
    mask = case.neighborhood.mask(case.layout).reshape(tokens, tokens)
    candidates = np.flatnonzero(~mask.all(axis=1))
    for token in rng.choice(candidates, min(6, len(candidates)), replace=False):
        seen = mask[token]
        alone = loss_on(case, cotangents, token)
        want = run(arrays, alone)
        for _ in range(2):
            got = run(poisoned(rng, arrays, ~seen, dtype), alone)
            what = f"query {token} of {case!r}"
            rows = [tokens_first(x.out)[token] for x in (got, want)]
            same_bits(*rows, f"out, {what}")
            rows = [
                np.asarray(x.lse).reshape(case.batch, tokens, -1)[:, token] for x in (got, want)
            ]
            same_bits(*rows, f"lse, {what}")
            rows = [tokens_first(x.gradients["query"])[token] for x in (got, want)]
            same_bits(*rows, f"d query, {what}")
            for name in ("key", "value"):
                rows = [tokens_first(x.gradients[name])[seen] for x in (got, want)]
                same_bits(*rows, f"d {name}, {what}")
            others = got.gradients.keys() - {"query", "key", "value"}
            for name in others if with_bias else others - {BIAS}:
                same_bits(got.gradients[name], want.gradients[name], f"d {name}, {what}")


@pytest.mark.parametrize(
    "dtype", [np.float32, pytest.param(jnp.bfloat16, marks=pytest.mark.slow), jnp.float16]
)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_finite_changes_outside_a_window(case, dtype):
    run, arrays = compiled(case, dtype), case.inputs(dtype)
    # Scores of the changed keys overflow, the outputs of queries that see them too. Their pairs' own entries of the bias
    # are then NaN, as in dense attention.
    check_untouched(case, dtype, run, arrays, with_bias=False)
    # Scores within range: no gradient may notice.
    norm = np.abs(arrays["query"].astype(np.float64)).sum(-1, keepdims=True)
    arrays = arrays | {"query": (arrays["query"].astype(np.float64) / norm).astype(dtype)}
    check_untouched(case, dtype, run, arrays, with_bias=True)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5000, 5060))
def test_finite_changes_many(seed):
    case = dataclasses.replace(random_case(seed, max_loops=8), scale=None)
    for dtype in (np.float32, jnp.float16):
        test_finite_changes_outside_a_window(case, dtype)


def test_finite_changes_under_x64():
    with jax.enable_x64(True):
        test_finite_changes_outside_a_window(CASES[1], np.float64)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_additional_rows_past_their_length(implementation):
    """NaN there is never used, and its gradients are exactly zero."""
    case = case_1d(18, 5, num_additional=4, lengths=(0, 3), has_bias=True)
    arrays, cotangents = case.inputs(np.float32), case.cotangents(np.float32)
    hidden = (np.arange(4)[None] >= np.asarray(case.lengths)[:, None])[:, :, None, None]
    names = ("additional_keys", "additional_values")
    program = jax.jit(
        lambda a, c: differentiate(lambda a: attend(case, a, implementation=implementation), a, c)
    )
    clean = program(
        arrays | {n: np.where(hidden, np.float32(0), arrays[n]) for n in names}, cotangents
    )
    for garbage in (np.nan, np.inf, 3e38):
        dirty = arrays | {n: np.where(hidden, np.float32(garbage), arrays[n]) for n in names}
        got = program(dirty, cotangents)
        for name, array in got.named().items():
            same_bits(array, clean.named()[name], name)
        for name in names:
            gradient = np.asarray(got.gradients[name])
            assert (gradient[np.broadcast_to(hidden, gradient.shape)] == 0).all()
            assert (gradient[1, :3] != 0).any()


def tile_reach(case, backward):
    """`[queries, keys]` bool: does the tile that answers for the query have the key in its outer box?"""
    problem = case.problem()
    axes = build_classes(problem, query_tile(problem, case.tiles, backward))
    reach = np.ones((1, 1), bool)
    for classes, d, length in zip(axes, case.dilation, case.layout, strict=True):
        axis = np.zeros((length, length), bool)
        for c in classes:
            for n in range(c.num_tiles):
                rows = c.query_start[n] + np.flatnonzero(c.owned[n])
                box = c.key_start[n] + np.arange(c.column_first[n], c.column_end[n])
                pairs = np.ix_(rows * d + c.query_residue[n], box * d + c.key_residue[n])
                axis[pairs] = True
        reach = np.kron(reach, axis)
    return reach


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            case_1d(40, 5, tiles=Tiles(q=(6,), kv=None, backward_q=(9,)), has_bias=True),
            marks=pytest.mark.slow,
        ),
        case_1d(37, 4, stride=3, dilation=3, tiles=Tiles(q=(4,), kv=None)),
        case_1d(30, 7, is_causal=True, tiles=Tiles(q=(5,), kv=None), num_additional=1),
        case_of((9, 8), (3, 4), tiles=Tiles(q=(4, 3), kv=None)),
        pytest.param(
            case_of((5, 6, 6), (3, 2, 3), dilation=(1, 2, 1), tiles=Tiles(q=(5, 2, 3), kv=None)),
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)
def test_nan_in_one_token_stays_in_its_tiles(case):
    """A NaN key or value reaches the queries that see it and no query whose tile's outer box excludes it."""
    arrays, cotangents = case.inputs(np.float32), case.cotangents(np.float32)
    run = compiled(case)
    tokens = math.prod(case.layout)
    mask = case.neighborhood.mask(case.layout).reshape(tokens, tokens)
    forward, backward = tile_reach(case, False), tile_reach(case, True)
    assert (forward | ~mask).all() and (backward | ~mask).all() and not forward.all()
    rng = np.random.default_rng(3)
    for token in (0, tokens - 1, *rng.integers(0, tokens, 3)):
        for name in ("key", "value"):
            array = arrays[name].copy()
            array.reshape(case.batch, tokens, -1)[:, token] = np.nan
            got = run(arrays | {name: array}, cotangents)
            nan_out = np.isnan(tokens_first(got.out)).any(axis=(1, 2, 3))
            assert nan_out[mask[:, token]].all(), "the NaN was not read where it is seen"
            assert not nan_out[~forward[:, token]].any()
            nan_lse = np.isnan(np.asarray(got.lse).reshape(case.batch, tokens, -1)).any(axis=(0, 2))
            assert not nan_lse[~forward[:, token]].any()
            nan_dquery = np.isnan(tokens_first(got.gradients["query"])).any(axis=(1, 2, 3))
            assert not nan_dquery[~(forward | backward)[:, token]].any()


def slab_program(case, tiles):
    @jax.jit
    def run(arrays, cotangents, origins):
        def attend(arrays):
            extras = {n: x for n, x in arrays.items() if n.startswith(("additional", "relative"))}
            tokens = [arrays[n] for n in ("query", "key", "value")]
            return slab_attention(
                *tokens,
                *origins,
                global_layout=case.layout,
                **case.geometry,
                **extras,
                tiles=tiles,
                implementation="xla",
            )

        return differentiate(attend, arrays, cotangents)

    return run


@pytest.mark.parametrize("tile", [*(pytest.param(n, marks=pytest.mark.slow) for n in (None, 1)), 3])
@pytest.mark.parametrize(
    ("case", "slab"),
    [
        (case_1d(30, 5, has_bias=True), (8,)),
        # The dilation does not divide the slab: its padding rows must not read either.
        (case_1d(34, 4, stride=2, dilation=3), (7,)),
        (case_1d(30, 6, is_causal=True, num_additional=2, lengths=(1, 0)), (9,)),
        (case_of((10, 9), (3, 2), dilation=(2, 3), has_bias=True), (3, 5)),
    ],
    ids=str,
)
def test_nan_in_a_slabs_halo_that_no_query_sees(case, slab, tile):
    """Keys of the slab beyond every query's window may be NaN: nothing shows, and their gradients are zero."""
    tiles = None if tile is None else Tiles(q=(tile,) * len(slab), kv=None)
    run = slab_program(case, tiles)
    arrays = case.inputs(np.float32)
    if BIAS in arrays:
        arrays[BIAS] = arrays[BIAS] * np.float32(100)  # exp of it overflows
    query = dataclasses.replace(case, layout=slab)
    cotangents = query.cotangents(np.float32)
    whole = places(case.layout)
    mask = case.neighborhood.mask(case.layout).reshape(whole.shape[1], -1)
    corners = [(0,) * len(slab), tuple(n - s for n, s in zip(case.layout, slab, strict=True))]
    corners.append(tuple((n - s) // 2 for n, s in zip(case.layout, slab, strict=True)))
    for corner in corners:
        box = tuple(slice(c, c + s) for c, s in zip(corner, slab, strict=True))
        inside = np.zeros(case.layout, bool)
        inside[box] = True
        unseen = ~mask[inside.ravel()].any(axis=0).reshape(1, *case.layout, 1, 1)
        assert unseen.any()
        local = arrays | {"query": arrays["query"][(slice(None), *box)]}
        origins = np.asarray([corner, (0,) * len(slab)], np.int32)
        clean = run(local, cotangents, origins)
        dirty = {n: np.where(unseen, np.float32(np.nan), arrays[n]) for n in ("key", "value")}
        got = run(local | dirty, cotangents, origins)
        for name, array in got.named().items():
            assert np.isfinite(array).all(), f"{name} at {corner}"
            same_bits(array, clean.named()[name], f"{name} at {corner}")
        for name in ("key", "value"):
            gradient = got.gradients[name]
            assert (gradient[np.broadcast_to(unseen, gradient.shape)] == 0).all()
