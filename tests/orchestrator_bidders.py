"""Bidders in the orchestrator's lab, what they are leased, and what was signed of it."""

from __future__ import annotations

from typing import Any

from orchestrator_lab import Lab, Peer, arrival, until

from shoal.market.lease import LeaseState
from shoal.orchestrator.leases import LiveLease
from shoal.orchestrator.store.tables import CertificateRow
from shoal.protocol.certificate import ClearingCertificate
from shoal.protocol.node import LeaseOffer
from shoal.protocol.signing import Signed


def sell(lab: Lab) -> None:
    lab.start(lab.orchestrator.auctioneer.run())


async def taken(lab: Lab, peer: Peer) -> tuple[LeaseOffer, LiveLease]:
    """The next lease that ``peer`` is offered, once it takes it."""
    offer = await arrival(peer.offers)
    live = lab.live(offer)
    await until(lambda: live.record.state is LeaseState.TAKEN)
    return offer, live


async def certificates(lab: Lab) -> list[ClearingCertificate]:
    """What was signed, in order."""
    rows = await lab.rows(CertificateRow)
    signed = [Signed[ClearingCertificate].decode(row.certificate.encode()) for row in rows]
    for certificate in signed:
        certificate.require_signer(lab.context.domain, lab.context.account.address)
    return [certificate.record for certificate in signed]


async def three(lab: Lab, **changes: Any) -> list[Peer]:
    """Bidders enough for an auction, at 10, 20 and 30 micros."""
    peers = [await lab.peer() for _ in range(3)]
    for number, peer in enumerate(peers, start=1):
        await peer.bid(price_micros=10 * number, turn=number == 3, **changes)
    return peers


def conclude(lab: Lab, live: LiveLease) -> None:
    """The lease's result was accepted."""
    lab.orchestrator.dispatcher.conclude(
        live, live.record.model_copy(update={"state": LeaseState.ACCEPTED}), unit_ms=1_000
    )
    live.workload.undelivered.discard(live.units)
    lab.orchestrator.settler.ledger(live.lease.job_id).release(live.lease.lease_id)
    lab.orchestrator.auctioneer.room_at(live.lease.node)
