"""Where a stranger's URL may lead: public addresses, and none that only looks like one."""

from __future__ import annotations

import asyncio
import socket

import aiohttp
import pytest
from aiohttp.abc import AbstractResolver, ResolveResult

from shoal.network.egress import PublicResolver, check_url, is_public
from shoal.protocol.errors import InvalidRequest, Unauthorised

PRIVATE = [
    "0.0.0.0",
    "10.1.2.3",
    "100.64.0.1",
    "100.100.100.200",  # one cloud's metadata
    "127.0.0.1",
    "127.255.255.254",
    "168.63.129.16",  # another's
    "169.254.169.254",  # most others'
    "172.16.0.1",
    "172.31.255.255",
    "192.0.0.192",
    "192.0.2.1",
    "192.168.1.1",
    "198.18.0.1",
    "224.0.0.1",
    "239.255.255.250",
    "255.255.255.255",
    "::",
    "::1",
    "::ffff:127.0.0.1",
    "::ffff:8.8.8.8",
    "::127.0.0.1",
    "64:ff9b::7f00:1",
    "2002:7f00:1::",
    "2001:0:1::1",
    "2001:db8::1",
    "fd00:ec2::254",
    "fe80::1",
    "fe80::1%eth0",
    "fec0::1",
    "ff02::1",
]
PUBLIC = ["1.1.1.1", "8.8.8.8", "100.63.255.255", "172.32.0.1", "2606:4700::1111", "2a00:1450::1"]


@pytest.mark.parametrize("address", PRIVATE)
def test_address_inside_is_refused(address: str) -> None:
    assert not is_public(address)
    host = f"[{address.partition('%')[0]}]" if ":" in address else address
    with pytest.raises(Unauthorised) as caught:
        check_url(f"http://{host}:8080", allow_private=False)
    assert caught.value.code == "private_address"
    # Control: what one's own configuration names may be anywhere.
    assert check_url(f"http://{host}:8080", allow_private=True).port == 8080


@pytest.mark.parametrize("address", PUBLIC)
def test_public_address_is_asked(address: str) -> None:
    assert is_public(address)
    host = f"[{address}]" if ":" in address else address
    assert str(check_url(f"https://{host}/mirror", allow_private=False).host) == address


@pytest.mark.parametrize(
    "host",
    [
        "2130706433",
        "0x7f000001",
        "0177.0.0.1",
        "127.1",
        "0",
        "0x7f.1",
        "127.0.0.1.",
        "017700000001",
    ],
)
def test_address_in_disguise_is_refused(host: str) -> None:
    # Each of them is 127.0.0.1 or 0.0.0.0 to the system's resolver.
    assert socket.inet_aton(host.rstrip("."))
    with pytest.raises((Unauthorised, InvalidRequest)):
        check_url(f"http://{host}/", allow_private=False)


@pytest.mark.parametrize(
    "url",
    [
        "ftp://example.org/",
        "file:///etc/passwd",
        "gopher://example.org/",
        "http://",
        "http:///path",
        "http://user:secret@example.org/",
        "http://user@example.org/",
        "http://example.org/?next=1",
        "http://example.org/#part",
        "http://example.org:99999/",
        "http://[::1",
        "https://example.org/" + "a" * 3000,
        "/ip4/127.0.0.1/tcp/1",
        "",
    ],
)
def test_url_that_is_no_holders_is_refused_whoever_named_it(url: str) -> None:
    for allow_private in (False, True):
        with pytest.raises(InvalidRequest):
            check_url(url, allow_private=allow_private)


class Names(AbstractResolver):
    """A name server that answers each question with the next of its answers."""

    def __init__(self, *answers: tuple[str, ...]) -> None:
        self.answers = list(answers)

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        answer = self.answers.pop(0)
        return [
            ResolveResult(hostname=host, host=address, port=port, family=family, proto=0, flags=0)
            for address in answer
        ]

    async def close(self) -> None:
        """Nothing is held."""


def test_name_that_leads_inside_is_refused() -> None:
    async def main() -> None:
        good = await PublicResolver(Names(("8.8.8.8", "1.1.1.1"))).resolve("mirror.example", 80)
        assert [entry["host"] for entry in good] == ["8.8.8.8", "1.1.1.1"]
        for inside in (("127.0.0.1",), ("8.8.8.8", "10.0.0.1"), ("::ffff:127.0.0.1",)):
            with pytest.raises(Unauthorised, match="not a public address"):
                await PublicResolver(Names(inside)).resolve("mirror.example", 80)

    asyncio.run(main())


@pytest.mark.parametrize("defended", [True, False])
def test_name_that_answers_differently_the_second_time_gains_nothing(defended: bool) -> None:
    """DNS rebinding: judged at one address, connected to at another."""

    async def main() -> None:
        reached = asyncio.Event()

        async def inside(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            reached.set()
            writer.close()

        server = await asyncio.start_server(inside, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        # Public while it is looked at (nothing answers there at once), private a moment later.
        names = Names(("8.8.8.8",), ("127.0.0.1",))
        checked = PublicResolver(names)
        assert await checked.resolve("rebind.example", port)
        resolver: AbstractResolver = checked if defended else names
        connector = aiohttp.TCPConnector(resolver=resolver)
        async with aiohttp.ClientSession(connector=connector) as http:
            with pytest.raises((Unauthorised, aiohttp.ClientError)) as caught:
                await http.get(f"http://rebind.example:{port}/")
        assert reached.is_set() is not defended
        assert isinstance(caught.value, Unauthorised) is defended
        server.close()
        await server.wait_closed()

    asyncio.run(main())
