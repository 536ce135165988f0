"""The line to the orchestrator: the two clocks, the speed both ways, who can dial in."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
from collections.abc import AsyncIterator, Callable
from time import perf_counter
from typing import Final

from shoal.protocol.errors import ShoalError
from shoal.protocol.probe import (
    MAX_FILLING_BYTES,
    PROBE_PROTOCOL,
    TOKEN_BYTES,
    DialBack,
    ProbeReply,
    ProbeRequest,
    pack_probe,
    unpack_probe,
)
from shoal.worker.doctor.report import Finding, fail, ok, warn
from shoal.worker.session import Link

GOOD_OFFSET_MS: Final = 2_000
MOST_OFFSET_MS: Final = 30_000
"""Bids say until when they are valid: beyond half a minute they end early or are refused."""
GOOD_DOWN_MBIT: Final = 5.0
GOOD_UP_MBIT: Final = 2.0
"""An adapter of 20 MB down in half a minute, a gradient of a tenth of that up in ten seconds."""
_ASK_S: Final = 5.0
_MEASURE_S: Final = 0.8
"""After so long the last transfer is the last: no way takes more than three times that."""
_MAX_TRANSFERS: Final = 16
_PINGS: Final = 5


async def ask(
    link: Link, request: ProbeRequest, filling_bytes: int = 0, *, timeout_s: float = _ASK_S
) -> tuple[ProbeReply, int]:
    """The orchestrator's answer, and how much filling came with it.

    Raises:
        Unavailable: it has answered enough probes for now (code ``overloaded``).
        NotFound: it knows no probes.
        PeerFault: it answered something else.
    """
    message = pack_probe(request, filling_bytes)
    return unpack_probe(
        ProbeReply, await link.request(PROBE_PROTOCOL, message, timeout_s=timeout_s)
    )


class Pulse:
    """Small probes: the round trip, the clock's offset, and where the worker is seen.

    Attributes:
        round_trip_ms: The shortest that was seen.
        offset_ms: How far this machine's clock is ahead of the orchestrator's.
        observed: Where the orchestrator sees this machine; None when it does not say.
    """

    def __init__(self) -> None:
        self.round_trip_ms = float("inf")
        self.offset_ms = 0.0
        self.observed: str | None = None

    @property
    def felt(self) -> bool:
        """Whether the orchestrator answered any probe."""
        return self.round_trip_ms < float("inf")

    async def feel(self, link: Link, now_ms: Callable[[], int]) -> None:
        """The pulse of several probes, of which the quickest says most.

        Source: RFC 5905, section 10: the offset of the sample with the least delay.
        """
        for _ in range(_PINGS):
            sent_ms, begun = now_ms(), perf_counter()
            reply, _ = await ask(link, ProbeRequest())
            round_trip_ms = 1_000 * (perf_counter() - begun)
            if round_trip_ms < self.round_trip_ms:
                self.round_trip_ms = round_trip_ms
                self.offset_ms = sent_ms + round_trip_ms / 2 - reply.now_ms
                self.observed = reply.observed


def judge_clock(pulse: Pulse) -> Finding:
    """What the offset between the two clocks means."""
    return judge_offset("the orchestrator", pulse.offset_ms, pulse.round_trip_ms / 2)


def judge_offset(other: str, offset_ms: float, error_ms: float) -> Finding:
    """What it means that this clock is ``offset_ms`` ahead of another's, give or take an error."""
    word = "ahead of" if offset_ms >= 0 else "behind"
    beyond_ms = max(0.0, abs(offset_ms) - error_ms)
    measured = f"{_time(abs(offset_ms))} {word} {other}, give or take {_time(error_ms)}"
    mend = "set this machine's clock: timedatectl set-ntp true"
    if beyond_ms > MOST_OFFSET_MS:
        return fail("clock", "clock", measured, mend)
    if beyond_ms > GOOD_OFFSET_MS:
        return warn("clock", "clock", measured, mend)
    return ok("clock", "clock", measured)


def _time(ms: float) -> str:
    return f"{ms:.0f} ms" if ms < 1_000 else f"{ms / 1_000:.1f} s"


async def look_at_speed(link: Link, round_trip_ms: float) -> list[Finding]:
    """How fast bytes come and go."""
    try:
        down = await _measure(link, round_trip_ms, down=True)
        up = await _measure(link, round_trip_ms, down=False)
    except ShoalError as error:
        if error.code == "overloaded":
            mend = "wait until then; the worker itself is not held up by it"
            return [warn("bandwidth", "bandwidth", error.message, mend)]
        raise
    return [
        judge_speed("down", down, GOOD_DOWN_MBIT),
        judge_speed("up", up, GOOD_UP_MBIT),
    ]


def judge_speed(way: str, mbit_per_s: float, good_mbit_per_s: float) -> Finding:
    """What so many megabits a second mean."""
    what = f"bandwidth {way}"
    measured = f"{mbit_per_s:.3g} Mbit/s over one stream"
    if mbit_per_s >= good_mbit_per_s:
        return ok("bandwidth", what, measured)
    return warn(
        "bandwidth",
        what,
        measured,
        "leases will wait for their bytes: take less work at once (capacity.*), or another line",
    )


async def _measure(link: Link, round_trip_ms: float, *, down: bool) -> float:
    """Megabits a second, from transfers that double until they take long enough to tell."""
    size_bytes, moved_bits, spent_s = 64 << 10, 0, 0.0
    for _ in range(_MAX_TRANSFERS):
        request = ProbeRequest(download_bytes=size_bytes if down else 0)
        begun = perf_counter()
        reply, came = await ask(link, request, 0 if down else size_bytes)
        # The way there and back is not the line's width; at least a tenth of the time is.
        took_s = perf_counter() - begun
        spent_s += max(took_s - round_trip_ms / 1_000, took_s / 10)
        moved_bits += 8 * (came if down else reply.received_bytes)
        if spent_s > _MEASURE_S:
            break
        size_bytes = min(2 * size_bytes, MAX_FILLING_BYTES)
    return moved_bits / max(spent_s, 1e-6) / 1e6


async def look_at_nat(link: Link, observed: str | None, wanted: dict[str, int]) -> list[Finding]:
    """Who can dial in: at the ports in ``wanted`` (by what they serve), or at any."""
    if observed is None:
        return [
            ok("nat", "dialling in", "the orchestrator does not see this machine's address itself")
        ]
    host = observed.split("/")[2]
    is_home = host in await asyncio.to_thread(own_addresses, host)
    findings = []
    for what, port in (wanted or {"": 0}).items():
        findings.append(await _try_port(link, host, what, port, is_home=is_home))
    return findings


async def _try_port(link: Link, host: str, what: str, port: int, *, is_home: bool) -> Finding:
    token = secrets.token_hex(TOKEN_BYTES)
    try:
        async with _saying(host, token, port) as listening:
            request = ProbeRequest(dial_back=DialBack(port=listening, token=token))
            reply, _ = await ask(link, request, timeout_s=_ASK_S + 2)
    except OSError as error:
        return warn(
            "nat",
            f"dialling in ({what})",
            f"port {port} cannot be tried: {error.strerror or error}",
            "stop what listens there, perhaps this worker itself, and run the doctor again",
        )
    except ShoalError as error:
        if error.code != "overloaded":
            raise
        return warn("nat", "dialling in", error.message, "wait until then")
    return judge_nat(host, what, port, reached=bool(reply.reached), is_home=is_home)


def judge_nat(host: str, what: str, port: int, *, reached: bool, is_home: bool) -> Finding:
    """What it means that a port of this machine was, or was not, reached from outside."""
    behind = "no NAT" if is_home else "behind NAT"
    if not what:
        if reached:
            return ok("nat", "dialling in", f"{host}, {behind}, can be dialled from outside")
        return ok("nat", "dialling in", f"{host}, {behind}; fine, the worker only dials out")
    if reached:
        return ok("nat", f"dialling in ({what})", f"{host} port {port} can be dialled, {behind}")
    mend = (
        f"open port {port} in this machine's firewall"
        if is_home
        else f"forward TCP port {port} of the router to this machine"
    )
    return warn(
        "nat",
        f"dialling in ({what})",
        f"{host} port {port} is not reached, {behind}",
        f"{mend}, or leave {what} out: work needs no open port",
    )


def own_addresses(towards: str) -> set[str]:
    """The addresses this machine itself has, as far as the way to ``towards`` shows them."""
    found = {"127.0.0.1", "::1"} if towards in {"127.0.0.1", "::1"} else set()
    family = socket.AF_INET6 if ":" in towards else socket.AF_INET
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
        # No packet is sent: connecting a datagram socket only chooses the way.
        probe.connect((towards, 9))
        found.add(probe.getsockname()[0])
    return found


@contextlib.asynccontextmanager
async def _saying(host: str, token: str, port: int) -> AsyncIterator[int]:
    """Who connects to ``port``, or for 0 to a free one, hears ``token``; yields the port.

    It listens on every address of the family of ``host``.
    """

    async def say(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(token.encode())
        with contextlib.suppress(OSError):
            await writer.drain()
        writer.close()

    # Of one family: for both, port 0 would be two ports.
    every = "::" if ":" in host else "0.0.0.0"
    server = await asyncio.start_server(say, every, port, reuse_address=True)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
