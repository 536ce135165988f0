"""What must come with a result before it is taken: its payload, and the provider's receipt."""

from __future__ import annotations

from shoal.network.blob_store import BlobStore
from shoal.orchestrator.leases import LiveLease
from shoal.protocol.errors import InvalidRequest, PeerFault
from shoal.protocol.node import ResultMessage
from shoal.protocol.signing import Domain


def require_payload(blobs: BlobStore, live: LiveLease, message: ResultMessage) -> None:
    """Passes only if the result's payload was uploaded and is as large as the lease allows.

    Raises:
    InvalidRequest: it never came, or is larger.
    """
    sha256 = message.result.payload.sha256
    if not blobs.has(sha256):
        raise InvalidRequest(
            f"The payload {sha256} of lease {live.lease.lease_id} was not uploaded; upload "
            "it, then send the result.",
            code="payload_missing",
        )
    # The store also holds whole models, which nobody may make us read as a result.
    size_bytes = blobs.size_of(sha256)
    if size_bytes > live.max_result_bytes:
        raise InvalidRequest(
            f"The payload of lease {live.lease.lease_id} has {size_bytes} bytes and "
            f"{live.max_result_bytes} are allowed.",
            code="oversize",
        )


def require_receipt(domain: Domain, live: LiveLease, message: ResultMessage, digest: str) -> None:
    """Passes only with the provider's signed receipt for this lease and this result.

    Raises:
    Unauthorised: another account signed it.
    PeerFault: it speaks of another lease or result.
    """
    message.receipt.require_signer(domain, live.lease.account)
    receipt = message.receipt.record
    said = (receipt.lease_id, receipt.lease_epoch, receipt.job_id, receipt.node)
    due = (live.lease.lease_id, live.lease.lease_epoch, live.lease.job_id, live.lease.node)
    if said != due or receipt.result_sha256 != digest:
        raise PeerFault(
            f"The receipt for lease {live.lease.lease_id} speaks of another lease or result.",
            code="receipt_mismatch",
            evidence=digest,
        )
