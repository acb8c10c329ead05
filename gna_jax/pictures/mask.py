"""The 1-D attention mask: queries x keys, in the colours of the stride groups."""

import dataclasses
from typing import SupportsIndex

import numpy as np

from gna_jax.neighborhood import AxisNeighborhood, Flags, Sizes
from gna_jax.pictures import palette
from gna_jax.pictures.grid import GridPicture
from gna_jax.pictures.palette import Kind, Mark
from gna_jax.pictures.panels import Panel
from gna_jax.pictures.tokens import check_drawable, describe, leaders, read_rule

KINDS = (
    Kind("not seen", palette.EMPTY, "· ", palette.FAINT_INK),
    Kind("keys that a stride group sees", palette.tint(palette.BLUE, 0.36), "▒▒", palette.BLUE),
    Kind("and the next group", palette.tint(palette.ORANGE, 0.42), "░░", palette.ORANGE),
)
MARKS = (
    Mark("the query itself", palette.BLUE, "o"),
    Mark("", palette.RED, "o"),
    Mark("the leader of its group", palette.INK, "L"),
)


def mask_1d(
    length: SupportsIndex,
    *,
    window_size: Sizes,
    stride: Sizes = 1,
    dilation: Sizes = 1,
    is_causal: Flags = False,
) -> GridPicture:
    """The attention mask of one axis of at most 512 tokens: a row per query, a column per key.

    The rows of a stride group have one colour: two colours take turns along the queries (of a dilation group). The
    query's own place is marked, so that a window is seen to sit around its group's leader.

    Raises:
      TypeError: for a traced or non-integer value.
      ValueError: for a rule that does not fit the axis, or a longer axis.
    """
    layout, rule = read_rule((length,), window_size, stride, dilation, is_causal)
    check_drawable(layout)
    axis, tokens = rule.axes[0], layout[0]
    panel = mask_panel(axis, tokens)
    is_leader = leaders(axis, tokens) == np.arange(tokens)
    marks = np.where(np.diag(is_leader), 3, panel.marks)
    panel = dataclasses.replace(panel, marks=marks)
    return GridPicture(f"attention mask: {describe(rule, layout)}", ((panel,),), KINDS, MARKS)


def mask_panel(axis: AxisNeighborhood, length: int, first: int = 0) -> Panel:
    """The mask of one axis: cells 1 or 2, where seen, and marks 1 or 2, at the query, by turns of the stride groups.

    The group of the token `first` has the first turn.
    """
    numbers = _group_numbers(leaders(axis, length), axis.dilation)
    turn = 1 + (numbers - numbers[first]) % 2
    cells = axis.mask(length) * turn[:, None]
    return Panel("", cells, np.diag(turn), labels=("queries", "keys"), numbered=True)


def _group_numbers(leaders: np.ndarray, dilation: int) -> np.ndarray:
    """The number of every token's stride group in its dilation group."""
    numbers = np.empty_like(leaders)
    for residue in range(dilation):
        of_group = slice(residue, None, dilation)
        numbers[of_group] = np.unique(leaders[of_group], return_inverse=True)[1]
    return numbers
