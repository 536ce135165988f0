"""What the orchestrator does to the chain: each effect's transaction, and how it shows."""

from __future__ import annotations

import json
from collections.abc import Mapping

from pydantic import Field
from sqlalchemy.orm import Session

from shoal.contracts.delivery import Landing
from shoal.contracts.escrow import JobEscrow
from shoal.contracts.records import EpochPost
from shoal.contracts.transactions import Call
from shoal.orchestrator.outbox import EffectKind, enqueue
from shoal.orchestrator.store.tables import EpochRow, EventRow
from shoal.protocol.clock import TimeSource
from shoal.protocol.errors import InvariantBroken, Unavailable
from shoal.protocol.ids import Hex32
from shoal.protocol.record import Record

POST_EPOCH = "post_epoch"
CLOSE_JOB = "close_job"
ALLOW_BONDS = "allow_bonds"
PUT_UP_BOND = "put_up_bond"
RETURN_BOND = "return_bond"


def effect_kinds(escrow: JobEscrow, time: TimeSource) -> Mapping[str, EffectKind]:
    """Every kind the orchestrator's outbox delivers."""
    return {
        POST_EPOCH: EpochPosting(escrow, time),
        CLOSE_JOB: JobClosing(escrow),
        ALLOW_BONDS: BondsAllowing(escrow),
        PUT_UP_BOND: BondPuttingUp(escrow),
        RETURN_BOND: BondReturning(escrow),
    }


def epoch_key(job_id: str, epoch: int) -> str:
    """The claim key of a job's epoch."""
    return f"epoch/{job_id}/{epoch}"


def closing_key(job_id: str) -> str:
    """The claim key of a job's end."""
    return f"close/{job_id}"


def allowance_key(escrow: str) -> str:
    """The claim key of our allowance to an escrow."""
    return f"allow_bonds/{escrow.lower()}"


def bond_key(job_id: str) -> str:
    """The claim key of a job's bond."""
    return f"bond/{job_id}"


def bond_return_key(job_id: str) -> str:
    """The claim key of a job's bond coming back."""
    return f"bond_return/{job_id}"


def enqueue_bond(session: Session, account: str, escrow: str, bond: JobBond) -> None:
    """The bond, and the escrow's leave to take it, will be given once this transaction commits."""
    enqueue(session, account, allowance_key(escrow), ALLOW_BONDS, "")
    enqueue(session, account, bond_key(bond.job_id), PUT_UP_BOND, bond.model_dump_json())


def enqueue_bond_return(session: Session, account: str, job_id: str) -> None:
    """The bond will be asked back once this transaction commits."""
    enqueue(session, account, bond_return_key(job_id), RETURN_BOND, job_id)


def enqueue_epoch(session: Session, account: str, post: EpochPost) -> None:
    """The epoch will be posted once this transaction commits."""
    key = epoch_key(post.job_id, post.epoch)
    enqueue(session, account, key, POST_EPOCH, post.model_dump_json())


def enqueue_closing(session: Session, account: str, job_id: str) -> None:
    """The job's escrow will be closed once this transaction commits."""
    enqueue(session, account, closing_key(job_id), CLOSE_JOB, job_id)


class JobBond(Record):
    """What a job's bond is to be.  Writer: `enqueue_bond`.  Reader: `BondPuttingUp`."""

    job_id: Hex32
    amount_micros: int = Field(ge=1, lt=1 << 128)


class EpochPosting:
    """A job's epoch, posted: payouts and provenance in one transaction."""

    def __init__(self, escrow: JobEscrow, time: TimeSource) -> None:
        self._escrow = escrow
        self._time = time

    def call(self, payload: str) -> Call:
        """The posting; ``payload`` is the `EpochPost`."""
        return self._escrow.post_call(EpochPost.model_validate_json(payload))

    async def find(self, payload: str) -> Landing | None:
        """Where the escrow counted the epoch.

        Raises:
            InvariantBroken: it did so under other roots than ours.
            Unavailable: it counts the epoch and the log does not show it yet.
        """
        post = EpochPost.model_validate_json(payload)
        if (await self._escrow.job(post.job_id)).epoch < post.epoch:
            return None
        found = [p for p in await self._escrow.epochs(post.job_id) if p.epoch == post.epoch]
        if not found:
            raise Unavailable(
                f"The chain counts epoch {post.epoch} of job {post.job_id} and shows no log of it "
                "yet; it is looked up again.",
                code="epoch_log_missing",
            )
        if (found[0].pay_root, found[0].prov_root) != (post.pay_root, post.prov_root):
            raise InvariantBroken(
                f"Epoch {post.epoch} of job {post.job_id} is on the chain with other roots than "
                "the database holds; another process posts with this account's key."
            )
        return Landing(
            tx_hash=found[0].tx_hash,
            block_number=found[0].block_number,
            block_hash=found[0].block_hash,
        )

    def landed(self, session: Session, payload: str, landing: Landing) -> None:
        """The epoch's row says where it is, and the job's followers are told the first time."""
        post = EpochPost.model_validate_json(payload)
        row = session.get_one(EpochRow, (post.job_id, post.epoch))
        if row.tx_hash is None:
            said = post.to_json() | {"tx_hash": landing.tx_hash}
            told = ("epoch", "cumulative_micros", "num_tasks", "num_statements", "tx_hash")
            session.add(
                EventRow(
                    job_id=post.job_id,
                    at_ms=self._time.now_ms(),
                    type="epoch_posted",
                    data=json.dumps({key: said[key] for key in told}, sort_keys=True),
                )
            )
        row.tx_hash, row.block_number = landing.tx_hash, landing.block_number
        row.gas_used = landing.gas_used


class JobClosing:
    """A job's escrow, closed: no more epochs, and the rest may be refunded."""

    def __init__(self, escrow: JobEscrow) -> None:
        self._escrow = escrow

    def call(self, payload: str) -> Call:
        """The closing; ``payload`` is the job's id."""
        return self._escrow.close_call(payload)

    async def find(self, payload: str) -> Landing | None:
        """Where the escrow was closed, by us or by a refund after its deadline."""
        if not (await self._escrow.job(payload)).closed:
            return None
        return await self._escrow.closing(payload) or Landing()

    def landed(self, session: Session, payload: str, landing: Landing) -> None:
        """Nothing follows; who ends the job writes that down."""


class BondsAllowing:
    """The escrow's leave to take our bonds, given once for all jobs."""

    def __init__(self, escrow: JobEscrow) -> None:
        self._escrow = escrow

    def call(self, payload: str) -> Call:
        """The approval; ``payload`` says nothing."""
        return self._escrow.allow_bonds_call()

    async def find(self, payload: str) -> Landing | None:
        """Whether the leave is there, whichever transaction gave it."""
        return Landing() if await self._escrow.may_take_bonds() else None

    def landed(self, session: Session, payload: str, landing: Landing) -> None:
        """Nothing follows."""


class BondPuttingUp:
    """A job's bond, put up by us before its first epoch is posted."""

    def __init__(self, escrow: JobEscrow) -> None:
        self._escrow = escrow

    def call(self, payload: str) -> Call:
        """The putting up; ``payload`` is the `JobBond`."""
        bond = JobBond.model_validate_json(payload)
        return self._escrow.bond_call(bond.job_id, bond.amount_micros)

    async def find(self, payload: str) -> Landing | None:
        """Where the job's bond came to be as large."""
        bond = JobBond.model_validate_json(payload)
        return await self._escrow.bonding(bond.job_id, bond.amount_micros)

    def landed(self, session: Session, payload: str, landing: Landing) -> None:
        """Nothing follows."""


class BondReturning:
    """A job's bond, ours again after the job's end."""

    def __init__(self, escrow: JobEscrow) -> None:
        self._escrow = escrow

    def call(self, payload: str) -> Call:
        """The return; ``payload`` is the job's id."""
        return self._escrow.return_bond_call(payload)

    async def find(self, payload: str) -> Landing | None:
        """Where the bond was paid back; nowhere in particular where the court took it."""
        returned = await self._escrow.bond_return(payload)
        if returned is not None:
            return returned
        job = await self._escrow.job(payload)
        return Landing() if job.frozen and not job.bond_micros else None

    def landed(self, session: Session, payload: str, landing: Landing) -> None:
        """Nothing follows."""
