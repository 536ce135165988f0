"""Finding orchestrators in the same local network, by multicast DNS.

Source: RFC 6762 (mDNS), RFC 6763 (service discovery). The service is Shoal's own, so that
neither hears other libp2p software; each address stands in a TXT entry. What is heard is a
stranger's claim: it is checked like any other and dialled only by who looks for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
from collections.abc import Iterable
from typing import Final

import ifaddr
from zeroconf import Error as ZeroconfError
from zeroconf import InterfaceChoice, ServiceStateChange, Zeroconf
from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

from shoal.network.reachability import scope_of
from shoal.protocol.discovery import MAX_ADDRESSES, Contact
from shoal.protocol.errors import Unavailable

_log: Final = logging.getLogger(__name__)

SERVICE: Final = "_shoal._tcp.local."
_MAX_FOUND: Final = 16
_ASK_TIMEOUT_MS: Final = 1_000
_WILDCARDS: Final = {"/ip4/0.0.0.0/": 4, "/ip6/::/": 6}

# A busy network's odd packets are no news to an operator.
logging.getLogger("zeroconf").setLevel(logging.CRITICAL)


class LanAnnouncer:
    """Tells the local network where this orchestrator is, until it is stopped.

    Args:
        peer_id: The node's name.
        addresses: Where it listens; a wildcard stands for each of this machine's numbers.
        interfaces: Which network interfaces to use, by their IP; absent is all.
    """

    def __init__(
        self, peer_id: str, addresses: Iterable[str], interfaces: tuple[str, ...] | None = None
    ) -> None:
        self._peer_id = peer_id
        self._addresses = own_addresses(addresses)
        self._interfaces = interfaces
        self._zeroconf: AsyncZeroconf | None = None

    async def start(self) -> None:
        """The announcement is made, and repeated to whoever asks.

        Raises:
            Unavailable: this machine has no network that carries multicast.
        """
        self._zeroconf = _open(self._interfaces)
        # A name of its own for each node: a second orchestrator in the network is no clash.
        name = hashlib.sha256(self._peer_id.encode()).hexdigest()[:32]
        info = AsyncServiceInfo(
            SERVICE,
            f"{name}.{SERVICE}",
            port=_port_of(self._addresses),
            properties={f"dnsaddr{n}": a for n, a in enumerate(self._addresses)},
            server=f"{name}.local.",
            parsed_addresses=[a.split("/")[2] for a in self._addresses],
        )
        try:
            await (await self._zeroconf.async_register_service(info))
        except OSError as error:
            await self.stop()
            raise _no_multicast(error) from error

    async def stop(self) -> None:
        """The announcement is withdrawn; a second call does nothing."""
        zeroconf, self._zeroconf = self._zeroconf, None
        if zeroconf is not None:
            await zeroconf.async_unregister_all_services()
            await zeroconf.async_close()


async def nearby(
    timeout_s: float, interfaces: tuple[str, ...] | None = None, *, enough: int = 1
) -> tuple[Contact, ...]:
    """The orchestrators that answer in the local network; those of no use are left out.

    Returns as soon as `enough` have answered, and else after ``timeout_s``.

    Raises:
        Unavailable: this machine has no network that carries multicast.
    """
    zeroconf = _open(interfaces)
    found: dict[str, Contact] = {}
    heard: asyncio.Queue[str] = asyncio.Queue()

    def note(
        zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange
    ) -> None:
        # Anybody may point the service's name at one of another service.
        is_ours = name.endswith(f".{SERVICE}")
        if is_ours and state_change is ServiceStateChange.Added and heard.qsize() < _MAX_FOUND:
            heard.put_nowait(name)

    browser = AsyncServiceBrowser(zeroconf.zeroconf, SERVICE, handlers=[note])
    try:
        async with asyncio.timeout(timeout_s):
            while len(found) < min(enough, _MAX_FOUND):
                name = await heard.get()
                # What is wrong with one name must not hide the others.
                with contextlib.suppress(ZeroconfError, ValueError):
                    info = AsyncServiceInfo(SERVICE, name)
                    if await info.async_request(zeroconf.zeroconf, _ASK_TIMEOUT_MS):
                        contact = _contact_of(info)
                        if contact is not None:
                            found[contact.peer] = contact
    except TimeoutError:
        pass
    finally:
        await browser.async_cancel()
        await zeroconf.async_close()
    return tuple(found.values())


def own_addresses(addresses: Iterable[str]) -> tuple[str, ...]:
    """The addresses, a wildcard replaced by each number this machine has in its networks."""
    dialable: dict[str, None] = {}
    for address in addresses:
        version = next((v for w, v in _WILDCARDS.items() if address.startswith(w)), None)
        if version is None:
            dialable[address] = None
            continue
        rest = address.split("/", 3)[3]
        for number in _own_numbers(version):
            dialable[f"/ip{version}/{number}/{rest}"] = None
    return tuple(dialable)[:MAX_ADDRESSES]


def _own_numbers(version: int) -> list[str]:
    numbers = [ip for adapter in ifaddr.get_adapters() for ip in adapter.ips]
    texts = [ip.ip if ip.is_IPv4 else ip.ip[0] for ip in numbers if ip.is_IPv4 is (version == 4)]
    return [str(text) for text in texts if not str(text).startswith(("127.", "::1", "fe80"))]


def _contact_of(info: AsyncServiceInfo) -> Contact | None:
    """Who announced, with the addresses that have a usable form; None where there is none."""
    texts = []
    for key, value in list(info.properties.items())[: 2 * MAX_ADDRESSES]:
        if key.startswith(b"dnsaddr") and value is not None:
            texts.append(value.decode("ascii", errors="replace"))
    usable = [text for text in texts if scope_of(text) is not None]
    if not usable:
        return None
    peer = usable[0].rpartition("/p2p/")[2]
    same = [text for text in usable if text.endswith(f"/p2p/{peer}")]
    return Contact(peer=peer, addresses=tuple(same[:MAX_ADDRESSES]))


def _port_of(addresses: tuple[str, ...]) -> int:
    return next((int(a.split("/tcp/")[1].split("/")[0]) for a in addresses if "/tcp/" in a), 0)


def _open(interfaces: tuple[str, ...] | None) -> AsyncZeroconf:
    try:
        if interfaces is None:
            return AsyncZeroconf(interfaces=InterfaceChoice.All)
        return AsyncZeroconf(interfaces=list(interfaces))
    except (OSError, RuntimeError) as error:
        raise _no_multicast(error) from error


def _no_multicast(error: Exception) -> Unavailable:
    return Unavailable(
        f"The local network can not be asked by multicast ({error}); name the orchestrator's "
        "address, or switch mdns off.",
        code="no_multicast",
    )
