"""What one query sees, on the layout itself: `window`."""

import numpy as np

from gna_jax.neighborhood import Flags, Sizes
from gna_jax.pictures import palette
from gna_jax.pictures.grid import GridPicture
from gna_jax.pictures.palette import Kind, Mark
from gna_jax.pictures.panels import Panel, plane_title, planes, rows_of
from gna_jax.pictures.tokens import (
    check_drawable,
    check_position,
    describe,
    read_rule,
    seen,
    stride_group,
)

KINDS = (
    Kind("not seen", palette.EMPTY, "· ", palette.FAINT_INK),
    Kind("keys that the query sees", palette.tint(palette.BLUE, 0.4), "▒▒", palette.BLUE),
)
MARKS = (
    Mark("its stride group", palette.RED, "o", is_ring=True),
    Mark("their leader", palette.INK, "L"),
    Mark("the query", palette.RED, "Q"),
)
GROUP, LEADER, QUERY = 1, 2, 3


def window(
    layout: Sizes,
    *,
    window_size: Sizes,
    stride: Sizes = 1,
    dilation: Sizes = 1,
    is_causal: Flags = False,
    query: Sizes | None = None,
) -> GridPicture:
    """What a query sees on a layout of one to three axes; three are drawn plane by plane along the first.

    Args:
      layout: tokens per axis.
      window_size: as `gna`, like `stride`, `dilation` and `is_causal`.
      query: its position; None for the middle of the layout. The other queries of its stride group see the same
        keys (causal: as far as they look back), and are marked; so is their leader, where it is another token.

    Raises:
      TypeError: for a traced or non-integer value.
      ValueError: for a rule that does not fit the layout, a query outside it, or a layout too large to draw.
    """
    sizes, rule = read_rule(layout, window_size, stride, dilation, is_causal)
    check_drawable(sizes)
    middle = tuple(length // 2 for length in sizes)
    place = check_position("query", middle if query is None else query, sizes)
    keys = seen(rule, sizes, place)
    group, leader = stride_group(rule, sizes, place)
    marks = group * GROUP
    marks[leader] = LEADER
    marks[place] = QUERY
    panels = [
        Panel(plane_title(numbers), cells, signs, numbered=True)
        for numbers, cells, signs in planes(keys.astype(int), marks)
    ]
    title = f"{describe(rule, sizes)}: a query sees {np.count_nonzero(keys)} of {keys.size} tokens"
    return GridPicture(title, rows_of(panels), KINDS, MARKS)
