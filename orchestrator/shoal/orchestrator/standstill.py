"""When nobody can take a job's work: its requester is told why, and what would help."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Final

from shoal.market.clearing import Refusal
from shoal.orchestrator.auctioneer import Auctioneer
from shoal.orchestrator.context import Context
from shoal.orchestrator.dispatcher import Dispatcher
from shoal.orchestrator.health import EVENT
from shoal.orchestrator.jobs import Jobs
from shoal.orchestrator.journal import Journal
from shoal.orchestrator.sealer import Sealer
from shoal.orchestrator.workload import Workload
from shoal.protocol.errors import Unavailable
from shoal.protocol.money import format_dollars

CODE: Final = "nobody_takes_work"
_AFTER_MS: Final = 30_000
"""Workers need some seconds for a job's base and for the next market epoch."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class _Cause:
    """Why a lot waits: a word that tells causes apart, the figures, and what to do."""

    word: str
    finding: str
    remedy: str


@dataclass
class _Wait:
    """Since when nobody has had any of the job's work, and what its requester was told of it."""

    since_ms: int
    told: _Cause | None = None


class Standstills:
    """Follows the jobs whose work waits while no worker holds any of it.

    Args:
        context: The orchestrator's surroundings.
        journal: Where the events go.
        sealer: Whose book says who bids.
        auctioneer: Which lots wait.
        dispatcher: Who holds leases.
        jobs: Which run.
    """

    def __init__(
        self,
        context: Context,
        journal: Journal,
        sealer: Sealer,
        auctioneer: Auctioneer,
        dispatcher: Dispatcher,
        jobs: Jobs,
    ) -> None:
        self._context = context
        self._journal = journal
        self._sealer = sealer
        self._auctioneer = auctioneer
        self._dispatcher = dispatcher
        self._jobs = jobs
        self._waits: dict[str, _Wait] = {}

    async def look(self) -> None:
        """What has begun or ended to wait is on record; what fails is tried at the next look."""
        try:
            await self._look()
        except Unavailable as error:
            _log.warning("standstill_not_told", extra={"reason": error.message})

    async def _look(self) -> None:
        now_ms = self._context.time.now_ms()
        stuck: dict[str, Workload] = {}
        for workload in self._auctioneer.waiting():
            if not self._dispatcher.live_leases(workload.lot.job_id):
                stuck.setdefault(workload.lot.job_id, workload)
        for job_id in [*self._waits]:
            if job_id not in stuck:
                await self._goes_on(job_id)
        for job_id, workload in stuck.items():
            wait = self._waits.setdefault(job_id, _Wait(now_ms))
            if now_ms - wait.since_ms >= _AFTER_MS:
                await self._stands(job_id, wait, self._cause(workload))

    async def _goes_on(self, job_id: str) -> None:
        wait = self._waits[job_id]
        if wait.told is not None and self._jobs.running_version(job_id) is not None:
            await self._tell(job_id, wait.told, active=False)
        del self._waits[job_id]

    async def _stands(self, job_id: str, wait: _Wait, cause: _Cause) -> None:
        # Figures move with every bid; another cause is news.
        if wait.told is None or wait.told.word != cause.word:
            await self._tell(job_id, cause, active=True)
            wait.told = cause

    async def _tell(self, job_id: str, cause: _Cause, *, active: bool) -> None:
        facts = {
            "code": CODE,
            "active": active,
            "cause": cause.word,
            "finding": cause.finding,
            "remedy": cause.remedy,
            "policy_version": self._jobs.running_version(job_id) or 0,
        }
        await self._journal.event(job_id, EVENT, facts)

    def _cause(self, workload: Workload) -> _Cause:
        kind, placement = workload.kind.value, workload.placement
        if placement is not None and placement.ladder.nodes:
            return _Cause(
                word="busy",
                finding=f"every worker that may have its {kind} tasks is busy, away or left out",
                remedy="wait for them, or for others",
            )
        refused = {} if placement is None else placement.refused
        # The later a refusal stands in the order of the checks, the nearer was the bid.
        nearest = next((one for one in reversed(Refusal) if one in refused.values()), None)
        match nearest:
            case None | Refusal.EXPIRED:
                return _Cause(
                    word="no_bids",
                    finding=f"no worker bids for its {kind} tasks",
                    remedy="wait: workers fetch its base before they bid, and bid only where the "
                    f"most it pays, ${format_dollars(workload.reserve.reserve_micros)} for a "
                    "unit, is above their floor",
                )
            case Refusal.TASK_TOO_LARGE:
                return self._too_large(workload, refused)
            case Refusal.ABOVE_RESERVE | Refusal.ABOVE_POSTED_PRICE:
                return self._too_dear(workload, refused, nearest)
            case Refusal.STAKE_TOO_SMALL | Refusal.UNSTAKED:
                return _Cause(
                    word="stakes_too_small",
                    finding=f"no worker's free stake backs one of its {kind} tasks",
                    remedy="wait for workers with more at stake, or submit it again with "
                    f"smaller tasks.{kind}",
                )

    def _too_large(self, workload: Workload, refused: dict[bytes, Refusal]) -> _Cause:
        kind = workload.kind.value
        smallest = min(map(len, workload.waiting))
        most = max(self._bids(refused, Refusal.TASK_TOO_LARGE, "capacity"), default=0)
        return _Cause(
            word="tasks_too_large",
            finding=f"the smallest of its {kind} tasks has {smallest} units, and the largest "
            f"worker takes {most} at once",
            remedy=f"submit it again with tasks.{kind} of at most {most}, or wait for larger ones",
        )

    def _too_dear(
        self, workload: Workload, refused: dict[bytes, Refusal], refusal: Refusal
    ) -> _Cause:
        kind = workload.kind.value
        least = min(self._bids(refused, refusal, "price_micros"), default=0)
        most = workload.reserve.reserve_micros
        return _Cause(
            word="too_dear",
            finding=f"the cheapest worker asks ${format_dollars(least)} for a unit of {kind}, its "
            f"handicap not counted, and the most the job pays is ${format_dollars(most)}",
            remedy="wait for other workers, or submit it again with a higher "
            f"budget.max_unit_price.{kind}",
        )

    def _bids(self, refused: dict[bytes, Refusal], refusal: Refusal, name: str) -> list[int]:
        """The figure ``name`` of every bid refused for this, as far as it still stands."""
        market = self._sealer.market
        entries = () if market is None else market.book.opened
        return [
            int(getattr(entry.bid, name))
            for entry in entries
            if refused.get(entry.digest) is refusal
        ]
