"""Hands finished work in: the payload as a blob, then result, receipt and signed statement."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from shoal.protocol.blob import BlobRef
from shoal.protocol.errors import Clock, Expired, PeerFault, ShoalError, Unavailable
from shoal.protocol.market import Lease
from shoal.protocol.node import (
    FAILURE_PROTOCOL,
    RESULT_PROTOCOL,
    FailureCause,
    FailureReply,
    LeaseFailure,
    ResultMessage,
    ResultReply,
)
from shoal.protocol.result import Receipt, Result
from shoal.protocol.signing import Domain, Signed, sign
from shoal.worker.events import log_event, log_failure
from shoal.worker.evidence import EvidenceBook
from shoal.worker.executor import Assignment
from shoal.worker.ports import BlobPlane, TaskOutput
from shoal.worker.session import Backoff, Credentials, Link
from shoal.worker.statement import sign_statement

_MAX_DETAIL_CHARS: Final = 500
_EVIDENCE_TIMEOUT_S: Final = 100.0
"""Below what a handler is given to answer in."""
_LEAST_PATIENCE_S: Final = 15.0
_SLOWEST_BYTES_PER_S: Final = 32 << 10
"""A quarter of a megabit per second: an upload slower than that is tried again."""
_OUR_CLOCKS: Final = frozenset({Clock.CONNECT, Clock.REPLY, Clock.TRANSFER})


@dataclass(frozen=True, kw_only=True)
class Drop:
    """Where results go, as the orchestrator's greeting says.

    Attributes:
        domain: Where signatures count.
        blob_urls: Holders that take payloads, the first preferred; mirrors take none.
    """

    domain: Domain
    blob_urls: tuple[str, ...]


class Submitter:
    """Delivers outputs for as long as their leases live.

    Args:
        credentials: The keys that sign receipt and statement.
        link: The way to the orchestrator.
        blobs: The blob plane.
        book: Where receipts are kept.
        monotonic_s: The machine's monotonic clock.
    """

    def __init__(
        self,
        credentials: Credentials,
        link: Link,
        blobs: BlobPlane,
        book: EvidenceBook,
        monotonic_s: Callable[[], float],
    ) -> None:
        self._credentials = credentials
        self._link = link
        self._blobs = blobs
        self._book = book
        self._monotonic_s = monotonic_s
        self.drop: Drop | None = None
        """Set from each greeting."""

    async def deliver(self, assignment: Assignment, output: TaskOutput) -> None:
        """The orchestrator holds the result.

        Raises:
            Expired: the lease ended first.
            ShoalError: the orchestrator refused the result; its own reason.
        """
        max_bytes = assignment.offer.max_result_bytes
        if len(output.payload) > max_bytes:
            raise PeerFault(
                f"The result of {assignment.lease.lease_id} has {len(output.payload)} bytes and "
                f"the lease takes {max_bytes}.",
                code="result_too_large",
            )
        message: ResultMessage | None = None
        pause = Backoff()
        while True:
            try:
                await self._joined_in_time(assignment)
                if message is None:
                    ref = await self._upload(assignment, output)
                    message = self._message(assignment, output, ref)
                    self._keep_receipt(message.receipt)
                await self._send(assignment, message)
            except (Unavailable, Expired) as error:
                if not self._may_retry(assignment, error):
                    raise
                log_failure("result_delayed", error, lease_id=assignment.lease.lease_id)
                await asyncio.sleep(pause.next_s())
            else:
                return

    def _keep_receipt(self, receipt: Signed[Receipt]) -> None:
        try:
            self._book.keep_receipt(receipt)
        except OSError as error:
            # The orchestrator still owes what it accepts; only our own proof of it is missing.
            log_failure("receipt_not_kept", error, lease_id=receipt.record.lease_id)

    async def give_back(self, assignment: Assignment, cause: FailureCause, detail: str) -> None:
        """The orchestrator knows that this lease will not be done, and why.

        Raises:
            ShoalError: it could not be told, or ended the lease before.
        """
        lease = assignment.lease
        failure = LeaseFailure(
            lease_id=lease.lease_id,
            lease_epoch=lease.lease_epoch,
            cause=cause,
            detail=detail[:_MAX_DETAIL_CHARS],
        )
        FailureReply.decode(await self._link.request(FAILURE_PROTOCOL, failure.encode()))

    async def _joined_in_time(self, assignment: Assignment) -> None:
        lease_id = assignment.lease.lease_id
        try:
            async with asyncio.timeout(self._left_s(assignment)):
                await self._link.wait_joined()
        except TimeoutError:
            raise Expired(
                f"The lease {lease_id} ended while the orchestrator was out of reach.",
                clock=Clock.DEADLINE,
                lease_id=lease_id,
            ) from None

    async def _upload(self, assignment: Assignment, output: TaskOutput) -> BlobRef:
        return await self._put(
            output.payload, assignment.offer.upload_token, self._left_s(assignment)
        )

    async def upload_evidence(self, data: bytes, token: str) -> None:
        """The orchestrator holds ``data``, which it asked for.

        Raises:
            Unavailable, Expired: it could not be handed over.
        """
        await self._put(data, token, _EVIDENCE_TIMEOUT_S)

    async def _put(self, data: bytes, token: str, timeout_s: float) -> BlobRef:
        failure: ShoalError | None = None
        # A link that died silently must cost one try, not all the time that is left.
        patience_s = min(timeout_s, _LEAST_PATIENCE_S + len(data) / _SLOWEST_BYTES_PER_S)
        for url in self._current_drop().blob_urls:
            try:
                return await self._blobs.put(url, data, token, timeout_s=patience_s)
            except (Unavailable, Expired) as error:
                failure = error
        raise failure or PeerFault(
            "The orchestrator names no place to store results.", code="no_blob_url"
        )

    def _message(
        self, assignment: Assignment, output: TaskOutput, payload: BlobRef
    ) -> ResultMessage:
        lease = assignment.lease
        result = _result(lease, output, payload)
        receipt = Receipt(
            lease_id=lease.lease_id,
            lease_epoch=lease.lease_epoch,
            job_id=lease.job_id,
            result_sha256=result.digest(),
            account=self._credentials.address,
            node=self._credentials.node,
        )
        signed: Signed[Receipt] = sign(
            receipt, self._current_drop().domain, self._credentials.account
        )
        statement = sign_statement(self._credentials.identity, lease, assignment.offer.task, result)
        return ResultMessage(result=result, receipt=signed, statement=statement)

    async def _send(self, assignment: Assignment, message: ResultMessage) -> None:
        reply = ResultReply.decode(await self._link.request(RESULT_PROTOCOL, message.encode()))
        if reply.result_sha256 != message.result.digest():
            raise PeerFault(
                f"The orchestrator confirmed another result for {assignment.lease.lease_id}.",
                evidence=reply.result_sha256,
                code="wrong_result",
            )
        log_event(
            "result_delivered",
            job_id=assignment.lease.job_id,
            lease_id=assignment.lease.lease_id,
            kind=assignment.lease.kind.value,
            num_units=message.result.num_units,
            policy_version=assignment.offer.task.policy.version,
        )

    def _may_retry(self, assignment: Assignment, error: Unavailable | Expired) -> bool:
        # An `Expired` of the orchestrator's clocks is final: the lease is no longer ours.
        if isinstance(error, Expired) and error.clock not in _OUR_CLOCKS:
            return False
        return not assignment.stop.is_set() and self._left_s(assignment) > 0

    def _left_s(self, assignment: Assignment) -> float:
        return max(0.0, assignment.deadline_s - self._monotonic_s())

    def _current_drop(self) -> Drop:
        if self.drop is None:
            raise Unavailable("The orchestrator has not greeted this worker yet.")
        return self.drop


def _result(lease: Lease, output: TaskOutput, payload: BlobRef) -> Result:
    return Result(
        lease_id=lease.lease_id,
        lease_epoch=lease.lease_epoch,
        task_id=lease.task_id,
        task_sha256=lease.task_sha256,
        kind=lease.kind,
        policy_sha256=output.policy_sha256,
        payload=payload,
        num_units=lease.num_units,
        num_tokens=output.num_tokens,
        compute_ms=output.compute_ms,
        engine=output.engine,
        dtype=output.dtype,
    )
