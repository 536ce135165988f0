"""How one effect gets onto the chain exactly once: the rules, without a chain or a clock.

An effect is named by its claim key and moves ``NEW → SIGNED → SENT → MINED → FINAL``.  What
is known of it is a `Delivery`; what the chain shows is a `Sighting`; `decide` says what to do
next.  Whoever drives this stores each new `Delivery` before it acts on it, so that a crash
at any point repeats a step and never an effect.

Source: transactional outbox; nonce rules of EIP-1559 transactions (Ethereum yellow paper,
section 6), replacement price of go-ethereum's pool (10 %) and OpenEthereum's (12.5 %).
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import NamedTuple, assert_never

from pydantic import Field

from shoal.protocol.ids import Hex32
from shoal.protocol.record import Record

BUMP_PER_MILLE = 125
"""Rise of both fees in a replacement: the most that any common node asks for."""


class Stage(StrEnum):
    """How far an effect has come."""

    NEW = "new"
    SIGNED = "signed"
    SENT = "sent"
    MINED = "mined"
    FINAL = "final"


class Attempt(Record):
    """One signed transaction, complete enough to be broadcast again after a crash."""

    tx_hash: Hex32
    raw: str = Field(pattern=r"^0x[0-9a-f]+$")
    nonce: int = Field(ge=0)
    gas: int = Field(ge=21_000)
    max_fee_wei: int = Field(ge=0)
    tip_wei: int = Field(ge=0)


class Landing(Record):
    """Where an effect was found on the chain.

    All is None where the chain shows the effect and not which transaction made it.
    """

    tx_hash: Hex32 | None = None
    block_number: int | None = None
    block_hash: Hex32 | None = None
    gas_used: int | None = None
    succeeded: bool = True


class Delivery(Record):
    """All that is known of one effect.  Writer and reader: the outbox.

    ``attempts`` are kept for ever: in a reorganised chain any of them may still be mined.
    ``tried_ms`` is when the newest was last handed to a node, ``sent_ms`` when a node last
    took it.
    """

    claim_key: str = Field(min_length=1, max_length=200)
    stage: Stage = Stage.NEW
    attempts: tuple[Attempt, ...] = ()
    num_broadcasts: int = 0
    tried_ms: int | None = None
    sent_ms: int | None = None
    landing: Landing | None = None

    @property
    def newest(self) -> Attempt | None:
        """The transaction that is to be mined; None before any was signed."""
        return self.attempts[-1] if self.attempts and self.stage is not Stage.NEW else None

    @property
    def hashes(self) -> tuple[str, ...]:
        """Every transaction that may show the effect, newest first."""
        own = [attempt.tx_hash for attempt in reversed(self.attempts)]
        found = self.landing.tx_hash if self.landing is not None else None
        return tuple(dict.fromkeys([*own, *([found] if found else [])]))

    @property
    def landed_nonce(self) -> int | None:
        """The nonce our own mined transaction spent; None where another made the effect."""
        if self.landing is None:
            return None
        mine = (a.nonce for a in self.attempts if a.tx_hash == self.landing.tx_hash)
        return next(mine, None)

    def signed(self, attempt: Attempt, *, tried_ms: int | None = None) -> Delivery:
        """``attempt`` is the transaction to be mined from now on."""
        attempts = (*self.attempts, attempt)
        return self._with(stage=Stage.SIGNED, attempts=attempts, tried_ms=tried_ms)

    def tried(self, now_ms: int) -> Delivery:
        """The newest transaction is about to be handed to a node."""
        return self._with(num_broadcasts=self.num_broadcasts + 1, tried_ms=now_ms)

    def taken(self, now_ms: int) -> Delivery:
        """A node holds the newest transaction."""
        return self._with(stage=Stage.SENT, sent_ms=now_ms)

    def landed(self, landing: Landing) -> Delivery:
        """The effect is in a block."""
        return self._with(stage=Stage.MINED, landing=landing)

    def unlanded(self) -> Delivery:
        """The block is gone; the newest transaction, signed already, is to be sent again."""
        return self._with(stage=Stage.SIGNED, landing=None, tried_ms=None)

    def requeued(self) -> Delivery:
        """The effect needs a transaction with another nonce."""
        return self._with(stage=Stage.NEW, landing=None, tried_ms=None)

    def finalised(self) -> Delivery:
        """The effect is deep enough to rest on."""
        return self._with(stage=Stage.FINAL)

    def _with(self, **changes: object) -> Delivery:
        return self.model_copy(update=changes)


class Sighting(NamedTuple):
    """What the chain shows of a delivery, read in the order of the fields.

    The order matters: a nonce read as spent before the receipts are looked up means that a
    transaction of ours without a receipt did not spend it.  ``effect`` is what the contract
    itself shows under the claim key, None where it shows nothing or was not asked.
    """

    num_spent_nonces: int
    head: int
    receipt: Landing | None = None
    is_pooled: bool = False
    effect: Landing | None = None


class Policy(Record):
    """When to wait, repeat and pay more.

    Example:
        >>> Policy(depth=12).stall_after_ms(num_attempts=2)
        60000
    """

    depth: int = Field(ge=0)
    """Blocks on top of a transaction before its effect is final."""
    stall_ms: int = Field(default=30_000, gt=0)
    """How long a transaction may wait in the pool before more is paid; doubles each time."""
    retry_ms: int = Field(default=500, gt=0)
    """Least time between two broadcasts of one transaction; doubles each time."""
    max_fee_wei: int = Field(default=500 * 10**9, gt=0)
    """No replacement pays more per gas than this."""

    def stall_after_ms(self, num_attempts: int) -> int:
        """How long the newest of ``num_attempts`` may wait in the pool."""
        return self.stall_ms << min(num_attempts - 1, 10)

    def retry_after_ms(self, num_broadcasts: int) -> int:
        """How long to wait after the last of ``num_broadcasts`` before the next."""
        return self.retry_ms << min(num_broadcasts - 1, 7)


class Step(StrEnum):
    """What to do next with a delivery."""

    SIGN = "sign"
    """Reserve a nonce and sign; the effect is not on the chain."""
    BROADCAST = "broadcast"
    """Hand the newest transaction to a node, byte for byte as stored."""
    NOTE_SENT = "note_sent"
    """A node holds it, whatever became of the answer."""
    BUMP = "bump"
    """Sign a replacement with the same nonce that pays more."""
    LAND = "land"
    """The effect is in a block: record where."""
    REQUEUE = "requeue"
    """Its nonce is spent and the effect is not there: it needs a new nonce."""
    UNLAND = "unland"
    """Its block is no longer in the chain and its nonce is free: send it again."""
    FINALISE = "finalise"
    """Its block is deep enough."""
    WAIT = "wait"
    """Nothing, yet."""


def telling_receipt(delivery: Delivery, receipts: Iterable[Landing]) -> Landing | None:
    """Which of its transactions' receipts tells of the delivery, if any does.

    A success always does.  A failure does only where it spent the nonce in use: one of an
    earlier nonce has been answered by signing anew.
    """
    newest = delivery.newest
    nonces = {attempt.tx_hash: attempt.nonce for attempt in delivery.attempts}
    failed = None
    for receipt in receipts:
        if receipt.succeeded:
            return receipt
        if newest is not None and nonces.get(receipt.tx_hash or "") == newest.nonce:
            failed = receipt
    return failed


def must_ask_contract(delivery: Delivery, sighting: Sighting) -> bool:
    """Whether `decide` needs to know what the contract shows under the claim key.

    It is asked before a nonce is spent on the effect, and whenever the transactions alone
    cannot tell.
    """
    if delivery.stage is Stage.NEW:
        return sighting.receipt is None or not sighting.receipt.succeeded
    newest = delivery.newest
    spent = newest is not None and sighting.num_spent_nonces > newest.nonce
    lost = delivery.stage is Stage.MINED
    failed = sighting.receipt is not None and not sighting.receipt.succeeded
    return failed or (sighting.receipt is None and (spent or lost))


def decide(
    delivery: Delivery, sighting: Sighting, now_ms: int, policy: Policy
) -> tuple[Step, Landing | None]:
    """The next step, and for `Step.LAND` where the effect was found."""
    receipt = sighting.receipt
    found = receipt if receipt is not None and receipt.succeeded else sighting.effect
    match delivery.stage:
        case Stage.FINAL:
            return Step.WAIT, None
        case Stage.NEW:
            return (Step.LAND, found) if found is not None else (Step.SIGN, None)
        case Stage.MINED:
            return _decide_mined(delivery, sighting, found, policy)
        case Stage.SIGNED | Stage.SENT:
            if found is not None:
                return Step.LAND, found
            newest = delivery.attempts[-1]
            if receipt is not None or sighting.num_spent_nonces > newest.nonce:
                return Step.REQUEUE, None
            return _decide_in_flight(delivery, sighting, now_ms, policy), None
        case _:  # pragma: no cover
            assert_never(delivery.stage)


def _decide_mined(
    delivery: Delivery, sighting: Sighting, found: Landing | None, policy: Policy
) -> tuple[Step, Landing | None]:
    landing = delivery.landing
    if found is None:
        newest = delivery.newest
        is_free = newest is not None and sighting.num_spent_nonces <= newest.nonce
        return (Step.UNLAND if is_free else Step.REQUEUE), None
    if landing is None or found.block_hash != landing.block_hash:
        return Step.LAND, found
    if found.block_number is None or sighting.head - found.block_number >= policy.depth:
        return Step.FINALISE, None
    return Step.WAIT, None


def _decide_in_flight(delivery: Delivery, sighting: Sighting, now_ms: int, policy: Policy) -> Step:
    if sighting.is_pooled:
        if delivery.stage is Stage.SIGNED or delivery.sent_ms is None:
            return Step.NOTE_SENT
        stalled = now_ms - delivery.sent_ms >= policy.stall_after_ms(len(delivery.attempts))
        price = delivery.attempts[-1].max_fee_wei
        can_pay = raised(price) <= policy.max_fee_wei
        return Step.BUMP if stalled and can_pay else Step.WAIT
    tried = delivery.tried_ms
    if tried is None or now_ms - tried >= policy.retry_after_ms(max(1, delivery.num_broadcasts)):
        return Step.BROADCAST
    return Step.WAIT


def raised(fee_wei: int) -> int:
    """``fee_wei`` plus the rise a node asks of a replacement, rounded up."""
    return fee_wei + -(-fee_wei * BUMP_PER_MILLE // 1000)


class Answer(StrEnum):
    """What a node's answer to a broadcast means, by its words."""

    TAKEN = "taken"
    SPENT = "spent"
    """The nonce is spent: by this transaction, by another of ours, or by a stranger's."""
    UNDERPRICED = "underpriced"
    UNCLEAR = "unclear"
    REFUSED = "refused"


_WORDS = {
    Answer.TAKEN: ("already known", "known transaction", "already imported", "alreadyknown"),
    Answer.SPENT: ("nonce too low", "nonce is too low", "old nonce", "oldnonce"),
    Answer.UNDERPRICED: ("replacement", "underpriced"),
    Answer.REFUSED: ("insufficient funds", "exceeds block gas limit", "intrinsic gas"),
}


def read_answer(message: str) -> Answer:
    """What ``message``, a node's refusal of a broadcast, means.

    Nodes share neither error codes nor wording, so this is a hint: whoever acts on it looks
    at the chain first.  Words nobody knows are `Answer.UNCLEAR`.

    Source: go-ethereum ``core/txpool/errors.go``, Erigon, Nethermind ``AcceptTxResult``,
    anvil ``InvalidTransactionError``.
    """
    said = message.lower()
    for answer, words in _WORDS.items():
        if any(word in said for word in words):
            return answer
    return Answer.UNCLEAR
