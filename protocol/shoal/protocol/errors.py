"""Every error Shoal raises on purpose, split by who must act.

::

    ShoalError
    ├── InvalidRequest    the caller mends the input          never retried
    │   ├── Unauthorised  the caller lacks a right            exit code 4
    │   ├── NotFound      the thing named does not exist
    │   └── OverBudget    the job's money does not cover it   exit code 5
    ├── Unavailable       we wait; carries ``retry_after_s``  retried
    ├── Expired           the market re-auctions; ``clock`` names the clock that ran out
    ├── PeerFault         the verifier acts; ``evidence`` is the digest of what was sent
    ├── ChainRejected     settlement acts; decoded reason and transaction hash
    └── InvariantBroken   we act; the process stops

Each class carries a stable ``code`` (for programs), a sentence (for people: what was
wrong, where, what to do) and ``context`` (the ids involved).  ``to_wire`` and
``error_from_wire`` move an error between processes without its traceback.
"""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar


class Clock(StrEnum):
    """The clocks that can run out on a piece of work."""

    OFFER = "offer"
    START = "start"
    HEARTBEAT = "heartbeat"
    DEADLINE = "deadline"
    CONNECT = "connect"
    REPLY = "reply"
    TRANSFER = "transfer"


class ShoalError(Exception):
    """Root of everything Shoal raises on purpose.

    Args:
        message: One sentence for a person: what was wrong, where, what to do.
        code: Stable machine-readable name; the class's own when absent.
        context: Ids and figures that locate the fault, never secrets.
    """

    default_code: ClassVar[str] = "error"
    retryable: ClassVar[bool] = False
    http_status: ClassVar[int] = 500
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, code: str | None = None, **context: str | int) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code
        self.context: dict[str, str | int] = context

    def __reduce__(self) -> tuple[object, ...]:
        return (error_from_wire, (self.to_wire(),))

    def to_wire(self) -> dict[str, object]:
        """The error as plain data, safe to show to a stranger."""
        return {
            "error": type(self).__name__,
            "code": self.code,
            "message": self.message,
            "context": self.context,
        }


class InvalidRequest(ShoalError, ValueError):
    """The input is wrong; retrying it unchanged cannot help."""

    default_code = "invalid_request"
    http_status = 400
    exit_code = 3


class Unauthorised(InvalidRequest):
    """The caller has no right to this: signature, stake, binding or ownership is missing."""

    default_code = "unauthorised"
    http_status = 403
    exit_code = 4


class NotFound(InvalidRequest):
    """The thing named does not exist here."""

    default_code = "not_found"
    http_status = 404


class OverBudget(InvalidRequest):
    """The job's escrow does not cover what was asked."""

    default_code = "over_budget"
    http_status = 402
    exit_code = 5


class Unavailable(ShoalError):
    """A part we depend on is not answering; waiting ``retry_after_s`` may mend it."""

    default_code = "unavailable"
    retryable = True
    http_status = 503

    def __init__(
        self,
        message: str,
        *,
        retry_after_s: int = 1,
        code: str | None = None,
        **context: str | int,
    ) -> None:
        super().__init__(message, code=code, retry_after_s=retry_after_s, **context)
        self.retry_after_s = retry_after_s


class Expired(ShoalError):
    """A deadline passed; ``clock`` names which one."""

    default_code = "expired"
    http_status = 409

    def __init__(
        self, message: str, *, clock: Clock, code: str | None = None, **context: str | int
    ) -> None:
        super().__init__(
            message, code=code or f"expired_{clock.value}", clock=clock.value, **context
        )
        self.clock = clock


class PeerFault(ShoalError):
    """A peer sent something no honest peer sends; ``evidence`` digests what it sent."""

    default_code = "peer_fault"
    http_status = 422

    def __init__(
        self, message: str, *, evidence: str = "", code: str | None = None, **context: str | int
    ) -> None:
        super().__init__(message, code=code, evidence=evidence, **context)
        self.evidence = evidence


class ChainRejected(ShoalError):
    """The chain refused an effect; ``reason`` is the decoded custom error."""

    default_code = "chain_rejected"
    http_status = 502

    def __init__(
        self,
        message: str,
        *,
        reason: str,
        tx_hash: str = "",
        code: str | None = None,
        **context: str | int,
    ) -> None:
        super().__init__(message, code=code, reason=reason, tx_hash=tx_hash, **context)
        self.reason = reason
        self.tx_hash = tx_hash


class InvariantBroken(ShoalError):
    """We have a defect: a promise the code rests on does not hold. The process stops."""

    default_code = "invariant_broken"


_CLASSES: dict[str, type[ShoalError]] = {
    cls.__name__: cls
    for cls in (
        ShoalError,
        InvalidRequest,
        Unauthorised,
        NotFound,
        OverBudget,
        Unavailable,
        Expired,
        PeerFault,
        ChainRejected,
        InvariantBroken,
    )
}
_MAX_MESSAGE_CHARS = 2_000


def error_from_wire(data: object) -> ShoalError:
    """Rebuilds an error another process sent.

    The sender may be hostile: an unknown class, or a field of the wrong type, gives a
    `PeerFault` rather than an exception of the sender's choosing.
    """
    if not isinstance(data, dict) or not isinstance(data.get("message"), str):
        return PeerFault("The peer answered with an error that is not in Shoal's form.")
    message = data["message"][:_MAX_MESSAGE_CHARS]
    cls = _CLASSES.get(str(data.get("error")), ShoalError)
    raw_context = data.get("context")
    context = {
        str(key)[:64]: value
        for key, value in (raw_context if isinstance(raw_context, dict) else {}).items()
        if isinstance(value, (str, int)) and str(key) not in {"message", "code"}
    }
    error = cls.__new__(cls)
    ShoalError.__init__(error, message, code=str(data.get("code", cls.default_code))[:64])
    error.context = context
    if isinstance(error, Unavailable):
        delay = context.get("retry_after_s", 1)
        error.retry_after_s = delay if isinstance(delay, int) and 0 <= delay <= 3600 else 1
    elif isinstance(error, Expired):
        known = {clock.value: clock for clock in Clock}
        error.clock = known.get(str(context.get("clock")), Clock.DEADLINE)
    elif isinstance(error, PeerFault):
        error.evidence = str(context.get("evidence", ""))
    elif isinstance(error, ChainRejected):
        error.reason = str(context.get("reason", ""))
        error.tx_hash = str(context.get("tx_hash", ""))
    return error
