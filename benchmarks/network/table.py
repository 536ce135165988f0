"""What a benchmark found, and the one table all of them are shown in."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One measured promise.

    Attributes:
        what: What was measured, in a few words.
        measured: The figures, with their units.
        wanted: The bound promised; empty where none is.
        reached: Whether the bound holds; None where there is none, or nothing was measured.
    """

    what: str
    measured: str
    wanted: str = ""
    reached: bool | None = None

    def row(self) -> str:
        """The finding as a line of a Markdown table."""
        verdict = {True: "yes", False: "**no**", None: ""}[self.reached]
        return f"| {self.what} | {self.measured} | {self.wanted} | {verdict} |"


class Findings(Protocol):
    """What every benchmark module offers."""

    def __call__(self, *, quick: bool) -> Iterable[Finding]:
        """The findings, each as soon as it is known; `quick` trades precision for time."""
        ...


def show(title: str, findings: Iterable[Finding]) -> bool:
    """The findings are printed as they come; True when no bound was missed."""
    print(f"\n## {title}\n\n| what | measured | wanted | reached |\n| --- | --- | --- | --- |")
    held = True
    for finding in findings:
        print(finding.row(), flush=True)
        held = held and finding.reached is not False
    return held


def main_of(doc: str | None, findings: Findings) -> None:
    """One module's own command line: ``--quick`` or nothing."""
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, smaller crowds")
    show((doc or "").splitlines()[0].rstrip("."), findings(quick=parser.parse_args().quick))


def median(values: Sequence[float]) -> float:
    """The middle value; of an even number, the mean of the two in the middle."""
    return statistics.median(values)


def percentile(values: Sequence[float], share: float) -> float:
    """The least value that `share` of all do not exceed (nearest rank)."""
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, max(0, -(-len(ranked) * round(share * 1000) // 1000) - 1))]


def milliseconds(seconds: Sequence[float]) -> str:
    """The median and the 99th percentile, in words."""
    return f"p50 {median(seconds) * 1e3:.2f}, p99 {percentile(seconds, 0.99) * 1e3:.2f} ms"
