"""The window rules against a brute force of their definition, and every message of their checks."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gna_jax.neighborhood import (
    WHOLE_GROUP,
    AxisNeighborhood,
    Neighborhood,
    group_length,
    key_interval,
    query_interval,
)


def dense_mask(length, window, stride, dilation, is_causal):
    """The definition on one axis, token by token; shares nothing with the package."""
    mask = np.zeros((length, length), dtype=bool)
    for residue in range(dilation):
        tokens = [i for i in range(length) if i % dilation == residue]
        last = len(tokens) - 1
        size = len(tokens) if window == -1 else window
        for j, token in enumerate(tokens):
            stride_group = [i for i in range(len(tokens)) if i // stride == j // stride]
            if is_causal:
                leader = stride_group[-1]
                keys = [k for k in range(len(tokens)) if leader - size + 1 <= k <= j]
            else:
                centre = min(stride_group[0] + stride // 2, last)
                left, right = size // 2, size - 1 - size // 2
                while centre - left < 0:
                    centre += 1
                while centre + right > last:
                    centre -= 1
                keys = range(centre - left, centre + right + 1)
            for k in keys:
                mask[token, tokens[k]] = True
    return mask


def rules_of(length):
    """Every (window, stride, dilation) that fits an axis of `length` tokens."""
    for dilation in range(1, length + 1):
        for window in (WHOLE_GROUP, *range(1, length // dilation + 1)):
            largest_stride = length // dilation if window == WHOLE_GROUP else window
            for stride in range(1, largest_stride + 1):
                yield window, stride, dilation


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("length", range(1, 17))
def test_mask_is_the_definition(length, is_causal):
    for window, stride, dilation in rules_of(length):
        mask = AxisNeighborhood(window, stride, dilation, is_causal).mask(length)
        expected = dense_mask(length, window, stride, dilation, is_causal)
        np.testing.assert_array_equal(mask, expected, err_msg=f"{window=} {stride=} {dilation=}")


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("length", range(1, 17))
def test_query_interval_is_the_transposed_mask(length, is_causal):
    for window, stride, dilation in rules_of(length):
        axis = AxisNeighborhood(window, stride, dilation, is_causal)
        expected = dense_mask(length, window, stride, dilation, is_causal)
        for residue in range(dilation):
            group = expected[residue::dilation, residue::dilation]
            key = query = np.arange(len(group))
            assert group_length(length, dilation, residue) == len(group)
            first, end = axis.queries(key, len(group))
            sees = (first[:, None] <= query[None, :]) & (query[None, :] < end[:, None])
            np.testing.assert_array_equal(
                sees, group.T, err_msg=f"{window=} {stride=} {dilation=} {residue=}"
            )


@pytest.mark.parametrize("is_causal", [False, True])
def test_intervals_of_python_ints_are_python_ints_equal_to_numpy(is_causal):
    for length in range(1, 10):
        for window, stride, dilation in rules_of(length):
            if dilation > 1:
                continue
            axis = AxisNeighborhood(window, stride, dilation, is_causal)
            for interval in (axis.keys, axis.queries):
                of_ints = [interval(position, length) for position in range(length)]
                assert {type(place) for pair in of_ints for place in pair} == {int}
                of_array = np.stack(interval(np.arange(length), length), axis=1)
                np.testing.assert_array_equal(of_ints, of_array, err_msg=f"{length=} {axis}")


@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("traced_length", [False, True])
def test_intervals_of_traced_positions_equal_numpy(length, traced_length):
    axes = [
        AxisNeighborhood(window, stride, 1, is_causal)
        for window, stride, dilation in rules_of(length)
        for is_causal in (False, True)
        if dilation == 1 and stride in (1, 2, window)
    ]

    def intervals(position, length):
        return [(axis.keys(position, length), axis.queries(position, length)) for axis in axes]

    position = np.arange(length)
    if traced_length:
        traced = jax.jit(intervals)(jnp.asarray(position), length)
    else:
        traced = jax.jit(intervals, static_argnums=1)(jnp.asarray(position), length)
    for axis, got, expected in zip(axes, traced, intervals(position, length), strict=True):
        np.testing.assert_array_equal(np.asarray(got), np.asarray(expected), err_msg=str(axis))


def keys_by_definition(query, length, window, stride, is_causal):
    """The definition for one query of a long group: `[first, end)` from the clamped centre."""
    if window == -1:
        window = length
    group_start = query - query % stride
    if is_causal:
        leader = min(group_start + stride - 1, length - 1)
        return max(leader - window + 1, 0), query + 1
    left, right = window // 2, window - 1 - window // 2
    leader = min(group_start + stride // 2, length - 1)
    centre = sorted((left, leader, length - 1 - right))[1]
    return centre - left, centre + right + 1


@st.composite
def long_groups(draw):
    length = draw(st.integers(1, 10**6))
    window = draw(st.one_of(st.just(WHOLE_GROUP), st.integers(1, length), st.just(length)))
    largest_stride = length if window == WHOLE_GROUP else window
    stride = draw(st.one_of(st.integers(1, largest_stride), st.just(largest_stride)))
    anywhere = st.integers(0, length - 1)
    near_the_end = st.integers(max(length - 2 * stride, 0), length - 1)
    places = draw(st.lists(st.one_of(anywhere, near_the_end), min_size=4, max_size=12))
    rule = {"length": length, "window": window, "stride": stride, "is_causal": draw(st.booleans())}
    return rule, places


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(long_groups())
def test_long_groups(case):
    rule, places = case
    expected = [keys_by_definition(query, **rule) for query in places]
    assert [key_interval(query, **rule) for query in places] == expected
    of_array = key_interval(np.array(places), **rule)
    np.testing.assert_array_equal(np.stack(of_array, axis=1), expected)

    def sees(query, key):
        first, end = keys_by_definition(query, **rule)
        return first <= key < end

    for key in places:
        first, end = query_interval(key, **rule)
        assert 0 <= first < end <= rule["length"]
        assert sees(first, key) and sees((first + end) // 2, key) and sees(end - 1, key)
        assert first == 0 or not sees(first - 1, key)
        assert end == rule["length"] or not sees(end, key)


def test_odd_window_of_stride_one_is_centred_away_from_the_edges():
    for window in (1, 3, 5, 7):
        query = np.arange(window // 2, 20 - window // 2)
        first, end = AxisNeighborhood(window, 1, 1, False).keys(query, 20)
        np.testing.assert_array_equal(query - first, end - 1 - query)


def test_stride_equal_to_window_is_blocked_attention():
    for window in (1, 2, 3, 4, 6, 12):
        block = np.arange(12) // window
        mask = AxisNeighborhood(window, window, 1, False).mask(12)
        np.testing.assert_array_equal(mask, block[:, None] == block[None, :])
        causal = AxisNeighborhood(window, window, 1, True).mask(12)
        np.testing.assert_array_equal(causal, np.tril(block[:, None] == block[None, :]))


def test_last_block_slides_inside_a_ragged_axis():
    mask = AxisNeighborhood(4, 4, 1, False).mask(10)
    np.testing.assert_array_equal(np.flatnonzero(mask[8]), [6, 7, 8, 9])
    np.testing.assert_array_equal(np.flatnonzero(mask[7]), [4, 5, 6, 7])


@pytest.mark.parametrize("stride", [1, 2, 5, 9])
def test_window_of_the_whole_axis_is_full_attention(stride):
    assert AxisNeighborhood(9, stride, 1, False).mask(9).all()
    np.testing.assert_array_equal(
        AxisNeighborhood(9, stride, 1, True).mask(9), np.tril(np.ones((9, 9), dtype=bool))
    )


def test_window_of_one_sees_only_itself():
    for dilation, is_causal in itertools.product((1, 2, 3), (False, True)):
        mask = AxisNeighborhood(1, 1, dilation, is_causal).mask(7)
        np.testing.assert_array_equal(mask, np.eye(7, dtype=bool))


def test_whole_group_is_the_window_of_the_group_length():
    for length, stride, is_causal in itertools.product(range(2, 12), (1, 2), (False, True)):
        whole = AxisNeighborhood(WHOLE_GROUP, stride, 1, is_causal)
        window = AxisNeighborhood(length, stride, 1, is_causal)
        np.testing.assert_array_equal(whole.mask(length), window.mask(length))


def test_whole_group_fills_groups_of_different_lengths():
    residue = np.arange(8) % 3
    mask = AxisNeighborhood(WHOLE_GROUP, 1, 3, False).mask(8)
    np.testing.assert_array_equal(mask, residue[:, None] == residue[None, :])


def test_window_extent_is_the_largest_number_of_keys():
    for length in range(1, 13):
        for window, stride, dilation in rules_of(length):
            axis = AxisNeighborhood(window, stride, dilation, False)
            assert axis.window_extent(length) == axis.mask(length).sum(axis=1).max()


def test_mask_of_several_axes_is_the_product():
    layout = (5, 4, 6)
    rules = {
        "window_size": (3, -1, 2),
        "stride": (2, 1, 2),
        "dilation": (1, 2, 3),
        "is_causal": (True, False, True),
    }
    mask = Neighborhood.of(3, **rules).mask(layout)
    one_axis = [dense_mask(n, *rule) for n, *rule in zip(layout, *rules.values(), strict=True)]
    for query, key in itertools.product(np.ndindex(layout), repeat=2):
        expected = all(m[i, j] for m, i, j in zip(one_axis, query, key, strict=True))
        assert mask[query + key] == expected, (query, key)


def test_of_broadcasts_over_the_axes():
    expected = Neighborhood((3, 3), (2, 2), (1, 1), (True, True))
    assert Neighborhood.of(2, window_size=3, stride=2, is_causal=True) == expected
    assert Neighborhood.of(2, window_size=[3, 3], stride=(2, 2), is_causal=[1, 1]) == expected
    numpy = Neighborhood.of(
        2, window_size=np.int64(3), stride=np.array([2, 2]), dilation=np.array(1), is_causal=True
    )
    assert numpy == expected and hash(numpy) == hash(expected)
    assert {type(size) for size in numpy.window_size + numpy.stride + numpy.dilation} == {int}
    assert {type(flag) for flag in numpy.is_causal} == {bool}
    assert Neighborhood.of(1, window_size=jnp.array([3])) == Neighborhood.of(1, window_size=3)
    assert Neighborhood.of(2, window_size=3, is_causal=[np.bool_(0), 1]).is_causal == (False, True)


def test_axes_take_one_rule_each():
    neighborhood = Neighborhood.of(
        2, window_size=(3, -1), stride=(2, 1), dilation=(1, 4), is_causal=(True, False)
    )
    assert neighborhood.rank == 2
    assert neighborhood.axes == (
        AxisNeighborhood(3, 2, 1, True),
        AxisNeighborhood(-1, 1, 4, False),
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window_size": 0}, r"window_size must be at least 1, or -1 .* got window_size=\(0, 0\)"),
        ({"window_size": (3, -2)}, r"window_size must be at least 1.* got window_size=\(3, -2\)"),
        ({"window_size": 3, "stride": 0}, r"stride must be at least 1; got stride=\(0, 0\)"),
        ({"window_size": 3, "dilation": (1, 0)}, r"dilation must be at least 1; got .*\(1, 0\)"),
        (
            {"window_size": (5, 2), "stride": 3},
            r"stride must not exceed window_size on any axis.* got stride=\(3, 3\),"
            r" window_size=\(5, 2\); stride = window_size is blocked",
        ),
        (
            {"window_size": (3, 3, 3)},
            r"window_size must be one value or one per spatial axis; got"
            r" window_size=\(3, 3, 3\) for 2 spatial axes",
        ),
        ({"window_size": 3, "is_causal": [True]}, r"is_causal must be one value or one per"),
    ],
)
def test_of_rejects_values(arguments, message):
    with pytest.raises(ValueError, match=message):
        Neighborhood.of(2, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window_size": 3.0}, r"window_size must be an integer or a tuple of integers; got 3.0"),
        ({"window_size": (3, None)}, r"window_size must be an integer .* got None"),
        ({"window_size": "33"}, r"window_size must be an integer .* got '33'"),
        ({"window_size": True}, r"window_size must be an integer .* got True"),
        ({"window_size": 3, "stride": np.float32(1)}, r"stride must be an integer"),
        ({"window_size": 3, "dilation": (1, False)}, r"dilation must be an integer .* got False"),
        ({"window_size": 3, "is_causal": 2}, r"is_causal must be a bool .* got 2"),
        ({"window_size": 3, "is_causal": ("yes", True)}, r"is_causal must be a bool .* got 'yes'"),
    ],
)
def test_of_rejects_kinds(arguments, message):
    with pytest.raises(TypeError, match=message):
        Neighborhood.of(2, **arguments)


@pytest.mark.parametrize("name", ["window_size", "stride", "dilation", "is_causal"])
@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (1, x)])
def test_of_rejects_traced_values(name, wrap):
    def build(value):
        arguments = {"window_size": 3} | {name: wrap(value)}
        return Neighborhood.of(2, **arguments).rank

    message = rf"{name} must be static.*static_argnames=\('{name}',\)"
    with pytest.raises(TypeError, match=message):
        jax.jit(build)(1)


@pytest.mark.parametrize(
    ("rules", "layout", "message"),
    [
        (
            {"window_size": (3, 9)},
            (8, 8),
            r"window_size must not exceed the layout on any axis; got window_size=\(3, 9\),"
            r" dilation=\(1, 1\), layout \(8, 8\); use a smaller window, or -1",
        ),
        (
            {"window_size": 3, "dilation": (2, 3)},
            (8, 8),
            r"window_size \* dilation must not exceed the layout .* dilation=\(2, 3\),"
            r" layout \(8, 8\); use a smaller window or dilation, or pad",
        ),
        (
            {"window_size": -1, "dilation": (1, 9)},
            (8, 8),
            r"a dilation group of the layout must hold at least `stride` tokens",
        ),
        (
            {"window_size": -1, "stride": (1, 3), "dilation": 3},
            (8, 8),
            r"must hold at least `stride` tokens \(stride=\(1, 3\)\); .* layout \(8, 8\)",
        ),
    ],
)
def test_check_layout_rejects(rules, layout, message):
    neighborhood = Neighborhood.of(2, **rules)
    with pytest.raises(ValueError, match=message):
        neighborhood.check_layout(layout)
    with pytest.raises(ValueError, match=message):
        neighborhood.mask(layout)


def test_check_layout_accepts_windows_that_just_fit():
    Neighborhood.of(2, window_size=(8, 4), dilation=(1, 2)).check_layout((8, 8))
    Neighborhood.of(2, window_size=-1, stride=(8, 2), dilation=(1, 4)).check_layout((8, 8))
