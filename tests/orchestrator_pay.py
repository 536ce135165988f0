"""Work in the orchestrator's lab that was accepted, as the verifier leaves it."""

from __future__ import annotations

from typing import Any

from orchestrator_chain import ADDRESSES
from orchestrator_lab import Lab

from shoal.market.settlement import PayEntry
from shoal.orchestrator.store.tables import LeaseRow, LotRow
from shoal.protocol.ids import new_id
from shoal.protocol.job import EnvSpec
from shoal.provenance.statement import StatementKind, environment_statement

ALICE, BOB = ADDRESSES["a"], ADDRESSES["b"]


async def pay(lab: Lab, job: str, account: str, micros: int) -> None:
    """One accepted lease: verdict, statement and ledger, as the verifier writes them."""
    journal, settler = lab.orchestrator.journal, lab.orchestrator.settler
    lease_id, lot_id, task_id = new_id("lease"), new_id("lot"), new_id("task")
    settler.ledger(job).hold(lease_id, micros)
    entry = PayEntry(task_id=task_id, lease_id=lease_id, account=account, pay_micros=micros)
    settler.ledger(job).accept(entry)
    lease = LeaseRow(
        lease_id=lease_id,
        lease_epoch=1,
        lot_id=lot_id,
        job_id=job,
        task_id=task_id,
        kind="rollout",
        account=account,
        node="n",
        num_units=1,
        unit_price_micros=micros,
        state="accepted",
        record="{}",
        issued_ms=1,
        pay_micros=micros,
        settlement_epoch=journal.open_epoch(job),
    )
    row = statement(lab, job)
    lot = LotRow(lot_id=lot_id, job_id=job, record="{}", opened_ms=1)

    def write(session: Any) -> None:
        session.add(lot)
        session.flush()
        session.add_all([lease, row])

    await lab.context.database.run(write)


def statement(lab: Lab, job: str) -> Any:
    said = environment_statement(job, EnvSpec(id="addition"), "a" * 64)
    return lab.orchestrator.journal.state(job, StatementKind.ENVIRONMENT, said)
