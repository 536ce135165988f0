"""One well-formed message or more of every kind that crosses the network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from court_vectors import _certificate
from eth_account import Account as EthAccount
from market_records import lot
from orchestrator_lab import Peer
from worker_double import POLICY, OrchestratorDouble, blob, make_task

from shoal.network.blob_chunks import BLOB_PROTOCOL, Span, decode_span, encode_span
from shoal.network.identity import NodeIdentity
from shoal.network.memory import MemoryHub, MemoryNetwork
from shoal.protocol.announcement import (
    CERTIFICATES_TOPIC,
    LOTS_TOPIC,
    POLICIES_TOPIC,
    CertificateAnnouncement,
    LotAnnouncement,
    PolicyAnnouncement,
)
from shoal.protocol.discovery import (
    FIND_PROTOCOL,
    PROVIDE_PROTOCOL,
    Contact,
    FindReply,
    FindRequest,
    ProvideReply,
    ProvideRequest,
)
from shoal.protocol.holders import (
    HAVE_PROTOCOL,
    HOLDERS_PROTOCOL,
    DeltaStep,
    HaveNotice,
    HaveReply,
    HoldersReply,
    HoldersRequest,
    Holding,
    KnownHolder,
)
from shoal.protocol.market import TaskKind
from shoal.protocol.node import (
    CANCEL_PROTOCOL,
    COMMIT_PROTOCOL,
    EVIDENCE_PROTOCOL,
    FAILURE_PROTOCOL,
    HEARTBEAT_PROTOCOL,
    HELLO_PROTOCOL,
    JOIN_PROTOCOL,
    LEASE_PROTOCOL,
    PROTOCOL_VERSION,
    RESULT_PROTOCOL,
    REVEAL_PROTOCOL,
    EvidenceReply,
    EvidenceRequest,
    FailureCause,
    FailureReply,
    Heartbeat,
    HelloRequest,
    JoinReply,
    JoinRequest,
    LeaseFailure,
    LeaseProgress,
    LeaseReply,
    ResultReply,
)
from shoal.protocol.probe import (
    PROBE_PROTOCOL,
    DialBack,
    ProbeReply,
    ProbeRequest,
    pack_probe,
    unpack_probe,
)
from shoal.protocol.record import Record
from shoal.protocol.sealing import (
    BidCancel,
    BidCancelReply,
    Reveals,
)
from shoal.protocol.signing import sign

DIGEST = "5" * 64
LEASE_ID = "lease_00000001"
NODE = NodeIdentity(b"w" * 32).peer_id
TOKEN = "a" * 32


@dataclass(frozen=True, kw_only=True)
class Message:
    """A kind of message, as its reader decodes it, and messages of that kind."""

    decode: Callable[[bytes], object]
    valid: tuple[bytes, ...]


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """What a protocol's server reads, and what its caller reads; None is plain bytes."""

    request: Message
    reply: Message | None


def records(*made: Record) -> Message:
    """The message whose reader decodes records of the one class that all of `made` have."""
    (kind,) = {type(record) for record in made}
    return Message(decode=kind.decode, valid=tuple(record.encode() for record in made))


@cache
def exchanges() -> dict[str, Exchange]:
    """Every protocol that nodes serve each other."""
    peer, double = _parties()
    return {**_membership(peer, double), **_market(peer, double), **_work(peer, double), **_blobs()}


@cache
def announcements() -> dict[str, Message]:
    """Every topic, and what is announced on it."""
    _, double = _parties()
    return announced_by(double, 1)


def announced_by(double: OrchestratorDouble, now_ms: int) -> dict[str, Message]:
    """What the orchestrator announces at that time, by topic."""
    domain, account = double.greeting.domain, double.account
    lots = LotAnnouncement(lots=(lot(), lot()), announced_at_ms=now_ms)
    policies = PolicyAnnouncement(policies=(POLICY,), sources=("http://b",), announced_at_ms=now_ms)
    certificate = sign(_certificate("0x" + "b" * 64, "0x" + "c" * 64), domain, account)
    certificates = CertificateAnnouncement(
        certificates=(certificate, certificate), announced_at_ms=now_ms
    )
    return {
        LOTS_TOPIC: records(sign(lots, domain, account)),
        POLICIES_TOPIC: records(sign(policies, domain, account)),
        CERTIFICATES_TOPIC: records(sign(certificates, domain, account)),
    }


def _parties() -> tuple[Peer, OrchestratorDouble]:
    hub = MemoryHub()
    identities = NodeIdentity(b"w" * 32), NodeIdentity(b"o" * 32)
    worker, orchestrator = (MemoryNetwork(hub, identity) for identity in identities)

    async def turn() -> None:
        """No epoch ends here."""

    peer = Peer(
        worker, identities[0], identities[1].peer_id, turn, EthAccount.from_key(b"\x01" * 32)
    )
    return peer, OrchestratorDouble(orchestrator, identities[1])


def _membership(peer: Peer, double: OrchestratorDouble) -> dict[str, Exchange]:
    progress = LeaseProgress(lease_id=LEASE_ID, lease_epoch=1, progress=7)
    return {
        HELLO_PROTOCOL: Exchange(
            request=records(
                HelloRequest(protocol_version=PROTOCOL_VERSION, software_version="0.1.0")
            ),
            reply=records(double.greeting),
        ),
        JOIN_PROTOCOL: Exchange(
            request=records(JoinRequest(bound_node=peer.bound(), name="peer", device="cpu")),
            reply=records(JoinReply(open_jobs=double.jobs, market_epoch=0)),
        ),
        HEARTBEAT_PROTOCOL: Exchange(
            request=records(
                Heartbeat(leases=()),
                Heartbeat(leases=(progress,), acknowledged=(LEASE_ID,)),
            ),
            reply=records(double.beat),
        ),
        PROBE_PROTOCOL: Exchange(
            request=Message(
                decode=lambda data: unpack_probe(ProbeRequest, data),
                valid=(
                    pack_probe(ProbeRequest(download_bytes=64)),
                    pack_probe(ProbeRequest(dial_back=DialBack(port=1, token=TOKEN)), 100),
                ),
            ),
            reply=Message(
                decode=lambda data: unpack_probe(ProbeReply, data),
                valid=(pack_probe(ProbeReply(now_ms=1, received_bytes=0, reached=False), 64),),
            ),
        ),
        FIND_PROTOCOL: Exchange(
            request=records(FindRequest(key=DIGEST, addresses=("/ip4/1.2.3.4/tcp/1",))),
            reply=records(
                FindReply(
                    providers=(Contact(peer=NODE, addresses=("/ip4/1.2.3.4/tcp/1",)),),
                    closer=(Contact(peer=NODE, addresses=()),),
                )
            ),
        ),
        PROVIDE_PROTOCOL: Exchange(
            request=records(ProvideRequest(key=DIGEST, addresses=("/ip4/1.2.3.4/tcp/1",))),
            reply=records(ProvideReply(ttl_s=60)),
        ),
    }


def _market(peer: Peer, double: OrchestratorDouble) -> dict[str, Exchange]:
    sealed = peer.seal(peer.make_bid())
    cancel = BidCancel(commitment=sealed.commitment, from_epoch=3)
    return {
        COMMIT_PROTOCOL: Exchange(request=records(sealed), reply=records(double.receipt(sealed))),
        CANCEL_PROTOCOL: Exchange(
            request=records(sign(cancel, double.greeting.domain, peer.account)),
            reply=records(BidCancelReply(commitment=sealed.commitment, from_epoch=3)),
        ),
        REVEAL_PROTOCOL: Exchange(
            request=records(double.notice([sealed.commitment])),
            reply=records(Reveals(reveals=tuple(peer.reveals.values()))),
        ),
    }


def _work(peer: Peer, double: OrchestratorDouble) -> dict[str, Exchange]:
    offers = [
        double.offer(make_task(kind, number), peer.account.address, NODE, number=number)
        for number, kind in enumerate(TaskKind)
    ]
    results = [peer.message(offer, b"payload") for offer in offers]
    lease = offers[0].lease.record
    failure = LeaseFailure(
        lease_id=lease.lease_id, lease_epoch=1, cause=FailureCause.NODE, detail="no"
    )
    wanted = EvidenceRequest(lease_id=LEASE_ID, blob_sha256=DIGEST, upload_token=TOKEN)
    return {
        LEASE_PROTOCOL: Exchange(
            request=records(*offers), reply=records(LeaseReply(lease_id=LEASE_ID, refusal="no"))
        ),
        RESULT_PROTOCOL: Exchange(
            request=records(*results),
            reply=records(ResultReply(lease_id=LEASE_ID, result_sha256=DIGEST)),
        ),
        FAILURE_PROTOCOL: Exchange(
            request=records(failure), reply=records(FailureReply(lease_id=LEASE_ID))
        ),
        EVIDENCE_PROTOCOL: Exchange(
            request=records(wanted), reply=records(EvidenceReply(lease_id=LEASE_ID, uploaded=True))
        ),
    }


def _blobs() -> dict[str, Exchange]:
    whole = Span(digest=DIGEST, start=0, size_bytes=4 << 20)
    step = DeltaStep(base_sha256="6" * 64, target_sha256=DIGEST, blob=blob(b"delta"))
    holder = KnownHolder(peer=NODE, sources=("http://192.0.2.7:80", f"/p2p/{NODE}"), chunks="ff")
    return {
        BLOB_PROTOCOL: Exchange(
            request=Message(decode=decode_span, valid=(encode_span(whole),)),
            reply=None,
        ),
        HAVE_PROTOCOL: Exchange(
            request=records(
                HaveNotice(
                    sources=(f"/p2p/{NODE}",),
                    http_port=80,
                    holdings=(Holding(sha256=DIGEST, chunks="80"), Holding(sha256=DIGEST)),
                    gone=(DIGEST,),
                )
            ),
            reply=records(HaveReply(ttl_ms=1000)),
        ),
        HOLDERS_PROTOCOL: Exchange(
            request=records(HoldersRequest(sha256=DIGEST, faults=(NODE,))),
            reply=records(HoldersReply(holders=(holder,), deltas=(step,))),
        ),
    }
