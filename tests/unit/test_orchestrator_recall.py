"""After a restart work is not bought again if it was accepted and its bytes are still there."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from learning_fixtures import Lab as School
from learning_fixtures import write_base
from orchestrator_court import learner_of
from orchestrator_lab import Lab, Sale, open_lab, run, until
from sqlalchemy.orm import Session

from shoal.market.lease import LeaseState
from shoal.orchestrator.recall import Recall
from shoal.orchestrator.store.tables import LeaseRow
from shoal.orchestrator.workload import Workload
from shoal.protocol.result import Result
from shoal.protocol.task import RolloutTask
from shoal.rl.batch import RolloutPayload, RowLimits
from shoal.rl.rollout import run_rollout


@pytest.fixture(scope="module")
def school(tmp_path_factory: pytest.TempPathFactory) -> School:
    return School.open(write_base(tmp_path_factory.mktemp("base")))


class Stall:
    """A market that only notes what is offered."""

    def __init__(self) -> None:
        self.opened: list[Workload] = []

    async def open(self, workload: Workload) -> None:
        self.opened.append(workload)


class Past:
    """A job with one accepted and paid parcel of rollouts, whose orchestrator starts anew."""

    def __init__(self, lab: Lab, school: School, job: str) -> None:
        self.lab, self.school, self.job = lab, school, job
        self.learner = learner_of(school)

    def sale(self) -> Sale:
        sale = Sale(self.job, 2, 1_000, 2)
        plan, version = self.school.plan, self.school.version()
        sale.make = lambda units: plan.rollout(0, version, plan.prompts(0), units).model_copy(
            update={"job_id": self.job}
        )
        return sale

    async def work(self) -> str:
        """One lease is leased, done, accepted and paid; its id."""
        lab, policy = self.lab, self.school.policy
        lab.context.blobs.put_bytes(policy.adapter_bytes(), pin=True)
        lab.orchestrator.jobs._running[self.job] = cast(
            Any, SimpleNamespace(learner=self.learner, selling=False, policy=None)
        )
        lab.start(lab.orchestrator.verifier.run())
        peer, sale = await lab.peer(), self.sale()
        await lab.orchestrator.auctioneer.open(sale.workload)
        offer, live = await lab.lease(peer, sale)
        task = cast(RolloutTask, offer.task)
        data = run_rollout(policy, task, self.school.environments)
        lab.context.blobs.put_bytes(data)
        limits = RowLimits(
            num_prompts=len(task.prompts),
            num_rows=len(task.prompts) * task.group_size,
            max_tokens=task.sampling.max_tokens,
            vocab_size=policy.vocab_size,
        )
        num_tokens = RolloutPayload.decode(data, limits).num_tokens
        await peer.submit(peer.message(offer, data, num_tokens=num_tokens))
        await until(lambda: live.record.state is LeaseState.ACCEPTED and bool(sale.delivered))
        return live.lease.lease_id

    async def edit(self, lease_id: str, **values: Any) -> None:
        def write(session: Session) -> None:
            row = session.get_one(LeaseRow, lease_id)
            for name, value in values.items():
                setattr(row, name, value)

        await self.lab.context.database.run(write)

    async def reopen(self) -> tuple[Sale, Stall]:
        sale, stall = self.sale(), Stall()
        recall = Recall(self.lab.context, stall, cast(Any, self.learner))
        recall.active = True
        await recall.open(sale.workload)
        return sale, stall


@pytest.mark.parametrize(
    "state", [LeaseState.REJECTED, LeaseState.SUBMITTED, LeaseState.REVOKED, LeaseState.FAILED]
)
def test_only_what_was_accepted_is_recalled(
    tmp_path: Path, school: School, state: LeaseState
) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            past = Past(lab, school, await lab.add_job())
            lease_id = await past.work()
            owed = lab.orchestrator.settler.ledger(past.job).owed_micros
            sale, stall = await past.reopen()
            assert (len(sale.delivered), stall.opened) == (1, [])
            # It is delivered, and not paid again.
            assert lab.orchestrator.settler.ledger(past.job).owed_micros == owed
            await past.edit(lease_id, state=state.value)
            sale, stall = await past.reopen()
            assert (sale.delivered, stall.opened) == ([], [sale.workload])

    run(scenario)


@pytest.mark.parametrize("damage", ["no result", "no bytes", "other bytes", "another task"])
def test_what_is_not_whole_is_bought_again(tmp_path: Path, school: School, damage: str) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            past = Past(lab, school, await lab.add_job())
            lease_id = await past.work()
            row = next(row for row in await lab.rows(LeaseRow) if row.lease_id == lease_id)
            result = Result.model_validate_json(row.result or "")
            changes: dict[str, dict[str, Any]] = {
                "no bytes": {"payload": {"sha256": "0" * 64, "size_bytes": 9}},
                "other bytes": {"payload": lab.context.blobs.put_bytes(b"junk").model_dump()},
                "another task": {"task_sha256": "0" * 64},
            }
            changed = {**result.model_dump(), **changes.get(damage, {})}
            false = Result.model_validate(changed).encode().decode()
            await past.edit(lease_id, result=None if damage == "no result" else false)
            sale, stall = await past.reopen()
            assert (sale.delivered, stall.opened) == ([], [sale.workload])
            # The control: with what was written down it is recalled.
            await past.edit(lease_id, result=row.result)
            sale, stall = await past.reopen()
            assert (len(sale.delivered), stall.opened) == (1, [])

    run(scenario)
