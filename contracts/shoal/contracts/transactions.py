"""One account's transactions: priced, signed, broadcast, looked up.  No order is kept here."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any, cast

from eth_account.signers.local import LocalAccount
from eth_typing import HexStr
from hexbytes import HexBytes
from web3.exceptions import ContractLogicError, TransactionNotFound, Web3RPCError
from web3.types import TxParams, TxReceipt

from shoal.contracts.connection import Connection, checksum
from shoal.contracts.delivery import (
    Answer,
    Attempt,
    Delivery,
    Landing,
    Sighting,
    raised,
    read_answer,
    telling_receipt,
)
from shoal.contracts.rejection import rejection, rpc_reason
from shoal.protocol.errors import ChainRejected, ShoalError

GAS_MARGIN_PERCENT = 25
"""Added to the node's estimate: storage may be colder when the transaction runs."""
TIP_WEI = 10**9


@dataclass(frozen=True, kw_only=True)
class Call:
    """One transaction to make: what to run and, in words, what for.

    ``to`` is None for a deployment.  ``gas`` replaces the estimate where an estimate would
    mislead.
    """

    to: str | None
    data: bytes
    purpose: str
    value_wei: int = 0
    gas: int | None = None


@dataclass(frozen=True, kw_only=True)
class Price:
    """What a transaction may cost: gas, and both fees of EIP-1559 per gas."""

    gas: int
    max_fee_wei: int
    tip_wei: int

    def above(self, attempt: Attempt) -> Price:
        """This price, or what it takes to replace ``attempt`` where that is more."""
        return Price(
            gas=max(self.gas, attempt.gas),
            max_fee_wei=max(self.max_fee_wei, raised(attempt.max_fee_wei)),
            tip_wei=max(self.tip_wei, raised(attempt.tip_wei)),
        )


class Transactions:
    """What one account can do on one chain, a transaction at a time."""

    def __init__(self, connection: Connection, account: LocalAccount, chain_id: int) -> None:
        self.account = account
        self._connection = connection
        self._chain_id = chain_id

    @property
    def address(self) -> str:
        """The account that signs."""
        return cast(str, self.account.address)

    async def num_spent(self, block: str = "latest") -> int:
        """The account's next nonce, by the latest block or with what is ``pending``."""
        async with self._connection.asking("read the account's nonce") as w3:
            return await w3.eth.get_transaction_count(self.account.address, cast(Any, block))

    async def price(self, call: Call) -> Price:
        """What ``call`` costs now.

        Raises:
            ChainRejected: the contract refuses it as things stand; nothing was sent.
        """
        async with self._connection.asking(call.purpose) as w3:
            gas = call.gas
            if gas is None:
                estimate = await w3.eth.estimate_gas(cast(TxParams, self._fields(call)))
                gas = estimate * (100 + GAS_MARGIN_PERCENT) // 100
            base_fee = (await w3.eth.get_block("latest"))["baseFeePerGas"]
        # Twice the base fee outlives six full blocks of rises (EIP-1559: at most 1/8 each).
        return Price(gas=gas, max_fee_wei=2 * base_fee + TIP_WEI, tip_wei=TIP_WEI)

    def sign(self, call: Call, nonce: int, price: Price) -> Attempt:
        """``call`` as a signed transaction with ``nonce``; nothing is sent."""
        fields = {key: value for key, value in self._fields(call).items() if key != "from"}
        signed = self.account.sign_transaction(
            {
                **fields,
                "nonce": nonce,
                "type": 2,
                "chainId": self._chain_id,
                "gas": price.gas,
                "maxFeePerGas": price.max_fee_wei,
                "maxPriorityFeePerGas": price.tip_wei,
            }
        )
        return Attempt(
            tx_hash=signed.hash.to_0x_hex(),
            raw=signed.raw_transaction.to_0x_hex(),
            nonce=nonce,
            gas=price.gas,
            max_fee_wei=price.max_fee_wei,
            tip_wei=price.tip_wei,
        )

    async def broadcast(self, attempt: Attempt) -> tuple[Answer, str]:
        """What a node's answer to ``attempt`` means, and its words.

        A lost answer is `Answer.UNCLEAR`: the node may have taken it.
        """
        try:
            async with self._connection.asking("broadcast a transaction") as w3:
                try:
                    await w3.eth.send_raw_transaction(HexStr(attempt.raw))
                except Web3RPCError as error:
                    words = rpc_reason(error)
                    return read_answer(words), words
        except ShoalError as error:
            return Answer.UNCLEAR, error.message
        return Answer.TAKEN, ""

    async def sight(self, delivery: Delivery) -> Sighting:
        """What the chain shows of ``delivery``, the contract not asked."""
        num_spent = await self.num_spent()
        head = await self._connection.block_number()
        found = await asyncio.gather(*(self.landing(h) for h in delivery.hashes))
        receipt = telling_receipt(delivery, (each for each in found if each is not None))
        newest = delivery.newest
        is_pooled = receipt is None and newest is not None and await self.is_known(newest.tx_hash)
        return Sighting(num_spent, head, receipt, is_pooled)

    async def landing(self, tx_hash: str) -> Landing | None:
        """Where the transaction was mined; None while it is not."""
        receipt = await self.receipt(tx_hash)
        return None if receipt is None else landing_of(receipt)

    async def is_known(self, tx_hash: str) -> bool:
        """Whether the node has the transaction, mined or not."""
        async with self._connection.asking("look up a transaction") as w3:
            try:
                await w3.eth.get_transaction(HexBytes(tx_hash))
            except TransactionNotFound:
                return False
            return True

    async def post_mortem(self, tx_hash: str, purpose: str) -> ChainRejected:
        """Why a mined transaction failed, found by running it again on its block's state."""
        async with self._connection.asking(purpose) as w3:
            sent = await w3.eth.get_transaction(HexBytes(tx_hash))
            replay: dict[str, Any] = {
                "from": sent["from"],
                "data": sent["input"],
                "value": sent["value"],
                "gas": sent["gas"],
            }
            if sent.get("to") is not None:
                replay["to"] = sent["to"]
            try:
                await w3.eth.call(cast(TxParams, replay), sent["blockNumber"])
            except ContractLogicError as error:
                return rejection(error, purpose, tx_hash=tx_hash)
            except Web3RPCError as error:
                reason = rpc_reason(error)
            else:
                reason = "it failed when mined, and would not fail now"
        return ChainRejected(
            f"The transaction to {purpose} failed: {reason}.", reason=reason, tx_hash=tx_hash
        )

    async def receipt(self, tx_hash: str) -> TxReceipt | None:
        """The transaction's receipt; None while it is not mined."""
        async with self._connection.asking("look up a receipt") as w3:
            try:
                return await w3.eth.get_transaction_receipt(HexBytes(tx_hash))
            except TransactionNotFound:
                return None

    def _fields(self, call: Call) -> dict[str, Any]:
        fields: dict[str, Any] = {
            "from": self.account.address,
            "data": "0x" + call.data.hex(),
            "value": call.value_wei,
        }
        return fields if call.to is None else fields | {"to": checksum(call.to)}


def landing_of(receipt: TxReceipt) -> Landing:
    """A receipt, in our words."""
    return Landing(
        tx_hash=receipt["transactionHash"].to_0x_hex(),
        block_number=receipt["blockNumber"],
        block_hash=receipt["blockHash"].to_0x_hex(),
        gas_used=receipt["gasUsed"],
        succeeded=receipt["status"] == 1,
    )
