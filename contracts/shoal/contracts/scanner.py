"""Following logs through a chain that may change its mind: each once, orphans taken back.

What was scanned is a `Checkpoint`, which the caller stores in the transaction that applies
the logs; the scanner itself remembers nothing.  So a crash repeats a scan and no log.

Source: EIP-234; the walk back to the common ancestor is that of every chain indexer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import NamedTuple

from pydantic import Field
from web3.exceptions import BlockNotFound
from web3.types import BlockData, LogReceipt

from shoal.contracts.connection import Connection
from shoal.contracts.logs import BLOCKS_AT_ONCE, LogReader
from shoal.protocol.errors import InvariantBroken, Unavailable
from shoal.protocol.ids import Hex32
from shoal.protocol.record import Record

MAX_BLOCKS_PER_SCAN = 2_000


class ScannedBlock(Record):
    """A block whose logs the caller has: its hash, and which of its logs were wanted."""

    number: int = Field(ge=0)
    block_hash: Hex32
    log_indices: tuple[int, ...] = ()


class Checkpoint(Record):
    """How far a scan has come: the newest blocks, consecutive, oldest first.

    Writer and reader: whoever applies the logs.  An empty one begins at the beginning.
    """

    blocks: tuple[ScannedBlock, ...] = ()


class LogId(NamedTuple):
    """One log's name for ever: the same transaction in another block is another log."""

    block_hash: str
    log_index: int


class Scan(NamedTuple):
    """What to do, in this order: take back ``orphaned``, apply ``logs``, store ``checkpoint``."""

    orphaned: list[LogId]
    """Logs of blocks that are no longer in the chain, newest first."""
    logs: list[LogReceipt]
    """Logs not seen before, oldest first."""
    checkpoint: Checkpoint


class LogScanner:
    """Follows the logs of some contracts.

    Args:
        connection: The chain.
        addresses: Whose logs are wanted.
        first_block: Where there is nothing before.
        depth: Blocks on top of one before it counts as final.
        topics: Which events are wanted; none means all.
    """

    def __init__(
        self,
        connection: Connection,
        addresses: Sequence[str],
        *,
        first_block: int,
        depth: int,
        topics: Sequence[bytes] = (),
    ) -> None:
        self._connection = connection
        self._reader = LogReader(connection)
        self._addresses = tuple(addresses)
        self._topics = tuple(topics)
        self._first_block = first_block
        self._depth = depth

    async def scan(self, checkpoint: Checkpoint, *, overlap: int = 0) -> Scan:
        """What the chain has that ``checkpoint`` has not, and the reverse.

        At most `MAX_BLOCKS_PER_SCAN` blocks are read; scan again while there are more.

        Args:
            checkpoint: What was applied so far.
            overlap: How many blocks of it are read once more; at a restart, some.

        Raises:
            Unavailable: the chain does not answer, or not completely; nothing was missed.
            InvariantBroken: a block that was final is gone.
        """
        blocks = list(checkpoint.blocks)
        orphaned = await self._walk_back(blocks)
        logs = await self._read_again(blocks, overlap)
        logs += await self._read_on(blocks)
        kept = tuple(blocks[-(self._depth + max(1, overlap)) :])
        return Scan(orphaned, logs, Checkpoint(blocks=kept))

    async def _walk_back(self, blocks: list[ScannedBlock]) -> list[LogId]:
        """Removes from ``blocks`` those after the common ancestor; their logs, newest first."""
        orphaned: list[LogId] = []
        num_gone = 0
        while blocks:
            there = await self._block_at(blocks[-1].number)
            if there is not None and there["hash"].to_0x_hex() == blocks[-1].block_hash:
                break
            num_gone += 1
            if num_gone > self._depth:
                raise InvariantBroken(
                    f"The chain has dropped block {blocks[-1].number}, more than {self._depth} "
                    "blocks deep; nothing it says can be relied on until a person has looked.",
                    code="deep_reorganisation",
                )
            gone = blocks.pop()
            orphaned += [LogId(gone.block_hash, index) for index in reversed(gone.log_indices)]
        return orphaned

    async def _read_again(self, blocks: list[ScannedBlock], overlap: int) -> list[LogReceipt]:
        """Logs of the last ``overlap`` blocks that the checkpoint does not know of."""
        new: list[LogReceipt] = []
        for position in range(max(0, len(blocks) - overlap), len(blocks)):
            known = blocks[position]
            block = await self._block_at(known.number)
            if block is None or block["hash"].to_0x_hex() != known.block_hash:
                raise Unavailable(
                    f"The chain replaced block {known.number} while it was read; it is read again.",
                    code="chain_changed",
                )
            found = await self._reader.of_block(block, self._addresses, self._topics)
            new += [log for log in found if log["logIndex"] not in known.log_indices]
            blocks[position] = _scanned(block, found)
        return new

    async def _read_on(self, blocks: list[ScannedBlock]) -> list[LogReceipt]:
        """Adds to ``blocks`` those that follow, as long as each names the last as its parent."""
        start = blocks[-1].number + 1 if blocks else self._first_block
        head = min(await self._connection.block_number(), start + MAX_BLOCKS_PER_SCAN - 1)
        logs: list[LogReceipt] = []
        for first in range(start, head + 1, BLOCKS_AT_ONCE):
            numbers = range(first, min(first + BLOCKS_AT_ONCE, head + 1))
            for block in await asyncio.gather(*(self._block_at(n) for n in numbers)):
                follows = not blocks or (
                    block is not None and block["parentHash"].to_0x_hex() == blocks[-1].block_hash
                )
                if block is None or not follows:
                    return logs
                found = await self._reader.of_block(block, self._addresses, self._topics)
                blocks.append(_scanned(block, found))
                logs += found
        return logs

    async def _block_at(self, number: int) -> BlockData | None:
        async with self._connection.asking("read a block") as w3:
            try:
                return await w3.eth.get_block(number)
            except BlockNotFound:
                return None


def _scanned(block: BlockData, logs: Sequence[LogReceipt]) -> ScannedBlock:
    return ScannedBlock(
        number=block["number"],
        block_hash=block["hash"].to_0x_hex(),
        log_indices=tuple(log["logIndex"] for log in logs),
    )
