"""Sending one account's transactions in order, for whoever waits until they are mined.

One sender per key, and one broadcast at a time: the nonce is the chain's.  A process that
must outlive a crash uses an outbox instead.
"""

from __future__ import annotations

import asyncio

from eth_account.signers.local import LocalAccount
from web3.types import TxReceipt

from shoal.contracts.connection import Connection
from shoal.contracts.delivery import Answer, Attempt
from shoal.contracts.records import Mined, SendStats
from shoal.contracts.transactions import Call, Transactions
from shoal.protocol.errors import ChainRejected, Unavailable

RECEIPT_TIMEOUT_S = 60.0
RECEIPT_POLL_S = 0.02


class Sender:
    """Sends one account's transactions; safe to use from many tasks at once."""

    def __init__(self, connection: Connection, account: LocalAccount, chain_id: int) -> None:
        self.transactions = Transactions(connection, account, chain_id)
        self._lock = asyncio.Lock()
        self._transactions = 0
        self._gas_used = 0

    @property
    def account(self) -> LocalAccount:
        """The account that signs."""
        return self.transactions.account

    @property
    def stats(self) -> SendStats:
        """What was mined through this sender, failed transactions included."""
        return SendStats(transactions=self._transactions, gas_used=self._gas_used)

    async def send(self, call: Call) -> Mined:
        """``call`` is in a block and succeeded.

        Raises:
            ChainRejected: the contract refuses; nothing was sent unless ``tx_hash`` is set.
            Unavailable: the chain does not answer; whether it has the transaction is unknown.
        """
        price = await self.transactions.price(call)
        async with self._lock:
            # Asked each time: a count of our own would be wrong after a reorganisation.
            nonce = await self.transactions.num_spent("pending")
            attempt = self.transactions.sign(call, nonce, price)
            await self._broadcast(attempt, call.purpose)
        receipt = await self._mined(attempt.tx_hash, call.purpose)
        self._transactions += 1
        self._gas_used += receipt["gasUsed"]
        if receipt["status"] != 1:
            raise await self.transactions.post_mortem(attempt.tx_hash, call.purpose)
        return Mined(
            tx_hash=attempt.tx_hash,
            block_number=receipt["blockNumber"],
            gas_used=receipt["gasUsed"],
        )

    async def _broadcast(self, attempt: Attempt, purpose: str) -> None:
        answer, words = await self.transactions.broadcast(attempt)
        if answer is Answer.TAKEN or await self.transactions.is_known(attempt.tx_hash):
            return
        if answer is Answer.UNCLEAR:
            raise Unavailable(
                f"Whether the chain took the transaction to {purpose} is unknown: {words}",
                code="broadcast_unclear",
            )
        raise ChainRejected(
            f"The chain refused to {purpose}: {words}.", reason=words, code=f"tx_{answer.value}"
        )

    async def _mined(self, tx_hash: str, purpose: str) -> TxReceipt:
        try:
            async with asyncio.timeout(RECEIPT_TIMEOUT_S):
                while True:
                    receipt = await self.transactions.receipt(tx_hash)
                    if receipt is not None:
                        return receipt
                    await asyncio.sleep(RECEIPT_POLL_S)
        except TimeoutError:
            raise Unavailable(
                f"The chain has not mined the transaction to {purpose} in {RECEIPT_TIMEOUT_S:.0f} "
                "s; look for it again before sending another.",
                code="not_mined",
                tx_hash=tx_hash,
            ) from None
