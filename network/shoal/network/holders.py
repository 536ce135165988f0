"""Who said they hold which blob: capped, lapsing, and fair to those who are asked.

Pure: time comes in as an argument.  What it answers is a hint; the digest decides.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from shoal.protocol.errors import Unavailable
from shoal.protocol.holders import MAX_HOLDERS, Holding, KnownHolder
from shoal.protocol.ids import PeerId

_MAX_MAP_DIGITS_PER_PEER: Final = 128 << 10
_REPORTERS_THAT_CONVINCE: Final = 2


@dataclass(frozen=True, kw_only=True)
class DirectoryLimits:
    """How much the directory remembers.

    Attributes:
        ttl_ms: How long a holding counts after it was last said.
        holdings_per_peer: Most blobs of one peer; its oldest make room.
        holdings: Most holdings of all peers together.
        reports_per_reporter: Most holders one reporter may speak ill of at a time.
        report_ms: How long a report counts.
    """

    ttl_ms: int = 60_000
    holdings_per_peer: int = 256
    holdings: int = 65_536
    reports_per_reporter: int = 8
    report_ms: int = 600_000


@dataclass
class _Held:
    holding: Holding
    until_ms: int


@dataclass
class _Peer:
    sources: tuple[str, ...] = ()
    led: int = 0
    named: int = 0
    held: OrderedDict[str, _Held] = field(default_factory=OrderedDict)


class HolderDirectory:
    """What each peer said it holds, for as long as it goes on saying so.

    A report that a holder gave wrong bytes may itself be a lie.  So it never removes anyone: it
    puts the holder last, at once in what its reporter is told, and in what everybody is told
    once two reporters agree.

    Args:
        limits: How much is remembered.
    """

    def __init__(self, limits: DirectoryLimits | None = None) -> None:
        self._limits = limits or DirectoryLimits()
        self._peers: dict[PeerId, _Peer] = {}
        self._holders: dict[str, dict[PeerId, None]] = {}
        self._reports: dict[str, OrderedDict[PeerId, int]] = {}
        self._num_holdings = 0
        self._turn = 0
        self._next_sweep_ms = 0

    def __len__(self) -> int:
        """How many holdings are remembered."""
        return self._num_holdings

    @property
    def ttl_ms(self) -> int:
        """How long a holding counts after it was last said."""
        return self._limits.ttl_ms

    def announce(
        self, peer: PeerId, sources: Sequence[str], holdings: Iterable[Holding], *, now_ms: int
    ) -> None:
        """``peer`` holds these too, and is asked under ``sources`` for all it holds.

        Raises:
            Unavailable: The directory is full (code ``directory_full``).
        """
        self._sweep(now_ms)
        known = self._peers.setdefault(peer, _Peer())
        known.sources = tuple(sources)
        for holding in holdings:
            self._drop(peer, holding.sha256)
            if self._num_holdings >= self._limits.holdings:
                raise Unavailable(
                    f"The directory of holders is full at {self._num_holdings} entries; "
                    "say again later what you hold.",
                    code="directory_full",
                    retry_after_s=max(1, self.ttl_ms // 1000),
                )
            known.held[holding.sha256] = _Held(holding, now_ms + self.ttl_ms)
            self._holders.setdefault(holding.sha256, {})[peer] = None
            self._num_holdings += 1
        self._shrink(peer, known)

    def progressed(self, peer: PeerId, holding: Holding, *, now_ms: int) -> None:
        """``peer`` holds more of a blob that it announced before; else nothing happens."""
        known = self._peers.get(peer)
        if known is not None and holding.sha256 in known.held:
            known.held[holding.sha256] = _Held(holding, now_ms + self.ttl_ms)
            self._shrink(peer, known)

    def gone(self, peer: PeerId, digests: Iterable[str]) -> None:
        """``peer`` does not hold these any more."""
        for sha256 in digests:
            self._drop(peer, sha256)

    def withdraw(self, peer: PeerId) -> None:
        """``peer`` holds nothing."""
        self.gone(peer, tuple(self._peers[peer].held) if peer in self._peers else ())
        self._peers.pop(peer, None)

    def report(self, reporter: str, holder: PeerId, sha256: str, *, now_ms: int) -> None:
        """``reporter`` got wrong bytes of this blob from ``holder``, or says so.

        Nothing happens when ``holder`` never said that it holds the blob.

        Args:
            reporter: Whoever answers for the report; an account, so that the many nodes of one
                provider count once.
            holder: The peer it accuses.
            sha256: The blob.
            now_ms: The time now.
        """
        if holder not in self._holders.get(sha256, {}):
            return
        reports = self._reports.setdefault(reporter, OrderedDict())
        reports.pop(holder, None)
        reports[holder] = now_ms + self._limits.report_ms
        if len(reports) > self._limits.reports_per_reporter:
            reports.popitem(last=False)

    def holders(
        self, sha256: str, *, asker: PeerId, reporter: str, now_ms: int
    ) -> tuple[KnownHolder, ...]:
        """Up to 16 holders of the blob, led by the one that led the longest ago.

        The first is asked first, for a small blob alone; so each takes its turn.

        Args:
            sha256: The blob.
            asker: Who asks; never in the answer.
            reporter: Under which name the asker reports.
            now_ms: The time now.
        """
        self._sweep(now_ms)
        found = [
            peer
            for peer in self._holders.get(sha256, {})
            if peer != asker and self._peers[peer].held[sha256].until_ms > now_ms
        ]
        found.sort(
            key=lambda peer: (
                self._is_suspect(peer, reporter, now_ms),
                self._peers[peer].led,
                self._peers[peer].named,
            )
        )
        named: list[KnownHolder] = []
        for peer in found[:MAX_HOLDERS]:
            self._turn += 1
            known = self._peers[peer]
            known.named = self._turn
            if not named:
                known.led = self._turn
            held = known.held[sha256].holding
            named.append(
                KnownHolder(
                    peer=peer,
                    sources=known.sources,
                    chunks=held.chunks,
                    chunk_bytes=held.chunk_bytes,
                )
            )
        return tuple(named)

    def _is_suspect(self, holder: PeerId, reporter: str, now_ms: int) -> bool:
        accusers = [
            name for name, reports in self._reports.items() if reports.get(holder, 0) > now_ms
        ]
        return reporter in accusers or len(accusers) >= _REPORTERS_THAT_CONVINCE

    def _drop(self, peer: PeerId, sha256: str) -> None:
        known = self._peers.get(peer)
        if known is None or known.held.pop(sha256, None) is None:
            return
        self._num_holdings -= 1
        holders = self._holders[sha256]
        del holders[peer]
        if not holders:
            del self._holders[sha256]

    def _shrink(self, peer: PeerId, known: _Peer) -> None:
        digits = sum(len(held.holding.chunks or "") for held in known.held.values())
        while len(known.held) > self._limits.holdings_per_peer or digits > _MAX_MAP_DIGITS_PER_PEER:
            oldest = next(iter(known.held))
            digits -= len(known.held[oldest].holding.chunks or "")
            self._drop(peer, oldest)

    def _sweep(self, now_ms: int) -> None:
        """Forgets what lapsed, at most twice in a holding's life: a look at everything."""
        if now_ms < self._next_sweep_ms:
            return
        self._next_sweep_ms = now_ms + self.ttl_ms // 2
        for peer, known in tuple(self._peers.items()):
            for sha256 in [key for key, held in known.held.items() if held.until_ms <= now_ms]:
                self._drop(peer, sha256)
            if not known.held:
                del self._peers[peer]
        for reporter, reports in tuple(self._reports.items()):
            for holder in [key for key, until_ms in reports.items() if until_ms <= now_ms]:
                del reports[holder]
            if not reports:
                del self._reports[reporter]
