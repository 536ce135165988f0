"""What the API tells of a job's market: the ladder, who was refused, why a lease has its price."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
from orchestrator_lab import Lab, arrival, open_lab, run

from shoal.client.views import BookView, LeaseView, parse_view
from shoal.orchestrator import market_book
from shoal.orchestrator.store.tables import CertificateRow, LeaseRow
from shoal.protocol.certificate import ClearingRule
from shoal.protocol.errors import NotFound
from shoal.protocol.market import TaskKind

MARKET = "/v1/market"


async def answer(lab: Lab, path: str, status: int = 200) -> Any:
    """What the API answers to a GET of ``path``."""
    transport = httpx.ASGITransport(lab.orchestrator.api.app())
    async with httpx.AsyncClient(transport=transport, base_url="http://api") as client:
        found = await client.get(MARKET + path)
    assert found.status_code == status, found.text
    return found.json()


async def book_of(lab: Lab, job: str) -> BookView:
    return parse_view(BookView, await answer(lab, f"/jobs/{job}/book"))


async def sold(lab: Lab, job: str, *prices: int, **changes: Any) -> list[Any]:
    """Peers with these prices, the first four of which win two of eight units each."""
    peers = []
    for price in prices:
        peers.append(await lab.peer())
        await peers[-1].bid(price_micros=price, capacity=2, turn=False)
    await lab.orchestrator.sealer.turn()
    lab.start(lab.orchestrator.auctioneer.run())
    await lab.open_sale(job, 8, **changes)
    return peers


def test_a_book_shows_the_whole_ladder_and_who_is_not_on_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            job = await lab.add_job()
            assert (await book_of(lab, job)).books == ()
            peers = await sold(lab, job, 40, 30, 20, 10, 50, 60, 5_000)
            offers = [await arrival(peer.offers) for peer in peers[:4]]
            (book,) = (await book_of(lab, job)).books
            clearing = book.clearing
            assert clearing.kind is TaskKind.ROLLOUT
            assert clearing.rule is ClearingRule.PAY_AS_BID
            assert (clearing.num_units, clearing.unfilled_units) == (8, 0)
            assert (clearing.num_bidders, clearing.num_rungs, clearing.num_refused) == (6, 6, 1)
            assert clearing.reserve.reserve_micros == 1_000
            assert clearing.sha256 == offers[0].lease.record.certificate_sha256
            assert [rung.price_micros for rung in book.rungs] == [10, 20, 30, 40, 50, 60]
            assert [rung.pay_micros for rung in book.rungs] == [10, 20, 30, 40, 50, 60]
            assert [(rung.num_units, rung.standby) for rung in book.rungs] == [
                *[(2, False)] * 4,
                (2, True),
                (0, False),
            ]
            assert [rung.node for rung in book.rungs][:2] == [peers[3].node, peers[2].node]
            assert {rung.name for rung in book.rungs} == {"peer"}
            (refused,) = book.refused
            assert (refused.account, refused.price_micros) == (peers[6].account.address, 5_000)
            assert refused.handicap_micros == book.rungs[0].handicap_micros > 0
            assert refused.reason == "above_reserve"
            assert book.refused_for == {"above_reserve": 1}
            assert set(book.lease_ids) <= {offer.lease.record.lease_id for offer in offers}
            assert len(book.lease_ids) == 3

    run(scenario)


def test_no_salt_and_no_unopened_bid_is_shown(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            job = await lab.add_job()
            silent = await lab.peer()
            sealed = silent.seal(silent.make_bid(price_micros=7))
            await silent.commit(sealed)
            hidden = silent.reveals.pop(sealed.commitment)
            peers = await sold(lab, job, 10, 20, 30)
            await arrival(peers[0].offers)
            said = await answer(lab, f"/jobs/{job}/book")
            (book,) = parse_view(BookView, said).books
            assert (book.clearing.num_commitments, book.clearing.num_revealed) == (4, 3)
            assert silent.account.address not in str(said)
            reveals = [hidden, *(reveal for peer in peers for reveal in peer.reveals.values())]
            assert len(reveals) == 4
            for reveal in reveals:
                assert reveal.salt not in str(said)
            # The file for a replay has to hold the salts shown: there they are found.
            file = str(await answer(lab, f"/certificates/{book.clearing.sha256}"))
            assert [reveal.salt in file for reveal in reveals] == [False, True, True, True]

    run(scenario)


def test_each_kind_shows_its_newest_clearing(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            job = await lab.add_job()
            (peer,) = await sold(lab, job, 10)
            await arrival(peer.offers)
            first = await book_of(lab, job)
            lab.time.advance(1)
            await peer.bid(kind=TaskKind.GRADIENT, price_micros=9)
            sale = await lab.open_sale(job, 2)
            gradient = {"kind": TaskKind.GRADIENT}
            lot = sale.workload.lot
            lot_class = lot.lot_class.model_copy(update=gradient)
            sale.workload.lot = lot.model_copy(update={"lot_class": lot_class})
            assert (await arrival(peer.offers)).lease.record.kind is TaskKind.GRADIENT
            rollout, other = (await book_of(lab, job)).books
            assert other.clearing.kind is TaskKind.GRADIENT
            assert len(other.lease_ids) == 1
            assert rollout.clearing.kind is TaskKind.ROLLOUT
            assert rollout.clearing.issued_at_ms >= first.books[0].clearing.issued_at_ms
            # Another job's clearings are not this one's.
            assert (await book_of(lab, await lab.add_job())).books == ()

    run(scenario)


def test_very_long_ladders_are_cut_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(market_book, "MAX_LISTED", 2)

    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            job = await lab.add_job()
            peers = await sold(lab, job, 10, 20, 30, 5_000, 6_000, 7_000)
            await arrival(peers[0].offers)
            (book,) = (await book_of(lab, job)).books
            assert (len(book.rungs), book.clearing.num_rungs) == (2, 3)
            assert (len(book.refused), book.clearing.num_refused) == (2, 3)
            assert book.refused_for == {"above_reserve": 3}

    run(scenario)


def test_a_lease_shows_its_rung_and_the_one_after_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            job = await lab.add_job()
            peers = await sold(lab, job, 10, 20, 30, 40)
            for place, peer in enumerate(peers):
                record = (await arrival(peer.offers)).lease.record
                view = parse_view(LeaseView, await answer(lab, f"/leases/{record.lease_id}"))
                assert (view.job_id, view.kind, view.attempt) == (job, TaskKind.ROLLOUT, 1)
                assert (view.num_units, view.unit_price_micros) == (2, 10 * (place + 1))
                assert (view.certificate_sha256, view.rung) == (record.certificate_sha256, place)
                assert view.clearing is not None
                assert view.clearing.sha256 == record.certificate_sha256
                assert view.bid is not None
                assert (view.bid.node, view.bid.pay_micros) == (peer.node, view.unit_price_micros)
                following = None if view.next_bid is None else view.next_bid.node
                assert following == (None if place == 3 else peers[place + 1].node)

    run(scenario)


def test_a_lease_whose_clearing_is_not_here_is_shown_without_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            job, peer = await lab.add_job(), await lab.peer()
            offer, _ = await lab.lease(peer, await lab.open_sale(job))
            lease_id = offer.lease.record.lease_id
            view = parse_view(LeaseView, await answer(lab, f"/leases/{lease_id}"))
            assert (view.clearing, view.bid, view.next_bid) == (None, None, None)
            assert (view.rung, view.unit_price_micros) == (0, 100)

            def age(session: Any) -> None:
                session.get_one(LeaseRow, lease_id).record = '{"of": "an older form"}'

            await lab.context.database.run(age)
            view = parse_view(LeaseView, await answer(lab, f"/leases/{lease_id}"))
            assert (view.certificate_sha256, view.rung, view.clearing) == (None, None, None)

    run(scenario)


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("/jobs/0x" + "0" * 64 + "/book", "no_job"),
        ("/leases/lease_00000000000000000000", "no_lease"),
        ("/leases/lease_%00", "no_lease"),
        ("/leases/" + "9" * 5_000, "no_lease"),
    ],
)
def test_what_is_not_there_is_said_in_a_sentence(tmp_path: Path, path: str, code: str) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            said = await answer(lab, path, NotFound.http_status)
            assert (said["error"], said["code"]) == ("NotFound", code)
            assert len(said["message"]) < 250

    run(scenario)


def test_a_certificate_that_its_book_does_not_clear_to_explains_nothing(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            job = await lab.add_job()
            (peer,) = await sold(lab, job, 10)
            await arrival(peer.offers)

            def tamper(session: Any) -> None:
                for row in session.query(CertificateRow):
                    row.certificate = row.certificate.replace('"num_bidders":1', '"num_bidders":2')

            await lab.context.database.run(tamper)
            said = await answer(lab, f"/jobs/{job}/book", 500)
            assert "is not what its stored book clears to" in said["message"]

    run(scenario)
