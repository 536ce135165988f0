"""One account's hands on the chain: every contract of a deployment over one connection."""

from __future__ import annotations

import asyncio
from typing import Self

from eth_account.signers.local import LocalAccount

from shoal.contracts.connection import Connection
from shoal.contracts.contract import Hands
from shoal.contracts.court import FaultCourt
from shoal.contracts.escrow import JobEscrow
from shoal.contracts.logs import BLOCKS_AT_ONCE, LogReader
from shoal.contracts.provenance_log import ProvenanceLog
from shoal.contracts.records import ChainTotals, Deployment, SendStats
from shoal.contracts.sender import Sender
from shoal.contracts.shares import ModelShares
from shoal.contracts.token import Token
from shoal.contracts.vault import StakeVault
from shoal.protocol.errors import InvalidRequest


class ChainGateway:
    """The contracts of one `Deployment`, typed; it sends when it was given an account."""

    def __init__(
        self, connection: Connection, deployment: Deployment, account: LocalAccount | None
    ) -> None:
        self.connection = connection
        self.deployment = deployment
        self.logs = LogReader(connection)
        chain_id = deployment.chain_id
        sender = None if account is None else Sender(connection, account, chain_id)
        self._hands = Hands(connection=connection, own_sender=sender, logs=self.logs)
        self.token = Token(self._hands, deployment.token)
        self.vault = StakeVault(self._hands, deployment.stake_vault, self.token)
        self.escrow = JobEscrow(
            self._hands, deployment.job_escrow, self.token, deployment.block_number
        )
        self.provenance = ProvenanceLog(self._hands, deployment.provenance_log)
        self.court = FaultCourt(self._hands, deployment.fault_court, self.token)
        self.shares = ModelShares(self._hands, deployment.model_shares, self.token)

    @classmethod
    async def connect(
        cls, rpc_url: str, deployment: Deployment, account: LocalAccount | None = None
    ) -> Self:
        """A gateway on the deployment's chain; without ``account`` it only reads.

        Raises:
            InvalidRequest: another chain, or no contracts at the deployment's addresses.
            Unavailable: nothing answers at ``rpc_url``.
        """
        gateway = cls(Connection(rpc_url), deployment, account)
        try:
            await gateway.check()
        except BaseException:
            await gateway.close()
            raise
        return gateway

    @property
    def account(self) -> str:
        """The address that signs."""
        return self.sender.transactions.address

    @property
    def sender(self) -> Sender:
        """What signs and sends.

        Raises:
            Unauthorised: the gateway was connected without an account.
        """
        return self._hands.sender

    @property
    def stats(self) -> SendStats:
        """Number and gas of this gateway's own transactions; zero for one that only reads."""
        sender = self._hands.own_sender
        return SendStats(transactions=0, gas_used=0) if sender is None else sender.stats

    async def close(self) -> None:
        """The connection is closed."""
        await self.connection.close()

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
        url, chain_id = self.connection.rpc_url, await self.connection.chain_id()
        if chain_id != self.deployment.chain_id:
            raise InvalidRequest(
                f"The chain at {url} has id {chain_id}, but Shoal's contracts are on "
                f"{self.deployment.chain_id}; connect to that chain.",
                code="wrong_chain",
                chain_id=chain_id,
                expected=self.deployment.chain_id,
            )
        addresses = self.deployment.addresses()
        there = await asyncio.gather(*(self.connection.has_code(a) for a in addresses))
        for address, is_there in zip(addresses, there, strict=True):
            if not is_there:
                raise InvalidRequest(
                    f"The chain at {url} has no contract at {address}; it was reset, or the "
                    "deployment file belongs to another chain. Deploy again.",
                    code="no_contract",
                )

    async def now_s(self) -> int:
        """The chain's own time: the latest block's timestamp, in Unix seconds."""
        return await self.connection.now_s()

    async def eth_balance(self, account: str) -> int:
        """``account``'s gas money, in wei."""
        return await self.connection.eth_balance(account)

    async def latest_block_hash(self) -> str:
        """The hash of the latest block, as 0x and 64 hex digits."""
        return (await self.connection.block())["hash"].to_0x_hex()

    async def totals(self) -> ChainTotals:
        """All transactions since the deployment's first block, whoever sent them."""
        first = self.deployment.block_number
        last = await self.connection.block_number()
        transactions = gas_used = 0
        for start in range(first, last + 1, BLOCKS_AT_ONCE):
            numbers = range(start, min(start + BLOCKS_AT_ONCE, last + 1))
            blocks = await asyncio.gather(*(self.connection.block(n) for n in numbers))
            transactions += sum(len(block["transactions"]) for block in blocks)
            gas_used += sum(block["gasUsed"] for block in blocks)
        return ChainTotals(blocks=last + 1 - first, transactions=transactions, gas_used=gas_used)
