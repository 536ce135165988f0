"""Requesters' budgets: opened, committed by epochs, claimed, refunded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from web3.logs import DISCARD

from shoal.contracts.connection import account_address, checksum, hash_bytes, job_id_bytes
from shoal.contracts.contract import BoundContract, Hands
from shoal.contracts.delivery import Landing
from shoal.contracts.records import (
    ZERO_ADDRESS,
    Claim,
    ClaimManyResult,
    EpochPost,
    EscrowState,
    Mined,
    Payment,
    PostedEpoch,
    SkippedClaim,
)
from shoal.contracts.rejection import decode_revert
from shoal.contracts.token import Token
from shoal.contracts.transactions import Call
from shoal.protocol.errors import InvalidRequest, NotFound

MAX_CLAIMS_PER_CALL = 100
"""Keeps one `claim_many` near a third of a 30-million-gas block."""
NEVER = 2**64 - 1
UNLIMITED = 2**256 - 1
"""An allowance that is never used up.  Source: OpenZeppelin ERC20, ``_spendAllowance``."""
CLAIM_GAS = 120_000
CLAIM_MANY_BASE_GAS = 100_000
"""Gas set aside per claim and per transaction; a first claim to a fresh account measures
below 100,000.  What is not used is not paid."""


class JobEscrow(BoundContract):
    """``JobEscrow``.

    Verbs that a crash must not repeat come twice: ``post_epoch`` sends, ``post_call`` gives
    the call for an outbox to send; so for closing a job and for its bond.
    """

    name = "JobEscrow"

    def __init__(self, hands: Hands, address: str, token: Token, first_block: int) -> None:
        super().__init__(hands, address)
        self._token = token
        self._first_block = first_block

    async def challenge_window_s(self) -> int:
        """Seconds a posted root waits before it can be claimed under."""
        return cast(int, await self._view("CHALLENGE_WINDOW"))

    async def min_bond_micros(self) -> int:
        """What a coordinator must have put up for a job before it may post; 0 for nothing."""
        return cast(int, await self._view("MIN_BOND"))

    async def court(self) -> str:
        """The address of the one court that can freeze this escrow's jobs."""
        return cast(str, await self._view("COURT"))

    async def job(self, job_id: str, *, depth: int = 0) -> EscrowState:
        """The job's money and state, as of ``depth`` blocks ago.

        Raises:
            NotFound: no job with this id was open then.
        """
        block = None
        if depth:
            block = max(0, await self._hands.connection.block_number() - depth)
        missing = NotFound(
            f"The chain holds no job {job_id}; open its escrow first.", code="no_such_job"
        )
        if block is not None and block < self._first_block:
            raise missing
        state = _escrow_state(
            job_id, await self._view_struct("jobOf", job_id_bytes(job_id), block=block)
        )
        if state.sponsor == ZERO_ADDRESS:
            raise missing
        return state

    async def claimed(self, job_id: str, account: str) -> int:
        """What ``account`` has been paid by the job so far, in micros."""
        return cast(
            int, await self._view("claimed", job_id_bytes(job_id), account_address(account))
        )

    async def payments(self, job_id: str, from_block: int | None = None) -> list[Payment]:
        """Every payment the job made, oldest first."""
        return [_payment(log) for log in await self._job_events("Claimed", job_id, from_block)]

    async def epochs(self, job_id: str, from_block: int | None = None) -> list[PostedEpoch]:
        """Every epoch posted for the job, oldest first."""
        return [_posted(log) for log in await self._job_events("EpochPosted", job_id, from_block)]

    async def closing(self, job_id: str, from_block: int | None = None) -> Landing | None:
        """Where the job was closed; None while the log shows no such thing."""
        logs = await self._job_events("Closed", job_id, from_block)
        return _landing(logs[0]) if logs else None

    async def open_job(
        self, job_digest: bytes, coordinator: str, amount_micros: int, deadline_s: int
    ) -> Mined:
        """Our job's escrow holds ``amount_micros``, which ``coordinator`` may commit.

        The job id is `protocol`'s: keccak(abi.encode(our account, ``job_digest``)).

        Args:
            job_digest: 32 bytes, the digest of what was asked for.
            coordinator: The orchestrator's account.
            amount_micros: The whole budget.
            deadline_s: Chain time from which what is not committed can be refunded.
        """
        args = [hash_bytes("job digest", job_digest), account_address(coordinator)]
        return await self._token.spend_by_permit(
            self.address,
            amount_micros,
            lambda permit: self._send(
                "openWithPermit",
                [*args, amount_micros, deadline_s, permit],
                "open the job's escrow",
            ),
        )

    async def top_up(self, job_id: str, amount_micros: int) -> Mined:
        """The job's escrow holds ``amount_micros`` more, from us."""
        await self._token.approve(self.address, amount_micros)
        return await self._send("topUp", [job_id_bytes(job_id), amount_micros], "top up the escrow")

    def post_call(self, post: EpochPost) -> Call:
        """The transaction that makes the job owe what ``post`` says and anchors its provenance."""
        epoch = (
            post.epoch,
            hash_bytes("pay root", post.pay_root),
            hash_bytes("provenance root", post.prov_root),
            post.cumulative_micros,
            post.num_tasks,
            post.num_statements,
        )
        return self._call("post", [job_id_bytes(post.job_id), epoch], f"post epoch {post.epoch}")

    async def post_epoch(self, post: EpochPost) -> Mined:
        """The job owes what ``post`` says, and its provenance root is anchored.

        Raises:
            ChainRejected: e.g. ``WrongEpoch``, ``TotalAboveFunds``, ``NotCoordinator``.
        """
        return await self._hands.sender.send(self.post_call(post))

    def allow_bonds_call(self) -> Call:
        """The transaction after which the escrow may take any bond that we put up.

        It takes tokens only of who calls it, so nobody else can use the allowance.
        """
        return self._token.approve_call(self.address, UNLIMITED)

    async def may_take_bonds(self) -> bool:
        """Whether our allowance to the escrow is one that is not used up."""
        allowed = await self._token.allowance(self._hands.sender.account.address, self.address)
        return allowed > UNLIMITED // 2

    def bond_call(self, job_id: str, amount_micros: int) -> Call:
        """The transaction that makes us answer for the job with ``amount_micros`` more."""
        args = [job_id_bytes(job_id), amount_micros]
        return self._call("putUpBond", args, "put up the job's bond")

    async def put_up_bond(self, job_id: str, amount_micros: int) -> Mined:
        """We answer for the job with ``amount_micros`` more; its coordinator only."""
        await self._token.approve(self.address, amount_micros)
        return await self._hands.sender.send(self.bond_call(job_id, amount_micros))

    async def bonding(
        self, job_id: str, least_micros: int, from_block: int | None = None
    ) -> Landing | None:
        """Where the job's bond came to be ``least_micros``; None while the log does not show it."""
        logs = await self._job_events("BondPutUp", job_id, from_block)
        return next((_landing(log) for log in logs if log["args"]["bond"] >= least_micros), None)

    def return_bond_call(self, job_id: str) -> Call:
        """The transaction that pays the job's bond back."""
        return self._call("returnBond", [job_id_bytes(job_id)], "return the job's bond")

    async def return_bond(self, job_id: str) -> Mined:
        """The job's coordinator has its bond back, whoever calls."""
        return await self._hands.sender.send(self.return_bond_call(job_id))

    async def bond_return(self, job_id: str, from_block: int | None = None) -> Landing | None:
        """Where the job's bond was paid back; None while the log shows no such thing."""
        logs = await self._job_events("BondReturned", job_id, from_block)
        return _landing(logs[-1]) if logs else None

    async def claim(self, job_id: str, claim: Claim) -> Mined:
        """``claim.account`` has been paid all that the job's root owes it.

        Claiming twice pays nothing more and is no error.
        """
        args = [
            job_id_bytes(job_id),
            account_address(claim.account),
            claim.cumulative_micros,
            _proof_bytes(claim),
        ]
        return await self._send("claim", args, f"claim for {claim.account}")

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
        call = self._call("claimMany", args, f"pay {len(claims)} payees", gas)
        return await self._claim_result(await self._hands.sender.send(call))

    def close_call(self, job_id: str) -> Call:
        """The transaction that makes the job final."""
        return self._call("close", [job_id_bytes(job_id)], "close the job")

    async def close_job(self, job_id: str) -> Mined:
        """The job is final: no more epochs, and the rest can be refunded."""
        return await self._hands.sender.send(self.close_call(job_id))

    async def refund(self, job_id: str) -> Mined:
        """What no epoch committed is back with the sponsor, whoever calls."""
        return await self._send("refund", [job_id_bytes(job_id)], "refund the job")

    async def _job_events(
        self, event: str, job_id: str, from_block: int | None
    ) -> list[Mapping[str, Any]]:
        start = self._first_block if from_block is None else from_block
        return await self._events(event, {"jobId": job_id_bytes(job_id)}, start)

    async def _claim_result(self, mined: Mined) -> ClaimManyResult:
        async with self._hands.connection.asking("read the receipt") as w3:
            receipt = await w3.eth.get_transaction_receipt(cast(Any, mined.tx_hash))
        events = self._contract.events
        paid = events.Claimed().process_receipt(receipt, errors=DISCARD)
        skipped = events.ClaimSkipped().process_receipt(receipt, errors=DISCARD)
        return ClaimManyResult(
            mined=mined,
            payments=tuple(_payment(cast(Any, log)) for log in paid),
            skipped=tuple(
                SkippedClaim(
                    account=log["args"]["who"], reason=decode_revert(log["args"]["reason"])
                )
                for log in skipped
            ),
        )


def _proof_bytes(claim: Claim) -> list[bytes]:
    return [hash_bytes("proof node", node) for node in claim.proof]


def _landing(log: Mapping[str, Any]) -> Landing:
    return Landing(
        tx_hash=log["transactionHash"].to_0x_hex(),
        block_number=log["blockNumber"],
        block_hash=log["blockHash"].to_0x_hex(),
    )


def _payment(log: Mapping[str, Any]) -> Payment:
    return Payment(
        account=log["args"]["who"],
        amount_micros=log["args"]["amount"],
        cumulative_micros=log["args"]["cumulative"],
        tx_hash=log["transactionHash"].to_0x_hex(),
        block_number=log["blockNumber"],
    )


def _posted(log: Mapping[str, Any]) -> PostedEpoch:
    args = log["args"]
    return PostedEpoch(
        job_id="0x" + args["jobId"].hex(),
        epoch=args["epoch"],
        pay_root="0x" + args["payRoot"].hex(),
        prov_root="0x" + args["provRoot"].hex(),
        cumulative_micros=args["cumulativeTotal"],
        num_tasks=args["numTasks"],
        num_statements=args["numStatements"],
        tx_hash=log["transactionHash"].to_0x_hex(),
        block_number=log["blockNumber"],
        block_hash=log["blockHash"].to_0x_hex(),
    )


def _escrow_state(job_id: str, job: dict[str, Any]) -> EscrowState:
    # The window of a root that the court took back never ends; what counts is the one before.
    taken_back = job["readyAt"] == NEVER
    return EscrowState(
        job_id=job_id,
        sponsor=job["sponsor"],
        coordinator=job["coordinator"],
        deadline_s=job["deadline"],
        epoch=job["epoch"],
        funded_micros=job["funded"],
        committed_micros=job["committed"],
        claimed_micros=job["claimed"],
        refunded_micros=job["refunded"],
        closed=job["closed"],
        frozen=job["frozen"],
        bond_micros=job["bond"],
        pay_root="0x" + job["acceptedRoot" if taken_back else "root"].hex(),
        ready_at_s=0 if taken_back else job["readyAt"],
    )
