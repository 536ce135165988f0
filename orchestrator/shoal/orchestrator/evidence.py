"""Residuals of error feedback: which ones a node may continue from, and asking for them.

A gradient with error feedback can only be recomputed with the residual its worker kept.  Its
payload commits to the residual's digest before the audit is drawn; the desk then asks for
the bytes.
"""

from __future__ import annotations

import hmac
import logging
import secrets
from collections import OrderedDict
from collections.abc import Collection

from shoal.orchestrator.context import Context
from shoal.orchestrator.leases import LiveLease
from shoal.protocol.errors import ShoalError, Unauthorised
from shoal.protocol.ids import Digest, PeerId
from shoal.protocol.node import EVIDENCE_PROTOCOL, EvidenceReply, EvidenceRequest
from shoal.rl.batch import ResidualLink
from shoal.rl.gradient_audit import ResidualEvidence

_log = logging.getLogger(__name__)

_MAX_SPENDABLE = 64
"""Residuals one node may have free in one job; as many as it has gradients under way."""
_BASE_TIMEOUT_S = 10.0
_SLOWEST_BYTES_PER_S = 250_000
"""A home line of 2 Mbit/s upwards."""


class EvidenceDesk:
    """Keeps what nodes may continue from, and collects what they committed to."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._spendable: dict[tuple[str, str], OrderedDict[Digest, None]] = {}
        self._expected: dict[str, tuple[Digest, int]] = {}

    def spendable(self, job_id: str, node: str) -> Collection[Digest]:
        """The residuals the node's accepted gradients left and none has continued from."""
        return tuple(self._spendable.get((job_id, node), ()))

    def accept(self, job_id: str, node: str, link: ResidualLink) -> None:
        """The residual before this accepted gradient is spent, the one after it may be."""
        held = self._spendable.setdefault((job_id, node), OrderedDict())
        if link.before is not None:
            held.pop(link.before, None)
        held[link.after] = None
        while len(held) > _MAX_SPENDABLE:
            held.popitem(last=False)

    def retain(self, job_ids: Collection[str]) -> None:
        """Nothing is kept of other jobs."""
        for key in [key for key in self._spendable if key[0] not in job_ids]:
            del self._spendable[key]

    async def collect(
        self, live: LiveLease, link: ResidualLink, size_bytes: int
    ) -> ResidualEvidence:
        """The bytes behind ``link``, each of ``size_bytes``; absent where the node sent none."""
        before = None
        if link.before is not None:
            before = await self._ask(live, link.before, size_bytes)
        after = await self._ask(live, link.after, size_bytes)
        return ResidualEvidence(before=before, after=after)

    def expects(self, token: str) -> bool:
        """Whether this upload token is of a request for evidence."""
        return any(hmac.compare_digest(known, token) for known in self._expected)

    def authorise(self, token: str, digest: str, size_bytes: int) -> None:
        """Passes if ``token`` was given out for exactly these bytes.

        Raises:
            Unauthorised: it was not.
        """
        if self._expected.get(token) != (digest, size_bytes):
            raise Unauthorised(
                "This upload token is for other evidence; send the bytes that were asked for.",
                code="bad_token",
            )

    async def _ask(self, live: LiveLease, digest: Digest, size_bytes: int) -> bytes | None:
        token = secrets.token_hex(16)
        self._expected[token] = (digest, size_bytes)
        request = EvidenceRequest(
            lease_id=live.lease.lease_id, blob_sha256=digest, upload_token=token
        )
        try:
            reply = EvidenceReply.decode(
                await self._context.network.request(
                    PeerId(live.lease.node),
                    EVIDENCE_PROTOCOL,
                    request.encode(),
                    timeout_s=_BASE_TIMEOUT_S + size_bytes / _SLOWEST_BYTES_PER_S,
                )
            )
            return self._context.blobs.read(digest) if reply.uploaded else None
        except ShoalError as error:
            _log.info(
                "evidence_missing",
                extra={"lease_id": live.lease.lease_id, "code": error.code},
            )
            return None
        finally:
            del self._expected[token]
