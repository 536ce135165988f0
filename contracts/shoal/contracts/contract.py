"""What the typed contracts share: one connection, one sender, views and calls by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from web3.contract.async_contract import AsyncContract

from shoal.contracts.artefact import artefact
from shoal.contracts.connection import Connection, checksum
from shoal.contracts.logs import LogReader
from shoal.contracts.records import Mined
from shoal.contracts.sender import Sender
from shoal.contracts.transactions import Call
from shoal.protocol.errors import InvalidRequest, Unauthorised


@dataclass(frozen=True, kw_only=True)
class Hands:
    """How a contract reads and sends; ``own_sender`` is None for one that only reads."""

    connection: Connection
    own_sender: Sender | None
    logs: LogReader

    @property
    def sender(self) -> Sender:
        """What signs and sends.

        Raises:
            Unauthorised: the gateway was connected without an account.
        """
        if self.own_sender is None:
            raise Unauthorised(
                "This gateway only reads: connect it with an account to send transactions.",
                code="read_only",
            )
        return self.own_sender


class BoundContract:
    """One of our contracts at one address."""

    name: ClassVar[str]

    def __init__(self, hands: Hands, address: str) -> None:
        self.address = checksum(address)
        self._hands = hands
        self._contract: AsyncContract = hands.connection.w3.eth.contract(
            address=self.address, abi=cast(Any, artefact(self.name).abi)
        )

    async def _view(self, function: str, *args: Any, block: int | None = None) -> Any:
        async with self._hands.connection.asking(f"read {function}"):
            bound = self._contract.functions[function](*args)
            return await bound.call(block_identifier="latest" if block is None else block)

    async def _view_struct(
        self, function: str, *args: Any, block: int | None = None
    ) -> dict[str, Any]:
        """A struct's values by name; web3 returns them as a bare tuple in the ABI's order."""
        values = await self._view(function, *args, block=block)
        entry = next(e for e in artefact(self.name).abi if e.get("name") == function)
        outputs = entry["outputs"]
        fields = outputs[0].get("components", outputs)
        return dict(zip((field["name"] for field in fields), values, strict=True))

    def _call(self, function: str, args: list[Any], purpose: str, gas: int | None = None) -> Call:
        try:
            data = self._contract.encode_abi(function, args=args)
        except (TypeError, ValueError) as error:
            raise InvalidRequest(
                f"The chain cannot take these values to {purpose}: {str(error)[:300]}",
                code="bad_arguments",
            ) from error
        return Call(to=self.address, data=bytes.fromhex(data[2:]), purpose=purpose, gas=gas)

    async def _send(self, function: str, args: list[Any], purpose: str) -> Mined:
        return await self._hands.sender.send(self._call(function, args, purpose))

    async def _events(
        self, event: str, filters: Mapping[str, Any], from_block: int
    ) -> list[Mapping[str, Any]]:
        """The contract's logs of ``event`` whose arguments equal ``filters``, oldest first."""
        kind = self._contract.events[event]()
        topic = bytes.fromhex(kind.topic[2:])
        found = await self._hands.logs.since(from_block, self.address, topic)
        decoded = (kind.process_log(log) for log in found)
        return [
            cast(Mapping[str, Any], log)
            for log in decoded
            if all(log["args"][name] == value for name, value in filters.items())
        ]
