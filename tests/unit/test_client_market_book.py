"""How a job's book and a lease's price read."""

from __future__ import annotations

import json
from typing import Any

import pytest
from client_records import clearing, drawn, lease, rung

from shoal.client.api import ShoalClient
from shoal.client.command import run
from shoal.client.market_book_view import (
    book_picture,
    lease_picture,
    lease_sentences,
    refusal_words,
    reserve_sentence,
)
from shoal.client.views import BookView, ClearingView, LeaseView, parse_view
from shoal.market.clearing import Refusal
from shoal.market.lease import LeaseState
from shoal.protocol.errors import NotFound, PeerFault

JOB_ID = "0x" + "12" * 32
LEASE_ID = "lease_0123456789"
URL = "http://orchestrator.invalid"


def book(*rungs: dict[str, Any], refused: tuple[Any, ...] = (), **changes: Any) -> BookView:
    kind = {
        "clearing": clearing(**changes),
        "rungs": rungs,
        "refused": refused,
        "refused_for": {bid["reason"]: 1 for bid in refused},
        "lease_ids": [LEASE_ID],
    }
    return parse_view(BookView, {"job_id": JOB_ID, "books": [kind]})


def refused_bid(reason: str, **changes: Any) -> dict[str, Any]:
    bid = {key: rung(8)[key] for key in ("account", "node", "name", "price_micros")}
    return {**bid, "handicap_micros": 39, "reason": reason, **changes}


def shown(view: BookView, width: int = 100) -> str:
    return drawn(*book_picture(view), width=width)


def why(**changes: Any) -> str:
    return " ".join(lease_sentences(parse_view(LeaseView, lease(**changes))))


def test_a_book_is_a_row_for_each_bid_and_the_rule_in_words() -> None:
    text = shown(
        book(
            rung(0),
            rung(1, num_units=26, standby=True),
            rung(2),
            refused=(refused_bid("above_reserve"),),
            num_refused=1,
        ),
        width=200,
    )
    rows = [line.split() for line in text.splitlines()]
    money = ["$0.000200", "$0.000001", "$0.000200"]
    assert ["0", "worker-1", "0x0101…0101", *money, "won", "128"] in rows
    assert next(row for row in rows if row[:2] == ["1", "worker-2"])[-2:] == ["stand-by", "26"]
    assert next(row for row in rows if row[:2] == ["2", "worker-3"])[-1] == "outbid"
    last = next(row for row in rows if row[:2] == ["—", "worker-9"])
    assert " ".join(last[3:]) == "$0.000600 $0.000039 — refused: above the reserve"
    assert (
        "3 bidders: each is paid what it asked; the cheapest by price + handicap go first." in text
    )
    assert "A further unit may cost $0.000264." in text
    assert "The reserve was $0.000300 a unit: the requester's maximum." in text
    assert f"shoal market why {LEASE_ID}" in text
    assert "did not compete" not in text
    assert "Not shown" not in text


def test_a_table_of_bids_fits_80_columns() -> None:
    view = book(rung(0), rung(1, num_units=1_000, standby=True))
    assert len([line for line in shown(view, 80).splitlines() if "worker-" in line]) == 2
    assert "stand-by 1000" in shown(view, 80)


def test_a_book_says_what_is_not_in_it() -> None:
    text = shown(
        book(
            rung(0),
            refused=(refused_bid("unstaked"),),
            num_rungs=300,
            num_refused=2,
            num_commitments=9,
            unfilled_units=5,
        ),
        width=200,
    )
    assert "5 sealed bids of the whole book did not compete" in text
    assert "128 units, 5 of them unfilled" in text
    assert "Not shown: 299 rungs and 1 refused bid (1 no stake in all)" in text


def test_a_book_without_bids_and_a_job_without_lots_say_so() -> None:
    empty = book(num_rungs=0, num_bidders=0, rule="posted")
    assert "No bid is on the ladder, so nobody is given this work yet." in shown(empty)
    nothing = parse_view(BookView, {"job_id": JOB_ID, "books": []})
    assert "No lot of job 0x1212121212 has been cleared yet" in shown(nothing)


def test_every_refusal_has_words() -> None:
    for refusal in Refusal:
        assert refusal_words(refusal) != refusal.value.replace("_", " ")
    assert refusal_words("of_a_newer\x1b[2Jversion") == "of a newer [2Jversion"


def test_a_lease_paid_as_bid_says_who_came_after_it() -> None:
    text = why()
    assert text.startswith(
        "Lease lease_0123456789 gave 128 rollout units of job 0x1212121212 to worker-1 (account "
        "0x0101…0101, node …LvKXtf) at $0.000200 a unit, on 2026-09-"
    )
    assert (
        "Its bid stood on rung 0 of 3, the first being 0: price $0.000200 + handicap $0.000001 = "
        "$0.000201;" in text
    )
    assert "It won 128 of the lot's 128 units" in text
    assert "The bid after it, of worker-2, came to $0.000251." in text
    assert "So its pay is its own price, $0.000200 a unit." in text
    assert text.endswith("paid in full: 128 * $0.000200 = $0.0256 (freshness 100 %).")
    assert "lease number" not in text


@pytest.mark.parametrize(
    ("rule", "bid", "said"),
    [
        (
            "posted",
            {"pay_micros": 263},
            "the posted $0.000264 less its handicap of $0.000001, $0.000263 a unit.",
        ),
        (
            "uniform",
            {"pay_micros": 263},
            "$0.000264 less its handicap of $0.000001, $0.000263 a unit, where it asked $0.000200.",
        ),
        (
            "uniform",
            {"price_micros": 264, "pay_micros": 264},
            "no more than it asked, so it is paid its own $0.000264.",
        ),
        (
            "uniform",
            {"num_units": 26, "standby": True},
            "The one price is for those who won units: its pay is its own price, $0.000200.",
        ),
        (
            "uniform",
            {"num_units": 0},
            "The one price is for those who won units: its pay is its own price, $0.000200.",
        ),
        ("pay_as_bid", {"num_units": 26, "standby": True}, "stood by with room for 26 units"),
        ("pay_as_bid", {"num_units": 0}, "It was outbid and has this work because"),
    ],
)
def test_each_rule_explains_its_pay(rule: str, bid: dict[str, Any], said: str) -> None:
    text = why(clearing=clearing(rule=rule, num_bidders=2), bid=rung(**bid))
    assert said in text
    assert ("fewer than 3 find no price" in text) == (rule == "posted")
    assert ("from 28 on one price" in text) == (rule == "uniform")
    # Under a posted price nobody is next: who goes first is drawn.
    assert ("The bid after it" in text) == (rule != "posted")


def test_of_equal_bids_the_seed_decides() -> None:
    tied = rung(1, price_micros=200)
    assert "came to $0.000201 as well: the seed put this one first." in why(next_bid=tied)


def test_the_reserve_says_what_set_it_and_why_it_rose() -> None:
    terms = {
        "requester_max_micros": 300,
        "reference_micros": 200,
        "gpu": "H100 SXM",
        "units_per_1000_gpu_hours": 10_000,
        "origin": "reference",
        "reserve_micros": 180,
    }
    said = reserve_sentence(parse_view(ClearingView, clearing(reserve=terms)))
    assert said == (
        "The reserve was $0.000180 a unit: 90 % of the $0.000200 that a unit costs on a data "
        "centre's H100 SXM."
    )
    again = {**terms, "num_raises": 2, "reserve_micros": 218}
    raised = reserve_sentence(parse_view(ClearingView, clearing(reserve=again)))
    assert "raised 2 times by a tenth because the work had failed" in raised
    assert "at most to the requester's $0.000300." in raised


def test_a_stale_rollout_says_what_its_age_cost() -> None:
    assert "paid 128 * $0.000200 * 50 % for its age = $0.0128, rounded down" in why(
        pay_micros=12_800
    )
    assert why(pay_micros=7).endswith("Accepted, and paid $0.000007.")


def test_another_lease_of_a_task_says_so() -> None:
    assert "It was lease number 3 of its task" in why(attempt=3)


@pytest.mark.parametrize("state", LeaseState)
def test_every_end_of_a_lease_has_a_sentence(state: LeaseState) -> None:
    said = lease_sentences(
        parse_view(LeaseView, lease(state=state.value, reason="the \x1b[31mreason.", pay_micros=0))
    )[-1]
    assert "\x1b" not in said
    if state.is_final and state is not LeaseState.ACCEPTED:
        assert said.endswith(": the  [31mreason. Nothing is paid for it.")
    elif state is not LeaseState.ACCEPTED:
        assert "is paid once" in said
    assert "It is on_holiday." in why(state="on_holiday")


def test_a_lease_without_a_certificate_says_that_nothing_explains_it() -> None:
    text = why(clearing=None, bid=None, next_bid=None, certificate_sha256=None, rung=None)
    assert "has no certificate of its clearing" in text
    assert "to account 0x0101…0101" in text
    assert "= $0.0256" in text


def test_a_picture_of_a_lease_tells_where_its_certificate_is_on_one_line() -> None:
    view = parse_view(LeaseView, lease())
    assert drawn(*lease_picture(view, URL), width=200).splitlines()[-1] == (
        f"{URL}/v1/market/certificates/{'5' * 64}"
    )


def test_names_and_reasons_are_no_markup() -> None:
    text = shown(book(rung(0, name="[red]bold[/red]")))
    assert "[red]bold[/red]" in text


@pytest.mark.parametrize(
    "changes",
    [{"issued_at_ms": 1 << 62}, {"node": "\x1b[2J"}, {"lease_id": "x\ny"}, {"clearing": {}}],
)
def test_what_is_no_lease_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(PeerFault):
        parse_view(LeaseView, lease(**changes))


def test_the_commands_print_sentences_or_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def a_book(self: ShoalClient, job_id: str) -> BookView:
        assert job_id == JOB_ID
        return book(rung(0))

    async def a_lease(self: ShoalClient, lease_id: str) -> LeaseView:
        if lease_id != LEASE_ID:
            raise NotFound(f"There is no lease {lease_id}.", code="no_lease")
        return parse_view(LeaseView, lease())

    monkeypatch.setattr(ShoalClient, "book", a_book)
    monkeypatch.setattr(ShoalClient, "lease", a_lease)
    assert run(["market", "book", JOB_ID, "--url", URL]) == 0
    assert "each is paid what it asked" in capsys.readouterr().out
    assert run(["market", "why", LEASE_ID, "--url", URL]) == 0
    assert "Lease lease_0123456789 gave" in capsys.readouterr().out
    assert run(["market", "book", JOB_ID, "--url", URL, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["books"][0]["rungs"][0]["pay_micros"] == 200
    assert run(["market", "why", LEASE_ID, "--url", URL, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["clearing"]["rule"] == "pay_as_bid"
    assert run(["market", "why", "lease_9999999999", "--url", URL]) == NotFound.exit_code
    assert capsys.readouterr().err == "shoal: There is no lease lease_9999999999.\n"


@pytest.mark.parametrize("text", ["nonsense", "lease_../../info", "lease_0123456789?x", ""])
def test_what_is_no_lease_id_never_leaves_the_machine(
    text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["market", "why", text, "--url", URL]) == 3
    assert "is not a lease's id" in capsys.readouterr().err
