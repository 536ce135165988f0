"""The live leases, found by id, node, job or upload token without looking through all of them."""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from sqlalchemy.orm import Session

from shoal.market.lease import LeaseRecord, LeaseState
from shoal.market.reputation import Outcome
from shoal.orchestrator.placement import Parcel
from shoal.orchestrator.roster import Member
from shoal.orchestrator.store.rows import update_row
from shoal.orchestrator.store.tables import LeaseRow
from shoal.orchestrator.workload import Workload
from shoal.protocol.canonical import sha256_hex
from shoal.protocol.ids import LeaseId
from shoal.protocol.market import Lease, TaskKind
from shoal.protocol.node import MAX_REVOKED, ResultMessage
from shoal.protocol.signing import Signed
from shoal.protocol.task import Task

_MAX_REMEMBERED = 10_000


@dataclass(kw_only=True, eq=False)
class LiveLease:
    """A lease that has not ended, with what is needed to judge or re-lease it.

    ``backing_micros`` of its account's stake answer for it until its verdict.
    ``expected_ms`` is what its units usually take, and ``backlog_ms`` the same for what its
    node held before it.  ``upload_sha256`` is the one payload its token may store, absent
    before the first upload.  ``message`` is the result its holder handed in, absent before that;
    it is stored with what becomes of the lease.  ``rival`` is the live lease of another node for
    the same parcel.
    """

    record: LeaseRecord
    signed: Signed[Lease]
    task: Task
    units: Parcel
    workload: Workload
    upload_token: str
    max_result_bytes: int
    expected_ms: int = 0
    backing_micros: int = 0
    backlog_ms: int = 0
    upload_sha256: str | None = None
    message: ResultMessage | None = None
    rival: LiveLease | None = None

    @property
    def lease(self) -> Lease:
        """The lease as signed."""
        return self.record.lease

    @property
    def may_rival(self) -> bool:
        """Whether its parcel may be leased to another node too."""
        return self.rival is None and self.record.state.is_open

    @property
    def claim_id(self) -> str:
        """Names the parcel of the lot: whoever does it, it is paid at most once."""
        named = f"{self.lease.lot_id}:{','.join(map(str, self.units))}"
        return f"claim_{sha256_hex(named.encode())[:20]}"


@dataclass(frozen=True, kw_only=True, order=True)
class Submission:
    """A result that arrived in time, waiting for its verdict.

    What the learner waits for is judged first, then what came first.
    """

    order: tuple[int, ...]
    live: LiveLease = field(compare=False)
    message: ResultMessage = field(compare=False)
    member: Member = field(compare=False)


class LeaseTable:
    """Every live lease, and the records of the last ten thousand that ended."""

    def __init__(self) -> None:
        self._live: dict[LeaseId, LiveLease] = {}
        self._by_job: defaultdict[str, dict[LeaseId, LiveLease]] = defaultdict(dict)
        self._open_of: defaultdict[str, dict[LeaseId, LiveLease]] = defaultdict(dict)
        self._by_token: dict[bytes, LiveLease] = {}
        self._held: Counter[tuple[str, TaskKind]] = Counter()
        self._backed: Counter[str] = Counter()
        self._ended: OrderedDict[str, LeaseRecord] = OrderedDict()
        self._untold: defaultdict[str, dict[str, None]] = defaultdict(dict)

    def __iter__(self) -> Iterator[LiveLease]:
        return iter(list(self._live.values()))

    def add(self, live: LiveLease) -> None:
        """The open lease is live."""
        lease_id = LeaseId(live.lease.lease_id)
        self._live[lease_id] = live
        self._by_job[live.lease.job_id][lease_id] = live
        self._by_token[_token_key(live.upload_token)] = live
        self._open_of[live.lease.node][lease_id] = live
        self._held[live.lease.node, live.lease.kind] += live.lease.num_units
        self._backed[live.lease.account.lower()] += live.backing_micros

    def change(self, live: LiveLease, record: LeaseRecord) -> None:
        """The lease stands as ``record`` says; once closed its units are in flight no more."""
        if live.record.state.is_open and not record.state.is_open:
            self._close(live)
        live.record = record

    def remove(self, live: LiveLease) -> bool:
        """The lease is live no more, but its record stays known; whether it was live."""
        lease_id = LeaseId(live.lease.lease_id)
        if self._live.pop(lease_id, None) is None:
            return False
        self._close(live)
        account = live.lease.account.lower()
        self._backed[account] -= live.backing_micros
        if not self._backed[account]:
            del self._backed[account]
        of_job = self._by_job[live.lease.job_id]
        of_job.pop(lease_id, None)
        if not of_job:
            del self._by_job[live.lease.job_id]
        self._by_token.pop(_token_key(live.upload_token), None)
        self._ended[lease_id] = live.record
        if live.record.state is LeaseState.REVOKED:
            self._untold[live.lease.node][lease_id] = None
        while len(self._ended) > _MAX_REMEMBERED:
            oldest, record = self._ended.popitem(last=False)
            self._note_told(record.lease.node, oldest)
        return True

    def _close(self, live: LiveLease) -> None:
        lease = live.lease
        of_node = self._open_of[lease.node]
        if of_node.pop(LeaseId(lease.lease_id), None) is None:
            return
        if not of_node:
            del self._open_of[lease.node]
        key = (lease.node, lease.kind)
        self._held[key] -= lease.num_units
        if not self._held[key]:
            del self._held[key]

    def untold(self, node: str) -> tuple[str, ...]:
        """The leases taken back from the node of which it may not know yet."""
        return tuple(self._untold.get(node, ()))[-MAX_REVOKED:]

    def told(self, node: str) -> None:
        """The node is being told which of the leases it holds were taken back."""
        self._untold.pop(node, None)

    def _note_told(self, node: str, lease_id: str) -> None:
        of_node = self._untold.get(node, {})
        of_node.pop(lease_id, None)
        if not of_node:
            self._untold.pop(node, None)

    def find(self, lease_id: str) -> LiveLease | None:
        """The live lease of that id."""
        return self._live.get(LeaseId(lease_id))

    def ended(self, lease_id: str) -> LeaseRecord | None:
        """The record of a lease that ended not long ago."""
        return self._ended.get(lease_id)

    def by_token(self, token: str) -> LiveLease | None:
        """The live lease whose upload token this is."""
        return self._by_token.get(_token_key(token))

    def of_job(self, job_id: str) -> list[LiveLease]:
        """The job's live leases."""
        return list(self._by_job[job_id].values()) if job_id in self._by_job else []

    def open_of(self, node: str) -> list[LiveLease]:
        """The node's leases without a result yet, the oldest first."""
        return list(self._open_of[node].values()) if node in self._open_of else []

    def num_open(self, node: str) -> int:
        """How many leases the node holds without a result yet."""
        return len(self._open_of[node]) if node in self._open_of else 0

    def backed_micros(self, account: str) -> int:
        """How much of the account's stake answers for leases without a verdict."""
        return self._backed[account.lower()]

    @property
    def in_flight(self) -> Mapping[tuple[str, TaskKind], int]:
        """Units each node holds of each kind; a submitted result no longer counts."""
        return self._held


def printable(text: str) -> str:
    """``text`` without NUL, which Postgres cannot store: strangers write reasons too."""
    return text.replace("\0", " ")


def lease_row(live: LiveLease) -> LeaseRow:
    """The database row of a lease just granted."""
    lease = live.lease
    return LeaseRow(
        lease_id=lease.lease_id,
        lease_epoch=lease.lease_epoch,
        lot_id=lease.lot_id,
        job_id=lease.job_id,
        task_id=lease.task_id,
        kind=lease.kind.value,
        account=lease.account,
        node=lease.node,
        num_units=lease.num_units,
        unit_price_micros=lease.unit_price_micros,
        state=live.record.state.value,
        record=live.signed.encode().decode(),
        issued_ms=lease.issued_at_ms,
        claim_id=live.claim_id,
    )


def handed_in(live: LiveLease) -> dict[str, object]:
    """What the lease's row says of its result: nothing where none came."""
    if live.message is None:
        return {}
    return {
        "result": live.message.result.encode().decode(),
        "receipt": live.message.receipt.encode().decode(),
    }


def store_end(session: Session, live: LiveLease, outcome: Outcome | None) -> None:
    """The lease's row says how it ended, and what followed from it if anything did."""
    record = live.record
    values = handed_in(live) | {
        "state": record.state.value,
        "reason": record.reason or "",
        "ended_ms": record.ended_at_ms,
    }
    if outcome is not None:
        values["outcome"] = outcome.encode().decode()
    update_row(session, LeaseRow, record.lease.lease_id, values)


def _token_key(token: str) -> bytes:
    # A digest: how long the look-up takes then says nothing about any live token.
    return hashlib.sha256(token.encode()).digest()
