"""One account's hands on the chain: stake, escrow, epochs, claims.

Reading is in `reader`, signing and nonces in `sender`; this module says which contract
call each verb is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Self, cast

from eth_account import Account as EthAccount
from eth_account.signers.local import LocalAccount
from web3 import AsyncHTTPProvider, AsyncWeb3
from web3.contract.async_contract import AsyncContract
from web3.logs import DISCARD

from shoal.contracts.connection import checksum, open_connection
from shoal.contracts.reader import (
    ChainReader,
    checked_address,
    checked_hash,
    job_id_bytes,
    payment_from,
)
from shoal.contracts.records import (
    Claim,
    ClaimManyResult,
    Deployment,
    EpochPost,
    Mined,
    SendStats,
    SignedCall,
    SkippedClaim,
)
from shoal.contracts.rejection import chain_errors, decode_revert
from shoal.contracts.sender import Call, OnSigned, Sender
from shoal.protocol.errors import InvalidRequest, Unauthorised

PERMIT_LIFETIME_S = 3600
MAX_CLAIMS_PER_CALL = 100
"""Keeps one `claim_many` near a third of a 30-million-gas block."""
CLAIM_GAS = 120_000
CLAIM_MANY_BASE_GAS = 100_000
"""Gas set aside per claim and per transaction; a first claim to a fresh account measures
below 100,000.  What is not used is not paid."""
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


class ChainGateway(ChainReader):
    """A `ChainReader` that can also send, when it was given an account."""

    def __init__(
        self,
        w3: AsyncWeb3[AsyncHTTPProvider],
        rpc_url: str,
        deployment: Deployment,
        account: LocalAccount | None,
    ) -> None:
        super().__init__(w3, rpc_url, deployment)
        self._sender = (
            None if account is None else Sender(w3, rpc_url, account, deployment.chain_id)
        )
        self._permit_lock = asyncio.Lock()

    @classmethod
    async def connect(
        cls, rpc_url: str, deployment: Deployment, account: LocalAccount | None = None
    ) -> Self:
        """A gateway on the deployment's chain; without ``account`` it only reads.

        Raises:
            InvalidRequest: another chain, or no contracts at the deployment's addresses.
            Unavailable: nothing answers at ``rpc_url``.
        """
        gateway = cls(open_connection(rpc_url), rpc_url, deployment, account)
        try:
            await gateway.check()
        except BaseException:
            await gateway.close()
            raise
        return gateway

    @property
    def account(self) -> str:
        """The address that signs."""
        return cast(str, self.sender.account.address)

    @property
    def sender(self) -> Sender:
        """What signs and sends.

        Raises:
            Unauthorised: the gateway was connected without an account.
        """
        if self._sender is None:
            raise Unauthorised(
                "This gateway only reads: connect it with an account to send transactions.",
                code="read_only",
            )
        return self._sender

    @property
    def stats(self) -> SendStats:
        """Number and gas of this gateway's own transactions; zero for one that only reads."""
        return SendStats(transactions=0, gas_used=0) if self._sender is None else self._sender.stats

    async def resend(self, signed: SignedCall) -> Mined:
        """A transaction stored before a crash is in a block; see `Sender.resend`."""
        return await self.sender.resend(signed)

    async def fund(self, account: str, eth_wei: int, token_micros: int) -> list[Mined]:
        """``account`` has been given gas money and fresh tokens; development chains only."""
        to = checksum(checked_address(account))
        mint = self._call(self._token, "mint", [to, token_micros], f"mint tokens for {to}")
        gift = Call(to=to, data=b"", value_wei=eth_wei, purpose=f"send gas money to {to}")
        calls = [call for call, wanted in ((gift, eth_wei), (mint, token_micros)) if wanted]
        return list(await asyncio.gather(*(self.sender.send(call) for call in calls)))

    async def transfer(self, to: str, amount_micros: int) -> Mined:
        """``amount_micros`` of our tokens are ``to``'s."""
        args = [checksum(checked_address(to)), amount_micros]
        return await self._send(self._token, "transfer", args, f"transfer tokens to {to}")

    async def stake(self, amount_micros: int) -> Mined:
        """``amount_micros`` of our tokens are added to our active stake."""
        async with self._permit_lock:
            permit = await self._permit(self.deployment.stake_vault, amount_micros)
            return await self._send(
                self._vault, "stakeWithPermit", [amount_micros, permit], "stake"
            )

    async def request_unbond(self, amount_micros: int) -> Mined:
        """``amount_micros`` of our stake are leaving; the waiting time starts anew for all."""
        return await self._send(self._vault, "requestUnbond", [amount_micros], "unbond stake")

    async def withdraw_stake(self) -> Mined:
        """What we unbonded is ours again."""
        return await self._send(self._vault, "withdraw", [], "withdraw stake")

    async def bind_node(self, node_key: bytes) -> Mined:
        """The chain says that we answer for the Ed25519 ``node_key``.

        Raises:
            ChainRejected: reason ``NodeKeyTaken``: another account bound it; make a new key.
        """
        key = checked_hash("node key", node_key)
        return await self._send(self._vault, "bindNode", [key], "bind the node key")

    async def open_job(
        self,
        job_digest: bytes,
        coordinator: str,
        amount_micros: int,
        deadline_s: int,
        *,
        on_signed: OnSigned | None = None,
    ) -> Mined:
        """Our job's escrow holds ``amount_micros``, which ``coordinator`` may commit.

        The job id is `protocol`'s: keccak(abi.encode(our account, ``job_digest``)).

        Args:
            job_digest: 32 bytes, the digest of what was asked for.
            coordinator: The orchestrator's account.
            amount_micros: The whole budget.
            deadline_s: Chain time from which what is not committed can be refunded.
            on_signed: Stores the signed transaction before it is broadcast.
        """
        digest = checked_hash("job digest", job_digest)
        to = checksum(checked_address(coordinator))
        async with self._permit_lock:
            permit = await self._permit(self.deployment.job_escrow, amount_micros)
            args = [digest, to, amount_micros, deadline_s, permit]
            return await self._send(
                self._escrow, "openWithPermit", args, "open the job's escrow", on_signed
            )

    async def top_up(self, job_id: str, amount_micros: int) -> Mined:
        """The job's escrow holds ``amount_micros`` more, from us."""
        async with self._permit_lock:
            spender = checksum(self.deployment.job_escrow)
            await self._send(self._token, "approve", [spender, amount_micros], "approve the escrow")
            args = [job_id_bytes(job_id), amount_micros]
            return await self._send(self._escrow, "topUp", args, "top up the escrow")

    async def post_epoch(self, post: EpochPost, *, on_signed: OnSigned | None = None) -> Mined:
        """The job owes what ``post`` says, and its provenance root is anchored.

        Raises:
            ChainRejected: e.g. ``WrongEpoch``, ``TotalAboveFunds``, ``NotCoordinator``.
        """
        epoch = (
            post.epoch,
            bytes.fromhex(post.pay_root[2:]),
            bytes.fromhex(post.prov_root[2:]),
            post.cumulative_micros,
            post.num_tasks,
            post.num_statements,
        )
        args = [job_id_bytes(post.job_id), epoch]
        return await self._send(self._escrow, "post", args, f"post epoch {post.epoch}", on_signed)

    async def claim(self, job_id: str, claim: Claim) -> Mined:
        """``claim.account`` has been paid all that the job's root owes it.

        Claiming twice pays nothing more and is no error.
        """
        args = [
            job_id_bytes(job_id),
            checksum(claim.account),
            claim.cumulative_micros,
            _proof_bytes(claim),
        ]
        return await self._send(self._escrow, "claim", args, f"claim for {claim.account}")

    async def claim_many(self, job_id: str, claims: Sequence[Claim]) -> ClaimManyResult:
        """Every payee that can be paid has been; the others are named with the reason.

        Args:
            job_id: The job whose root the proofs are under.
            claims: At most `MAX_CLAIMS_PER_CALL`.
        """
        if not 0 < len(claims) <= MAX_CLAIMS_PER_CALL:
            raise InvalidRequest(
                f"{len(claims)} claims in one call; send 1 to {MAX_CLAIMS_PER_CALL}.",
                code="bad_claim_count",
            )
        args = [
            job_id_bytes(job_id),
            [checksum(claim.account) for claim in claims],
            [claim.cumulative_micros for claim in claims],
            [_proof_bytes(claim) for claim in claims],
        ]
        # A node's estimate is the least gas with which the call does not revert, and this
        # call survives claims that run dry: the limit is computed instead.
        gas = CLAIM_MANY_BASE_GAS + CLAIM_GAS * len(claims)
        call = self._call(self._escrow, "claimMany", args, f"pay {len(claims)} payees", gas)
        return await self._claim_result(await self.sender.send(call))

    async def close_job(self, job_id: str, *, on_signed: OnSigned | None = None) -> Mined:
        """The job is final: no more epochs, and the rest can be refunded."""
        args = [job_id_bytes(job_id)]
        return await self._send(self._escrow, "close", args, "close the job", on_signed)

    async def refund(self, job_id: str, *, on_signed: OnSigned | None = None) -> Mined:
        """What no epoch committed is back with the sponsor, whoever calls."""
        args = [job_id_bytes(job_id)]
        return await self._send(self._escrow, "refund", args, "refund the job", on_signed)

    def _call(
        self,
        contract: AsyncContract,
        name: str,
        args: list[Any],
        purpose: str,
        gas: int | None = None,
    ) -> Call:
        try:
            data = contract.encode_abi(name, args=args)
        except (TypeError, ValueError) as error:
            raise InvalidRequest(
                f"The chain cannot take these values to {purpose}: {str(error)[:300]}",
                code="bad_arguments",
            ) from error
        return Call(to=contract.address, data=bytes.fromhex(data[2:]), purpose=purpose, gas=gas)

    async def _send(
        self,
        contract: AsyncContract,
        name: str,
        args: list[Any],
        purpose: str,
        on_signed: OnSigned | None = None,
    ) -> Mined:
        return await self.sender.send(self._call(contract, name, args, purpose), on_signed)

    async def _permit(self, spender: str, amount_micros: int) -> tuple[int, int, bytes, bytes]:
        """Our EIP-2612 signature letting ``spender`` take ``amount_micros``."""
        sender = self.sender
        owner = sender.account.address
        _, name, version, chain_id, verifier, _, _ = await self._view(self._token, "eip712Domain")
        message = {
            "owner": owner,
            "spender": checksum(spender),
            "value": amount_micros,
            "nonce": await self._view(self._token, "nonces", owner),
            "deadline": await self.now_s() + PERMIT_LIFETIME_S,
        }
        domain = {
            "name": name,
            "version": version,
            "chainId": chain_id,
            "verifyingContract": verifier,
        }
        signed = EthAccount.sign_typed_data(sender.account.key, domain, _PERMIT_TYPES, message)
        return (
            cast(int, message["deadline"]),
            signed.v,
            signed.r.to_bytes(32, "big"),
            signed.s.to_bytes(32, "big"),
        )

    async def _claim_result(self, mined: Mined) -> ClaimManyResult:
        with chain_errors("read the receipt", self.rpc_url):
            receipt = await self._w3.eth.get_transaction_receipt(cast(Any, mined.tx_hash))
        events = self._escrow.events
        paid = events.Claimed().process_receipt(receipt, errors=DISCARD)
        skipped = events.ClaimSkipped().process_receipt(receipt, errors=DISCARD)
        return ClaimManyResult(
            mined=mined,
            payments=tuple(payment_from(log) for log in paid),
            skipped=tuple(
                SkippedClaim(
                    account=log["args"]["who"], reason=decode_revert(log["args"]["reason"])
                )
                for log in skipped
            ),
        )


def _proof_bytes(claim: Claim) -> list[bytes]:
    return [bytes.fromhex(node[2:]) for node in claim.proof]
