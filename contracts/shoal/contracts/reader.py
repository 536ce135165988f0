"""Reading Shoal's contracts: views and logs, typed; no account needed."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, Self, cast

from eth_utils.address import is_address
from web3 import AsyncHTTPProvider, AsyncWeb3
from web3.contract.async_contract import AsyncContract, AsyncContractEvent

from shoal.contracts.connection import bind_contract, checksum
from shoal.contracts.records import (
    ZERO_ADDRESS,
    ChainTotals,
    Deployment,
    EscrowState,
    Payment,
    PostedEpoch,
    StakeInfo,
)
from shoal.contracts.rejection import chain_errors
from shoal.protocol.errors import InvalidRequest, NotFound

HASH_BYTES = 32
_BLOCKS_AT_ONCE = 64


class ChainReader:
    """A connection to one chain and the contracts of one `Deployment` on it."""

    def __init__(
        self, w3: AsyncWeb3[AsyncHTTPProvider], rpc_url: str, deployment: Deployment
    ) -> None:
        self.rpc_url = rpc_url
        self.deployment = deployment
        self._w3 = w3
        self._token: AsyncContract = bind_contract(w3, "DevUSD", deployment.token)
        self._vault: AsyncContract = bind_contract(w3, "StakeVault", deployment.stake_vault)
        self._escrow: AsyncContract = bind_contract(w3, "JobEscrow", deployment.job_escrow)
        self._log: AsyncContract = bind_contract(w3, "ProvenanceLog", deployment.provenance_log)

    async def close(self) -> None:
        """The connection is closed."""
        await self._w3.provider.disconnect()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def check(self) -> None:
        """Passes only on the deployment's own chain, with its contracts in place.

        Raises:
            InvalidRequest: another chain (``wrong_chain``), or no contract at an address
                (``no_contract``).
            Unavailable: the chain does not answer.
        """
        with chain_errors("read the chain id", self.rpc_url):
            chain_id = await self._w3.eth.chain_id
        if chain_id != self.deployment.chain_id:
            raise InvalidRequest(
                f"The chain at {self.rpc_url} has id {chain_id}, but Shoal's contracts are on "
                f"{self.deployment.chain_id}; connect to that chain.",
                code="wrong_chain",
                chain_id=chain_id,
                expected=self.deployment.chain_id,
            )
        d = self.deployment
        addresses = (d.token, d.stake_vault, d.job_escrow, d.provenance_log)
        with chain_errors("read the contracts' code", self.rpc_url):
            codes = await asyncio.gather(*(self._w3.eth.get_code(checksum(a)) for a in addresses))
        for address, code in zip(addresses, codes, strict=True):
            if not code:
                raise InvalidRequest(
                    f"The chain at {self.rpc_url} has no contract at {address}; it was reset, or "
                    "the deployment file belongs to another chain. Deploy again.",
                    code="no_contract",
                )

    async def now_s(self) -> int:
        """The chain's own time: the latest block's timestamp, in Unix seconds."""
        with chain_errors("read the latest block", self.rpc_url):
            return (await self._w3.eth.get_block("latest"))["timestamp"]

    async def block_number(self) -> int:
        """The latest block's number."""
        with chain_errors("read the block number", self.rpc_url):
            return await self._w3.eth.block_number

    async def eth_balance(self, account: str) -> int:
        """``account``'s gas money, in wei."""
        with chain_errors("read a balance", self.rpc_url):
            return await self._w3.eth.get_balance(checksum(checked_address(account)))

    async def token_balance(self, account: str) -> int:
        """``account``'s settlement tokens, in micros."""
        return cast(
            int, await self._view(self._token, "balanceOf", checksum(checked_address(account)))
        )

    async def stake_of(self, account: str) -> StakeInfo:
        """``account``'s stake; all zero for an account that never staked."""
        active, unbonding, unbond_at = await self._view(
            self._vault, "stakeOf", checksum(checked_address(account))
        )
        return StakeInfo(active_micros=active, unbonding_micros=unbonding, unbond_at_s=unbond_at)

    async def node_owner(self, node_key: bytes) -> str | None:
        """The account that bound the Ed25519 ``node_key``; None for a free key."""
        owner = await self._view(self._vault, "nodeOwner", checked_hash("node key", node_key))
        return None if owner == ZERO_ADDRESS else cast(str, owner)

    async def challenge_window_s(self) -> int:
        """Seconds a posted root waits before it can be claimed under."""
        return cast(int, await self._view(self._escrow, "CHALLENGE_WINDOW"))

    async def escrow(self, job_id: str) -> EscrowState:
        """The job's money and state.

        Raises:
            NotFound: no job with this id was ever opened.
        """
        job = await self._view(self._escrow, "jobOf", job_id_bytes(job_id))
        state = _escrow_state(job_id, _fields(self._escrow, "jobOf", job))
        if state.sponsor == ZERO_ADDRESS:
            raise NotFound(
                f"The chain holds no job {job_id}; open its escrow first.", code="no_such_job"
            )
        return state

    async def claimed(self, job_id: str, account: str) -> int:
        """What ``account`` has been paid by the job so far, in micros."""
        return cast(
            int,
            await self._view(
                self._escrow, "claimed", job_id_bytes(job_id), checksum(checked_address(account))
            ),
        )

    async def provenance_head(self, job_id: str) -> tuple[bytes, int]:
        """The head of the job's provenance log, and how many roots it holds."""
        subject = (checksum(self.deployment.job_escrow), job_id_bytes(job_id))
        head = await self._view(self._log, "head", *subject)
        return bytes(head), cast(int, await self._view(self._log, "seq", *subject))

    async def payments(self, job_id: str, from_block: int | None = None) -> list[Payment]:
        """Every payment the job made, oldest first."""
        logs = await self._logs(self._escrow.events.Claimed(), job_id, from_block)
        return [payment_from(log) for log in logs]

    async def epochs(self, job_id: str, from_block: int | None = None) -> list[PostedEpoch]:
        """Every epoch posted for the job, oldest first."""
        logs = await self._logs(self._escrow.events.EpochPosted(), job_id, from_block)
        return [_posted(log) for log in logs]

    async def totals(self) -> ChainTotals:
        """All transactions since the deployment's first block, whoever sent them."""
        first = self.deployment.block_number
        last = await self.block_number()
        transactions = gas_used = 0
        for start in range(first, last + 1, _BLOCKS_AT_ONCE):
            numbers = range(start, min(start + _BLOCKS_AT_ONCE, last + 1))
            with chain_errors("read blocks", self.rpc_url):
                blocks = await asyncio.gather(*(self._w3.eth.get_block(n) for n in numbers))
            transactions += sum(len(block["transactions"]) for block in blocks)
            gas_used += sum(block["gasUsed"] for block in blocks)
        return ChainTotals(blocks=last + 1 - first, transactions=transactions, gas_used=gas_used)

    async def _view(self, contract: AsyncContract, name: str, *args: Any) -> Any:
        with chain_errors(f"read {name}", self.rpc_url):
            return await contract.functions[name](*args).call()

    async def _logs(
        self, event: AsyncContractEvent, job_id: str, from_block: int | None
    ) -> list[Mapping[str, Any]]:
        start = self.deployment.block_number if from_block is None else from_block
        with chain_errors(f"read the log of {job_id}", self.rpc_url):
            logs = await event.get_logs(
                argument_filters={"jobId": job_id_bytes(job_id)}, from_block=start
            )
        return list(cast(Any, logs))


def job_id_bytes(job_id: str) -> bytes:
    """``job_id`` as the chain's 32 bytes."""
    try:
        return checked_hash("job id", bytes.fromhex(job_id.removeprefix("0x")))
    except ValueError as error:
        raise InvalidRequest(
            f"{job_id[:80]!r} is not a job id; it is 0x and 64 hex digits.", code="bad_job_id"
        ) from error


def payment_from(log: Mapping[str, Any]) -> Payment:
    """The payment a ``Claimed`` log records."""
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
    )


def _escrow_state(job_id: str, job: dict[str, Any]) -> EscrowState:
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
        refund_taken=job["refundTaken"],
        pay_root="0x" + job["root"].hex(),
        ready_at_s=job["readyAt"],
    )


def _fields(contract: AsyncContract, function: str, values: tuple[Any, ...]) -> dict[str, Any]:
    """A struct's values by name; web3 returns them as a bare tuple in the ABI's order."""
    entry = next(
        cast(dict[str, Any], e) for e in cast(Any, contract.abi) if e.get("name") == function
    )
    names = [component["name"] for component in entry["outputs"][0]["components"]]
    return dict(zip(names, values, strict=True))


def checked_address(account: str) -> str:
    """``account``, if it has the form of one."""
    if not is_address(account):
        raise InvalidRequest(
            f"{account[:80]!r} is not an account; it is 0x and 40 hex digits.", code="bad_account"
        )
    return account


def checked_hash(what: str, value: bytes) -> bytes:
    """``value``, if it is 32 bytes long."""
    if len(value) != HASH_BYTES:
        raise InvalidRequest(
            f"The {what} has {len(value)} bytes; it must have {HASH_BYTES}.", code="bad_length"
        )
    return value
