"""An orchestrator that nobody named: where it is looked for, and whose word is taken."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from market_records import account
from worker_double import CONTRACTS, DOMAIN

from shoal.network.identity import NodeIdentity
from shoal.protocol.clock import ManualTime
from shoal.protocol.discovery import Contact
from shoal.protocol.errors import InvalidRequest, ShoalError, Unauthorised, Unavailable
from shoal.protocol.node import PROTOCOL_VERSION, BoundNode, HelloReply, NodeBinding
from shoal.protocol.signing import Domain, sign
from shoal.worker.config import load_config
from shoal.worker.finding import Finder, require_trusted
from shoal.worker.ways import Ways

HOME, STRANGER = account(70), account(71)
NODE = NodeIdentity(bytes(31) + b"\1")
OTHER = NodeIdentity(bytes(31) + b"\2")
WHERE = f"/ip4/192.0.2.1/tcp/4001/p2p/{NODE.peer_id}"


def proof(
    *,
    identity: NodeIdentity = NODE,
    named: str = HOME.address,
    signer: Any = HOME,
    domain: Domain = DOMAIN,
    counter: NodeIdentity | None = None,
    node_key: bytes | None = None,
) -> BoundNode:
    """The binding of the orchestrator's node; the arguments forge one of its parts each."""
    binding = NodeBinding(
        account=named,
        node=identity.peer_id,
        node_key="0x" + (node_key or identity.public_key).hex(),
        valid_from_ms=0,
    )
    return BoundNode(
        binding=sign(binding, domain, signer),
        node_signature="0x" + (counter or identity).sign(binding.node_message()).hex(),
    )


def greeting(bound: BoundNode | None, account_named: str = HOME.address) -> HelloReply:
    return HelloReply(
        protocol_version=PROTOCOL_VERSION,
        software_version="0",
        domain=DOMAIN,
        contracts=CONTRACTS,
        orchestrator=account_named,
        min_stake_micros=0,
        rpc_urls=(),
        api_url="http://a.invalid",
        blob_urls=(),
        heartbeat_ms=1_000,
        bound_node=bound,
    )


def test_the_trusted_account_that_proves_its_node_is_joined_named_or_found() -> None:
    for address in (None, WHERE):
        require_trusted(greeting(proof()), NODE.peer_id, HOME.address, address=address)
        require_trusted(greeting(proof()), NODE.peer_id, HOME.address.lower(), address=address)


@pytest.mark.parametrize(
    "said",
    [
        greeting(None),
        greeting(proof(named=STRANGER.address, signer=STRANGER), STRANGER.address),
        greeting(proof(signer=STRANGER)),
        greeting(proof(named=STRANGER.address, signer=STRANGER)),
        greeting(proof(identity=OTHER)),
        greeting(proof(node_key=OTHER.public_key)),
        greeting(proof(counter=OTHER)),
        greeting(proof(domain=Domain(chain_id=1, escrow=DOMAIN.escrow))),
        greeting(proof(domain=Domain(chain_id=DOMAIN.chain_id, escrow="0x" + "9" * 40))),
    ],
    ids=[
        "no proof",
        "another account",
        "signed by a stranger",
        "a stranger's own proof",
        "another node",
        "another key",
        "not countersigned",
        "for another chain",
        "for another escrow",
    ],
)
def test_whoever_does_not_prove_to_be_the_trusted_account_is_not_joined(said: HelloReply) -> None:
    with pytest.raises(Unauthorised):
        require_trusted(said, NODE.peer_id, HOME.address, address=None)
    # A stranger among those found must not keep the worker from finding the right one.
    with pytest.raises(Unavailable):
        require_trusted(said, NODE.peer_id, HOME.address, address=WHERE)
    # The control: where the provider named the address and trusts whoever is there.
    require_trusted(said, NODE.peer_id, None, address=None)


def test_a_stranger_nobody_vouches_for_is_shown_and_not_joined() -> None:
    with pytest.raises(InvalidRequest) as caught:
        require_trusted(greeting(proof()), NODE.peer_id, None, address=WHERE)
    assert not isinstance(caught.value, Unauthorised)
    for part in (HOME.address, str(DOMAIN.chain_id), WHERE, "--trust"):
        assert part in caught.value.message


def found(*addresses: str) -> tuple[Contact, ...]:
    return tuple(Contact(peer=NODE.peer_id, addresses=(address,)) for address in addresses)


def test_every_place_is_asked_and_one_that_fails_is_told() -> None:
    async def lan() -> tuple[Contact, ...]:
        raise Unavailable("No multicast here.")

    async def table() -> tuple[Contact, ...]:
        return found(WHERE, WHERE)

    async def nobody() -> tuple[Contact, ...]:
        return ()

    assert asyncio.run(Finder({"local network": lan, "bootstrap nodes": table})()) == (WHERE,)
    with pytest.raises(Unavailable) as caught:
        asyncio.run(Finder({"local network": lan, "bootstrap nodes": nobody})())
    assert "local network: No multicast here." in caught.value.message
    assert "bootstrap nodes: 0 found" in caught.value.message
    with pytest.raises(InvalidRequest):
        asyncio.run(Finder({})())


async def dialled(ways: Ways) -> list[str]:
    return [address async for address, _ in ways.addresses()]


def test_a_remembered_orchestrator_is_dialled_before_anybody_is_asked(tmp_path: Path) -> None:
    asked = []

    async def find() -> tuple[str, ...]:
        asked.append(1)
        return (elsewhere,)

    elsewhere = f"/ip4/192.0.2.9/tcp/4001/p2p/{OTHER.peer_id}"
    time = ManualTime()

    async def scenario() -> None:
        ways = Ways((), tmp_path, time, find=find, trust=HOME.address)
        assert await dialled(ways) == [elsewhere]
        ways.note_reached(NODE.peer_id, WHERE, ())
        again = Ways((), tmp_path, time, find=find, trust=HOME.address)
        first = again.addresses()
        assert (await anext(first))[0] == WHERE
        assert len(asked) == 1
        assert (await anext(first))[0] == elsewhere

    asyncio.run(scenario())


def test_with_a_named_address_nobody_is_asked(tmp_path: Path) -> None:
    async def find() -> tuple[str, ...]:
        raise AssertionError("nobody is to be asked")

    ways = Ways((WHERE,), tmp_path, ManualTime(), find=find)
    assert asyncio.run(dialled(ways)) == [WHERE]
    ways.require_trusted(greeting(None), NODE.peer_id, WHERE)


def test_finding_nobody_says_so_and_a_found_stranger_is_not_trusted(tmp_path: Path) -> None:
    async def find() -> tuple[str, ...]:
        raise Unavailable("No orchestrator was found.", code="none_found")

    ways = Ways((), tmp_path, ManualTime(), find=find)
    with pytest.raises(ShoalError) as caught:
        asyncio.run(dialled(ways))
    assert caught.value.code == "none_found"
    with pytest.raises(InvalidRequest):
        ways.require_trusted(greeting(proof()), NODE.peer_id, WHERE)


def test_the_settings_of_finding_are_read_from_every_source() -> None:
    environment = {"SHOAL_WORKER_TRUST": HOME.address, "SHOAL_WORKER_MDNS": "true"}
    config = load_config(None, environment, {"bootstrap": f"{WHERE}, {WHERE}"})
    assert (config.trust, config.mdns, config.bootstrap) == (HOME.address, True, (WHERE, WHERE))
    assert config.is_finding
    assert not load_config(None, {}, {}).is_finding
    with pytest.raises(InvalidRequest):
        load_config(None, {}, {"trust": "somebody"})
