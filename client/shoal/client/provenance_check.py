"""The offline provenance check, as commands use it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from shoal.protocol.errors import InvalidRequest

if TYPE_CHECKING:
    from rich.console import RenderableType

    from shoal.provenance.report import Report

_HEAD = re.compile(r"^(?:0x)?([0-9a-fA-F]{64})$")


def check_bundle(bundle: Path, model_dir: Path | None, head: bytes | None) -> Report:
    """What the offline check of the file ``bundle`` finds.

    Args:
        bundle: The bundle's file.
        model_dir: The downloaded adapter; absent leaves the files unchecked.
        head: The job's provenance head on chain; absent leaves it unchecked.

    Raises:
        InvalidRequest: there is no bundle there.
    """
    from shoal.provenance.bundle import read_bundle
    from shoal.provenance.verifier import verify_bundle

    return verify_bundle(read_bundle(bundle), model_dir, pinned_head=head)


def parse_head(text: str | None) -> bytes | None:
    """A head written in hex, as bytes.

    Raises:
        InvalidRequest: it is not 32 bytes of hex.
    """
    if text is None:
        return None
    match = _HEAD.match(text)
    if match is None:
        raise InvalidRequest(
            f"--head is {text[:80]!r}; write the 64 hex digits the chain holds for the job."
        )
    return bytes.fromhex(match.group(1))


def report_picture(report: Report) -> list[RenderableType]:
    """The report as a terminal shows it."""
    from rich.table import Table
    from rich.text import Text

    from shoal.provenance.report import DOES_NOT_PROVE, PROVES, PROVES_ONLY_WITH_HEAD, Outcome

    marks = {
        Outcome.PASSED: Text("PASS", style="green"),
        Outcome.FAILED: Text("FAIL", style="bold red"),
        Outcome.NOT_CHECKED: Text("—", style="dim"),
    }
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    # A digest cut short cannot be compared.
    table.add_column(overflow="fold")
    for step in report.steps:
        table.add_row(marks[step.outcome], step.name, Text(step.detail, style="dim"))
    if not report.passed:
        return [table, "", Text("FAIL", style="bold red")]
    notes = [f"Proves: {PROVES}"]
    if not report.head_pinned:
        notes.append(f"Note: {PROVES_ONLY_WITH_HEAD}")
    notes.append(f"Does not prove: {DOES_NOT_PROVE}")
    return [table, "", Text("PASS", style="bold green"), *(Text(note) for note in notes)]
