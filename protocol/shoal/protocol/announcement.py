"""What the orchestrator tells everybody at once: new lots, new policy versions, certificates.

Announcements travel by gossip, from worker to worker, so each is signed by the orchestrator's
account and says when it was made.  Nothing depends on one arriving: what it says is also told
with the next heartbeat or lease.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field

from shoal.protocol.certificate import ClearingCertificate
from shoal.protocol.ids import Hex32
from shoal.protocol.market import Lot
from shoal.protocol.policy import PolicyVersion
from shoal.protocol.record import MAX_INT
from shoal.protocol.signing import Domain, SignableRecord, Signed

LOTS_TOPIC = "shoal/lots/3"
POLICIES_TOPIC = "shoal/policies/2"
CERTIFICATES_TOPIC = "shoal/certificates/3"

MAX_ANNOUNCEMENT_BYTES = 48 << 10
"""Below the cap of a gossip message, which holds an announcement and its envelope."""

MAX_LOTS = 32
MAX_POLICIES = 32
MAX_CERTIFICATES = 32
MAX_SOURCES = 8

MAX_AGE_MS = 120_000
"""An older announcement tells nothing any more: its lots are sold, its version superseded."""

MAX_SKEW_MS = 60_000
"""How far ahead of a receiver's clock the orchestrator's may run; clocks at home drift."""


def topic_of(topic: str, domain: Domain, account: str) -> str:
    """The topic on which one orchestrator, and nobody else, announces.

    Because its name says whose signature its messages carry, whoever passes on another's has
    not looked; that is what a forwarder can be held to.

    Example:
        >>> topic_of(LOTS_TOPIC, Domain(chain_id=1, escrow="0x" + "E" * 40), "0x" + "A" * 40)[:20]
        'shoal/lots/3/0xaaaaa'
    """
    return f"{topic}/{account.lower()}/{domain.chain_id}/{domain.escrow.lower()}"


class _Announcement(SignableRecord):
    """Signed as a digest and a time: the kind of record is part of what is signed."""

    eip712_fields: ClassVar[tuple[tuple[str, str], ...]] = (
        ("announcementDigest", "bytes32"),
        ("announcedAtMs", "uint64"),
    )

    announced_at_ms: int = Field(ge=0, le=MAX_INT)

    def eip712_message(self) -> dict[str, Any]:
        """The fields the orchestrator signs; the digest covers all the others."""
        return {
            "announcementDigest": bytes.fromhex(self.digest()),
            "announcedAtMs": self.announced_at_ms,
        }


class LotAnnouncement(_Announcement):
    """Lots that were just opened, and jobs that are about to open their first.

    Writer: the orchestrator.  Reader: workers, which ask for the job's terms if they do not
    know the job yet.

    Example:
        >>> LotAnnouncement(lots=(), announced_at_ms=1).encode()
        b'{"announced_at_ms":1,"jobs":[],"lots":[]}'
    """

    lots: tuple[Lot, ...] = Field(max_length=MAX_LOTS)
    jobs: tuple[Hex32, ...] = Field(default=(), max_length=MAX_LOTS)


class PolicyAnnouncement(_Announcement):
    """Policy versions that were just published, and who has their adapters.

    Writer: the orchestrator.  Reader: workers, which fetch the adapter before the first task
    names it.  ``sources`` are blob sources of the orchestrator's own.

    Example:
        >>> PolicyAnnouncement(policies=(), announced_at_ms=1).sources
        ()
    """

    policies: tuple[PolicyVersion, ...] = Field(max_length=MAX_POLICIES)
    sources: tuple[Annotated[str, Field(min_length=1, max_length=500)], ...] = Field(
        default=(), max_length=MAX_SOURCES
    )


class CertificateAnnouncement(_Announcement):
    """Clearings that were just certified, each as it was signed.

    Writer: the orchestrator.  Reader: workers, which keep the certificates of jobs they know:
    two that differ, of one lot and epoch, prove that bidders were told different things.

    Example:
        >>> CertificateAnnouncement(certificates=(), announced_at_ms=1).encode()
        b'{"announced_at_ms":1,"certificates":[]}'
    """

    certificates: tuple[Signed[ClearingCertificate], ...] = Field(max_length=MAX_CERTIFICATES)


SignedLots = Signed[LotAnnouncement]
SignedPolicies = Signed[PolicyAnnouncement]
SignedCertificates = Signed[CertificateAnnouncement]
