"""Signing and sending transactions of one account, in order.

One sender per key: the nonce is counted here, under a lock, and read again from the chain
after any doubt.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, cast

from eth_account.signers.local import LocalAccount
from eth_typing import HexStr
from hexbytes import HexBytes
from web3 import AsyncHTTPProvider, AsyncWeb3
from web3.exceptions import ContractLogicError, TransactionNotFound, Web3RPCError
from web3.types import TxParams, TxReceipt

from shoal.contracts.connection import checksum
from shoal.contracts.records import Mined, SendStats, SignedCall
from shoal.contracts.rejection import chain_errors, rejection
from shoal.protocol.errors import ChainRejected

RECEIPT_TIMEOUT_S = 60.0
RECEIPT_POLL_S = 0.02
GAS_MARGIN_PERCENT = 25
"""Added to the node's estimate: storage may be colder when the transaction runs."""
PRIORITY_FEE_WEI = 10**9

OnSigned = Callable[[SignedCall], Awaitable[None]]
"""Called with the signed transaction before its first broadcast, to store it."""


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


class Sender:
    """Sends one account's transactions; safe to use from many tasks at once."""

    def __init__(
        self, w3: AsyncWeb3[AsyncHTTPProvider], rpc_url: str, account: LocalAccount, chain_id: int
    ) -> None:
        self.account = account
        self._w3 = w3
        self.rpc_url = rpc_url
        self._chain_id = chain_id
        self._lock = asyncio.Lock()
        self._next_nonce: int | None = None
        self._transactions = 0
        self._gas_used = 0

    @property
    def stats(self) -> SendStats:
        """What was mined through this sender, failed transactions included."""
        return SendStats(transactions=self._transactions, gas_used=self._gas_used)

    async def send(self, call: Call, on_signed: OnSigned | None = None) -> Mined:
        """``call`` is in a block and succeeded.

        Raises:
            ChainRejected: the contract refuses; nothing was sent unless ``tx_hash`` is set.
            Unavailable: the chain does not answer; whether it has the transaction is unknown.
        """
        return await self.settle(await self.submit(call, on_signed))

    async def submit(self, call: Call, on_signed: OnSigned | None = None) -> SignedCall:
        """``call`` is signed, handed to ``on_signed``, and in the chain's pool."""
        with chain_errors(call.purpose, self.rpc_url):
            params = await self._price(call)
        async with self._lock:
            nonce = await self._take_nonce(call.purpose)
            signed = self._sign(params, nonce, call.purpose)
            if on_signed is not None:
                await on_signed(signed)
            # Until the broadcast is answered the nonce is in doubt: the next call asks the chain.
            self._next_nonce = None
            with chain_errors(call.purpose, self.rpc_url):
                await self._w3.eth.send_raw_transaction(HexStr(signed.raw))
            self._next_nonce = nonce + 1
        return signed

    async def settle(self, signed: SignedCall) -> Mined:
        """``signed``, already broadcast, is in a block and succeeded."""
        with chain_errors(signed.purpose, self.rpc_url):
            receipt = await self._w3.eth.wait_for_transaction_receipt(
                HexBytes(signed.tx_hash), timeout=RECEIPT_TIMEOUT_S, poll_latency=RECEIPT_POLL_S
            )
            self._transactions += 1
            self._gas_used += receipt["gasUsed"]
            if receipt["status"] != 1:
                raise await self._post_mortem(signed, receipt)
        return Mined(
            tx_hash=signed.tx_hash,
            block_number=receipt["blockNumber"],
            gas_used=receipt["gasUsed"],
        )

    async def resend(self, signed: SignedCall) -> Mined:
        """``signed``, stored before a crash, is in a block; broadcast again where it is not.

        Raises:
            ChainRejected: its nonce went to another transaction; sign the call anew.
        """
        with chain_errors(signed.purpose, self.rpc_url):
            if not await self._is_mined(signed):
                try:
                    await self._w3.eth.send_raw_transaction(HexStr(signed.raw))
                except Web3RPCError as error:
                    # The node knows it already, or the nonce is spent: by it, or by another.
                    spent = await self._w3.eth.get_transaction_count(self.account.address)
                    if spent > signed.nonce and not await self._is_mined(signed):
                        raise ChainRejected(
                            f"The transaction to {signed.purpose} lost its nonce {signed.nonce} to "
                            "another; sign it anew.",
                            reason="nonce_taken",
                            tx_hash=signed.tx_hash,
                        ) from error
                    if spent <= signed.nonce and not await self._is_known(signed):
                        raise
                self._next_nonce = None
        return await self.settle(signed)

    async def _take_nonce(self, purpose: str) -> int:
        if self._next_nonce is not None:
            return self._next_nonce
        with chain_errors(purpose, self.rpc_url):
            return await self._w3.eth.get_transaction_count(self.account.address, "pending")

    async def _price(self, call: Call) -> TxParams:
        fields: dict[str, Any] = {
            "from": self.account.address,
            "data": "0x" + call.data.hex(),
            "value": call.value_wei,
        }
        if call.to is not None:
            fields["to"] = checksum(call.to)
        params = cast(TxParams, fields)
        if call.gas is None:
            estimate = await self._w3.eth.estimate_gas(params)
            fields["gas"] = estimate * (100 + GAS_MARGIN_PERCENT) // 100
        else:
            fields["gas"] = call.gas
        base_fee = (await self._w3.eth.get_block("latest"))["baseFeePerGas"]
        fields["maxPriorityFeePerGas"] = PRIORITY_FEE_WEI
        # Twice the base fee outlives six full blocks of rises (EIP-1559: at most 1/8 each).
        fields["maxFeePerGas"] = 2 * base_fee + PRIORITY_FEE_WEI
        fields["chainId"] = self._chain_id
        return params

    def _sign(self, params: TxParams, nonce: int, purpose: str) -> SignedCall:
        fields: dict[str, Any] = {k: v for k, v in params.items() if k != "from"}
        signed = self.account.sign_transaction(fields | {"nonce": nonce, "type": 2})
        return SignedCall(
            tx_hash=signed.hash.to_0x_hex(),
            raw=signed.raw_transaction.to_0x_hex(),
            nonce=nonce,
            purpose=purpose,
        )

    async def _is_mined(self, signed: SignedCall) -> bool:
        try:
            await self._w3.eth.get_transaction_receipt(HexBytes(signed.tx_hash))
        except TransactionNotFound:
            return False
        return True

    async def _is_known(self, signed: SignedCall) -> bool:
        try:
            await self._w3.eth.get_transaction(HexBytes(signed.tx_hash))
        except TransactionNotFound:
            return False
        return True

    async def _post_mortem(self, signed: SignedCall, receipt: TxReceipt) -> ChainRejected:
        """Why a mined transaction failed, found by running it again on its block's state."""
        sent = await self._w3.eth.get_transaction(HexBytes(signed.tx_hash))
        replay: dict[str, Any] = {
            "from": sent["from"],
            "data": sent["input"],
            "value": sent["value"],
            "gas": sent["gas"],
        }
        if sent.get("to") is not None:
            replay["to"] = sent["to"]
        try:
            await self._w3.eth.call(cast(TxParams, replay), receipt["blockNumber"])
        except ContractLogicError as error:
            return rejection(error, signed.purpose, tx_hash=signed.tx_hash)
        except Web3RPCError as error:
            reason = str(error.message)
        else:
            reason = "it failed when mined, and would not fail now"
        return ChainRejected(
            f"The transaction to {signed.purpose} failed: {reason}.",
            reason=reason,
            tx_hash=signed.tx_hash,
        )
