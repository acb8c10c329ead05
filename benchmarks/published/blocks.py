"""Blocks of 128 tokens for torch's block masks: tile order, and which blocks meet. Needs numpy alone: torch's Python reads it too."""

import numpy as np

BLOCK = 128
TILES = ((128,), (16, 8), (2, 8, 8), (4, 4, 8))
"""Tiles of `BLOCK` tokens: the first of a layout's rank that divides it, else the first of the rank."""


def tile_of(layout):
    """The tile of `BLOCK` tokens."""
    mine = [tile for tile in TILES if len(tile) == len(layout)]
    whole = (t for t in mine if all(n % size == 0 for n, size in zip(layout, t, strict=True)))
    return next(whole, mine[0])


def tile_order(layout, tile):
    """Coordinates `[rank, tokens]` of the tokens, tile after tile."""
    places = np.indices(layout).reshape(len(layout), -1)
    inside = [place % size for place, size in zip(places, tile, strict=True)]
    of_tile = [place // size for place, size in zip(places, tile, strict=True)]
    return places[:, np.lexsort([*inside[::-1], *of_tile[::-1]])]


def block_kinds(intervals, layout, tile):
    """`[blocks, blocks]` bool twice: does a pair of the blocks attend, do all? Products over the axes, as windows are boxes."""
    any_pair = every_pair = np.ones((1, 1), bool)
    for (first, end), length, size in zip(intervals, layout, tile, strict=True):
        first, end = (np.asarray(x).reshape(-1, size, 1) for x in (first, end))
        start = np.arange(0, length, size)
        some = ((first < start + size) & (end > start)).any(axis=1)
        all_of_them = ((first <= start) & (end >= start + size)).all(axis=1)
        any_pair, every_pair = np.kron(any_pair, some), np.kron(every_pair, all_of_them)
    return any_pair.astype(bool), every_pair.astype(bool)
