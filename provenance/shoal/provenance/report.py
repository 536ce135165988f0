"""What a check of a bundle found, step by step, in words."""

from __future__ import annotations

from enum import StrEnum

from pydantic import Field

from shoal.protocol.record import Record

PROVES = (
    "Who signed each statement, which account each signer answers to, that no statement was "
    "altered, added, dropped or reordered under the head, and that pay equals the accepted "
    "verdicts."
)
PROVES_ONLY_WITH_HEAD = (
    "No head was pinned, so a consistent forgery would also pass: compare the head with the "
    "one the chain holds for this job."
)
DOES_NOT_PROVE = (
    "That a contribution influenced the weights, that the orchestrator's verdicts were right, "
    "or that the data could lawfully be used."
)


class Outcome(StrEnum):
    """How a step ended."""

    PASSED = "passed"
    FAILED = "failed"
    NOT_CHECKED = "not_checked"


class Step(Record):
    """One step; ``detail`` says what was compared, or why it failed or was not done."""

    name: str
    outcome: Outcome
    detail: str


class Report(Record):
    """The steps in order, up to the first failure, and what they add up to.

    ``passed`` is true when no step failed; ``head_pinned`` says whether the head came from
    outside the bundle, without which a pass means consistency only.
    """

    steps: tuple[Step, ...]
    passed: bool
    head_pinned: bool
    num_statements: int = Field(ge=0)

    def failure(self) -> Step | None:
        """The step that failed, if one did."""
        return next((step for step in self.steps if step.outcome is Outcome.FAILED), None)

    def text(self) -> str:
        """The report for a person to read."""
        marks = {Outcome.PASSED: "PASS", Outcome.FAILED: "FAIL", Outcome.NOT_CHECKED: "----"}
        lines = [f"{marks[step.outcome]}  {step.name:<12} {step.detail}" for step in self.steps]
        lines.append("PASS" if self.passed else "FAIL")
        if self.passed:
            lines.append(f"Proves: {PROVES}")
            if not self.head_pinned:
                lines.append(f"Note: {PROVES_ONLY_WITH_HEAD}")
            lines.append(f"Does not prove: {DOES_NOT_PROVE}")
        return "\n".join(lines)
