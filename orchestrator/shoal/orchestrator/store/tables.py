"""The tables, as SQLAlchemy sees them.  Alembic's migrations build them."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    ForeignKey,
    Index,
    Integer,
    String,
    Text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    """Root of the tables' metadata."""


class JobRow(Base):
    """One job: the signed record, and where it is."""

    __tablename__ = "jobs"

    job_id: Mapped[str] = mapped_column(String(66), primary_key=True)
    record: Mapped[str] = mapped_column(Text)
    base: Mapped[str] = mapped_column(Text)
    state: Mapped[str] = mapped_column(String(16), index=True)
    reason: Mapped[str] = mapped_column(Text, default="")
    epoch: Mapped[int] = mapped_column(Integer, default=1)
    policy_version: Mapped[int] = mapped_column(Integer, default=0)
    escrow_deadline_s: Mapped[int] = mapped_column(BigInteger)
    funded_micros: Mapped[int] = mapped_column(BigInteger, default=0)
    created_ms: Mapped[int] = mapped_column(BigInteger)
    started_ms: Mapped[int | None] = mapped_column(BigInteger, default=None)
    finished_ms: Mapped[int | None] = mapped_column(BigInteger, default=None)


class PolicyRow(Base):
    """One policy version of a job."""

    __tablename__ = "policies"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.job_id"), primary_key=True)
    version: Mapped[int] = mapped_column(Integer, primary_key=True)
    record: Mapped[str] = mapped_column(Text)
    created_ms: Mapped[int] = mapped_column(BigInteger)


class NodeRow(Base):
    """One worker node that has joined, with both signatures of its binding."""

    __tablename__ = "nodes"

    node: Mapped[str] = mapped_column(String(100), primary_key=True)
    account: Mapped[str] = mapped_column(String(42), index=True)
    name: Mapped[str] = mapped_column(String(200))
    device: Mapped[str] = mapped_column(String(200))
    bound_node: Mapped[str] = mapped_column(Text)
    joined_ms: Mapped[int] = mapped_column(BigInteger)


class CommitmentRow(Base):
    """One sealed bid: the receipt we gave for it, and the bid itself once it was opened."""

    __tablename__ = "commitments"

    commitment: Mapped[str] = mapped_column(String(66), primary_key=True)
    epoch_to: Mapped[int] = mapped_column(BigInteger, index=True)
    seq: Mapped[int] = mapped_column(BigInteger, unique=True)
    entry: Mapped[str] = mapped_column(Text)


class SealRow(Base):
    """One market epoch's sealed book, and the block its seed was drawn from.

    ``competing`` names the commitments whose bids were opened in time, as a JSON list; absent
    until the book is frozen.
    """

    __tablename__ = "seals"

    epoch: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    seal: Mapped[str] = mapped_column(Text)
    block_hash: Mapped[str] = mapped_column(String(66))
    block_number: Mapped[int] = mapped_column(BigInteger)
    competing: Mapped[str | None] = mapped_column(Text, default=None)


class CertificateRow(Base):
    """One clearing: the signed certificate, and the bidders' terms it was cleared under."""

    __tablename__ = "certificates"

    sha256: Mapped[str] = mapped_column(String(64), primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.job_id"), index=True)
    lot_id: Mapped[str] = mapped_column(ForeignKey("lots.lot_id"), index=True)
    epoch: Mapped[int] = mapped_column(BigInteger)
    certificate: Mapped[str] = mapped_column(Text)
    terms: Mapped[str] = mapped_column(Text)
    issued_ms: Mapped[int] = mapped_column(BigInteger)


class LotRow(Base):
    """One lot offered to the market."""

    __tablename__ = "lots"

    lot_id: Mapped[str] = mapped_column(String(80), primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.job_id"), index=True)
    record: Mapped[str] = mapped_column(Text)
    opened_ms: Mapped[int] = mapped_column(BigInteger)


class LeaseRow(Base):
    """One lease from offer to verdict, with the evidence each stage left."""

    __tablename__ = "leases"
    __table_args__ = (
        Index("ix_leases_job_state", "job_id", "state"),
        Index("ix_leases_job_ended", "job_id", "ended_ms"),
    )

    lease_id: Mapped[str] = mapped_column(String(80), primary_key=True)
    lease_epoch: Mapped[int] = mapped_column(Integer)
    lot_id: Mapped[str] = mapped_column(ForeignKey("lots.lot_id"))
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.job_id"))
    task_id: Mapped[str] = mapped_column(String(80))
    kind: Mapped[str] = mapped_column(String(16))
    account: Mapped[str] = mapped_column(String(42), index=True)
    node: Mapped[str] = mapped_column(String(100))
    num_units: Mapped[int] = mapped_column(Integer)
    unit_price_micros: Mapped[int] = mapped_column(BigInteger)
    state: Mapped[str] = mapped_column(String(16))
    reason: Mapped[str] = mapped_column(Text, default="")
    record: Mapped[str] = mapped_column(Text)
    issued_ms: Mapped[int] = mapped_column(BigInteger)
    ended_ms: Mapped[int | None] = mapped_column(BigInteger, default=None)
    result: Mapped[str | None] = mapped_column(Text, default=None)
    receipt: Mapped[str | None] = mapped_column(Text, default=None)
    verdict: Mapped[str | None] = mapped_column(Text, default=None)
    audited: Mapped[bool] = mapped_column(Boolean, default=False)
    pay_micros: Mapped[int] = mapped_column(BigInteger, default=0)
    settlement_epoch: Mapped[int | None] = mapped_column(Integer, default=None)
    outcome: Mapped[str | None] = mapped_column(Text, default=None)
    claim_id: Mapped[str | None] = mapped_column(String(80), default=None)


class StatementRow(Base):
    """One signed provenance statement, in the order it was recorded."""

    __tablename__ = "statements"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.job_id"), primary_key=True)
    seq: Mapped[int] = mapped_column(Integer, primary_key=True)
    epoch: Mapped[int] = mapped_column(Integer, index=True)
    kind: Mapped[str] = mapped_column(String(32))
    contributor: Mapped[str] = mapped_column(String(42))
    envelope: Mapped[str] = mapped_column(Text)
    payload_sha256: Mapped[str] = mapped_column(String(64))


class EpochRow(Base):
    """One settled epoch of a job, and the transaction that settled it.

    An absent ``tx_hash`` means the roots are computed but not yet on the chain.
    """

    __tablename__ = "epochs"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.job_id"), primary_key=True)
    epoch: Mapped[int] = mapped_column(Integer, primary_key=True)
    pay_root: Mapped[str] = mapped_column(String(66))
    prov_root: Mapped[str] = mapped_column(String(66))
    payouts: Mapped[str] = mapped_column(Text)
    cumulative_micros: Mapped[int] = mapped_column(BigInteger)
    num_tasks: Mapped[int] = mapped_column(Integer)
    num_statements: Mapped[int] = mapped_column(Integer)
    tx_hash: Mapped[str | None] = mapped_column(String(66), default=None)
    block_number: Mapped[int | None] = mapped_column(BigInteger, default=None)
    gas_used: Mapped[int | None] = mapped_column(BigInteger, default=None)


class SenderRow(Base):
    """Who may send for an account, and the next nonce it has not used.

    ``sender_epoch`` rises with each process that takes the account over; what an earlier one
    still tries to write is refused.
    """

    __tablename__ = "senders"

    account: Mapped[str] = mapped_column(String(42), primary_key=True)
    sender_epoch: Mapped[int] = mapped_column(Integer, default=0)
    next_nonce: Mapped[int] = mapped_column(BigInteger, default=0)


class OutboxRow(Base):
    """One effect on the chain, from the decision to its final block.

    ``delivery`` holds every signed transaction and where the effect was found; ``nonce`` is
    the one in use or spent, absent where none is.
    """

    __tablename__ = "outbox"
    __table_args__ = (Index("ix_outbox_account_stage", "account", "stage"),)

    claim_key: Mapped[str] = mapped_column(String(200), primary_key=True)
    account: Mapped[str] = mapped_column(String(42))
    kind: Mapped[str] = mapped_column(String(16))
    payload: Mapped[str] = mapped_column(Text)
    stage: Mapped[str] = mapped_column(String(8))
    nonce: Mapped[int | None] = mapped_column(BigInteger, default=None)
    delivery: Mapped[str] = mapped_column(Text)


class EventRow(Base):
    """One thing that happened to a job, as a requester may read it."""

    __tablename__ = "events"
    __table_args__ = (Index("ix_events_job_type_at", "job_id", "type", "at_ms"),)

    seq: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.job_id"), index=True)
    at_ms: Mapped[int] = mapped_column(BigInteger)
    type: Mapped[str] = mapped_column(String(32))
    data: Mapped[str] = mapped_column(Text)
