"""Who may work: every way to be turned away, and the one way in."""

from __future__ import annotations

from pathlib import Path

import pytest
from eth_account import Account as EthAccount
from orchestrator_lab import Peer, open_lab, run, until

from shoal.network.identity import NodeIdentity
from shoal.orchestrator.store.tables import NodeRow
from shoal.protocol.errors import InvalidRequest, PeerFault, ShoalError, Unauthorised
from shoal.protocol.ids import PeerId
from shoal.protocol.node import HELLO_PROTOCOL, JOIN_PROTOCOL, PROTOCOL_VERSION


async def refused(peer: Peer, **forged: object) -> ShoalError:
    with pytest.raises(ShoalError) as caught:
        await peer.join(peer.bound(**forged))  # type: ignore[arg-type]
    return caught.value


def test_a_bound_and_staked_node_joins_and_is_on_record(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            peer = await lab.peer()
            member = lab.orchestrator.roster.member(peer.node)
            assert (member.account, member.connected) == (peer.account.address, True)
            rows = await lab.rows(NodeRow)
            assert [(row.node, row.account) for row in rows] == [(peer.node, peer.account.address)]

    run(scenario)


def test_the_greeting_names_chain_contracts_and_terms(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path, min_stake_micros=77) as lab:
            reply = await (await lab.peer(joined=False)).hello()
            assert reply.domain == lab.context.domain
            assert reply.orchestrator == lab.context.account.address
            assert reply.min_stake_micros == 77
            assert reply.blob_urls == ("http://b.invalid",)

    run(scenario)


def test_another_protocol_version_is_named_and_refused(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            peer = await lab.peer(joined=False)
            with pytest.raises(InvalidRequest) as caught:
                await peer.hello(PROTOCOL_VERSION + 1)
            assert caught.value.code == "stale_version"
            assert f"version {PROTOCOL_VERSION}" in caught.value.message

    run(scenario)


def test_a_binding_signed_by_another_account_is_refused(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            peer = await lab.peer(joined=False)
            error = await refused(peer, signer=EthAccount.create())
            assert (type(error), error.code) == (Unauthorised, "wrong_signer")
            assert not lab.orchestrator.roster.members()

    run(scenario)


def test_a_binding_of_another_node_is_refused(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            peer = await lab.peer(joined=False)
            stranger = NodeIdentity.generate()
            lab.chain.owners[stranger.public_key] = peer.account.address
            error = await refused(peer, identity=stranger)
            assert (type(error), error.code) == (Unauthorised, "wrong_node")

    run(scenario)


def test_a_binding_the_node_did_not_countersign_is_refused(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            peer = await lab.peer(joined=False)
            error = await refused(peer, counter=NodeIdentity.generate())
            assert (type(error), error.code) == (Unauthorised, "wrong_node")

    run(scenario)


@pytest.mark.parametrize("owner", [None, "0x" + "5" * 40])
def test_a_node_the_chain_does_not_bind_to_the_account_is_refused(
    tmp_path: Path, owner: str | None
) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            peer = await lab.peer(joined=False)
            del lab.chain.owners[peer.identity.public_key]
            if owner is not None:
                lab.chain.owners[peer.identity.public_key] = owner
            error = await refused(peer)
            assert (type(error), error.code) == (Unauthorised, "unbound_node")

    run(scenario)


def test_an_account_below_the_least_stake_is_refused(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path, min_stake_micros=2_000_000) as lab:
            peer = await lab.peer(joined=False)
            lab.chain.stakes[peer.account.address] = 1_999_999
            error = await refused(peer)
            assert (type(error), error.code) == (Unauthorised, "no_stake")
            assert "1.999999" in error.message
            assert "2.00" in error.message
            lab.chain.stakes[peer.account.address] = 2_000_000
            await peer.join()

    run(scenario)


def test_malformed_bytes_are_a_peer_fault_and_change_nothing(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            peer = await lab.peer(joined=False)
            for protocol in (HELLO_PROTOCOL, JOIN_PROTOCOL):
                for data in (b"", b"\xff\x00", b"{}", b"[" * 10_000):
                    with pytest.raises(PeerFault):
                        await peer.ask(protocol, data)
            assert not lab.orchestrator.roster.members()

    run(scenario)


def test_a_node_that_never_joined_may_not_speak_of_leases(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            peer = await lab.peer(joined=False)
            with pytest.raises(Unauthorised) as caught:
                await peer.beat()
            assert caught.value.code == "not_joined"

    run(scenario)


def test_a_lost_node_is_noted_and_may_come_back(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            peer = await lab.peer()
            member = lab.orchestrator.roster.member(peer.node)
            await peer.network.disconnect(lab.context.network.peer_id)
            await until(lambda: not member.connected)
            await peer.network.connect(lab.context.network.addresses[0], timeout_s=1)
            await peer.join()
            assert lab.orchestrator.roster.member(peer.node) is member
            assert member.connected

    run(scenario)


def test_a_node_that_goes_while_it_joins_is_not_held_for_connected(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            peer = await lab.peer()
            await peer.network.disconnect(lab.context.network.peer_id)
            roster = lab.orchestrator.roster
            await until(lambda: not roster.member(peer.node).connected)
            from shoal.protocol.node import JoinRequest

            request = JoinRequest(bound_node=peer.bound(), name="peer", device="cpu")
            member = await roster.join(PeerId(peer.node), request)
            assert not member.connected

    run(scenario)
