"""What the requester does with a job's escrow once the job has ended."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shoal.protocol.errors import InvalidRequest

if TYPE_CHECKING:
    from shoal.contracts.gateway import ChainGateway
    from shoal.contracts.records import EscrowState


@dataclass(frozen=True, kw_only=True)
class Refund:
    """What of a job's budget is back with its requester; ``sent_now`` if by this call."""

    refunded_micros: int
    sent_now: bool


async def refund_rest(gateway: ChainGateway, job_id: str) -> Refund:
    """What no epoch of the job committed is back with its sponsor; twice is once.

    What providers have yet to claim stays in the escrow, theirs for good.

    Raises:
        NotFound: the chain holds no such job.
        InvalidRequest: the escrow is neither closed nor past its deadline.
    """
    state = await gateway.escrow.job(job_id)
    rest_micros = state.funded_micros - state.committed_micros - state.refunded_micros
    if state.closed and rest_micros == 0:
        return Refund(refunded_micros=state.refunded_micros, sent_now=False)
    if not state.closed and await gateway.now_s() < state.deadline_s:
        raise InvalidRequest(
            f"The escrow of job {job_id} is still the job's; end the job with `shoal cancel`, or "
            f"ask again from {when(state)} on.",
            code="refund_too_early",
            deadline_s=state.deadline_s,
        )
    if rest_micros == 0:
        return Refund(refunded_micros=state.refunded_micros, sent_now=False)
    await gateway.escrow.refund(job_id)
    return Refund(refunded_micros=state.refunded_micros + rest_micros, sent_now=True)


def when(state: EscrowState) -> str:
    """The escrow's deadline, for people."""
    moment = datetime.datetime.fromtimestamp(state.deadline_s, tz=datetime.UTC)
    return f"{moment:%Y-%m-%d %H:%M:%S} UTC"
