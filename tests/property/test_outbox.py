"""The outbox against a chain that loses answers, forgets, reorganises and has a thief.

The contract here does not refuse a second time: that each effect happens once is the
outbox's own doing.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from ledger_double import MemoryLedger
from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from shoal.contracts.delivery import Answer, Attempt, Delivery, Landing, Policy, Stage, Step
from shoal.contracts.transactions import Call
from shoal.orchestrator.outbox import Outbox, enqueue
from shoal.orchestrator.store.database import Database
from shoal.orchestrator.store.tables import OutboxRow, SenderRow
from shoal.protocol.clock import ManualTime
from shoal.protocol.errors import ChainRejected, InvariantBroken

_T = TypeVar("_T")
DEPTH = 3
POLICY = Policy(depth=DEPTH, stall_ms=30_000, retry_ms=500)


SETTINGS = settings(max_examples=15, stateful_step_count=25, deadline=None)


class CrashError(BaseException):
    """The process is gone."""


class Faults:
    """When the process dies, and what the next broadcasts meet."""

    def __init__(self) -> None:
        self.crash_in: int | None = None
        self.answers: list[str] = []

    def point(self) -> None:
        if self.crash_in is not None:
            self.crash_in -= 1
            if self.crash_in < 0:
                self.crash_in = None
                raise CrashError


class Counting:
    """A contract that counts how often it was told each key."""

    def __init__(self) -> None:
        self.done: Counter[str] = Counter()
        self.where: dict[str, str] = {}

    def reset(self) -> None:
        self.done.clear()
        self.where.clear()

    def run(self, data: bytes, tx_hash: str, *, commit: bool) -> None:
        if data == b"refused":
            raise ChainRejected("Refused.", reason="Refused()")
        if commit:
            self.done[data.decode()] += 1
            self.where[data.decode()] = tx_hash


class FaultyLedger(MemoryLedger):
    """A ledger behind a bad connection."""

    def __init__(self, contract: Counting, faults: Faults) -> None:
        super().__init__(contract)
        self.automine = False
        self._faults = faults

    async def broadcast(self, attempt: Attempt) -> tuple[Answer, str]:
        self._faults.point()
        fault = self._faults.answers.pop() if self._faults.answers else ""
        if fault == "unreachable":
            return Answer.UNCLEAR, "no answer"
        if fault == "lie":
            return Answer.SPENT, "nonce too low"
        answer = await super().broadcast(attempt)
        self._faults.point()
        return (Answer.UNCLEAR, "no answer") if fault == "lost" else answer


class FaultyDatabase:
    """A database whose process may die before or after a commit."""

    def __init__(self, real: Database, faults: Faults) -> None:
        self._real = real
        self._faults = faults

    async def run(self, work: Callable[[Session], _T]) -> _T:
        self._faults.point()
        answer = self._real.run_now(work)
        self._faults.point()
        return answer

    async def make_durable(self) -> None:
        self._faults.point()


class Telling:
    """The one kind of effect: the contract is told the payload."""

    def __init__(self, ledger: MemoryLedger, contract: Counting) -> None:
        self._ledger = ledger
        self._contract = contract
        self.landings: Counter[str] = Counter()

    def call(self, payload: str) -> Call:
        return Call(to=self._ledger.address, data=payload.encode(), purpose=f"tell {payload}")

    async def find(self, payload: str) -> Landing | None:
        tx_hash = self._contract.where.get(payload)
        return None if tx_hash is None else self._ledger.landing(tx_hash)

    def landed(self, session: Session, payload: str, landing: Landing) -> None:
        self.landings[payload] += 1


_DATABASES: list[Database] = []


def database() -> Database:
    """One empty database for all examples: migrating each its own would take most of the time."""
    if not _DATABASES:
        folder = Path(tempfile.mkdtemp(prefix="outbox-"))
        _DATABASES.append(Database(f"sqlite:///{folder / 'outbox.db'}"))
    _DATABASES[0].run_now(lambda s: (s.execute(delete(OutboxRow)), s.execute(delete(SenderRow))))
    return _DATABASES[0]


class OutboxMachine(RuleBasedStateMachine):
    """Anything may happen between any two steps; in the end each effect is there once."""

    outbox_class = Outbox

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.real = database()
        self.faults = Faults()
        self.contract = Counting()
        self.ledger = FaultyLedger(self.contract, self.faults)
        self.kind = Telling(self.ledger, self.contract)
        self.time = ManualTime()
        self.keys: list[str] = []
        self.thefts = 0

    @initialize()
    def start(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.faults.crash_in = None
        self.outbox = self.outbox_class(
            cast(Database, FaultyDatabase(self.real, self.faults)),
            self.ledger,
            {"tell": self.kind},
            self.time,
            POLICY,
        )
        self.do(self.outbox.open())

    def do(self, work: Any) -> None:
        try:
            self.runner.run(work)
        except CrashError:
            self.restart()

    @rule()
    def decide_on_an_effect(self) -> None:
        key = f"effect-{len(self.keys)}"
        self.keys.append(key)
        for _ in range(2):
            self.real.run_now(lambda s: enqueue(s, self.ledger.address, key, "tell", key))

    @precondition(lambda self: self.keys)
    @rule(data=st.data())
    def go_a_step_further(self, data: st.DataObject) -> None:
        self.do(self.outbox.advance(data.draw(st.sampled_from(self.keys))))

    @rule()
    def look_at_everything(self) -> None:
        self.do(self.outbox.tick())

    @rule(steps=st.integers(0, 12))
    def die_soon(self, steps: int) -> None:
        self.faults.crash_in = steps

    @rule(answer=st.sampled_from(["lost", "unreachable", "lie"]))
    def break_the_next_broadcast(self, answer: str) -> None:
        self.faults.answers.append(answer)

    @rule(limit=st.integers(0, 3))
    def mine(self, limit: int) -> None:
        self.ledger.mine(limit)

    @rule(ms=st.sampled_from([100, 1_000, 40_000]))
    def wait(self, ms: int) -> None:
        self.time.advance(ms)

    @rule(depth=st.integers(1, DEPTH), keep=st.booleans())
    def reorganise(self, depth: int, keep: bool) -> None:
        self.ledger.reorganise(min(depth, len(self.ledger.blocks)), keep_in_pool=keep)

    @precondition(lambda self: self.ledger.pool)
    @rule(data=st.data())
    def forget_from_the_pool(self, data: st.DataObject) -> None:
        del self.ledger.pool[data.draw(st.sampled_from(sorted(self.ledger.pool)))]

    @precondition(lambda self: self.thefts < 3)
    @rule()
    def steal_a_nonce(self) -> None:
        self.thefts += 1
        self.ledger.steal_nonce()

    def teardown(self) -> None:
        try:
            self._calm_down()
            self._check()
        finally:
            self.runner.close()

    def _calm_down(self) -> None:
        self.faults.crash_in, self.faults.answers = None, []
        for _ in range(5 * DEPTH + 5):
            for key in self.keys:
                self.do(self.outbox.advance(key))
            self.do(self.outbox.tick())
            if not self.ledger.pool and self._stages() <= {Stage.FINAL.value}:
                return
            self.ledger.mine()
            self.time.advance(100_000)

    def _stages(self) -> set[str]:
        return self.real.run_now(lambda s: set(s.scalars(select(OutboxRow.stage))))

    def _check(self) -> None:
        assert dict(self.contract.done) == dict.fromkeys(self.keys, 1)
        assert self._stages() <= {Stage.FINAL.value}
        assert set(self.kind.landings) == set(self.keys)
        sender = self.real.run_now(lambda s: s.get_one(SenderRow, self.ledger.address))
        spent = self.runner.run(self.ledger.num_spent())
        assert not self.ledger.pool
        assert sender.next_nonce <= spent


def test_each_effect_happens_once_whatever_goes_wrong() -> None:
    run_state_machine_as_test(OutboxMachine, settings=SETTINGS)


class ForgetfulOutbox(Outbox):
    """Signs anew after a lost answer, where it should look first: the control."""

    async def advance(self, claim_key: str) -> tuple[Delivery, Step]:
        row = await self._database.run(lambda s: s.get_one(OutboxRow, claim_key))
        delivery = Delivery.model_validate_json(row.delivery)
        if delivery.num_broadcasts == 1 and len(delivery.attempts) == 1:
            await self._store(row, delivery.requeued())
        return await super().advance(claim_key)


@pytest.mark.parametrize(("kind", "times"), [(Outbox, 1), (ForgetfulOutbox, 2)])
def test_a_lost_answer_is_looked_up_and_not_repeated(kind: type[Outbox], times: int) -> None:
    contract, faults, time = Counting(), Faults(), ManualTime()
    ledger = FaultyLedger(contract, faults)
    real = database()

    async def scenario() -> None:
        outbox = kind(real, ledger, {"tell": Telling(ledger, contract)}, time, POLICY)
        await outbox.open()
        await real.run(lambda s: enqueue(s, ledger.address, "a", "tell", "a"))
        faults.answers.append("lost")
        for _ in range(6):
            await outbox.advance("a")
        ledger.mine()
        assert contract.done["a"] == times

    asyncio.run(scenario())


def test_only_the_newest_process_sends() -> None:
    contract = Counting()
    ledger = FaultyLedger(contract, Faults())
    real = database()
    kind = {"tell": Telling(ledger, contract)}

    async def scenario() -> None:
        old = Outbox(real, ledger, kind, ManualTime(), POLICY)
        await old.open()
        new = Outbox(real, ledger, kind, ManualTime(), POLICY)
        await real.run(lambda s: enqueue(s, ledger.address, "a", "tell", "a"))
        # Control: with nobody after it, the first may sign.
        await old.advance("a")
        await new.open()
        ledger.pool.clear()
        await real.run(lambda s: enqueue(s, ledger.address, "b", "tell", "b"))
        with pytest.raises(InvariantBroken) as caught:
            await old.advance("b")
        assert caught.value.code == "sender_fenced"
        await new.advance("b")
        rows = await real.run(lambda s: list(s.scalars(select(OutboxRow.nonce))))
        assert sorted(nonce for nonce in rows if nonce is not None) == [0, 1]

    asyncio.run(scenario())


def test_a_stalled_transaction_pays_more_and_keeps_its_nonce() -> None:
    contract = Counting()
    ledger = FaultyLedger(contract, Faults())
    real, time = database(), ManualTime()

    async def scenario() -> None:
        outbox = Outbox(real, ledger, {"tell": Telling(ledger, contract)}, time, POLICY)
        await outbox.open()
        await real.run(lambda s: enqueue(s, ledger.address, "a", "tell", "a"))
        for _ in range(5):
            await outbox.advance("a")
        assert len(ledger.broadcasts) == 1
        time.advance(POLICY.stall_ms)
        await outbox.tick()
        row = await real.run(lambda s: s.get_one(OutboxRow, "a"))
        first, second = Delivery.model_validate_json(row.delivery).attempts
        assert (first.nonce, second.nonce) == (0, 0)
        assert second.max_fee_wei * 1000 >= first.max_fee_wei * 1125
        assert second.tip_wei * 1000 >= first.tip_wei * 1125
        assert ledger.pool[0] == second
        # The older may still be the one that is mined.
        ledger.pool[0] = first
        ledger.mine()
        await outbox.tick()
        row = await real.run(lambda s: s.get_one(OutboxRow, "a"))
        landing = Delivery.model_validate_json(row.delivery).landing
        assert landing is not None
        assert landing.tx_hash == first.tx_hash

    asyncio.run(scenario())


def test_a_chain_that_drops_a_final_block_stops_us() -> None:
    contract = Counting()
    ledger = FaultyLedger(contract, Faults())
    real = database()

    async def scenario() -> None:
        outbox = Outbox(real, ledger, {"tell": Telling(ledger, contract)}, ManualTime(), POLICY)
        await outbox.open()
        await real.run(lambda s: enqueue(s, ledger.address, "a", "tell", "a"))
        for _ in range(DEPTH + 2):
            for _ in range(3):
                await outbox.advance("a")
            ledger.mine()
        await outbox.tick()
        ledger.reorganise(DEPTH, keep_in_pool=False)
        await outbox.tick()
        ledger.reorganise(len(ledger.blocks), keep_in_pool=False)
        with pytest.raises(InvariantBroken) as caught:
            await outbox.tick()
        assert caught.value.code == "deep_reorganisation"

    asyncio.run(scenario())
