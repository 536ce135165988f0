"""What the doctor found: lines of OK, WARN or FAIL, each with its figure and its mend."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from shoal.protocol.record import Record

if TYPE_CHECKING:
    from rich.console import Console


class Level(StrEnum):
    """How bad it is: a worker works with WARN, perhaps badly, and does not with FAIL."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


class Finding(Record):
    """One line of the report.

    Writer: a check.  Reader: the provider, or its programs.

    Attributes:
        check: Stable name of what was looked at, such as ``clock``.
        level: How bad it is.
        what: The same in words.
        measured: What was found, with its figure.
        mend: What to do; empty when nothing needs mending.

    Example:
        >>> Finding(check="disk", level=Level.OK, what="disk", measured="80 GiB free").mend
        ''
    """

    check: str
    level: Level
    what: str
    measured: str
    mend: str = ""


class Report(Record):
    """Everything the doctor found, in the order of the checks."""

    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing keeps the worker from working."""
        return all(finding.level is not Level.FAIL for finding in self.findings)

    @property
    def exit_code(self) -> int:
        """0, or 1 when something keeps the worker from working."""
        return 0 if self.passed else 1

    def count(self, level: Level) -> int:
        """How many lines are of ``level``."""
        return sum(finding.level is level for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """The report for a program."""
        return {"passed": self.passed, **super().to_json()}


def ok(check: str, what: str, measured: str) -> Finding:
    """Nothing needs mending."""
    return Finding(check=check, level=Level.OK, what=what, measured=measured)


def warn(check: str, what: str, measured: str, mend: str) -> Finding:
    """The worker works, perhaps badly, until ``mend`` is done."""
    return Finding(check=check, level=Level.WARN, what=what, measured=measured, mend=mend)


def fail(check: str, what: str, measured: str, mend: str) -> Finding:
    """The worker does not work until ``mend`` is done."""
    return Finding(check=check, level=Level.FAIL, what=what, measured=measured, mend=mend)


_COLOURS = {Level.OK: "green", Level.WARN: "yellow", Level.FAIL: "bold red"}


def show(report: Report, console: Console) -> None:
    """``report`` is on the console, one line for each finding and below it its mend."""
    from rich.text import Text

    width = max((len(finding.what) for finding in report.findings), default=0)
    for finding in report.findings:
        line = Text(f"{finding.level.value.upper():<5} ", style=_COLOURS[finding.level])
        line.append(f"{finding.what:<{width}}  ", style="bold")
        line.append(printable(finding.measured), style="default")
        if finding.mend:
            line.append(f"  — {printable(finding.mend)}", style="default")
        # An address cut in two by a line break cannot be copied.
        console.print(line, soft_wrap=True)
    console.print(Text(verdict(report), style="bold"), soft_wrap=True)


def verdict(report: Report) -> str:
    """The report in a sentence."""
    failed, warned = report.count(Level.FAIL), report.count(Level.WARN)
    if failed:
        return f"{_things(failed)} to mend before this worker can work."
    if warned:
        return f"This worker can work; {_things(warned)} would make it work better."
    return "This worker can work."


def _things(count: int) -> str:
    return "1 thing" if count == 1 else f"{count} things"


def printable(text: str) -> str:
    """``text`` on one line and without control characters: strangers write error texts too."""
    words = "".join(c if c.isprintable() else " " for c in text)
    return " ".join(words.split())


def gathered(parts: Iterable[Iterable[Finding]]) -> Report:
    """One report of many checks' findings."""
    return Report(findings=tuple(finding for part in parts for finding in part))


def size(num_bytes: float) -> str:
    """``num_bytes`` for people.

    Example:
        >>> size(1_610_612_736)
        '1.5 GiB'
    """
    for unit in ("bytes", "KiB", "MiB"):
        if abs(num_bytes) < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "bytes" else f"{num_bytes:.3g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.3g} GiB"
