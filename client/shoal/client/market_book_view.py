"""How a book and a lease's price read: tables for the figures, sentences for the reasons."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import TYPE_CHECKING, assert_never

from shoal.client.picture import short, short_job
from shoal.client.views import BookView, ClearingView, KindBookView, LeaseView, RungView
from shoal.market.clearing import Refusal
from shoal.market.freshness import FULL_PERMILLE
from shoal.market.lease import LeaseState
from shoal.market.pricing import MIN_AUCTION_BIDDERS, UNIFORM_BIDDERS
from shoal.market.reserve import REFERENCE_SHARE_PERMILLE
from shoal.protocol.certificate import ClearingRule, ReserveOrigin
from shoal.protocol.money import format_dollars

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

_MAX_STRANGERS_WORDS = 500

_REFUSALS = {
    Refusal.EXPIRED: "its bid had lapsed",
    Refusal.UNSTAKED: "no stake",
    Refusal.ABOVE_RESERVE: "above the reserve",
    Refusal.TASK_TOO_LARGE: "takes no task this large",
    Refusal.STAKE_TOO_SMALL: "stake backs no task",
    Refusal.ABOVE_POSTED_PRICE: "above the posted price",
}


def book_picture(book: BookView) -> list[RenderableType]:
    """The book as a terminal shows it: for each kind of task a table and why it is so."""
    from rich.text import Text

    if not book.books:
        return [
            Text(
                f"No lot of job {short_job(book.job_id)} has been cleared yet; "
                "`shoal jobs` says how far it is."
            )
        ]
    parts: list[RenderableType] = []
    for kind in book.books:
        parts += [*_kind_picture(kind), ""]
    lease_ids = [lease_id for kind in book.books for lease_id in kind.lease_ids[:1]]
    if lease_ids:
        parts.append(Text(f"One price explained: shoal market why {lease_ids[0]}", style="dim"))
    return parts


def lease_picture(lease: LeaseView, url: str) -> list[RenderableType]:
    """Why the lease went where it did, at its price; ``url`` is the orchestrator's."""
    from rich.markup import escape
    from rich.text import Text

    parts: list[RenderableType] = [Text(sentence) for sentence in lease_sentences(lease)]
    if lease.clearing is not None:
        where = escape(f"{url}/v1/market/certificates/{lease.clearing.sha256}")
        parts += ["", Text("To check it, save this and run `shoal market replay` on the file:")]
        # A string, so that the line is not cut in two: it is there to be copied.
        parts.append(f"[dim]{where}[/dim]")
    return parts


def lease_sentences(lease: LeaseView) -> list[str]:
    """Why the lease went where it did, at its price, one thought each."""
    sentences = [_granted(lease)]
    if lease.clearing is None or lease.bid is None:
        sentences.append(
            "The orchestrator has no certificate of its clearing, as of leases that are older "
            "than sealed clearings, so nothing says why it had this price."
        )
    else:
        sentences += [
            _place(lease, lease.clearing, lease.bid),
            rule_sentence(lease.clearing),
            _pay_sentence(lease.clearing, lease.bid),
            reserve_sentence(lease.clearing),
        ]
    sentences.append(_ending(lease))
    return sentences


def rule_sentence(clearing: ClearingView) -> str:
    """Which rule priced the clearing, and whom it serves first."""
    bidders = _count(clearing.num_bidders, "bidder")
    price = _unit_price(clearing.clearing_price_micros)
    match clearing.rule:
        case ClearingRule.POSTED:
            return (
                f"{bidders}: fewer than {MIN_AUCTION_BIDDERS} find no price in an auction, so one "
                f"is posted, {price} a unit, which follows supply and demand from lot to lot. "
                "Whoever asks no more is paid it less its handicap; who goes first is drawn from "
                "the seed."
            )
        case ClearingRule.PAY_AS_BID:
            return (
                f"{bidders}: each is paid what it asked; the cheapest by price + handicap go "
                f"first. A further unit may cost {price}."
            )
        case ClearingRule.UNIFORM:
            return (
                f"{bidders}: from {UNIFORM_BIDDERS} on one price holds for all who win, {price} a "
                "unit less their handicap and never less than they asked. It is the price + "
                "handicap of a further unit, or the reserve where nobody had room for one. The "
                "cheapest by price + handicap go first."
            )
    assert_never(clearing.rule)


def reserve_sentence(clearing: ClearingView) -> str:
    """The most a unit could cost, and what set it."""
    reserve = clearing.reserve
    if reserve.origin is ReserveOrigin.REFERENCE and reserve.reference_micros is not None:
        origin = (
            f"{REFERENCE_SHARE_PERMILLE // 10} % of the {_unit_price(reserve.reference_micros)} "
            f"that a unit costs on a data centre's {reserve.gpu}"
        )
    else:
        origin = "the requester's maximum"
    sentence = f"The reserve was {_unit_price(reserve.reserve_micros)} a unit: {origin}"
    if reserve.num_raises:
        times = "once" if reserve.num_raises == 1 else f"{reserve.num_raises} times"
        sentence += (
            f", raised {times} by a tenth because the work had failed, at most to the "
            f"requester's {_unit_price(reserve.requester_max_micros)}"
        )
    return f"{sentence}."


def _kind_picture(book: KindBookView) -> list[RenderableType]:
    from rich.text import Text

    clearing = book.clearing
    moment = _moment(clearing.issued_at_ms)
    unfilled = f", {clearing.unfilled_units} of them unfilled" if clearing.unfilled_units else ""
    parts: list[RenderableType] = [
        Text.assemble(
            (clearing.kind.value, "bold"),
            f"  {_count(clearing.num_units, 'unit')}{unfilled}, cleared {moment} in market epoch "
            f"{clearing.epoch}",
        ),
        Text(f"certificate {clearing.sha256}", style="dim"),
        Text(rule_sentence(clearing)),
        Text(reserve_sentence(clearing)),
    ]
    silent = clearing.num_commitments - clearing.num_revealed
    if silent:
        sealed = f"{_count(silent, 'sealed bid')} of the whole book did not compete: withdrawn, "
        parts.append(Text(f"{sealed}or not shown in time."))
    if not clearing.num_rungs:
        parts.append(Text("No bid is on the ladder, so nobody is given this work yet."))
    if book.rungs or book.refused:
        parts.append(_bid_table(book))
    hidden = _hidden(book)
    return [*parts, Text(hidden, style="dim")] if hidden else parts


def _hidden(book: KindBookView) -> str:
    """How much of a very long ladder was not sent."""
    more_rungs = book.clearing.num_rungs - len(book.rungs)
    more_refused = book.clearing.num_refused - len(book.refused)
    if more_rungs <= 0 and more_refused <= 0:
        return ""
    reasons = ", ".join(
        f"{number} {refusal_words(reason)}" for reason, number in book.refused_for.items()
    )
    refused = f" ({reasons} in all)" if reasons else ""
    return (
        f"Not shown: {_count(max(0, more_rungs), 'rung')} and "
        f"{_count(max(0, more_refused), 'refused bid')}{refused}; the certificate's file has all."
    )


def _bid_table(book: KindBookView) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", show_edge=False)
    for title in ("rung", "worker", "account"):
        table.add_column(title, no_wrap=True)
    for title in ("price", "handicap", "pay"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("outcome")
    for rung in book.rungs:
        table.add_row(
            str(rung.rung),
            Text(_clean(rung.name)),
            Text(short(rung.account), style="dim"),
            *map(_unit_price, (rung.price_micros, rung.handicap_micros, rung.pay_micros)),
            _won(rung),
        )
    for bid in book.refused:
        table.add_row(
            "—",
            Text(_clean(bid.name)),
            Text(short(bid.account), style="dim"),
            *map(_unit_price, (bid.price_micros, bid.handicap_micros)),
            "—",
            Text(f"refused: {refusal_words(bid.reason)}", style="yellow"),
        )
    return table


def refusal_words(reason: str) -> str:
    """Why a bid is not on a ladder, in words; a reason of a newer orchestrator as it is."""
    known = {str(refusal): words for refusal, words in _REFUSALS.items()}
    return known.get(reason, _clean(reason).replace("_", " "))


def _won(rung: RungView) -> str:
    if rung.standby:
        return f"stand-by {rung.num_units}"
    return f"won {rung.num_units}" if rung.num_units else "outbid"


def _granted(lease: LeaseView) -> str:
    account = f"account {short(lease.account)}, node …{lease.node[-6:]}"
    name = "" if lease.bid is None else _clean(lease.bid.name)
    who = f"{name} ({account})" if name else account
    sentence = (
        f"Lease {lease.lease_id} gave {_count(lease.num_units, f'{lease.kind.value} unit')} of job "
        f"{short_job(lease.job_id)} to {who} at {_unit_price(lease.unit_price_micros)} a unit, on "
        f"{_moment(lease.issued_at_ms)}."
    )
    if lease.attempt == 1:
        return sentence
    return (
        f"{sentence} It was lease number {lease.attempt} of its task: those before it ended "
        "without an accepted result, or fell behind."
    )


def _place(lease: LeaseView, clearing: ClearingView, bid: RungView) -> str:
    sentence = (
        f"Its bid stood on rung {bid.rung} of {clearing.num_rungs}, the first being 0: price "
        f"{_unit_price(bid.price_micros)} + handicap {_unit_price(bid.handicap_micros)} = "
        f"{_unit_price(bid.adjusted_micros)}; the handicap is what its record of failing and "
        "waiting costs the requester."
    )
    if bid.standby:
        sentence += (
            f" It had won nothing and stood by with room for {_count(bid.num_units, 'unit')}: this "
            "is work that another failed or had no room for."
        )
    elif not bid.num_units:
        sentence += (
            " It was outbid and has this work because those before it failed it or had no room."
        )
    else:
        sentence += (
            f" It won {bid.num_units} of the lot's {_count(clearing.num_units, 'unit')}, by its "
            f"room for {bid.room_units}."
        )
    following = lease.next_bid
    if following is not None and clearing.rule is not ClearingRule.POSTED:
        whose = f", of {_clean(following.name)}," if following.name else ""
        sentence += f" The bid after it{whose} came to {_unit_price(following.adjusted_micros)}"
        tied = following.adjusted_micros == bid.adjusted_micros
        sentence += " as well: the seed put this one first." if tied else "."
    return sentence


def _pay_sentence(clearing: ClearingView, bid: RungView) -> str:
    """Why the rung's pay is what it is."""
    pay, own = _unit_price(bid.pay_micros), _unit_price(bid.price_micros)
    price, handicap = _unit_price(clearing.clearing_price_micros), _unit_price(bid.handicap_micros)
    match clearing.rule:
        case ClearingRule.POSTED:
            return (
                f"So its pay is the posted {price} less its handicap of {handicap}, {pay} a unit."
            )
        case ClearingRule.PAY_AS_BID:
            return f"So its pay is its own price, {pay} a unit."
        case ClearingRule.UNIFORM if bid.standby or not bid.num_units:
            return f"The one price is for those who won units: its pay is its own price, {pay}."
        case ClearingRule.UNIFORM if bid.pay_micros > bid.price_micros:
            return (
                f"So its pay is {price} less its handicap of {handicap}, {pay} a unit, where it "
                f"asked {own}."
            )
        case ClearingRule.UNIFORM:
            return f"{price} less {handicap} is no more than it asked, so it is paid its own {pay}."
    assert_never(clearing.rule)


def _ending(lease: LeaseView) -> str:
    """What came of the lease and what is paid for it."""
    state = next((state for state in LeaseState if state.value == lease.state), None)
    because = f": {_clean(lease.reason)}" if lease.reason else ""
    match state:
        case LeaseState.ACCEPTED:
            return _paid(lease)
        case LeaseState.OFFERED | LeaseState.TAKEN | LeaseState.RUNNING:
            return f"It is {lease.state}; it is paid once its result is accepted."
        case LeaseState.SUBMITTED:
            return "Its result waits for its verdict; it is paid once that accepts it."
        case LeaseState.REJECTED:
            return _unpaid(f"Its result was rejected{because}")
        case LeaseState.EXPIRED:
            return _unpaid(f"It expired{because}")
        case LeaseState.REFUSED:
            return _unpaid(f"Its holder refused it{because}")
        case LeaseState.FAILED:
            return _unpaid(f"Its holder could not do it{because}")
        case LeaseState.REVOKED:
            return _unpaid(f"It was called off without blame{because}")
        case None:
            return f"It is {_clean(lease.state)}{because}."
    assert_never(state)


def _unpaid(what: str) -> str:
    return f"{what.rstrip('.')}. Nothing is paid for it."


def _paid(lease: LeaseView) -> str:
    amount = f"{lease.num_units} * {_unit_price(lease.unit_price_micros)}"
    paid = _dollars(lease.pay_micros)
    share = _share_permille(lease)
    if share is None:
        return f"Accepted, and paid {paid}."
    if share == FULL_PERMILLE:
        return f"Accepted, and paid in full: {amount} = {paid} (freshness 100 %)."
    return (
        f"Accepted, and paid {amount} * {share / 10:g} % for its age = {paid}, rounded down: its "
        "policy was no longer the newest."
    )


def _share_permille(lease: LeaseView) -> int | None:
    """The share of its price that the lease was paid, by the lot's schedule."""
    shares: Sequence[int] = (
        (FULL_PERMILLE,) if lease.clearing is None else lease.clearing.freshness_permille
    )
    whole = lease.num_units * lease.unit_price_micros
    return next(
        (share for share in shares if whole * share // FULL_PERMILLE == lease.pay_micros), None
    )


def _dollars(micros: int) -> str:
    return f"${format_dollars(micros)}"


def _unit_price(micros: int) -> str:
    """A price with every decimal: prices are small, and so they line up."""
    return f"${micros // 1_000_000}.{micros % 1_000_000:06d}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _moment(at_ms: int) -> str:
    return f"{datetime.datetime.fromtimestamp(at_ms / 1000).astimezone():%Y-%m-%d %H:%M:%S}"


def _clean(text: str) -> str:
    """What strangers wrote, without what could steer a terminal."""
    shown = "".join(char if char.isprintable() else " " for char in text)
    return shown if len(shown) <= _MAX_STRANGERS_WORDS else f"{shown[:_MAX_STRANGERS_WORDS]}…"
