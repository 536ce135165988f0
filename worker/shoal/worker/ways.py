"""The ways to the orchestrator: what the provider wrote down, what it said itself, what worked."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from shoal.network.address_book import AddressBook, Role
from shoal.protocol.canonical import digest_of
from shoal.protocol.clock import TimeSource
from shoal.protocol.errors import InvalidRequest, PeerFault, ShoalError
from shoal.protocol.ids import PeerId
from shoal.protocol.node import HelloReply
from shoal.worker.events import log_failure
from shoal.worker.finding import Find, require_trusted
from shoal.worker.http import get_json

MAX_ADDRESSES: Final = 16
_SHORT_S: Final = 2.5
"""How long one of several ways may take at first: a dead one must not hold up the next."""
_LONG_S: Final = 10.0
_MAX_ROUNDS: Final = 8
_WILDCARDS: Final = ("/ip4/0.0.0.0/", "/ip6/::/")


class Ways:
    """Where to dial the orchestrator, in the order that is likely to be quickest.

    First where it was reached last, then what the provider wrote down, then what else the
    orchestrator said of itself.  What is remembered belongs to exactly these written-down
    addresses: a worker told of another orchestrator never dials the former one.

    Args:
        configured: What the provider wrote down.
        folder: Where the addresses that worked are remembered.
        time: The wall clock.
        find: Looks for orchestrators, where none is written down.
        trust: The account the orchestrator must prove to speak for.

    Raises:
        InvalidRequest: one of the addresses is neither a libp2p address nor a URL.
    """

    def __init__(
        self,
        configured: tuple[str, ...],
        folder: Path,
        time: TimeSource,
        *,
        find: Find | None = None,
        trust: str | None = None,
    ) -> None:
        for text in configured:
            require_address(text)
        self._configured = configured
        self._find = None if configured else find
        self._trust = trust
        name = digest_of(sorted(configured))[:16]
        self._book = AddressBook(folder / "orchestrators" / f"{name}.json", time)
        self._rounds = 0

    async def addresses(self) -> AsyncIterator[tuple[str, float]]:
        """Each address once, and how many seconds it may take to answer.

        A URL is asked only when it is its turn.  A line too slow for the first round, which is
        impatient where there are several addresses, is reached in a later one.

        Raises:
            ShoalError: no address was found at all; why the last URL gave none.
        """
        remembered = [address for _, address in self._book.known(Role.ORCHESTRATOR)]
        written = dict.fromkeys((*remembered[:1], *self._configured, *remembered[1:]))
        patience_s = min(_SHORT_S * 2**self._rounds, _LONG_S)
        self._rounds = min(self._rounds + 1, _MAX_ROUNDS)
        seen: set[str] = set()
        failure: ShoalError | None = None
        for text in written:
            only_s = _LONG_S if len(written) == 1 else patience_s
            try:
                found = await find_addresses(text, timeout_s=only_s)
            except ShoalError as error:
                log_failure("way_not_found", error, address=text)
                failure = error
                continue
            for address in found:
                if address not in seen:
                    seen.add(address)
                    yield address, only_s if len(found) == 1 else patience_s
        # Only when the remembered ones did not answer: to look is to ask strangers.
        if self._find is not None:
            try:
                found = await self._find()
            except ShoalError as error:
                log_failure("orchestrators_not_found", error)
                failure, found = error, ()
            for address in found:
                if address not in seen:
                    seen.add(address)
                    yield address, patience_s
        if not seen and failure is not None:
            raise failure

    def require_trusted(self, greeting: HelloReply, peer: PeerId, address: str) -> None:
        """Passes the orchestrator that was written down, or is trusted and proves who it is.

        Raises:
            ShoalError: it is another, or nobody vouches for it; see `finding.require_trusted`.
        """
        found_at = None if self._configured else address
        require_trusted(greeting, peer, self._trust, address=found_at)

    def note_reached(self, peer: PeerId, address: str, said: tuple[str, ...]) -> None:
        """The orchestrator was reached at ``address`` and says that it is at ``said`` too."""
        self._rounds = 0
        dialable = [other for other in said if not other.startswith(_WILDCARDS)]
        self._book.remember(peer, [address, *dialable], Role.ORCHESTRATOR)
        self._book.note_reached(peer, address)

    def note_failed(self, address: str) -> None:
        """The orchestrator was not reached at ``address``."""
        for peer, known in self._book.known(Role.ORCHESTRATOR):
            if known == address:
                self._book.note_failed(peer, address)


def require_address(text: str) -> None:
    """Passes what may be an orchestrator's address.

    Raises:
        InvalidRequest: it is neither a libp2p address nor an http(s) URL.
    """
    if not text.startswith("/") and not _is_http(text):
        raise InvalidRequest(
            f"The orchestrator {text!r} is neither an address like "
            "/ip4/192.0.2.1/tcp/4001/p2p/12D3… nor a URL like https://example.org; "
            "copy one from the orchestrator's start-up lines.",
            code="bad_orchestrator",
        )


def _is_http(text: str) -> bool:
    try:
        return urlsplit(text).scheme in {"http", "https"}
    except ValueError:  # an IPv6 address without its second bracket
        return False


async def find_addresses(orchestrator: str, *, timeout_s: float = _LONG_S) -> tuple[str, ...]:
    """The libp2p addresses to dial for what the provider wrote down.

    Raises:
        InvalidRequest: it is neither an address ending in ``/p2p/<id>`` nor an http(s) URL.
        Unavailable: nothing answers at the URL.
        PeerFault: what answers there is no orchestrator.
    """
    require_address(orchestrator)
    if orchestrator.startswith("/"):
        return (orchestrator,)
    info: Any = await get_json(f"{orchestrator.rstrip('/')}/v1/market/info", timeout_s=timeout_s)
    addresses = info.get("p2p_addresses") if isinstance(info, dict) else None
    if not isinstance(addresses, list) or not addresses:
        raise PeerFault(
            f"{orchestrator} names no libp2p address; check that it is an orchestrator's URL.",
            code="no_addresses",
        )
    return tuple(str(address)[:500] for address in addresses[:MAX_ADDRESSES])
