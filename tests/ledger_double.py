"""A chain of one account in memory: its nonces, its pool, its blocks, and what can go wrong."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Protocol

from shoal.contracts.delivery import (
    Answer,
    Attempt,
    Delivery,
    Landing,
    Sighting,
    telling_receipt,
)
from shoal.contracts.transactions import Call, Price
from shoal.protocol.canonical import sha256_hex
from shoal.protocol.errors import ChainRejected

GAS = 50_000


class Contract(Protocol):
    """What transactions run; state is a fold over the blocks."""

    def reset(self) -> None:
        """As before the first block."""

    def run(self, data: bytes, tx_hash: str, *, commit: bool) -> None:
        """Takes effect, or raises `ChainRejected`; without ``commit`` it only raises."""


@dataclass
class Block:
    """Transactions in order, each with whether it succeeded."""

    name: str
    transactions: list[tuple[Attempt, bool]] = field(default_factory=list)


class MemoryLedger:
    """The real `Transactions`' twin.  A broadcast is mined at once unless ``automine`` is off."""

    def __init__(self, contract: Contract, address: str = "0x" + "5" * 40) -> None:
        self.contract = contract
        self.address = address
        self.blocks: list[Block] = []
        self.pool: dict[int, Attempt] = {}
        self.automine = True
        self.broadcasts: list[str] = []
        self.refused: dict[str, str] = {}
        self._forks = 0

    async def num_spent(self, block: str = "latest") -> int:
        spent = sum(len(each.transactions) for each in self.blocks)
        while block == "pending" and spent in self.pool:
            spent += 1
        return spent

    async def price(self, call: Call) -> Price:
        if call.gas is None:
            self.contract.run(call.data, "", commit=False)
        return Price(gas=call.gas or GAS, max_fee_wei=1_000, tip_wei=100)

    def sign(self, call: Call, nonce: int, price: Price) -> Attempt:
        said = [call.data.hex(), nonce, price.max_fee_wei]
        raw = json.dumps(said).encode().hex()
        return Attempt(
            tx_hash="0x" + sha256_hex(raw.encode()),
            raw="0x" + raw,
            nonce=nonce,
            gas=price.gas,
            max_fee_wei=price.max_fee_wei,
            tip_wei=price.tip_wei,
        )

    async def broadcast(self, attempt: Attempt) -> tuple[Answer, str]:
        self.broadcasts.append(attempt.tx_hash)
        if attempt.nonce < await self.num_spent():
            return Answer.SPENT, "nonce too low"
        rival = self.pool.get(attempt.nonce)
        if rival is not None and rival.tx_hash == attempt.tx_hash:
            return Answer.TAKEN, "already known"
        if rival is not None and attempt.max_fee_wei * 1000 < rival.max_fee_wei * 1125:
            return Answer.UNDERPRICED, "replacement transaction underpriced"
        self.pool[attempt.nonce] = attempt
        if self.automine:
            self.mine()
        return Answer.TAKEN, ""

    async def sight(self, delivery: Delivery) -> Sighting:
        spent = await self.num_spent()
        found = (self.landing(tx_hash) for tx_hash in delivery.hashes)
        receipt = telling_receipt(delivery, (each for each in found if each is not None))
        newest = delivery.newest
        pooled = newest is not None and self.pool.get(newest.nonce) == newest
        return Sighting(spent, len(self.blocks), receipt, pooled)

    async def post_mortem(self, tx_hash: str, purpose: str) -> ChainRejected:
        reason = self.refused.get(tx_hash, "unknown")
        return ChainRejected(f"Refused to {purpose}: {reason}.", reason=reason, tx_hash=tx_hash)

    def landing(self, tx_hash: str) -> Landing | None:
        for number, block in enumerate(self.blocks, start=1):
            for attempt, succeeded in block.transactions:
                if attempt.tx_hash == tx_hash:
                    return Landing(
                        tx_hash=tx_hash,
                        block_number=number,
                        block_hash="0x" + sha256_hex(block.name.encode()),
                        gas_used=GAS,
                        succeeded=succeeded,
                    )
        return None

    def mine(self, limit: int = 100) -> None:
        """A block with the next transactions of the pool, an empty one where there are none."""
        block = Block(f"{len(self.blocks)}/{self._forks}")
        spent = sum(len(each.transactions) for each in self.blocks)
        while spent in self.pool and len(block.transactions) < limit:
            attempt = self.pool.pop(spent)
            block.transactions.append((attempt, self._run(attempt)))
            spent += 1
        self.pool = {nonce: attempt for nonce, attempt in self.pool.items() if nonce >= spent}
        self.blocks.append(block)

    def reorganise(self, depth: int, *, keep_in_pool: bool) -> None:
        """The last ``depth`` blocks are gone; their transactions are back in the pool, or lost."""
        self._forks += 1
        orphaned = self.blocks[len(self.blocks) - depth :]
        del self.blocks[len(self.blocks) - depth :]
        if keep_in_pool:
            for attempt, _ in (each for block in orphaned for each in block.transactions):
                self.pool.setdefault(attempt.nonce, attempt)
        self.contract.reset()
        for block in self.blocks:
            block.transactions = [(a, self._run(a)) for a, _ in block.transactions]

    def steal_nonce(self, data: bytes = b"") -> None:
        """Somebody else with our key had a transaction mined."""
        spent = sum(len(each.transactions) for each in self.blocks)
        stolen = self.sign(Call(to=None, data=data, purpose="steal"), spent, _DEAR)
        self.pool[spent] = stolen
        self.mine(limit=1)

    def _run(self, attempt: Attempt) -> bool:
        data = bytes.fromhex(json.loads(bytes.fromhex(attempt.raw[2:]))[0])
        if not data:
            return True
        try:
            self.contract.run(data, attempt.tx_hash, commit=True)
        except ChainRejected as error:
            self.refused[attempt.tx_hash] = error.reason
            return False
        return True


_DEAR = Price(gas=GAS, max_fee_wei=10**9, tip_wei=10**9)
