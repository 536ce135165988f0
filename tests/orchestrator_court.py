"""A judge at work: a job whose policy is real, a worker, and what it hands in."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from learning_fixtures import Lab as School
from learning_fixtures import spread_rewards
from orchestrator_lab import Lab, Peer, Sale, open_lab, until

from shoal.orchestrator.leases import LiveLease
from shoal.orchestrator.main import Orchestrator
from shoal.protocol.job import JobSpec
from shoal.protocol.learning import GradientSpec
from shoal.protocol.market import TaskKind
from shoal.protocol.node import LeaseOffer, ResultMessage
from shoal.protocol.result import Verdict
from shoal.protocol.task import RolloutTask, Task
from shoal.rl.batch import GradientSlice, RolloutPayload, RowLimits
from shoal.rl.environments import Split
from shoal.rl.gradient import encode_slice, make_groups
from shoal.rl.rollout import encode_prompts, run_rollout


class Court:
    """A job whose policy is real, a worker, and the judge at work."""

    def __init__(
        self,
        lab: Lab,
        school: School,
        job: str,
        peer: Peer,
        sale: Sale,
        judging: asyncio.Task[None],
    ) -> None:
        self.lab, self.school, self.job, self.peer, self.sale = lab, school, job, peer, sale
        self.verifier = lab.orchestrator.verifier
        self.member = lab.orchestrator.roster.member(peer.node)
        self.ledger = lab.orchestrator.settler.ledger(job)
        self.judging = judging

    async def lease(self, peer: Peer | None = None) -> tuple[LeaseOffer, LiveLease]:
        return await self.lab.lease(peer or self.peer, self.sale)

    def honest(self, offer: LeaseOffer, peer: Peer | None = None) -> ResultMessage:
        task = cast(RolloutTask, offer.task)
        payload = run_rollout(self.school.policy, task, self.school.environments)
        return self.message(offer, payload, peer)

    def message(
        self, offer: LeaseOffer, payload: bytes, peer: Peer | None = None, **changes: Any
    ) -> ResultMessage:
        self.lab.context.blobs.put_bytes(payload)
        try:
            num_tokens = self.decoded(offer, payload).num_tokens
        except Exception:
            num_tokens = 1
        return (peer or self.peer).message(offer, payload, **{"num_tokens": num_tokens, **changes})

    def decoded(self, offer: LeaseOffer, payload: bytes) -> RolloutPayload:
        task = cast(RolloutTask, offer.task)
        return RolloutPayload.decode(
            payload,
            RowLimits(
                num_prompts=len(task.prompts),
                num_rows=len(task.prompts) * task.group_size,
                max_tokens=task.sampling.max_tokens,
                vocab_size=self.school.policy.vocab_size,
            ),
        )

    def lied(self, offer: LeaseOffer, shift: float = 0.05) -> ResultMessage:
        """Real tokens with log-probabilities that are not theirs."""
        task = cast(RolloutTask, offer.task)
        true = run_rollout(self.school.policy, task, self.school.environments)
        payload = self.decoded(offer, true)
        forged = RolloutPayload(
            prompts_sha256=payload.prompts_sha256,
            token_ids=payload.token_ids,
            logprobs=tuple(row - shift for row in payload.logprobs),
            finished=payload.finished,
            rewards=payload.rewards,
        )
        return self.message(offer, forged.encode())

    async def verdict(self, message: ResultMessage, live: LiveLease) -> Verdict:
        """The verdict on ``message`` as the worker reads it from its next heartbeat."""
        peer = self.peer
        await peer.submit(message)
        await until(lambda: live.record.state.is_final)
        lease_id = live.lease.lease_id
        member = self.lab.orchestrator.roster.find(live.lease.node)
        assert member is not None
        signed = member.undelivered[cast(Any, lease_id)]
        signed.require_signer(self.lab.context.domain, self.lab.context.account.address)
        return signed.record


async def gradient_sale(
    lab: Lab, school: School, job: str, spec: GradientSpec
) -> tuple[Sale, GradientSlice]:
    """A gradient over rows that the school's policy sampled, on the market; and those rows."""
    plan = school.plan
    rollout = plan.rollout(0, school.version(), plan.prompts(0), range(2))
    prompts = encode_prompts(school.policy, school.environments, rollout.prompts, Split.TRAIN)
    limits = RowLimits(num_prompts=2, num_rows=8, max_tokens=5, vocab_size=school.policy.vocab_size)
    drawn = RolloutPayload.decode(run_rollout(school.policy, rollout, school.environments), limits)
    rows = encode_slice(make_groups(drawn, prompts, spread_rewards(8), 4, plan.spec.loss))
    ref = lab.context.blobs.put_bytes(rows.encode(), pin=True)
    task = plan.gradient(0, school.version(), ref, num_rows=8, num_groups=2)
    sale = Sale(job, 2, 1_000, 2)
    lot = sale.workload.lot
    lot_class = lot.lot_class.model_copy(update={"kind": TaskKind.GRADIENT})
    sale.workload.lot = lot.model_copy(update={"lot_class": lot_class})
    sale.make = lambda units: task.model_copy(update={"gradient": spec})
    await lab.orchestrator.auctioneer.open(sale.workload)
    return sale, rows


def learner_of(school: School, spec: JobSpec | None = None) -> Any:
    """What a running job has learnt with, as far as a judge asks for it."""
    return SimpleNamespace(
        policy=school.policy,
        auditor=school.auditor,
        spec=spec or school.plan.spec,
        environments=school.environments,
    )


def enrol(orchestrator: Orchestrator, job: str, learner: Any) -> None:
    """The job runs, as far as a judge can tell."""
    running = SimpleNamespace(learner=learner, selling=False, policy=None, let_go=lambda: None)
    orchestrator.jobs._running[job] = cast(Any, running)


async def taught(lab: Lab, school: School) -> str:
    """A running job whose policy is the school's."""
    job = await lab.add_job()
    lab.context.blobs.put_bytes(school.policy.adapter_bytes(), pin=True)
    enrol(lab.orchestrator, job, learner_of(school))
    return job


@asynccontextmanager
async def court(
    folder: Path, school: School, *, num_units: int = 2, spot_check_rate: float = 0.05
) -> AsyncIterator[Court]:
    """A court in session over ``folder``, with the policy and the tasks of ``school``."""
    async with open_lab(folder) as lab:
        job = await taught(lab, school)
        sale = await lab.open_sale(job, num_units)
        version = school.version()

        def make(units: Sequence[int]) -> Task:
            return school.plan.rollout(0, version, school.plan.prompts(0), units)

        sale.make = make
        sale.workload.verify = sale.workload.verify.model_copy(
            update={"spot_check_rate": spot_check_rate}
        )
        judging = lab.start(lab.orchestrator.verifier.run())
        yield Court(lab, school, job, await lab.peer(), sale, judging)
