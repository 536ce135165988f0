"""Logs read by block hash and checked against the block, so that a short answer shows.

A node that answers ``eth_getLogs`` with fewer logs than there are cannot be told from one
that is right.  A block's header says by its bloom filter which blocks can hold a wanted log
at all, and the receipts of one block can be counted: so those are read.

Source: Ethereum yellow paper, section 4.3.1 (the logs' bloom filter); EIP-234 (reading by
block hash, which a reorganised chain answers with an error and never with silence).
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from eth_utils.crypto import keccak
from hexbytes import HexBytes
from web3.types import BlockData, LogReceipt, TxReceipt

from shoal.contracts.connection import Connection
from shoal.protocol.errors import Unavailable

BLOCKS_AT_ONCE = 64
_BLOOM_BITS = 2048


class LogReader:
    """Reads logs from one chain."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def since(self, from_block: int, address: str, topic: bytes) -> list[LogReceipt]:
        """``address``'s logs whose first topic is ``topic``, from a block to the latest.

        Raises:
            Unavailable: an answer is incomplete, or the chain changed meanwhile; ask again.
        """
        last = await self._connection.block_number()
        found: list[LogReceipt] = []
        for start in range(from_block, last + 1, BLOCKS_AT_ONCE):
            numbers = range(start, min(start + BLOCKS_AT_ONCE, last + 1))
            blocks = await asyncio.gather(*(self._connection.block(n) for n in numbers))
            for block in blocks:
                found += await self.of_block(block, [address], [topic])
        return found

    async def of_block(
        self, block: BlockData, addresses: Sequence[str], topics: Sequence[bytes] = ()
    ) -> list[LogReceipt]:
        """The block's logs of ``addresses`` with a first topic among ``topics``, in order.

        No topics means any.

        Raises:
            Unavailable: the node's answer does not fit the block; ask again.
        """
        wanted = {address.lower() for address in addresses}
        if not may_hold(block["logsBloom"], addresses, topics):
            return []
        logs = checked_logs(block, await self._receipts(block))
        return [
            log
            for log in logs
            if log["address"].lower() in wanted
            and (not topics or (log["topics"] and bytes(log["topics"][0]) in topics))
        ]

    async def _receipts(self, block: BlockData) -> list[TxReceipt]:
        async with self._connection.asking("read a block's receipts") as w3:
            # By hash: a number may mean another block by the time it is answered.
            answer = await w3.eth.get_block_receipts(cast(Any, {"blockHash": block["hash"]}))
        return list(answer or ())


def checked_logs(block: BlockData, receipts: Sequence[TxReceipt]) -> list[LogReceipt]:
    """All logs of ``block``, if ``receipts`` are just its own and complete.

    Raises:
        Unavailable: transactions or logs are missing, or belong to another block.
    """
    whose = [bytes(receipt["transactionHash"]) for receipt in receipts]
    sent = [_hash_of(transaction) for transaction in block["transactions"]]
    logs = [log for receipt in receipts for log in receipt["logs"]]
    positions = [log["logIndex"] for log in logs]
    is_complete = (
        whose == sent
        and positions == list(range(len(logs)))
        and bloom_of(logs) == bytes(block["logsBloom"])
        and all(log["blockHash"] == block["hash"] for log in logs)
    )
    if not is_complete:
        raise Unavailable(
            f"The chain's node answers with an incomplete list of what block {block['number']} "
            "holds; it is asked again.",
            code="truncated_logs",
            block_number=block["number"],
        )
    return logs


def may_hold(bloom: bytes, addresses: Iterable[str], topics: Sequence[bytes]) -> bool:
    """Whether a block with this filter can hold such a log; False is certain, True is not."""
    return any(_is_in(bloom, bytes.fromhex(address[2:])) for address in addresses) and (
        not topics or any(_is_in(bloom, topic) for topic in topics)
    )


def bloom_of(logs: Iterable[Mapping[str, Any]]) -> bytes:
    """The bloom filter of ``logs``: 256 bytes."""
    bits = 0
    for log in logs:
        for item in (HexBytes(log["address"]), *log["topics"]):
            for bit in _bits(bytes(item)):
                bits |= 1 << bit
    return bits.to_bytes(_BLOOM_BITS // 8, "big")


def _is_in(bloom: bytes, item: bytes) -> bool:
    return all(bloom[-1 - bit // 8] >> (bit % 8) & 1 for bit in _bits(item))


def _bits(item: bytes) -> list[int]:
    """The three bits of ``item``: the low 11 bits of the first three byte pairs of its hash."""
    digest = keccak(item)
    return [int.from_bytes(digest[i : i + 2], "big") % _BLOOM_BITS for i in (0, 2, 4)]


def _hash_of(transaction: Any) -> bytes:
    is_hash = isinstance(transaction, bytes | str)
    return bytes(HexBytes(transaction if is_hash else transaction["hash"]))
