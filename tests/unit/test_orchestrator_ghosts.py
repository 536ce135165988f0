"""A node that has missed two heartbeats is awarded nothing until it is heard of again."""

from __future__ import annotations

from pathlib import Path

import pytest
from orchestrator_lab import Lab, Peer, arrival, open_lab, run, until

from shoal.market.lease import LeaseState
from shoal.orchestrator.roster import Roster

BEAT_MS = 1_000
SILENT_MS = 2 * BEAT_MS + BEAT_MS // 2 + 1


def sell(lab: Lab) -> None:
    lab.start(lab.orchestrator.auctioneer.run())


async def idle(lab: Lab, peer: Peer) -> bool:
    await lab.settled()
    return peer.offers.empty()


@pytest.mark.parametrize("watched", [True, False])
def test_a_stopped_node_is_awarded_nothing_and_is_back_with_its_next_heartbeat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, watched: bool
) -> None:
    if not watched:
        # The negative control: connected is then all that counts.
        monkeypatch.setattr(Roster, "is_here", lambda _, member: member.connected)

    async def scenario() -> None:
        async with open_lab(tmp_path, heartbeat_ms=BEAT_MS) as lab:
            job = await lab.add_job()
            ghost = await lab.peer()
            await ghost.bid()
            sell(lab)
            # Its process is stopped: the connection stands, and no heartbeat comes.
            lab.time.advance(SILENT_MS)
            sale = await lab.open_sale(job)
            if not watched:
                await arrival(ghost.offers)
                return
            assert await idle(lab, ghost)
            assert sale.workload.waiting
            await ghost.beat()
            await lab.settled()
            assert (await arrival(ghost.offers)).lease.record.node == ghost.node

    run(scenario)


def test_a_heartbeat_that_is_late_by_less_than_half_costs_nothing(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path, heartbeat_ms=BEAT_MS) as lab:
            job = await lab.add_job()
            peer = await lab.peer()
            await peer.bid()
            sell(lab)
            lab.time.advance(SILENT_MS - 1)
            await lab.open_sale(job)
            assert (await arrival(peer.offers)).lease.record.node == peer.node

    run(scenario)


def test_work_goes_to_the_node_that_is_there_though_the_ghost_is_cheaper(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path, heartbeat_ms=BEAT_MS) as lab:
            job = await lab.add_job()
            ghost, there = await lab.peer(), await lab.peer()
            await ghost.bid(price_micros=10)
            await there.bid(price_micros=20)
            lab.time.advance(SILENT_MS)
            await there.beat()
            await lab.open_sale(job)
            sell(lab)
            assert (await arrival(there.offers)).lease.record.node == there.node
            assert ghost.offers.empty()

    run(scenario)


def test_what_a_ghost_holds_follows_its_leases_own_clocks(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path, heartbeat_ms=BEAT_MS) as lab:
            job = await lab.add_job()
            ghost = await lab.peer()
            await lab.peer()
            sale = await lab.open_sale(job)
            _, live = await lab.lease(ghost, sale)
            lab.time.advance(SILENT_MS)
            await lab.orchestrator.dispatcher.reap()
            # A lease ends after three missed heartbeats, not after two.
            assert live.record.state is LeaseState.RUNNING
            member = lab.orchestrator.roster.member(ghost.node)
            assert member.connected
            assert not lab.orchestrator.roster.is_here(member)

    run(scenario)


@pytest.mark.parametrize("sign", ["beat", "bid", "join"])
def test_any_message_is_a_sign_of_life(tmp_path: Path, sign: str) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path, heartbeat_ms=BEAT_MS) as lab:
            peer = await lab.peer()
            roster = lab.orchestrator.roster
            lab.time.advance(SILENT_MS)
            assert not roster.is_here(roster.member(peer.node))
            if sign == "bid":
                await peer.bid(turn=False)
            elif sign == "join":
                await peer.join()
            else:
                await peer.beat()
            assert roster.is_here(roster.member(peer.node))

    run(scenario)


def test_a_node_whose_connection_is_gone_is_not_there_however_lately_it_beat(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path, heartbeat_ms=BEAT_MS) as lab:
            peer = await lab.peer()
            roster = lab.orchestrator.roster
            await peer.beat()
            await peer.network.disconnect(lab.context.network.peer_id)
            await until(lambda: not roster.member(peer.node).connected)
            assert not roster.is_here(roster.member(peer.node))

    run(scenario)


def test_a_ghost_is_not_waited_for_when_the_book_is_sealed(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path, heartbeat_ms=BEAT_MS) as lab:
            ghost, there = await lab.peer(), await lab.peer()
            await ghost.bid(turn=False)
            lab.time.advance(SILENT_MS)
            await there.bid()
            assert ghost.notices == []
            assert len(there.notices) == 1

    run(scenario)
