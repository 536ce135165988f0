"""A link that breaks at each moment of a lease: nothing lost, nothing paid twice, no one blamed."""

from __future__ import annotations

from pathlib import Path

import pytest
from orchestrator_lab import TIMEOUT_S, Lab, Peer, Sale, arrival, open_lab, run, until

from shoal.market.lease import MISSED_HEARTBEATS, LeaseState
from shoal.orchestrator.hearing import Hearing
from shoal.orchestrator.leases import LiveLease
from shoal.protocol.errors import InvalidRequest, Unavailable
from shoal.protocol.ids import PeerId
from shoal.protocol.node import LeaseOffer, ResultMessage, ResultReply

PAYLOAD = b"what was computed"
BEAT_MS = 1_000


class Story:
    """A job, a worker that holds a lease of its two units, and another worker."""

    def __init__(self, lab: Lab, job: str, sale: Sale, holder: Peer, other: Peer) -> None:
        self.lab, self.job, self.sale = lab, job, sale
        self.holder, self.other = holder, other
        self.dispatcher = lab.orchestrator.dispatcher
        self.ledger = lab.orchestrator.settler.ledger(job)
        self.home = PeerId(lab.context.network.peer_id)

    @classmethod
    async def begin(cls, lab: Lab) -> Story:
        job = await lab.add_job()
        return cls(lab, job, await lab.open_sale(job), await lab.peer(), await lab.peer())

    async def lease(self) -> tuple[LeaseOffer, LiveLease]:
        return await self.lab.lease(self.holder, self.sale)

    async def drop(self, peer: Peer) -> None:
        """The peer's connection is gone, as when its line was cut."""
        await peer.network.disconnect(self.home)
        member = self.lab.orchestrator.roster.member(peer.node)
        await until(lambda: not member.connected)

    async def come_back(self, peer: Peer) -> None:
        """The peer has dialled and joined again."""
        address = self.lab.context.network.addresses[0]
        await peer.network.connect(address, timeout_s=TIMEOUT_S)
        await peer.join()

    async def beats(self, *peers: Peer, times: int) -> None:
        """Time passes, a beat at a time, in which these peers are heard and the rest are not."""
        for _ in range(times):
            self.lab.time.advance(BEAT_MS)
            for peer in peers:
                await peer.beat()
            await self.dispatcher.reap()

    def is_paused(self, peer: Peer) -> bool:
        return self.lab.orchestrator.setbacks.is_paused(peer.node)

    def is_held_once(self) -> bool:
        """Whether exactly one lease's money is held for the units."""
        return self.ledger.held_micros == 200 and len(self.dispatcher.live_leases(self.job)) == 1


def test_a_drop_during_the_offer_gives_the_units_back_and_revokes_what_was_taken_unheard(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            story = await Story.begin(lab)
            story.holder.gate.clear()
            award = lab.award(story.holder, story.sale)
            workload = story.sale.workload
            await story.dispatcher.grant(workload, workload.waiting[0], award)
            offer = await arrival(story.holder.offers)
            await story.drop(story.holder)
            await story.dispatcher.drained(story.job)
            assert (workload.waiting, story.ledger.held_micros) == ([(0, 1)], 0)
            story.holder.gate.set()
            await story.come_back(story.holder)
            # It believes that it holds the lease; its first heartbeat tells it otherwise.
            assert (await story.holder.beat(offer)).revoked == (offer.lease.record.lease_id,)
            with pytest.raises(InvalidRequest, match="refused"):
                await story.holder.submit(story.holder.message(offer, PAYLOAD))
            assert story.dispatcher.submissions.empty()

    run(scenario)


@pytest.mark.parametrize(("silent_beats", "lives"), [(2, True), (MISSED_HEARTBEATS + 1, False)])
def test_a_drop_during_execution_keeps_the_lease_within_its_own_clock(
    tmp_path: Path, silent_beats: int, lives: bool
) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            story = await Story.begin(lab)
            offer, live = await story.lease()
            await story.drop(story.holder)
            await story.beats(story.other, times=silent_beats)
            assert live.record.state.is_open is lives
            await story.come_back(story.holder)
            revoked = (await story.holder.beat(offer, progress=5)).revoked
            assert (revoked == ()) is lives
            assert story.is_held_once() is lives
            assert story.is_paused(story.holder) is not lives
            if lives:
                lab.context.blobs.put_bytes(PAYLOAD)
                await story.holder.submit(story.holder.message(offer, PAYLOAD))
                assert story.dispatcher.submissions.qsize() == 1

    run(scenario)


def test_a_stopped_worker_learns_that_its_lease_is_gone_and_may_work_on(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            story = await Story.begin(lab)
            offer, live = await story.lease()
            # SIGSTOP: the connection stands, and nothing is heard.
            await story.beats(story.other, times=MISSED_HEARTBEATS + 1)
            assert live.record.state is LeaseState.EXPIRED
            assert (await story.holder.beat(offer)).revoked == (offer.lease.record.lease_id,)
            lab.time.advance(10_000)
            assert not story.is_paused(story.holder)
            _, again = await story.lease()
            assert again.record.state is LeaseState.RUNNING

    run(scenario)


def test_a_reply_lost_after_the_result_is_asked_for_again_and_counts_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            story = await Story.begin(lab)
            offer, live = await story.lease()
            lab.context.blobs.put_bytes(PAYLOAD)
            message = story.holder.message(offer, PAYLOAD)
            submit = story.dispatcher.submit

            def lose_reply(peer: PeerId, message: ResultMessage) -> ResultReply:
                submit(peer, message)
                raise Unavailable("The line was cut.")

            with monkeypatch.context() as patch:
                patch.setattr(story.dispatcher, "submit", lose_reply)
                with pytest.raises(Unavailable):
                    await story.holder.submit(message)
            assert live.record.state is LeaseState.SUBMITTED
            await story.drop(story.holder)
            await story.come_back(story.holder)
            assert (await story.holder.beat(offer)).revoked == ()
            reply = await story.holder.submit(message)
            assert reply.result_sha256 == message.result.digest()
            assert story.dispatcher.submissions.qsize() == 1
            assert story.is_held_once()

    run(scenario)


@pytest.mark.parametrize(
    ("outage_beats", "defended"), [(4, True), (30, True), (120, True), (30, False)]
)
def test_when_all_fall_silent_at_once_no_lease_is_lost_and_nobody_is_blamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outage_beats: int, defended: bool
) -> None:
    if not defended:
        monkeypatch.setattr(Hearing, "take_deaf_ms", lambda self, now_ms: 0)

    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            story = await Story.begin(lab)
            offer, live = await story.lease()
            await story.beats(story.other, times=1)
            await story.holder.beat(offer)
            for peer in (story.holder, story.other):
                await story.drop(peer)
            await story.beats(times=outage_beats)
            # The holder is the last to find back.
            await story.come_back(story.other)
            await story.beats(story.other, times=2)
            assert (live.record.state is LeaseState.RUNNING) is defended
            await story.come_back(story.holder)
            revoked = (await story.holder.beat(offer, progress=1)).revoked
            assert (revoked == ()) is defended
            assert story.is_held_once() is defended
            if defended:
                assert not story.is_paused(story.holder)

    run(scenario)


def test_who_does_not_come_back_after_an_outage_loses_its_lease(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            story = await Story.begin(lab)
            _, live = await story.lease()
            await story.beats(story.other, times=1)
            await story.beats(times=10)
            await story.beats(story.other, times=15)
            assert live.record.state is LeaseState.EXPIRED
            assert story.is_paused(story.holder)
            assert story.sale.workload.waiting == [(0, 1)]

    run(scenario)


@pytest.mark.parametrize("is_outage", [True, False])
def test_an_offer_into_an_outage_is_nobodys_broken_promise(tmp_path: Path, is_outage: bool) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            story = await Story.begin(lab)
            await story.beats(story.holder, story.other, times=1)
            story.holder.gate.clear()
            workload = story.sale.workload
            award = lab.award(story.holder, story.sale)
            await story.dispatcher.grant(workload, workload.waiting[0], award)
            await arrival(story.holder.offers)
            await story.beats(*(() if is_outage else (story.other,)), times=3)
            await story.drop(story.holder)
            await story.dispatcher.drained(story.job)
            assert workload.waiting == [(0, 1)]
            assert story.is_paused(story.holder) is not is_outage

    run(scenario)
