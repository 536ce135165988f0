"""Providers' stake, and which account answers for which node key."""

from __future__ import annotations

from typing import cast

from shoal.contracts.connection import account_address, hash_bytes
from shoal.contracts.contract import BoundContract, Hands
from shoal.contracts.records import ZERO_ADDRESS, Mined, StakeInfo
from shoal.contracts.token import Token


class StakeVault(BoundContract):
    """``StakeVault``."""

    name = "StakeVault"

    def __init__(self, hands: Hands, address: str, token: Token) -> None:
        super().__init__(hands, address)
        self._token = token

    async def stake_of(self, account: str) -> StakeInfo:
        """``account``'s stake; all zero for an account that never staked."""
        stake = await self._view_struct("stakeOf", account_address(account))
        return StakeInfo(
            active_micros=stake["active"],
            unbonding_micros=stake["unbonding"],
            unbond_at_s=stake["unbondAt"],
        )

    async def node_owner(self, node_key: bytes) -> str | None:
        """The account that bound the Ed25519 ``node_key``; None for a free key."""
        owner = await self._view("nodeOwner", hash_bytes("node key", node_key))
        return None if owner == ZERO_ADDRESS else cast(str, owner)

    async def stake(self, amount_micros: int) -> Mined:
        """``amount_micros`` of our tokens are added to our active stake."""
        return await self._token.spend_by_permit(
            self.address,
            amount_micros,
            lambda permit: self._send("stakeWithPermit", [amount_micros, permit], "stake"),
        )

    async def request_unbond(self, amount_micros: int) -> Mined:
        """``amount_micros`` of our stake are leaving; the waiting time starts anew for all."""
        return await self._send("requestUnbond", [amount_micros], "unbond stake")

    async def withdraw_stake(self) -> Mined:
        """What we unbonded is ours again."""
        return await self._send("withdraw", [], "withdraw stake")

    async def bind_node(self, node_key: bytes) -> Mined:
        """The chain says that we answer for the Ed25519 ``node_key``.

        Raises:
            ChainRejected: reason ``NodeKeyTaken``: another account bound it; make a new key.
        """
        key = hash_bytes("node key", node_key)
        return await self._send("bindNode", [key], "bind the node key")
