"""What the relay and the hole puncher decide without a network."""

from __future__ import annotations

import pytest
import trio
import trio.testing
from libp2p.relay.circuit_v2.pb.dcutr_pb2 import HolePunch
from multiaddr import Multiaddr

from shoal.network.libp2p_punch import Outlook, _places_in, worth_dialling
from shoal.network.libp2p_relay import RelayLimits, RelayServer

HOME = ("192.168.7.2", 40001)
ABROAD = ("11.1.2.2", 40001)
PEER_HOME = ("192.168.7.3", 50001)
PEER_ABROAD = ("11.1.9.2", 50001)
BEHIND_OUR_NAT = ("11.1.2.2", 50001)


@pytest.mark.parametrize(
    ("seen", "theirs", "dialled"),
    [
        (ABROAD, [PEER_ABROAD, PEER_HOME], [PEER_ABROAD]),
        (ABROAD, [BEHIND_OUR_NAT, PEER_HOME], [PEER_HOME]),
        (ABROAD, [PEER_HOME], []),
        (HOME, [PEER_HOME], [PEER_HOME]),
        (HOME, [PEER_ABROAD], []),
    ],
    ids=["abroad", "same NAT", "only private", "private relay", "private relay, public peer"],
)
def test_only_places_that_an_honest_peer_could_mean_are_dialled(
    seen: tuple[str, int], theirs: list[tuple[str, int]], dialled: list[tuple[str, int]]
) -> None:
    assert worth_dialling(theirs, Outlook(source=HOME, seen=seen)) == dialled


def connect_message(*addresses: str) -> bytes:
    message = HolePunch(type=HolePunch.CONNECT)
    message.ObsAddrs.extend(Multiaddr(address).to_bytes() for address in addresses)
    return bytes(message.SerializeToString())


def test_a_peers_places_are_few_plain_and_on_high_ports() -> None:
    good = "/ip4/11.1.9.2/tcp/50001"
    bad = (
        "/ip4/11.1.9.2/tcp/443",
        "/ip4/224.0.0.1/tcp/50001",
        "/ip4/0.0.0.0/tcp/50001",
        "/ip4/169.254.169.254/tcp/50001",
        "/dns4/example.org/tcp/50001",
        "/ip4/11.1.9.2/udp/50001/quic-v1",
    )
    for address in bad:
        assert _places_in(connect_message(address, good)) == [("11.1.9.2", 50001)]
    many = [f"/ip4/11.1.9.2/tcp/{port}" for port in range(50_000, 50_100)]
    assert len(_places_in(connect_message(*many))) == 4


def test_a_message_that_is_no_connect_is_refused() -> None:
    with pytest.raises(ValueError, match="where it is seen"):
        _places_in(HolePunch(type=HolePunch.SYNC).SerializeToString())


def test_a_place_that_is_no_address_is_passed_over() -> None:
    message = HolePunch(type=HolePunch.CONNECT, ObsAddrs=[b"\xff\xff", b""])
    assert _places_in(message.SerializeToString()) == []


@pytest.mark.parametrize("num_circuits", [1, 4])
def test_all_circuits_together_keep_the_rate(num_circuits: int) -> None:
    relay = RelayServer(RelayLimits(bytes_per_s=1000))

    async def circuit() -> None:
        for _ in range(10):
            await relay._wait_turn(100)

    async def all_of_them() -> float:
        begun = trio.current_time()
        async with trio.open_nursery() as nursery:
            for _ in range(num_circuits):
                nursery.start_soon(circuit)
        return trio.current_time() - begun

    took_s = trio.run(all_of_them, clock=trio.testing.MockClock(autojump_threshold=0))
    # The first of all goes at once.
    assert took_s == pytest.approx(num_circuits - 0.1)
