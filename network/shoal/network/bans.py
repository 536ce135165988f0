"""Who has misbehaved, how badly, and until when they are kept out.

Faults add points that fade with time; whoever gathers too many is banned for a minute, and for
twice as long each time it happens again, up to a day. What an honest node may do (time out, lose
its connection, ask for what is not there) is no fault.
"""

from __future__ import annotations

import ipaddress
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

# Points of a fault halve in this time, so a rare slip never adds up.
_HALF_LIFE_S: Final = 600.0
_PEER_THRESHOLD: Final = 100.0
# Many honest nodes may share one address behind a NAT; one of them must not shut out the rest.
_ADDRESS_THRESHOLD: Final = 500.0
_FIRST_BAN_S: Final = 60.0
_MAX_BAN_S: Final = 86_400.0
# A banned node's record is kept this long after its ban, so that the next one is longer.
_MEMORY_S: Final = 86_400.0
_MAX_RECORDS: Final = 8192


class Fault(StrEnum):
    """What no honest node does, or does rarely."""

    BAD_FRAME = "bad_frame"
    OVERSIZE = "oversize"
    FLOOD = "flood"
    BAD_RECORD = "bad_record"
    BAD_GOSSIP = "bad_gossip"
    HANDSHAKE = "handshake"
    UNKNOWN_PROTOCOL = "unknown_protocol"


# A node of another version may ask for protocols we lack or send records we cannot read, and a
# load balancer opens and drops connections all day: those weigh little. Nothing honest frames
# bytes wrongly.
POINTS: Final = {
    Fault.BAD_FRAME: 20.0,
    Fault.OVERSIZE: 20.0,
    Fault.FLOOD: 100.0,
    Fault.BAD_RECORD: 2.0,
    Fault.BAD_GOSSIP: 10.0,
    Fault.HANDSHAKE: 1.0,
    Fault.UNKNOWN_PROTOCOL: 0.5,
}


@dataclass(frozen=True, kw_only=True)
class Ban:
    """Someone kept out: a peer id or an IP address, why, and until when on the clock given."""

    subject: str
    reason: str
    until_s: float


@dataclass
class _Record:
    points: float = 0.0
    since_s: float = 0.0
    num_bans: int = 0
    until_s: float = 0.0
    reason: str = ""


class Bans:
    """Points and bans by peer id and by IP address; any thread may ask.

    Args:
        clock: Seconds, monotonic.
        shared_addresses: Networks that many share (this machine, a proxy in front of us), whose
            addresses are never banned.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        *,
        shared_addresses: tuple[str, ...] = ("127.0.0.0/8", "::1/128"),
    ) -> None:
        self._clock = clock
        self._shared = tuple(ipaddress.ip_network(network) for network in shared_addresses)
        self._lock = threading.Lock()
        self._records: OrderedDict[str, _Record] = OrderedDict()

    def penalise(self, subject: str, fault: Fault) -> bool:
        """True when this fault of a peer id or IP address led to a ban."""
        threshold = _PEER_THRESHOLD
        if _is_address(subject):
            if self._is_shared(subject):
                return False
            threshold = _ADDRESS_THRESHOLD
        with self._lock:
            now_s = self._clock()
            record = self._record(subject, now_s)
            faded = record.points * 0.5 ** ((now_s - record.since_s) / _HALF_LIFE_S)
            record.points, record.since_s = faded + POINTS[fault], now_s
            if record.points < threshold or now_s < record.until_s:
                return False
            for_s = min(_MAX_BAN_S, _FIRST_BAN_S * 2.0**record.num_bans)
            self._ban(record, now_s, for_s, fault.value)
            return True

    def ban(self, subject: str, reason: str, for_s: float) -> None:
        """`subject` is kept out for `for_s` seconds, a day at most; never for less than it was."""
        with self._lock:
            now_s = self._clock()
            self._ban(self._record(subject, now_s), now_s, min(for_s, _MAX_BAN_S), reason)

    def lift(self, subject: str) -> None:
        """`subject` may come back, with a clean record."""
        with self._lock:
            self._records.pop(subject, None)

    def is_banned(self, subject: str) -> bool:
        """True while a ban of this peer id or IP address runs."""
        with self._lock:
            record = self._records.get(subject)
            return record is not None and self._clock() < record.until_s

    def banned(self) -> tuple[Ban, ...]:
        """The bans that run now."""
        with self._lock:
            now_s = self._clock()
            return tuple(
                Ban(subject=subject, reason=record.reason, until_s=record.until_s)
                for subject, record in self._records.items()
                if now_s < record.until_s
            )

    def _ban(self, record: _Record, now_s: float, for_s: float, reason: str) -> None:
        record.points = 0.0
        record.num_bans = min(record.num_bans + 1, 32)
        record.until_s = max(record.until_s, now_s + for_s)
        record.reason = reason

    def _record(self, subject: str, now_s: float) -> _Record:
        record = self._records.get(subject)
        if record is not None and now_s - max(record.since_s, record.until_s) > _MEMORY_S:
            record = self._records[subject] = _Record()
        if record is None:
            record = self._records[subject] = _Record()
            if len(self._records) > _MAX_RECORDS:
                self._make_room(now_s)
        self._records.move_to_end(subject)
        record.since_s = record.since_s or now_s
        return record

    def _make_room(self, now_s: float) -> None:
        # Names are free to make: a flood of new ones must not wash out the bans that run.
        for subject, record in self._records.items():
            if now_s >= record.until_s:
                del self._records[subject]
                return
        self._records.popitem(last=False)

    def _is_shared(self, subject: str) -> bool:
        address = ipaddress.ip_address(subject)
        return any(address in network for network in self._shared)


def _is_address(subject: str) -> bool:
    try:
        ipaddress.ip_address(subject)
    except ValueError:
        return False
    return True
