"""What the operator watches: `/metrics` for Prometheus, and `/health` for a supervisor."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator
from time import monotonic
from typing import Final

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from shoal.contracts.delivery import Stage
from shoal.market.lease import LeaseState
from shoal.network.meters import Kind, Sample
from shoal.orchestrator.context import Context
from shoal.orchestrator.dispatcher import Dispatcher
from shoal.orchestrator.roster import Roster
from shoal.orchestrator.store.tables import JobRow, OutboxRow
from shoal.protocol.errors import ShoalError
from shoal.protocol.version import SOFTWARE_VERSION

METRICS_TYPE: Final = CONTENT_TYPE_LATEST
PREFIX: Final = "shoal_"
_METRICS_AGE_S: Final = 1.0
_HEALTH_AGE_S: Final = 2.0
_PART_S: Final = 3.0


class Vitals:
    """Metrics and health, each looked up at most once in a while, however many ask.

    Args:
        context: The orchestrator's surroundings.
        roster: Who is here.
        dispatcher: Whose leases are counted.
        monotonic_s: The machine's monotonic clock.
    """

    def __init__(
        self,
        context: Context,
        roster: Roster,
        dispatcher: Dispatcher,
        monotonic_s: Callable[[], float] = monotonic,
    ) -> None:
        self._context = context
        self._roster = roster
        self._dispatcher = dispatcher
        self._monotonic_s = monotonic_s
        self._turn = asyncio.Lock()
        self._metrics: tuple[float, bytes] | None = None
        self._health: tuple[float, dict[str, str]] | None = None

    async def metrics(self) -> bytes:
        """The metrics in Prometheus' text form.

        Raises:
            Unavailable: the database does not answer.
        """
        async with self._turn:
            now_s = self._monotonic_s()
            if self._metrics is None or now_s - self._metrics[0] >= _METRICS_AGE_S:
                stages, jobs = await self._context.database.run(self._counted)
                families = [*self._own(stages, jobs), *metered(self._meters())]
                self._metrics = (now_s, rendered(families))
            return self._metrics[1]

    async def health(self) -> dict[str, str]:
        """How each part is: ``ok``, or what is wrong with it; says no address and no secret."""
        async with self._turn:
            now_s = self._monotonic_s()
            if self._health is None or now_s - self._health[0] >= _HEALTH_AGE_S:
                parts = {
                    "database": self._context.database.run(
                        lambda session: session.scalar(select(1))
                    ),
                    "chain": self._context.chain.now_s(),
                }
                answers = await asyncio.gather(*map(_answers, parts.values()))
                found = dict(zip(parts, answers, strict=True))
                listens = bool(self._context.network.addresses)
                found["network"] = "ok" if listens else "does not listen"
                self._health = (now_s, found)
            return self._health[1]

    def _counted(self, session: Session) -> tuple[dict[str, int], dict[str, int]]:
        unfinished = [stage.value for stage in Stage if stage is not Stage.FINAL]
        stages = session.execute(
            select(OutboxRow.stage, func.count())
            .where(OutboxRow.account == self._context.account.address)
            .where(OutboxRow.stage.in_(unfinished))
            .group_by(OutboxRow.stage)
        ).all()
        jobs = session.execute(select(JobRow.state, func.count()).group_by(JobRow.state)).all()
        return {row[0]: row[1] for row in stages}, {row[0]: row[1] for row in jobs}

    def _meters(self) -> tuple[Sample, ...]:
        return self._context.network.meters.snapshot()

    def _own(self, stages: dict[str, int], jobs: dict[str, int]) -> Iterator[Metric]:
        members = self._roster.members()
        connected = sum(member.connected for member in members)
        leases = self._dispatcher.states()
        yield _gauge(
            "workers",
            "Workers that joined since the start.",
            "state",
            {"connected": connected, "gone": len(members) - connected},
        )
        yield _gauge(
            "leases",
            "Leases that have not ended.",
            "state",
            {state.value: leases[state] for state in LeaseState if not state.is_final},
        )
        yield _gauge("jobs", "Jobs in the database.", "state", jobs)
        yield _gauge(
            "chain_outbox",
            "Effects on the chain that are not final.",
            "stage",
            {
                stage.value: stages.get(stage.value, 0)
                for stage in Stage
                if stage is not Stage.FINAL
            },
        )
        yield _gauge(
            "results_waiting",
            "Results that wait for their verdict.",
            None,
            {"": leases[LeaseState.SUBMITTED]},
        )
        held = {"": self._context.blobs.total_bytes}
        yield _gauge("blob_store_bytes", "Blobs on this disk.", None, held)
        yield _gauge("build", "Always 1.", "version", {SOFTWARE_VERSION: 1})


def metered(samples: Iterable[Sample]) -> Iterator[Metric]:
    """The node's meters, one family for each name; a label that a sample lacks is empty."""
    by_name: dict[str, list[Sample]] = {}
    for sample in samples:
        by_name.setdefault(sample.name, []).append(sample)
    for name, found in by_name.items():
        labels = sorted({label for sample in found for label, _ in sample.labels})
        words = f"Of this node: {name.replace('_', ' ')}."
        family: CounterMetricFamily | GaugeMetricFamily
        if found[0].kind is Kind.COUNTER:
            family = CounterMetricFamily(PREFIX + name, words, labels=labels)
        else:
            family = GaugeMetricFamily(PREFIX + name, words, labels=labels)
        for sample in found:
            values = dict(sample.labels)
            family.add_metric([values.get(label, "") for label in labels], sample.value)
        yield family


def rendered(families: Iterable[Metric]) -> bytes:
    """``families`` and the process's own figures, in Prometheus' text form."""
    registry = CollectorRegistry(auto_describe=False)
    ProcessCollector(registry=registry)
    registry.register(_Gathered(families))
    return generate_latest(registry)


class _Gathered(Collector):
    """Families that were gathered beforehand, where waiting is allowed."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = list(families)

    def collect(self) -> Iterable[Metric]:
        return self._families

    def describe(self) -> Iterable[Metric]:
        return ()


def _gauge(name: str, words: str, label: str | None, values: dict[str, int]) -> Metric:
    family = GaugeMetricFamily(PREFIX + name, words, labels=[] if label is None else [label])
    for value, count in values.items():
        family.add_metric([] if label is None else [value], count)
    return family


async def _answers(asked: Awaitable[object]) -> str:
    # What the part says is not repeated: it may name an address with a secret in it.
    try:
        async with asyncio.timeout(_PART_S):
            await asked
    except TimeoutError:
        return f"no answer within {_PART_S:g} s"
    except ShoalError as error:
        return f"does not answer ({error.code})"
    return "ok"
