"""The settlement token; on a development chain also its faucet."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, cast

from eth_account import Account as EthAccount

from shoal.contracts.connection import account_address, checksum
from shoal.contracts.contract import BoundContract, Hands
from shoal.contracts.records import Mined
from shoal.contracts.transactions import Call

PERMIT_LIFETIME_S = 3600
Permit = tuple[int, int, bytes, bytes]
"""Deadline, v, r and s, as the contracts take it."""
_PERMIT_TYPES = {
    "Permit": [
        {"name": "owner", "type": "address"},
        {"name": "spender", "type": "address"},
        {"name": "value", "type": "uint256"},
        {"name": "nonce", "type": "uint256"},
        {"name": "deadline", "type": "uint256"},
    ]
}
"""Source: EIP-2612."""


class Token(BoundContract):
    """``DevUSD``, or the stablecoin that stands in its place."""

    name = "DevUSD"

    def __init__(self, hands: Hands, address: str) -> None:
        super().__init__(hands, address)
        self._permit_lock = asyncio.Lock()

    async def balance(self, account: str) -> int:
        """``account``'s tokens, in micros."""
        return cast(int, await self._view("balanceOf", account_address(account)))

    async def transfer(self, to: str, amount_micros: int) -> Mined:
        """``amount_micros`` of our tokens are ``to``'s."""
        return await self._hands.sender.send(self.transfer_call(to, amount_micros))

    def transfer_call(self, to: str, amount_micros: int) -> Call:
        """The transaction that gives ``to`` ``amount_micros`` of our tokens."""
        args = [account_address(to), amount_micros]
        return self._call("transfer", args, f"transfer tokens to {to}")

    async def approve(self, spender: str, amount_micros: int) -> Mined:
        """``spender`` may take ``amount_micros`` of our tokens."""
        return await self._hands.sender.send(self.approve_call(spender, amount_micros))

    def approve_call(self, spender: str, amount_micros: int) -> Call:
        """The transaction after which ``spender`` may take ``amount_micros`` of our tokens."""
        args = [account_address(spender), amount_micros]
        return self._call("approve", args, f"let {spender} take tokens")

    async def allowance(self, owner: str, spender: str) -> int:
        """What ``spender`` may still take of ``owner``'s tokens, in micros."""
        args = account_address(owner), account_address(spender)
        return cast(int, await self._view("allowance", *args))

    async def fund(self, account: str, eth_wei: int, token_micros: int) -> list[Mined]:
        """``account`` has been given gas money and fresh tokens; development chains only."""
        to = account_address(account)
        mint = self._call("mint", [to, token_micros], f"mint tokens for {to}")
        gift = Call(to=to, data=b"", value_wei=eth_wei, purpose=f"send gas money to {to}")
        calls = [call for call, wanted in ((gift, eth_wei), (mint, token_micros)) if wanted]
        return list(await asyncio.gather(*(self._hands.sender.send(call) for call in calls)))

    async def spend_by_permit(
        self, spender: str, amount_micros: int, send: Callable[[Permit], Awaitable[Mined]]
    ) -> Mined:
        """``send`` has used our permit for ``spender`` to take ``amount_micros``.

        One at a time: the next permit's number is known once this one is spent.
        """
        async with self._permit_lock:
            return await send(await self._permit(spender, amount_micros))

    async def _permit(self, spender: str, amount_micros: int) -> Permit:
        account = self._hands.sender.account
        _, name, version, chain_id, verifier, _, _ = await self._view("eip712Domain")
        deadline_s = await self._hands.connection.now_s() + PERMIT_LIFETIME_S
        message = {
            "owner": account.address,
            "spender": checksum(spender),
            "value": amount_micros,
            "nonce": await self._view("nonces", account.address),
            "deadline": deadline_s,
        }
        domain: dict[str, Any] = {
            "name": name,
            "version": version,
            "chainId": chain_id,
            "verifyingContract": verifier,
        }
        signed = EthAccount.sign_typed_data(account.key, domain, _PERMIT_TYPES, message)
        return deadline_s, signed.v, signed.r.to_bytes(32, "big"), signed.s.to_bytes(32, "big")
