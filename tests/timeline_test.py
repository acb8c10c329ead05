"""Timelines of kernels: spans in order, work that adds up, and the same in a terminal."""

import pytest

from gna_jax.pictures import kernel_timelines
from gna_jax.pictures.timeline import Lane, Span, timeline

TIMELINES = {  # flops of the eight products that it shows, and flops per clock
    "hopper forward": (kernel_timelines.hopper_forward, 8 * 2 * 64 * 128 * 128, 4096),
    "hopper backward": (kernel_timelines.hopper_key_gradient, 8 * 2 * 64 * 64 * 128, 4096),
    "blackwell forward": (kernel_timelines.blackwell_forward, 8 * 2 * 128**3, 8192),
    "cutlass on blackwell": (kernel_timelines.cutlass_blackwell_forward, 8 * 2 * 128**3, 8192),
    "blackwell backward": (kernel_timelines.blackwell_key_gradient, 8 * 2 * 128**3, 8192),
}


@pytest.mark.parametrize(("make", "flops", "rate"), TIMELINES.values(), ids=TIMELINES)
def test_the_matrix_unit_is_never_idle_and_does_the_whole_work(make, flops, rate):
    picture = make()
    unit, *_ = picture.lanes
    assert sum(span.length for span in unit.spans) == flops / rate
    ends = [span.start + span.length for span in unit.spans]
    assert [span.start for span in unit.spans] == [0, *ends[:-1]]


def test_text_shows_every_lane_to_scale():
    spans = (Span(0, 10, "first", "product"), Span(20, 20, "second", "softmax"))
    picture = timeline([Lane("unit", spans)], "a title")
    title, _, line, axis, *_ = picture.text(46).plain.split("\n")
    assert title == "a title"
    assert line.startswith("unit  █") and line[6 + 20] == "▒"
    assert "second" in line and axis.endswith("40 clocks")
    with pytest.raises(ValueError, match="needs lines of 26 characters; got width=20"):
        picture.text(20)


@pytest.mark.parametrize(
    "spans",
    [
        (Span(0, 10, "", "product"), Span(9, 5, "", "product")),
        (Span(0, 0, "", "product"),),
        (Span(0, 1, "", "nap"),),
    ],
)
def test_spans_that_are_no_timeline(spans):
    with pytest.raises(ValueError, match="one after the other.* in lane 'x'"):
        timeline([Lane("x", spans)])
