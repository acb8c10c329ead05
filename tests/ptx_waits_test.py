"""The check of compiled kernels' waits (`ptx_waits`), on a few lines; on real kernels it is part of the resource tests."""

import pytest
from ptx_waits import unawaited, without_a_wait

KERNEL = """
.visible .entry kernel()
{{
	.reg .b32 	%r<9>;
$L__BB0_1:
	{issue}
	{between}
	// begin inline asm
	{wait};

	// end inline asm
	mbarrier.arrive.release.cta.shared::cta.b64 _, [%r5], 1;
	@%p1 bra 	$L__BB0_1;
	add.f32 %r7, %r1, %r2;
	ret;
}}
"""
WGMMA = "{ .reg .pred p; wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r1,%r2}, %rd1, %rd2, p, 1, 1, 0, 0; }"
LOAD = "tcgen05.ld.sync.aligned.16x256b.x8.b32 {%r1,%r2}, [%r3];"
STORE = "tcgen05.st.sync.aligned.16x256b.x8.b32 [%r3], {%r1,%r2};"
MEETING = """mbarrier.arrive.release.cta.shared::cta.b64 _, [%r6], 1;
	LAB_WAIT: mbarrier.try_wait.parity.shared.b64 P1, [%r6], %r4, %r8; @P1 bra.uni DONE; bra.uni LAB_WAIT; DONE:"""
WAITS = {
    WGMMA: "wgmma.wait_group.sync.aligned 0",
    LOAD: "tcgen05.wait::ld.sync.aligned",
    STORE: "tcgen05.wait::st.sync.aligned",
}


def kernel(issue, between=""):
    return KERNEL.format(issue=issue, between=between, wait=WAITS[issue])


@pytest.mark.parametrize("issue", WAITS)
def test_what_waits_is_in_order_and_without_the_wait_is_not(issue):
    ptx = kernel(issue)
    assert unawaited(ptx) == []
    (faulty,) = without_a_wait(ptx)
    (first, *_) = unawaited(faulty)
    assert first.startswith("mbarrier.arrive.release")


@pytest.mark.parametrize(
    ("issue", "between", "text"),
    [
        (WGMMA, "add.f32 %r7, %r1, %r2;", "wgmma still runs"),
        (WGMMA, "mov.b32 %r7, %r1;\n\tadd.f32 %r8, %r7, %r4;", "wgmma still runs"),
        (
            WGMMA,
            WGMMA.replace("{%r1,%r2}, %rd1", "{%r7,%r8}, {%r1,%r2}"),  # a sum as a left operand
            "wgmma still runs",
        ),
        (LOAD, STORE, "tcgen05.ld still runs"),
        (
            STORE,
            "mbarrier.arrive.release.cta.shared::cta.b64 _, [%r6], 1;",
            "tcgen05.st still runs",
        ),
    ],
)
def test_what_comes_too_early(issue, between, text):
    (found, *_) = unawaited(kernel(issue, between))
    assert found.endswith(text)


@pytest.mark.parametrize(
    ("issue", "between"),
    [
        (WGMMA, WGMMA),  # sums of one accumulator in order
        (WGMMA, "mov.b32 %r7, %r1;"),  # a name of the same register
        (WGMMA, MEETING),  # workers that take turns
        (LOAD, "add.f32 %r7, %r1, %r2;"),  # ptxas waits
    ],
)
def test_what_need_not_wait(issue, between):
    assert unawaited(kernel(issue, between)) == []


def test_a_wait_on_one_of_two_ways_is_none():
    ptx = kernel(WGMMA).replace("// begin", "@%p2 bra 	$L__BB0_2;\n// begin")
    assert unawaited(ptx.replace("mbarrier.arrive", "$L__BB0_2:\n	mbarrier.arrive"))
