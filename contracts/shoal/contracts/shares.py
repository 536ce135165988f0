"""Shares in the models that jobs made, and the revenue those shares earn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from shoal.contracts.connection import account_address, hash_bytes, job_id_bytes
from shoal.contracts.contract import BoundContract, Hands
from shoal.contracts.records import ZERO_ADDRESS, Mined
from shoal.contracts.token import Token
from shoal.contracts.transactions import Call
from shoal.protocol.errors import NotFound
from shoal.protocol.ids import Hex32
from shoal.protocol.record import Record


class ModelState(Record):
    """A released model's shares: ``minted_points <= total_points``, for ever."""

    job_id: Hex32
    root: Hex32
    total_points: int
    minted_points: int
    transferable: bool


class ModelShares(BoundContract):
    """``ModelShares``.  A model goes by the id of the job that made it."""

    name = "ModelShares"

    def __init__(self, hands: Hands, address: str, token: Token) -> None:
        super().__init__(hands, address)
        self._token = token

    async def model(self, job_id: str) -> ModelState:
        """The model's shares.

        Raises:
            NotFound: the job's model was not released.
        """
        held = await self._view_struct("modelOf", _model_id(job_id))
        if held["totalPoints"] == 0:
            raise NotFound(f"Job {job_id} has released no model shares.", code="not_released")
        return ModelState(
            job_id=job_id,
            root="0x" + held["root"].hex(),
            total_points=held["totalPoints"],
            minted_points=held["minted"],
            transferable=held["transferable"],
        )

    async def balance(self, job_id: str, account: str) -> int:
        """``account``'s shares of the model."""
        args = (account_address(account), _model_id(job_id))
        return cast(int, await self._view("balanceOf", *args))

    async def revenue_owed(self, job_id: str, account: str) -> int:
        """What ``account`` can claim of the model's revenue now, in micros, rounded down."""
        args = (_model_id(job_id), account_address(account))
        return cast(int, await self._view("revenueOwedDown", *args))

    async def release(
        self, job_id: str, root: str, total_points: int, *, transferable: bool = False
    ) -> Mined:
        """The model's shares are fixed: who has how many is under ``root``, once and for all."""
        return await self._hands.sender.send(
            self.release_call(job_id, root, total_points, transferable=transferable)
        )

    def release_call(
        self, job_id: str, root: str, total_points: int, *, transferable: bool = False
    ) -> Call:
        """The transaction that fixes the model's shares, without a resale royalty."""
        terms = (hash_bytes("share root", root), total_points, transferable, ZERO_ADDRESS, 0)
        return self._call("release", [job_id_bytes(job_id), terms], "release model shares")

    async def mint(
        self, job_id: str, account: str, cumulative_points: int, proof: Sequence[str]
    ) -> Mined:
        """``account`` has all the shares that the root gives it; twice is once."""
        nodes = [hash_bytes("proof node", node) for node in proof]
        args = [_model_id(job_id), account_address(account), cumulative_points, nodes]
        return await self._send("mintByProof", args, f"mint shares for {account}")

    async def deposit_revenue(self, job_id: str, amount_micros: int) -> Mined:
        """``amount_micros`` of our tokens are the model's holders', by points."""
        await self._token.approve(self.address, amount_micros)
        args = [_model_id(job_id), amount_micros]
        return await self._send("depositRevenue", args, "deposit revenue")

    async def claim_revenue(self, job_id: str, account: str) -> Mined:
        """``account`` has been paid its part of the model's revenue; twice is once."""
        args = [_model_id(job_id), account_address(account)]
        return await self._send("claimRevenue", args, f"claim revenue for {account}")


def _model_id(job_id: str) -> int:
    return int.from_bytes(job_id_bytes(job_id), "big")
