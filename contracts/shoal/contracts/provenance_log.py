"""The heads of provenance logs."""

from __future__ import annotations

from typing import cast

from shoal.contracts.connection import account_address, hash_bytes
from shoal.contracts.contract import BoundContract
from shoal.contracts.records import Mined


class ProvenanceLog(BoundContract):
    """``ProvenanceLog``."""

    name = "ProvenanceLog"

    async def head(self, publisher: str, subject: str) -> tuple[bytes, int]:
        """The head of ``publisher``'s log of ``subject``, and how many roots it holds.

        A job's log is published by the escrow under the job's id.
        """
        where = (account_address(publisher), hash_bytes("log subject", subject))
        head = await self._view("head", *where)
        return bytes(head), cast(int, await self._view("seq", *where))

    async def anchor(self, subject: str, root: str, num_leaves: int) -> Mined:
        """``root`` over ``num_leaves`` statements is appended to our own log of ``subject``."""
        args = [hash_bytes("log subject", subject), hash_bytes("root", root), num_leaves]
        return await self._send("anchor", args, "anchor a root")
