"""Tiles of tokens between memory and registers, in Triton: places, addresses, masks and the relative position bias.

A tile of tokens on three axes is a matrix of one row per token, numbered row-major, gathered straight from `[B, *space, N, H]`.
Places are tuples of one vector per axis, in tokens of the dilation group.
"""

import triton
import triton.language as tl


@triton.jit
def tile_places(starts, plan: tl.constexpr, IS_KEY: tl.constexpr):
    """Per axis, where the tokens of the tile at `starts` lie."""
    first: tl.constexpr = plan.axes[0].kv_tile if IS_KEY else plan.axes[0].q_tile
    second: tl.constexpr = plan.axes[1].kv_tile if IS_KEY else plan.axes[1].q_tile
    third: tl.constexpr = plan.axes[2].kv_tile if IS_KEY else plan.axes[2].q_tile
    numbers = tl.arange(0, first * second * third)
    return (
        starts[0] + numbers // (second * third),
        starts[1] + (numbers // third) % second,
        starts[2] + numbers % third,
    )


@triton.jit
def before(places, ends, plan: tl.constexpr):
    """Which tokens of a tile lie before these ends on every axis: of the group, or of the box that a walk reads."""
    real = True
    for i in tl.static_range(3):
        if not plan.axes[i].is_flat:
            real = real & (places[i] < ends[i])
    return real


@triton.jit
def read_rows(real, places, lengths, plan: tl.constexpr, IS_KEY: tl.constexpr):
    """Which real tokens of an own tile are read: of a slab those inside the volume, for memory outside it may hold anything.

    Queries of a slab all see additional keys, where there are any.
    """
    if plan.is_slab and (IS_KEY or plan.num_additional == 0):
        for i in tl.static_range(3):
            if plan.axes[i].is_slab:
                real = real & (places[i] >= 0) & (places[i] < lengths[i])
    return real


@triton.jit
def token_numbers(places, offsets, plan: tl.constexpr, IS_KEY: tl.constexpr):
    """Row-major number of tokens in their array."""
    number = 0
    for i in tl.static_range(3):
        if not plan.axes[i].is_flat:
            place = offsets[i] + plan.axes[i].dilation * places[i]
            if IS_KEY:
                number = number * plan.axes[i].key_tokens + place
            else:
                number = number * plan.axes[i].query_tokens + place
    return number


@triton.jit
def head_base(array, sample, head, tokens, HEADS: tl.constexpr, DIM: tl.constexpr):
    """The first element of a sample's head in `[B, tokens, HEADS, DIM]`. Inside a sample 32 bits number all elements."""
    return array + sample.to(tl.int64) * tokens * (HEADS * DIM) + head * DIM


@triton.jit
def load_rows(
    base,
    numbers,
    real,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """`[tokens, COLUMNS]` of one head; zeros in columns past `DIM` and, where `MASKED`, in rows that are not real."""
    columns = tl.arange(0, COLUMNS)
    pointers = base + (numbers * (HEADS * DIM))[:, None] + columns[None, :]
    if MASKED:
        if DIM == COLUMNS:
            return tl.load(pointers, mask=real[:, None], other=0.0)
        else:
            return tl.load(pointers, mask=real[:, None] & (columns < DIM)[None, :], other=0.0)
    elif DIM == COLUMNS:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=(columns < DIM)[None, :], other=0.0)


@triton.jit
def store_rows(
    base, numbers, real, tile, HEADS: tl.constexpr, DIM: tl.constexpr, COLUMNS: tl.constexpr
):
    """The inverse of `load_rows`, in the array's dtype."""
    columns = tl.arange(0, COLUMNS)
    pointers = base + (numbers * (HEADS * DIM))[:, None] + columns[None, :]
    mask = real[:, None] & (columns < DIM)[None, :]
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def query_base(array, sample, head, plan: tl.constexpr):
    """`head_base` of queries or their gradient."""
    return head_base(array, sample, head, plan.query_tokens, plan.query_heads, plan.head_dim)


@triton.jit
def out_base(array, sample, head, plan: tl.constexpr):
    """`head_base` of out or its cotangent."""
    return head_base(array, sample, head, plan.query_tokens, plan.query_heads, plan.value_dim)


@triton.jit
def key_base(array, sample, head, tokens, plan: tl.constexpr):
    """`head_base` of keys or their gradient."""
    return head_base(array, sample, head, tokens, plan.kv_heads, plan.head_dim)


@triton.jit
def value_base(array, sample, head, tokens, plan: tl.constexpr):
    """`head_base` of values or their gradient."""
    return head_base(array, sample, head, tokens, plan.kv_heads, plan.value_dim)


@triton.jit
def load_queries(base, numbers, real, plan: tl.constexpr, MASKED: tl.constexpr):
    """`load_rows` from a `query_base`."""
    heads: tl.constexpr = plan.query_heads
    return load_rows(base, numbers, real, heads, plan.head_dim, plan.head_columns, MASKED)


@triton.jit
def load_outs(base, numbers, real, plan: tl.constexpr, MASKED: tl.constexpr):
    """`load_rows` from an `out_base`."""
    heads: tl.constexpr = plan.query_heads
    return load_rows(base, numbers, real, heads, plan.value_dim, plan.value_columns, MASKED)


@triton.jit
def load_keys(base, numbers, real, plan: tl.constexpr, MASKED: tl.constexpr):
    """`load_rows` from a `key_base`."""
    heads: tl.constexpr = plan.kv_heads
    return load_rows(base, numbers, real, heads, plan.head_dim, plan.head_columns, MASKED)


@triton.jit
def load_values(base, numbers, real, plan: tl.constexpr, MASKED: tl.constexpr):
    """`load_rows` from a `value_base`."""
    heads: tl.constexpr = plan.kv_heads
    return load_rows(base, numbers, real, heads, plan.value_dim, plan.value_columns, MASKED)


@triton.jit
def store_queries(base, numbers, real, tile, plan: tl.constexpr):
    """`store_rows` to a `query_base`."""
    store_rows(base, numbers, real, tile, plan.query_heads, plan.head_dim, plan.head_columns)


@triton.jit
def store_outs(base, numbers, real, tile, plan: tl.constexpr):
    """`store_rows` to an `out_base`."""
    store_rows(base, numbers, real, tile, plan.query_heads, plan.value_dim, plan.value_columns)


@triton.jit
def store_keys(base, numbers, real, tile, plan: tl.constexpr):
    """`store_rows` to a `key_base`."""
    store_rows(base, numbers, real, tile, plan.kv_heads, plan.head_dim, plan.head_columns)


@triton.jit
def store_values(base, numbers, real, tile, plan: tl.constexpr):
    """`store_rows` to a `value_base`."""
    store_rows(base, numbers, real, tile, plan.kv_heads, plan.value_dim, plan.value_columns)


@triton.jit
def seen(firsts, ends, places, plan: tl.constexpr):
    """`[rows, columns]`: does the column's token lie in the row's interval `[first, end)` on every axis?

    Hides padding too: intervals end before it.
    """
    mask = True
    for i in tl.static_range(3):
        if not plan.axes[i].is_flat:
            # Both ends in one compare: before `first` the difference wraps around to a large number.
            offset = (places[i][None, :] - firsts[i][:, None]).to(tl.uint32, bitcast=True)
            size = (ends[i] - firsts[i]).to(tl.uint32, bitcast=True)
            mask = mask & (offset < size[:, None])
    return mask


@triton.jit
def key_bias_numbers(places, plan: tl.constexpr):
    """Every key's part of its pairs' numbers in the bias table; a query's part is subtracted."""
    number = 0
    for i in tl.static_range(3):
        if not plan.axes[i].is_flat:
            number = number + places[i] * plan.bias_strides[i]
    return number


@triton.jit
def query_bias_numbers(places, ends, plan: tl.constexpr):
    """Every query's part of its pairs' numbers in the bias table. Padding stands for the last query: its pairs have entries too."""
    number = 0
    for i in tl.static_range(3):
        if not plan.axes[i].is_flat:
            place = tl.minimum(places[i], ends[i] - 1) - (plan.axes[i].extent - 1)
            number = number + place * plan.bias_strides[i]
    return number


@triton.jit
def load_bias(bias, head, numbers, mask, plan: tl.constexpr, MASKED: tl.constexpr):
    """Bias of the pairs with these numbers, float32 and in powers of two as the scores are."""
    pointers = bias + head * plan.bias_entries + numbers
    if MASKED:
        entries = tl.load(pointers, mask=mask, other=0.0)
    else:
        entries = tl.load(pointers)
    return entries.to(tl.float32) * plan.log2_e
