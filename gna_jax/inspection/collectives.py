"""What a compiled program moves between devices, read from XLA's text: `collectives(jax.jit(f).lower(..).compile().as_text())`.

Works on programs for any platform, compiled without running. An operation in a loop's body counts once.
"""

import dataclasses
import math
import re

_KINDS = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
_OPERATION = re.compile(rf"= (?P<results>[^=]*?) (?P<kind>{_KINDS})(?P<is_start>-start)?\(")
_ARRAY = re.compile(r"(?P<dtype>[a-z]+\d*\w*)\[(?P<shape>[\d,]*)\]")
_PAIRS = re.compile(r"source_target_pairs=\{(?P<pairs>[\d{},]*)\}")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One operation.

    Args:
      kind: XLA's name of it: `collective-permute`, `all-gather`, ..
      arrays: dtype and shape of every result, on one device.
      pairs: `(sender, receiver)` of a permute; empty for the other kinds.
    """

    kind: str
    arrays: tuple[tuple[str, tuple[int, ...]], ...]
    pairs: tuple[tuple[int, int], ...]

    @property
    def elements(self) -> int:
        """Of all results, on one device."""
        return sum(math.prod(shape) for _, shape in self.arrays)

    @property
    def bytes(self) -> int:
        """Of all results, on one device."""
        return sum(_itemsize(dtype) * math.prod(shape) for dtype, shape in self.arrays)

    @property
    def bytes_sent(self) -> int:
        """Of a permute: by all devices together."""
        return self.bytes * len(self.pairs)


def collectives(program: str) -> tuple[Collective, ...]:
    """Every collective of a compiled program's text, in its order."""
    found = []
    for line in program.splitlines():
        operation = _OPERATION.search(line)
        if operation is None:
            continue
        arrays = [
            (array["dtype"], tuple(int(n) for n in array["shape"].split(",") if n))
            for array in _ARRAY.finditer(operation["results"])
        ]
        if operation["is_start"] and operation["results"].startswith("("):
            # A start hands on its operands, then the results, then words of its own.
            arrays = [array for array in arrays if array != ("u32", ())]
            arrays = arrays[len(arrays) // 2 :]
        pairs = _PAIRS.search(line)
        numbers = [int(n) for n in re.findall(r"\d+", pairs["pairs"])] if pairs else []
        both = tuple(zip(numbers[::2], numbers[1::2], strict=True))
        found.append(Collective(operation["kind"], tuple(arrays), both))
    return tuple(found)


def _itemsize(dtype: str) -> int:
    """Bytes of XLA's dtypes by their names: `f32`, `bf16`, `f8e4m3fn`, `pred`, .."""
    if dtype == "pred":
        return 1
    return int(re.sub(r"^[a-z]+", "", dtype).split("e")[0]) // 8
