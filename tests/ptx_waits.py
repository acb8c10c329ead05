"""What the interpreter cannot see: asynchronous instructions of compiled kernels, and whether anything goes on before they are done.

Reads PTX. wgmma, loads from and stores to tensor memory (tcgen05.ld, tcgen05.st) run on after their issue:

- what wgmma accumulates is not read, and no slot of shared memory is said to be free, before `wgmma.wait_group 0`;
- nobody is told to go on, and tensor memory is not written, before loads from it have waited (`tcgen05.wait::ld`). Their registers
  may be read at once: ptxas waits for them, says jax's documentation of `async_load_tmem`;
- nobody is told to go on before stores to tensor memory have waited (`tcgen05.wait::st`).
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

WAITS = {
    "wgmma.wait_group.sync.aligned 0": "wgmma",
    "tcgen05.wait::ld.sync.aligned": "tcgen05.ld",
    "tcgen05.wait::st.sync.aligned": "tcgen05.st",
}
"""What each waiting instruction ends."""
ISSUES = {"wgmma.mma_async": "wgmma", "tcgen05.ld": "tcgen05.ld", "tcgen05.st": "tcgen05.st"}
RELEASE = "mbarrier.arrive.release"
"""An arrival that tells others to go on; those that announce a copy's bytes are `mbarrier.arrive.expect_tx`."""
FORBIDS = {
    "wgmma": (RELEASE,),
    "tcgen05.ld": (RELEASE, "tcgen05.st"),
    "tcgen05.st": (RELEASE,),
}
"""What may not be issued while something runs."""
REGISTER = re.compile(r"%[a-z]+\d+")


class Statement(NamedTuple):
    """An instruction: its text without predicate, whether it has one, its labels."""

    text: str
    is_predicated: bool
    labels: tuple[str, ...]


def statements(ptx: str) -> list[Statement]:
    """The instructions of the kernel's body, in order."""
    ptx = re.sub(r"//.*|^\s*\.loc .*$", "", ptx, flags=re.MULTILINE)
    body = ptx[ptx.index("{") :]
    found, labels = [], []
    for text in re.split(r"[;\n]", body):
        text = text.strip().lstrip("{} \t").strip()
        while match := re.match(r"([$\w]+):(?!:)\s*", text):
            labels.append(match[1])
            text = text[match.end() :]
        text = text.lstrip("{} \t").rstrip("} \t") if text.startswith(("{", "}")) else text
        if not text or text.startswith("."):
            continue
        predicate = re.match(r"@!?%?\w+\s+", text)
        found.append(
            Statement(text[predicate.end() if predicate else 0 :], bool(predicate), tuple(labels))
        )
        labels = []
    return found


def unawaited(ptx: str) -> list[str]:
    """Every instruction that comes too early, with what still runs."""
    program = statements(ptx)
    places: dict[str, list[int]] = {}
    for number, statement in enumerate(program):
        for label in statement.labels:
            places.setdefault(label, []).append(number)
    running: dict[int, frozenset[str]] = {0: frozenset()}
    pending, errors = [0], {}
    while pending:
        number = pending.pop()
        state, text = running[number], program[number].text
        for kind in too_early(program, number, state):
            errors[number] = f"{text[:120]}: {kind} still runs"
        after = step(text, state)
        for following in successors(program, places, number):
            known = running.get(following)
            if known is None or not after <= known:
                running[following] = after | (known or frozenset())
                pending.append(following)
    return [errors[number] for number in sorted(errors)]


def without_a_wait(ptx: str) -> Iterator[str]:
    """The text without the first, the second .. of its waits: planted faults."""
    lines = ptx.splitlines()
    for number, line in enumerate(lines):
        if line.strip().startswith(tuple(WAITS)):
            yield "\n".join([*lines[:number], *lines[number + 1 :]])


def successors(
    program: list[Statement], places: dict[str, list[int]], number: int
) -> Iterator[int]:
    """Where control may go from an instruction.

    Labels of inline assembly recur with every loop that waits for a barrier, `LAB_WAIT: try; @done bra DONE; bra LAB_WAIT; DONE:`.
    """
    text, is_predicated, _ = program[number]
    opcode = re.split(r"[.\s]", text, maxsplit=1)[0]
    if opcode == "bra":
        found = places[text.split()[-1]]
        if len(found) > 1:
            found = (
                [n for n in found if n > number][:1]
                if is_predicated
                else [n for n in found if n < number][-1:]
            )
        yield found[0]
    if number + 1 < len(program) and (is_predicated or opcode not in ("bra", "ret", "exit")):
        yield number + 1


def step(text: str, state: frozenset[str]) -> frozenset[str]:
    """What runs after an instruction: kinds, and `register` entries that wgmma still writes."""
    for wait, kind in WAITS.items():
        if text.startswith(wait):
            kept = {entry for entry in state if entry != kind}
            return frozenset(e for e in kept if kind != "wgmma" or not e.startswith("%"))
    for issue, kind in ISSUES.items():
        if text.startswith(issue):
            written = REGISTER.findall(text.partition("{")[2].partition("}")[0])
            return state | {kind} | (set(written) if kind == "wgmma" else set())
    target, sources = operands(text)
    if text.startswith("mov") and sources & state:
        return state | target
    return state


def too_early(program: list[Statement], number: int, state: frozenset[str]) -> Iterator[str]:
    """The kinds that run and must not while this instruction is issued."""
    text = program[number].text
    for kind, forbidden in FORBIDS.items():
        if kind in state and text.startswith(forbidden) and not is_meeting(program, number):
            yield kind
    # A register may be named anew, and wgmma may go on with its own sum; it may not take another's as its left operand.
    if not text.startswith("mov") and operands(text)[1] & state:
        yield "wgmma"


def is_meeting(program: list[Statement], number: int) -> bool:
    """Whether an arrival is one that the same threads wait for right away: workers that take turns, no slot that is free."""
    place = re.search(r"\[(%\w+)\]", program[number].text)
    waits = (s.text for s in program[number + 1 :] if s.text.startswith("mbarrier"))
    following = next(waits, "")
    return (
        place is not None
        and following.startswith("mbarrier.try_wait")
        and f"[{place[1]}]" in following
    )


def operands(text: str) -> tuple[frozenset[str], frozenset[str]]:
    """Registers written, the first operand, and all others."""
    _, _, rest = text.partition(" ")
    target, _, sources = rest.partition("}") if rest.startswith("{") else rest.partition(",")
    return frozenset(REGISTER.findall(target)), frozenset(REGISTER.findall(sources))
