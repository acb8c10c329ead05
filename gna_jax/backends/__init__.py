"""The implementations by name, and the ladder that chooses one.

Each rung is a module with `PLATFORMS` (None: all), `supports(problem, tiles) -> None | reason`, `forward` and `backward`.
GPU rungs come first and are imported only when asked for. Rules (docs: "Which implementation runs"):

- a name runs, or raises NotImplementedError with its reason;
- a sequence is the caller's own ladder: the first that can, else an error that lists every reason;
- None takes a GPU rung only on its platform and where it is verified, else "xla"; a GPU rung that declined on its own
  platform warns once per distinct reason.
"""

import dataclasses
import importlib
import warnings
from collections.abc import Sequence
from types import ModuleType

from gna_jax.backends.verified import is_verified
from gna_jax.problem import Problem
from gna_jax.tiling import Tiles


class GnaPerformanceWarning(UserWarning):
    """A default passed over a GPU kernel; the text says which, why, and the nearest legal change."""


@dataclasses.dataclass(frozen=True)
class Rung:
    """One implementation: its name, its module, and the platforms it runs on (None: all)."""

    name: str
    module: str
    platforms: tuple[str, ...] | None = None

    def load(self) -> ModuleType:
        """The backend's module."""
        return importlib.import_module(self.module)

    def reason(self, problem: Problem, tiles: Tiles | None) -> str | None:
        """None, or why this rung cannot run the problem."""
        if self.platforms is not None and problem.device.platform not in self.platforms:
            return (
                f"{self.name} runs on {' or '.join(self.platforms)}, the device is {problem.device.kind};"
                " name the target with device=, or use 'xla'"
            )
        return self.load().supports(problem, tiles)


RUNGS = (
    Rung("cutlass", "gna_jax.backends.cutlass", ("cuda",)),
    Rung("mosaic", "gna_jax.backends.mosaic", ("cuda",)),
    Rung("triton", "gna_jax.backends.triton", ("cuda",)),
    Rung("xla", "gna_jax.backends.xla"),
    Rung("reference", "gna_jax.backends.reference"),
)


@dataclasses.dataclass(frozen=True)
class Choice:
    """What runs, and why each other rung does not: (name, reason) in ladder order."""

    name: str
    reasons: tuple[tuple[str, str], ...]


def choose(
    problem: Problem,
    implementation: str | Sequence[str] | None,
    tiles: Tiles | None,
    rungs: Sequence[Rung] = RUNGS,
) -> Choice:
    """Apply the rules above.

    Raises:
      ValueError: for a name that no rung has.
      NotImplementedError: where a named implementation cannot run, with every reason.
    """
    by_name = {rung.name: rung for rung in rungs}
    if implementation is None:
        return _default(problem, tiles, rungs)
    names = (implementation,) if isinstance(implementation, str) else tuple(implementation)
    unknown = [name for name in names if name not in by_name]
    if unknown or not names:
        raise ValueError(
            f"implementation must be one of {tuple(by_name)}, a sequence of them, or None;"
            f" got implementation={implementation!r}"
        )
    reasons = []
    for name in names:
        reason = by_name[name].reason(problem, tiles)
        if reason is None:
            return Choice(name, tuple(reasons))
        reasons.append((name, reason))
    raise NotImplementedError(
        f"implementation={implementation!r} cannot run this call: "
        + "; ".join(reason for _, reason in reasons)
    )


def _default(problem: Problem, tiles: Tiles | None, rungs: Sequence[Rung]) -> Choice:
    reasons: list[tuple[str, str]] = []
    for rung in rungs:
        reason = rung.reason(problem, tiles)
        on_its_platform = rung.platforms is not None and problem.device.platform in rung.platforms
        if reason is None and on_its_platform and not is_verified(rung.name, problem.device):
            reason = (
                f"{rung.name} has not been verified on {problem.device.kind};"
                f" pass implementation={rung.name!r} to use it all the same, or let it be checked there once:"
                f" gna-jax verify --implementation {rung.name}"
            )
        if reason is None and rung.name != "reference":
            return Choice(rung.name, tuple(reasons))
        if reason is None:
            reason = "reference is dense, tokens squared: it runs only when named"
        reasons.append((rung.name, reason))
    raise NotImplementedError(
        "no implementation can run this call: " + "; ".join(reason for _, reason in reasons)
    )


_warned: set[str] = set()


def warn_declined(problem: Problem, choice: Choice, rungs: Sequence[Rung] = RUNGS) -> None:
    """One GnaPerformanceWarning per distinct reason for which a GPU rung declined on its own platform."""
    for rung in rungs:
        reason = dict(choice.reasons).get(rung.name)
        if reason is None or not rung.platforms or problem.device.platform not in rung.platforms:
            continue
        if reason not in _warned:
            _warned.add(reason)
            warnings.warn(
                f"gna runs {choice.name!r} on {problem.device.kind}: {reason}",
                GnaPerformanceWarning,
                stacklevel=4,
            )


def load(name: str) -> ModuleType:
    """The module of a rung."""
    return next(rung for rung in RUNGS if rung.name == name).load()
