"""Why work went where at what price: clearings and leases as a person may ask for them.

Shown is what a certificate publishes anyway: the bids that competed, never a salt, never a
bid that was not opened.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from itertools import islice
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from shoal.orchestrator.certificates import Recleared, recleared
from shoal.orchestrator.context import Context
from shoal.orchestrator.store.tables import CertificateRow, JobRow, LeaseRow, NodeRow
from shoal.protocol.certificate import ClearingCertificate, Rung
from shoal.protocol.errors import NotFound, PeerFault
from shoal.protocol.market import Lease, TaskKind
from shoal.protocol.signing import Signed

MAX_LISTED = 200
"""Rungs, and refused bids, that one answer names; how many there are in all it always says."""
_NUM_LEASES = 3
_LEASE_ID = re.compile(r"^lease_[0-9a-z]{8,64}$")


async def job_book(context: Context, job_id: str) -> dict[str, Any]:
    """The newest clearing of each kind of the job's tasks, with its ladder and who was refused.

    Raises:
        NotFound: there is no such job.
    """
    named = await context.database.run(lambda session: _newest_clearings(session, job_id))
    books = []
    for sha256, lease_ids in named:
        found = await recleared(context, sha256)
        books.append(await _book(context, found, sha256, lease_ids))
    return {"job_id": job_id, "books": books}


async def explained_lease(context: Context, lease_id: str) -> dict[str, Any]:
    """The lease, the clearing it cites, its rung there and the rung after it.

    The clearing and the rungs are absent where no certificate of it is stored.

    Raises:
        NotFound: there is no such lease.
    """
    row = await context.database.run(lambda session: _lease_row(session, lease_id))
    view = _lease(row)
    view |= {"clearing": None, "bid": None, "next_bid": None}
    cited = _cited(row)
    if cited is None:
        return view
    view |= {"certificate_sha256": cited.certificate_sha256, "rung": cited.rung}
    try:
        found = await recleared(context, cited.certificate_sha256)
    except NotFound:
        return view
    ladder = found.cleared.ladder
    rungs = [ladder.rung(place) for place in range(cited.rung, min(cited.rung + 2, len(ladder)))]
    names = await _names(context, (rung.node for rung in rungs))
    shown = [_rung(rung, names) for rung in rungs]
    view["clearing"] = _clearing(found.certificate.record, cited.certificate_sha256)
    view["bid"], view["next_bid"] = (*shown, None, None)[:2]
    return view


def _newest_clearings(session: Session, job_id: str) -> list[tuple[str, list[str]]]:
    """For each kind that was ever cleared: the newest certificate, and the newest leases."""
    if session.get(JobRow, job_id) is None:
        raise NotFound(f"There is no job {job_id}; `shoal jobs` lists them.", code="no_job")
    found = []
    for kind in TaskKind:
        # A certificate names its kind once, and canonical JSON spells it in one way only.
        newest = (
            select(CertificateRow.sha256)
            .where(CertificateRow.job_id == job_id)
            .where(CertificateRow.certificate.contains(f'"kind":"{kind.value}"'))
            .order_by(CertificateRow.issued_ms.desc())
            .limit(1)
        )
        sha256 = session.scalar(newest)
        if sha256 is not None:
            found.append((sha256, _newest_leases(session, job_id, kind)))
    return found


def _newest_leases(session: Session, job_id: str, kind: TaskKind) -> list[str]:
    newest = (
        select(LeaseRow.lease_id)
        .where(LeaseRow.job_id == job_id, LeaseRow.kind == kind.value)
        .order_by(LeaseRow.issued_ms.desc())
        .limit(_NUM_LEASES)
    )
    return list(session.scalars(newest))


async def _book(
    context: Context, found: Recleared, sha256: str, lease_ids: list[str]
) -> dict[str, Any]:
    ladder = found.cleared.ladder
    rungs = [ladder.rung(place) for place in range(min(len(ladder), MAX_LISTED))]
    refused = list(islice(_refused(found), MAX_LISTED))
    nodes = [rung.node for rung in rungs] + [bid["node"] for bid in refused]
    names = await _names(context, nodes)
    return {
        "clearing": _clearing(found.certificate.record, sha256),
        "rungs": [_rung(rung, names) for rung in rungs],
        "refused": [{**bid, "name": names.get(bid["node"], "")} for bid in refused],
        "refused_for": dict(Counter(str(why) for _, why in found.cleared.refused)),
        "lease_ids": lease_ids,
    }


def _refused(found: Recleared) -> Iterable[dict[str, Any]]:
    """Each bid that is not on the ladder, and why."""
    bids = {entry.digest: entry.bid for entry in found.market.book.opened}
    handicaps = {
        (row.account.lower(), row.node): row.handicap_micros for row in found.market.terms.rows
    }
    for digest, why in found.cleared.refused:
        bid = bids[digest]
        yield {
            "account": bid.account,
            "node": bid.node,
            "price_micros": bid.price_micros,
            "handicap_micros": handicaps.get((bid.account.lower(), bid.node), 0),
            "reason": str(why),
        }


async def _names(context: Context, nodes: Iterable[str]) -> dict[str, str]:
    """What the nodes call themselves."""
    query = select(NodeRow.node, NodeRow.name).where(NodeRow.node.in_(set(nodes)))
    rows = await context.database.run(lambda session: session.execute(query).all())
    return {row.node: row.name for row in rows}


def _rung(rung: Rung, names: dict[str, str]) -> dict[str, Any]:
    return {**rung.to_json(), "name": names.get(rung.node, "")}


def _clearing(record: ClearingCertificate, sha256: str) -> dict[str, Any]:
    return {
        "sha256": sha256,
        "lot_id": record.lot.lot_id,
        "kind": record.lot.lot_class.kind.value,
        "epoch": record.epoch,
        "num_units": record.lot.num_units,
        "num_commitments": record.num_commitments,
        "num_revealed": record.num_revealed,
        "num_bidders": record.num_bidders,
        "num_rungs": record.num_rungs,
        "num_refused": record.num_refused,
        "unfilled_units": record.unfilled_units,
        "rule": record.rule.value,
        "clearing_price_micros": record.clearing_price_micros,
        "reserve": record.reserve.to_json(),
        "freshness_permille": list(record.lot.freshness_permille),
        "issued_at_ms": record.issued_at_ms,
    }


def _lease_row(session: Session, lease_id: str) -> LeaseRow:
    row = session.get(LeaseRow, lease_id) if _LEASE_ID.match(lease_id) else None
    if row is None:
        raise NotFound(
            f"There is no lease {lease_id[:80]!r}; `shoal market book JOB` names the newest ones "
            "of a job.",
            code="no_lease",
        )
    return row


def _lease(row: LeaseRow) -> dict[str, Any]:
    return {
        "lease_id": row.lease_id,
        "job_id": row.job_id,
        "lot_id": row.lot_id,
        "task_id": row.task_id,
        "attempt": row.lease_epoch,
        "kind": row.kind,
        "state": row.state,
        "reason": row.reason,
        "account": row.account,
        "node": row.node,
        "num_units": row.num_units,
        "unit_price_micros": row.unit_price_micros,
        "pay_micros": row.pay_micros,
        "issued_at_ms": row.issued_ms,
        "ended_at_ms": row.ended_ms,
        "certificate_sha256": None,
        "rung": None,
    }


def _cited(row: LeaseRow) -> Lease | None:
    """The signed lease; None for one of a form that cited no clearing yet."""
    try:
        return Signed[Lease].decode(row.record.encode()).record
    except PeerFault:
        return None
