"""The outbox: every effect on the chain happens once, whatever stops in between.

Who decides on an effect writes its row in the same transaction (`enqueue`).  From then on
each step is stored before it is taken, and the chain is looked at before each step, so that
a crash, a lost answer or a reorganised chain repeats steps and never effects.  The rules
are in `shoal.contracts.delivery`; here are the database and the order of things.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

from sqlalchemy import ColumnElement, and_, func, select
from sqlalchemy.orm import Session

from shoal.contracts.delivery import (
    Answer,
    Attempt,
    Delivery,
    Landing,
    Policy,
    Sighting,
    Stage,
    Step,
    decide,
    must_ask_contract,
    raised,
)
from shoal.contracts.transactions import Call, Price
from shoal.orchestrator.store.database import Database
from shoal.orchestrator.store.tables import OutboxRow, SenderRow
from shoal.protocol.clock import TimeSource
from shoal.protocol.errors import ChainRejected, InvariantBroken, ShoalError, Unavailable

_log = logging.getLogger(__name__)

DELIVER_TIMEOUT_S = 60.0
POLL_S = 0.05
TICK_S = 1.0
GAP_TICKS = 10
"""Ticks between looks for a nonce that was never used: that is rare, and costs two requests."""
FILL_NONCE = "fill_nonce"
TRANSFER_GAS = 21_000
"""Source: Ethereum yellow paper, appendix G (G_transaction)."""


class Wallet(Protocol):
    """One account's transactions; `shoal.contracts.transactions.Transactions` is the real one."""

    @property
    def address(self) -> str:
        """The account that signs."""
        ...

    async def num_spent(self, block: str = "latest") -> int:
        """The account's next nonce by ``block``."""
        ...

    async def price(self, call: Call) -> Price:
        """What ``call`` costs now."""
        ...

    def sign(self, call: Call, nonce: int, price: Price) -> Attempt:
        """``call``, signed."""
        ...

    async def broadcast(self, attempt: Attempt) -> tuple[Answer, str]:
        """What a node answers to ``attempt``."""
        ...

    async def sight(self, delivery: Delivery) -> Sighting:
        """What the chain shows of ``delivery``."""
        ...

    async def post_mortem(self, tx_hash: str, purpose: str) -> ChainRejected:
        """Why a mined transaction failed."""
        ...


class EffectKind(Protocol):
    """One kind of effect: its transaction, how the chain shows it, what it means to us."""

    def call(self, payload: str) -> Call:
        """The transaction that makes the effect."""
        ...

    async def find(self, payload: str) -> Landing | None:
        """Where the contract shows the effect, whoever made it; None where it does not."""
        ...

    def landed(self, session: Session, payload: str, landing: Landing) -> None:
        """Writes what follows from the effect; called again when it moves to another block."""
        ...


def enqueue(session: Session, account: str, claim_key: str, kind: str, payload: str) -> None:
    """The effect will happen once this transaction commits; a second time is the first.

    Args:
        session: The transaction that decides on the effect.
        account: Whose key signs it.
        claim_key: The effect's name for ever.
        kind: Which `EffectKind` it is.
        payload: What that kind needs to know.
    """
    if session.get(OutboxRow, claim_key) is None:
        delivery = Delivery(claim_key=claim_key)
        session.add(
            OutboxRow(
                claim_key=claim_key,
                account=account,
                kind=kind,
                payload=payload,
                stage=delivery.stage.value,
                delivery=delivery.model_dump_json(),
            )
        )


class Outbox:
    """Delivers one account's effects; the only sender of that account's key."""

    def __init__(
        self,
        database: Database,
        wallet: Wallet,
        kinds: Mapping[str, EffectKind],
        time: TimeSource,
        policy: Policy,
    ) -> None:
        self._database = database
        self._wallet = wallet
        self._kinds = dict(kinds) | {FILL_NONCE: NonceFiller(wallet)}
        self._time = time
        self._policy = policy
        self._epoch: int | None = None
        self._turn = asyncio.Lock()

    async def open(self) -> None:
        """This process is the account's sender, and the database agrees with the chain.

        Call before anything is served.

        Raises:
            Unavailable: the database or the chain does not answer.
            InvariantBroken: the chain dropped a block that was final.
        """

        def take(session: Session) -> int:
            row = session.get(SenderRow, self._wallet.address, with_for_update=True)
            if row is None:
                row = SenderRow(account=self._wallet.address, sender_epoch=0, next_nonce=0)
                session.add(row)
            row.sender_epoch += 1
            return row.sender_epoch

        self._epoch = await self._database.run(take)
        await self.tick()

    async def run(self) -> None:
        """What was sent is followed until it is final, for as long as this runs."""
        for count in itertools.count(1):
            await asyncio.sleep(TICK_S)
            try:
                await self.tick(look_for_gaps=count % GAP_TICKS == 0)
            except Unavailable as error:
                _log.warning("outbox_waits", extra={"reason": error.message})

    async def deliver(self, claim_key: str) -> Landing:
        """The effect is in a block; safe to call again, and at once where it is already.

        Raises:
            ChainRejected: the contract refuses the effect as things stand.
            Unavailable: the chain or the database does not answer, or takes too long; the
                effect is followed further, and calling again goes on from there.
        """
        try:
            async with asyncio.timeout(DELIVER_TIMEOUT_S):
                while True:
                    delivery, step = await self.advance(claim_key)
                    if delivery.landing is not None:
                        return delivery.landing
                    if step is Step.WAIT:
                        await asyncio.sleep(POLL_S)
        except TimeoutError:
            raise Unavailable(
                f"The chain has not taken {claim_key} in {DELIVER_TIMEOUT_S:.0f} s; it is "
                "followed further.",
                code="not_mined",
            ) from None

    async def tick(self, *, look_for_gaps: bool = True) -> None:
        """Every effect under way has gone a step further, and no nonce is missing if looked for.

        Raises:
            Unavailable: the database or the chain does not answer.
            InvariantBroken: another process sends with this key, or the chain dropped a block
                that was final.
        """
        for claim_key in await self._database.run(self._under_way):
            await self._push(claim_key)
        if look_for_gaps:
            await self._close_gap()

    async def _push(self, claim_key: str) -> None:
        """The effect has gone as far as it can without waiting."""
        step = Step.SIGN
        try:
            while step is not Step.WAIT:
                _, step = await self.advance(claim_key)
        except InvariantBroken:
            raise
        except ShoalError as error:
            _log.warning("effect_waits", extra={"claim_key": claim_key, "reason": error.message})

    async def advance(self, claim_key: str) -> tuple[Delivery, Step]:
        """The effect has gone one step further; which one, and where it stands now."""
        async with self._turn:
            row = await self._database.run(lambda s: s.get_one(OutboxRow, claim_key))
            delivery = Delivery.model_validate_json(row.delivery)
            if delivery.stage is Stage.FINAL:
                return delivery, Step.WAIT
            sighting = await self._wallet.sight(delivery)
            if must_ask_contract(delivery, sighting):
                effect = await self._kinds[row.kind].find(row.payload)
                sighting = sighting._replace(effect=effect)
            step, found = decide(delivery, sighting, self._time.now_ms(), self._policy)
            return await self._take(step, row, delivery, sighting, found), step

    async def _take(
        self,
        step: Step,
        row: OutboxRow,
        delivery: Delivery,
        sighting: Sighting,
        found: Landing | None,
    ) -> Delivery:
        now_ms = self._time.now_ms()
        match step:
            case Step.WAIT:
                return delivery
            case Step.SIGN:
                return await self._sign(row, delivery, sighting.num_spent_nonces)
            case Step.BUMP:
                return await self._bump(row, delivery)
            case Step.BROADCAST:
                return await self._broadcast(row, delivery)
            case Step.NOTE_SENT:
                return await self._store(row, delivery.taken(now_ms))
            case Step.UNLAND:
                return await self._store(row, delivery.unlanded())
            case Step.FINALISE:
                return await self._store(row, delivery.finalised())
            case Step.LAND:
                return await self._land(row, delivery, found)
            case Step.REQUEUE:
                requeued = await self._store(row, delivery.requeued())
                if sighting.receipt is not None and sighting.receipt.tx_hash is not None:
                    purpose = self._kinds[row.kind].call(row.payload).purpose
                    raise await self._wallet.post_mortem(sighting.receipt.tx_hash, purpose)
                return requeued

    async def _sign(self, row: OutboxRow, delivery: Delivery, num_spent: int) -> Delivery:
        """A nonce is reserved and the transaction that uses it stored, in one transaction."""
        call = self._kinds[row.kind].call(row.payload)
        price = await self._wallet.price(call)

        def reserve(session: Session) -> Delivery:
            sender = self._sender(session)
            if row.kind == FILL_NONCE:
                nonce = int(row.payload)
            else:
                # Spent by a stranger with our key, or before our database was lost.
                nonce = max(sender.next_nonce, num_spent)
                sender.next_nonce = nonce + 1
            signed = delivery.signed(self._wallet.sign(call, nonce, price))
            _write(session, row.claim_key, signed)
            return signed

        signed = await self._database.run(reserve)
        # The chain must never know a transaction that a power cut took from the database.
        await self._database.make_durable()
        return signed

    async def _bump(
        self, row: OutboxRow, delivery: Delivery, tried_ms: int | None = None
    ) -> Delivery:
        """A replacement that pays more is stored; both may still be mined, and one will."""
        old = delivery.attempts[-1]
        if raised(old.max_fee_wei) > self._policy.max_fee_wei:
            return delivery
        call = replace(self._kinds[row.kind].call(row.payload), gas=old.gas)
        price = (await self._wallet.price(call)).above(old)
        bumped = delivery.signed(self._wallet.sign(call, old.nonce, price), tried_ms=tried_ms)
        stored = await self._store(row, bumped)
        await self._database.make_durable()
        _log.info("fee_raised", extra={"claim_key": row.claim_key, "nonce": old.nonce})
        return stored

    async def _broadcast(self, row: OutboxRow, delivery: Delivery) -> Delivery:
        answer, words = await self._wallet.broadcast(delivery.attempts[-1])
        now_ms = self._time.now_ms()
        tried = delivery.tried(now_ms)
        if answer is Answer.TAKEN:
            tried = tried.taken(now_ms)
        # Of every other answer the chain itself says, before the next step, what is true.
        stored = await self._store(row, tried)
        if answer is Answer.UNDERPRICED:
            # Not at once: the next try is due only when this one would have been.
            return await self._bump(row, stored, tried_ms=now_ms)
        if answer is Answer.REFUSED:
            raise ChainRejected(
                f"The chain's node refuses the transaction for {row.claim_key}: {words}.",
                reason=words,
                code="tx_refused",
                tx_hash=delivery.attempts[-1].tx_hash,
            )
        return stored

    async def _land(self, row: OutboxRow, delivery: Delivery, landing: Landing | None) -> Delivery:
        if landing is None:
            raise InvariantBroken(f"The effect {row.claim_key} was found nowhere and yet landed.")
        landed = delivery.landed(landing)
        if landing.tx_hash is None:
            # No transaction to follow: the chain shows the effect and that is all there is.
            landed = landed.finalised()

        def write(session: Session) -> None:
            self._sender(session)
            _write(session, row.claim_key, landed)
            self._kinds[row.kind].landed(session, row.payload, landing)

        await self._database.run(write)
        return landed

    async def _store(self, row: OutboxRow, delivery: Delivery) -> Delivery:
        def write(session: Session) -> None:
            self._sender(session)
            _write(session, row.claim_key, delivery)

        await self._database.run(write)
        return delivery

    def _sender(self, session: Session) -> SenderRow:
        """The account's row, if this process still is its sender."""
        row = session.get_one(SenderRow, self._wallet.address, with_for_update=True)
        if row.sender_epoch != self._epoch:
            raise InvariantBroken(
                f"Another process sends for the account {self._wallet.address} from this database; "
                "only one may. Stop the other, or give each a key of its own.",
                code="sender_fenced",
            )
        return row

    def _under_way(self, session: Session) -> list[str]:
        """Effects that were signed once and are not final; new ones belong to who asked."""
        unfinished = (stage for stage in Stage if stage is not Stage.FINAL)
        rows = session.scalars(select(OutboxRow).where(self._own(*unfinished))).all()
        return [
            row.claim_key
            for row in sorted(rows, key=lambda row: (row.nonce is None, row.nonce))
            if row.kind == FILL_NONCE or Delivery.model_validate_json(row.delivery).attempts
        ]

    async def _close_gap(self) -> None:
        """A nonce that nothing will use is spent on nothing, or all later ones would wait."""
        async with self._turn:
            num_spent = await self._wallet.num_spent()
            missing = await self._wallet.num_spent("pending")

            def look(session: Session) -> bool:
                sender = self._sender(session)
                last_final = session.scalar(
                    select(func.max(OutboxRow.nonce)).where(self._own(Stage.FINAL))
                )
                if last_final is not None and last_final >= num_spent:
                    raise InvariantBroken(
                        f"The chain has dropped transaction {last_final} of "
                        f"{self._wallet.address}, more than {self._policy.depth} blocks deep; "
                        "nothing it says can be relied on until a person has looked.",
                        code="deep_reorganisation",
                    )
                is_held = session.scalar(
                    select(func.count()).where(
                        self._own(Stage.SIGNED, Stage.SENT, Stage.MINED),
                        OutboxRow.nonce == missing,
                    )
                )
                if missing >= sender.next_nonce or is_held:
                    return False
                self._refill(session, missing)
                return True

            is_gap = await self._database.run(look)
        if is_gap:
            _log.warning("nonce_gap", extra={"nonce": missing})
            await self._push(_filler_key(self._wallet.address, missing))

    def _own(self, *stages: Stage) -> ColumnElement[bool]:
        return and_(
            OutboxRow.account == self._wallet.address,
            OutboxRow.stage.in_([stage.value for stage in stages]),
        )

    def _refill(self, session: Session, nonce: int) -> None:
        key = _filler_key(self._wallet.address, nonce)
        enqueue(session, self._wallet.address, key, FILL_NONCE, str(nonce))
        # One that was final may be needed again where a reorganised chain lost its spender.
        session.flush()
        row = session.get_one(OutboxRow, key)
        if row.stage == Stage.FINAL.value:
            _write(session, key, Delivery.model_validate_json(row.delivery).requeued())


class NonceFiller:
    """The effect that a nonce is spent, on a transfer of nothing to ourselves."""

    def __init__(self, wallet: Wallet) -> None:
        self._wallet = wallet

    def call(self, payload: str) -> Call:
        """A transfer of nothing; ``payload`` is the nonce."""
        return Call(
            to=self._wallet.address,
            data=b"",
            purpose=f"spend nonce {payload} on nothing",
            gas=TRANSFER_GAS,
        )

    async def find(self, payload: str) -> Landing | None:
        """Whether the nonce is spent, on whatever."""
        return Landing() if await self._wallet.num_spent() > int(payload) else None

    def landed(self, session: Session, payload: str, landing: Landing) -> None:
        """Nothing follows."""


def _filler_key(account: str, nonce: int) -> str:
    return f"nonce/{account}/{nonce}"


def _write(session: Session, claim_key: str, delivery: Delivery) -> None:
    row = session.get_one(OutboxRow, claim_key)
    row.stage = delivery.stage.value
    row.delivery = delivery.model_dump_json()
    if delivery.landing is not None:
        row.nonce = delivery.landed_nonce
    else:
        row.nonce = None if delivery.newest is None else delivery.newest.nonce
