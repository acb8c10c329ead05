"""What `make test-all` found, file by file: `python tests/all_results.py REPORT.xml .. > tests/all_results.md`.

Reads pytest's --junitxml reports. A run that takes hours is kept in the repository, so that a reader need not repeat it.
"""

import dataclasses
import os
import platform
import sys
import xml.etree.ElementTree as ElementTree
from importlib.metadata import version
from pathlib import Path

STATES = ("passed", "failed", "skipped")
HEAD = """# The last full matrices

What `make test-all` runs: every test that needs no GPU, those marked `slow`, `kernel` and `triton` included. A file that is not in the
table was not run. Seconds are of the tests themselves, two at a time.

"""


@dataclasses.dataclass
class Tally:
    """Of one file: how many tests ended how, and their seconds."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0

    def add(self, test: ElementTree.Element) -> None:
        """Count one `testcase` of a report."""
        states = {"failure": "failed", "error": "failed", "skipped": "skipped"}
        found = next((states[part.tag] for part in test if part.tag in states), "passed")
        setattr(self, found, getattr(self, found) + 1)
        self.seconds += float(test.get("time", 0))

    def row(self, name: str) -> str:
        """A row of the table."""
        counts = " | ".join(str(getattr(self, state)) for state in STATES)
        return f"| {name} | {counts} | {self.seconds:.0f} |"


def tallies(reports: list[Path]) -> dict[str, Tally]:
    """By file, in their order. A test that two reports have counts once, as in the last."""
    tests = {}
    for report in reports:
        for test in ElementTree.parse(report).iter("testcase"):
            tests[test.get("classname"), test.get("name")] = test
    found: dict[str, Tally] = {}
    for (module, _), test in sorted(tests.items(), key=lambda item: str(item[0])):
        found.setdefault(str(module).split(".")[1], Tally()).add(test)
    return found


def dates(reports: list[Path]) -> str:
    """First and last day of the runs."""
    days = {
        suite.get("timestamp", "unknown")[:10]
        for report in reports
        for suite in ElementTree.parse(report).iter("testsuite")
    }
    return " to ".join(sorted({min(days), max(days)}))


def text(reports: list[Path]) -> str:
    """The page."""
    found, total = tallies(reports), Tally()
    for tally in found.values():
        for name in (*STATES, "seconds"):
            setattr(total, name, getattr(total, name) + getattr(tally, name))
    where = f"{dates(reports)}, Python {platform.python_version()}, jax {version('jax')}, {os.cpu_count()} cores of {platform.machine()}.\n\n"
    table = ["| tests | passed | failed | skipped | seconds |", "|---|---|---|---|---|"]
    table += [tally.row(f"`{name}.py`") for name, tally in found.items()]
    return HEAD + where + "\n".join([*table, total.row("all")]) + "\n"


if __name__ == "__main__":
    print(text([Path(name) for name in sys.argv[1:]]), end="")
