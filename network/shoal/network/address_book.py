"""Peers remembered on disk: where each was reached, and when it is worth dialling it again."""

from __future__ import annotations

import contextlib
import logging
import os
import random
from collections.abc import Callable, Iterable
from enum import StrEnum
from pathlib import Path
from typing import Final

from pydantic import Field

from shoal.network.identity import public_key_of
from shoal.protocol.clock import TimeSource
from shoal.protocol.errors import InvalidRequest, PeerFault
from shoal.protocol.ids import PeerId
from shoal.protocol.record import MAX_INT, Record

_log: Final = logging.getLogger(__name__)

MAX_PEERS_PER_ROLE: Final = 128
MAX_ADDRESSES_PER_PEER: Final = 8
MAX_FILE_BYTES: Final = 1 << 20
MAX_AGE_MS: Final = 30 * 86_400_000
"""A peer neither heard of nor reached for thirty days is forgotten."""

FIRST_PAUSE_MS: Final = 1_000
LONGEST_PAUSE_MS: Final = 600_000
_MAX_ADDRESS_CHARS: Final = 512
_FORMAT: Final = 1


class Role(StrEnum):
    """What a remembered peer is to us; each role has room of its own."""

    ORCHESTRATOR = "orchestrator"
    HOLDER = "holder"
    BOOTSTRAP = "bootstrap"


class _Address(Record):
    """One way to a peer.  ``due_ms`` is when it may be dialled again after a failure."""

    address: str = Field(min_length=1, max_length=_MAX_ADDRESS_CHARS)
    reached_ms: int = Field(default=0, ge=0, le=MAX_INT)
    failures: int = Field(default=0, ge=0, le=MAX_INT)
    failed_ms: int = Field(default=0, ge=0, le=MAX_INT)
    due_ms: int = Field(default=0, ge=0, le=MAX_INT)


class _Peer(Record):
    """A peer in one role, its addresses in the order they were last heard of."""

    peer: str = Field(min_length=1, max_length=128)
    role: Role
    seen_ms: int = Field(ge=0, le=MAX_INT)
    addresses: tuple[_Address, ...] = Field(max_length=MAX_ADDRESSES_PER_PEER)


class _Book(Record):
    """The file."""

    format: int = Field(ge=_FORMAT, le=_FORMAT)
    peers: tuple[_Peer, ...] = Field(max_length=MAX_PEERS_PER_ROLE * len(Role))


class AddressBook:
    """Remembers peers and how dialling them went, across restarts.

    Nothing in it is trusted: an address only says where to dial, and the handshake proves
    who answers.  It holds a bounded number of peers of each role; the one heard of longest
    ago makes room.  Every change is written at once and whole.

    Args:
        path: The file, or None to remember in this process only.
        time: The wall clock.
        draw: A number in [0, 1), drawn for each pause.

    Example:
        >>> from shoal.protocol.clock import ManualTime
        >>> peer = PeerId("12D3KooWGzxzKZYveHXtpG6AsrUJBcWxHBFS2HsEoGTxrMLvKXtf")
        >>> book = AddressBook(None, ManualTime())
        >>> book.remember(peer, [f"/ip4/192.0.2.1/tcp/4001/p2p/{peer}"], Role.ORCHESTRATOR)
        >>> [address for _, address in book.candidates(Role.ORCHESTRATOR)]
        ['/ip4/192.0.2.1/tcp/4001/p2p/12D3KooWGzxzKZYveHXtpG6AsrUJBcWxHBFS2HsEoGTxrMLvKXtf']
    """

    def __init__(
        self,
        path: Path | None,
        time: TimeSource,
        *,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._path = path
        self._time = time
        self._draw = draw
        self._peers: dict[tuple[Role, str], _Peer] = {}
        if path is not None and path.exists():
            self._peers = _read(path, time.now_ms())

    def remember(self, peer: PeerId, addresses: Iterable[str], role: Role) -> None:
        """The peer and its usable addresses are known; what was noted of them before stays."""
        if not _is_peer(peer):
            return
        known = self._peers.pop((role, peer), None)
        before = {} if known is None else {entry.address: entry for entry in known.addresses}
        usable = dict.fromkeys(address for address in addresses if _is_usable(address, peer))
        # Those named now come first, so that a peer's old addresses make room for its new.
        merged = {address: before.get(address, _Address(address=address)) for address in usable}
        merged |= {address: entry for address, entry in before.items() if address not in merged}
        if not merged:
            return
        self._peers[role, peer] = _Peer(
            peer=peer,
            role=role,
            seen_ms=self._time.now_ms(),
            addresses=tuple(merged.values())[:MAX_ADDRESSES_PER_PEER],
        )
        self._make_room(role)
        self._save()

    def note_reached(self, peer: PeerId, address: str) -> None:
        """The peer answered at ``address``, which is tried first from now on."""
        now_ms = self._time.now_ms()
        self._update(peer, _Address(address=address, reached_ms=now_ms), seen_ms=now_ms)

    def note_failed(self, peer: PeerId, address: str) -> None:
        """Nobody answered at ``address``: it waits, each time twice as long as before.

        The pause is drawn from its upper half, so that many peers that lost the same one do
        not come back together.
        """
        entry = self._find(peer, address)
        if entry is None:
            return
        now_ms = self._time.now_ms()
        longest_ms = min(FIRST_PAUSE_MS << min(entry.failures, 20), LONGEST_PAUSE_MS)
        pause_ms = round(longest_ms * (1 + self._draw()) / 2)
        failed = entry.model_copy(
            update={
                "failures": entry.failures + 1,
                "failed_ms": now_ms,
                "due_ms": now_ms + pause_ms,
            }
        )
        self._update(peer, failed, seen_ms=None)

    def candidates(self, role: Role) -> list[tuple[PeerId, str]]:
        """What may be dialled now, best first: least failed, then reached last."""
        now_ms = self._time.now_ms()
        return [(peer, entry.address) for peer, entry in self._ordered(role) if _due(entry, now_ms)]

    def known(self, role: Role) -> list[tuple[PeerId, str]]:
        """Every address of the role, due or not, in the same order."""
        return [(peer, entry.address) for peer, entry in self._ordered(role)]

    def wait_s(self, role: Role) -> float | None:
        """Seconds until a candidate is due: 0 when one is, None when nobody is known."""
        entries = [entry for _, entry in self._ordered(role)]
        if not entries:
            return None
        now_ms = self._time.now_ms()
        if any(_due(entry, now_ms) for entry in entries):
            return 0.0
        return (min(entry.due_ms for entry in entries) - now_ms) / 1000

    def forget(self, peer: PeerId) -> None:
        """Nothing is known of the peer in any role."""
        if [self._peers.pop((role, peer)) for role in Role if (role, peer) in self._peers]:
            self._save()

    def _ordered(self, role: Role) -> list[tuple[PeerId, _Address]]:
        entries = [
            (PeerId(known.peer), entry)
            for known in self._peers.values()
            if known.role is role
            for entry in known.addresses
        ]
        return sorted(entries, key=lambda pair: (pair[1].failures, -pair[1].reached_ms))

    def _find(self, peer: PeerId, address: str) -> _Address | None:
        for role in Role:
            for entry in self._peers[role, peer].addresses if (role, peer) in self._peers else ():
                if entry.address == address:
                    return entry
        return None

    def _update(self, peer: PeerId, changed: _Address, *, seen_ms: int | None) -> None:
        for role in Role:
            known = self._peers.get((role, peer))
            if known is None or all(e.address != changed.address for e in known.addresses):
                continue
            entries = tuple(
                changed if entry.address == changed.address else entry for entry in known.addresses
            )
            seen = known.seen_ms if seen_ms is None else seen_ms
            self._peers[role, peer] = known.model_copy(
                update={"addresses": entries, "seen_ms": seen}
            )
            self._save()

    def _make_room(self, role: Role) -> None:
        of_role = [known for known in self._peers.values() if known.role is role]
        of_role.sort(key=lambda known: known.seen_ms)
        for known in of_role[: max(0, len(of_role) - MAX_PEERS_PER_ROLE)]:
            del self._peers[role, known.peer]

    def _save(self) -> None:
        if self._path is None:
            return
        book = _Book(format=_FORMAT, peers=tuple(self._peers.values()))
        draft = self._path.with_name(f"{self._path.name}.{os.getpid()}.new")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            draft.write_bytes(book.encode())
            draft.chmod(0o600)
            os.replace(draft, self._path)
        except OSError as error:
            # The book only saves time at the next start; a full disk must not stop a worker.
            _log.warning(
                "address_book_not_written", extra={"path": str(self._path), "reason": str(error)}
            )
            with contextlib.suppress(OSError):
                draft.unlink(missing_ok=True)


def _due(entry: _Address, now_ms: int) -> bool:
    # A wall clock that was set back must not leave an address waiting for the old time.
    return now_ms >= entry.due_ms or now_ms < entry.failed_ms


def _is_peer(peer: str) -> bool:
    try:
        public_key_of(PeerId(peer))
    except InvalidRequest:
        return False
    return True


def _is_usable(address: str, peer: str) -> bool:
    return (
        len(address) <= _MAX_ADDRESS_CHARS
        and address.startswith("/")
        and address.endswith(f"/p2p/{peer}")
        and address.isascii()
        and address.isprintable()
        and " " not in address
    )


def _read(path: Path, now_ms: int) -> dict[tuple[Role, str], _Peer]:
    """What the file holds; nothing, with one warning, when it is not an address book."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise PeerFault(f"It is larger than {MAX_FILE_BYTES} bytes.")
        book = _Book.decode(path.read_bytes(), max_bytes=MAX_FILE_BYTES)
    except (OSError, PeerFault) as error:
        _log.warning(
            "address_book_damaged",
            extra={"path": str(path), "reason": str(error), "mend": "peers are found anew"},
        )
        return {}
    fresh = {}
    for known in book.peers:
        addresses = tuple(e for e in known.addresses if _is_usable(e.address, known.peer))
        if _is_peer(known.peer) and addresses and now_ms - known.seen_ms <= MAX_AGE_MS:
            fresh[known.role, known.peer] = known.model_copy(update={"addresses": addresses})
    return fresh
