"""What evaluations decide: which version is the best, and when a job may stop."""

from __future__ import annotations

from dataclasses import dataclass, field

from shoal.protocol.job import EvalSpec


@dataclass(kw_only=True)
class Standings:
    """The held-out avg@k of a job's versions, and what follows from it.

    Evaluations may finish in any order.  They are judged in the order of their versions, each
    once those before it are known, so that the verdict does not depend on who was slow.
    """

    rules: EvalSpec
    best_version: int | None = None
    best_average: float = 0.0
    stop_requested: str | None = None
    stop_version: int | None = None
    _due: list[int] = field(default_factory=list)
    _known: dict[int, float] = field(default_factory=dict)
    _without_progress: int = 0

    def expect(self, version: int) -> None:
        """The evaluation of ``version`` has begun; versions come in rising order."""
        self._due.append(version)

    def record(self, version: int, average: float) -> bool:
        """Takes in one result; whether there is a new best version."""
        self._known[version] = average
        before = self.best_version
        while self._due and self._due[0] in self._known:
            self._judge(self._due[0], self._known[self._due[0]])
            self._due.pop(0)
        return self.best_version != before

    def _judge(self, version: int, average: float) -> None:
        if self.best_version is None or average > self.best_average:
            self.best_version, self.best_average = version, average
            self._without_progress = 0
        else:
            self._without_progress += 1
        if self.stop_requested is None:
            self.stop_requested = self._reason(version, average)
            self.stop_version = version if self.stop_requested else None

    def stop_reason(self, through: int) -> str | None:
        """Why the job should stop, by the evaluations of versions up to ``through`` alone."""
        decided = self.stop_version is not None and self.stop_version <= through
        return self.stop_requested if decided else None

    def _reason(self, version: int, average: float) -> str | None:
        rules = self.rules
        if rules.target is not None and average >= rules.target:
            return (
                f"version {version} reached {average:.3f} on held-out prompts, the target is "
                f"{rules.target:g}"
            )
        if rules.patience is not None and self._without_progress >= rules.patience:
            return (
                f"{self._without_progress} evaluations in a row were no better than version "
                f"{self.best_version} with {self.best_average:.3f}"
            )
        return None
