"""How a worker's status reads: what it does, and when it does nothing, why, with figures."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any

from shoal.protocol.money import format_dollars
from shoal.protocol.node import IdleReason
from shoal.worker.doctor.report import printable, size
from shoal.worker.session import SessionState
from shoal.worker.status import Asked, HeldLease, Judgement, WorkerStatus

if TYPE_CHECKING:
    from rich.console import Console


def status_json(status: WorkerStatus, *, running: bool, now_ms: int) -> dict[str, Any]:
    """The status for a program."""
    return {
        "running": running,
        "now_ms": now_ms,
        "state": state_words(status, running=running, now_ms=now_ms),
        "idle_words": idle_words(status),
        **status.to_json(),
    }


def show_status(status: WorkerStatus, console: Console, *, running: bool, now_ms: int) -> None:
    """The status for a person."""
    from rich.text import Text

    rows = list(lines(status, running=running, now_ms=now_ms))
    width = max(len(label) for label, _ in rows)
    for label, text in rows:
        line = Text(f"{label:<{width}}  ", style="bold" if label else "default")
        line.append(printable(text), style="default")
        console.print(line, soft_wrap=True)


def lines(status: WorkerStatus, *, running: bool, now_ms: int) -> list[tuple[str, str]]:
    """The status as labelled lines."""
    found = [
        ("worker", f"{status.name} {status.node}"),
        ("account", status.account),
        ("state", state_words(status, running=running, now_ms=now_ms)),
    ]
    if running and status.session is SessionState.JOINED:
        found.append(("work", work_words(status)))
        if not status.leases:
            found.append(("why idle", idle_words(status)))
        found += [("", lease_words(lease, now_ms)) for lease in status.leases]
    found.append(("earned", pay_words(status)))
    found += [
        ("last verdicts" if not index else "", verdict_words(judgement, now_ms))
        for index, judgement in enumerate(status.verdicts)
    ]
    cache = f"{size(status.cache_bytes)} of {size(status.cache_limit_bytes)}"
    found.append(("cache", cache))
    found.append(("uploaded", f"{size(status.uploaded_bytes)} since the start"))
    return found


def state_words(status: WorkerStatus, *, running: bool, now_ms: int) -> str:
    """Whether the worker runs, and how things stand with its orchestrator."""
    if not running:
        why = f" ({status.ended})" if status.ended else ", without saying why"
        return (
            f"stopped, last heard {_moment(status.at_ms)}{why}; it had run for "
            f"{_span(status.at_ms - status.started_ms)}"
        )
    since = _span(now_ms - status.session_since_ms)
    up = f"up for {_span(now_ms - status.started_ms)}"
    at = f" {status.address}" if status.address else ""
    match status.session:
        case SessionState.JOINED:
            trip = (
                f", answers in {status.round_trip_ms} ms"
                if status.round_trip_ms is not None
                else ""
            )
            again = f", join number {status.num_joins}" if status.num_joins > 1 else ""
            return f"{up}; joined{at} for {since}{trip}{again}"
        case SessionState.DIALLING:
            return f"{up}; dialling{at} for {since}{_last(status)}"
        case SessionState.JOINING:
            return f"{up}; joining{at} for {since}{_last(status)}"
        case SessionState.WAITING:
            left_ms = 0 if status.retry_at_ms is None else max(0, status.retry_at_ms - now_ms)
            return f"{up}; not joined, dialling again in {_span(left_ms)}{_last(status)}"
        case SessionState.STOPPED:
            return f"{up}; not joined yet"


def work_words(status: WorkerStatus) -> str:
    """What is held."""
    jobs = f"{status.num_jobs} open job{'' if status.num_jobs == 1 else 's'}"
    if not status.leases:
        return f"no lease, {jobs}"
    units = sum(lease.num_units for lease in status.leases)
    leases = f"{len(status.leases)} lease{'' if len(status.leases) == 1 else 's'}"
    return f"{leases} of {units} units, {jobs}"


def idle_words(status: WorkerStatus) -> str:
    """Why the worker earns nothing just now, with the figures there are."""
    words = _idle_words(status)
    if status.idle_since_ms is None or status.idle in {None, IdleReason.WORKING}:
        return words
    return f"{words} (since {_moment(status.idle_since_ms)})"


def _idle_words(status: WorkerStatus) -> str:
    detail = status.idle_detail
    match status.idle:
        case None:
            return "the orchestrator has not said yet"
        case IdleReason.WORKING:
            return "it works"
        case IdleReason.NO_JOBS:
            return "no job is open; wait"
        case IdleReason.FETCHING_BASE:
            return _fetching_words(status)
        case IdleReason.ABOVE_RESERVE:
            return _price_words(status)
        case IdleReason.STAKE_TOO_SMALL if detail and detail.needed_stake_micros is not None:
            needed = format_dollars(detail.needed_stake_micros)
            free = format_dollars(detail.free_stake_micros or 0)
            return (
                f"stake too small for this class: its smallest task needs ${needed} and ${free} "
                "is free; start with a larger --stake"
            )
        case IdleReason.STAKE_TOO_SMALL:
            return "stake too small for the open work; start with a larger --stake"
        case IdleReason.TASK_TOO_LARGE if detail and detail.task_units is not None:
            return (
                f"tasks too large: the smallest has {detail.task_units} units and this worker "
                f"takes {detail.capacity_units}; raise capacity.{detail.kind}"
            )
        case IdleReason.TASK_TOO_LARGE:
            return "tasks too large for this worker; raise capacity.*"
        case IdleReason.OUTBID if detail and detail.place is not None:
            return (
                f"outbid: {detail.place}. of {detail.places} on the ladder for "
                f"{detail.kind} at ${format_dollars(detail.price_micros or 0)}; lower the price "
                "or wait"
            )
        case IdleReason.OUTBID:
            return "others stand before it on the ladder; lower price.* or wait"
        case IdleReason.TOO_SLOW if detail and detail.task_ms is not None:
            return (
                f"too slow for the open work: a {detail.kind} task would be done in about "
                f"{_seconds(detail.task_ms)}, its way over the line included, and takes others "
                f"{_seconds(detail.usual_ms or 0)}; mend a slow line, or wait for longer tasks"
            )
        case IdleReason.TOO_SLOW:
            return "others would be done well before it; mend a slow line, or wait for longer tasks"
        case IdleReason.PAUSED if detail and detail.wait_ms is not None:
            return (
                f"left out for another {_span(detail.wait_ms)} after broken promises; look at "
                "the last verdicts and the log"
            )
        case IdleReason.PAUSED:
            return "left out for a while after broken promises; look at the log"
        case IdleReason.NO_WORK:
            return "nothing it bids for is waiting; wait"
        case IdleReason.STARTING:
            return "no bid of its own stands yet; look at bid_failed and base_delayed in the log"


def _fetching_words(status: WorkerStatus) -> str:
    parts = [
        f"{fetch.model} {size(fetch.fetched_bytes)}"
        + (f" of {size(fetch.size_bytes)}" if fetch.size_bytes else "")
        for fetch in status.fetching
    ]
    return f"bases are on their way: {', '.join(parts)}" if parts else "a base is on its way"


def _price_words(status: WorkerStatus) -> str:
    detail = status.idle_detail
    if detail is not None and detail.limit_micros is not None and detail.price_micros is not None:
        limit, price = detail.limit_micros, detail.price_micros
        asked = f"${format_dollars(price)} for a unit of {detail.kind}"
        if limit < price:
            return f"priced out: it asks {asked} and the most is ${format_dollars(limit)}"
        return (
            f"priced out: it asks {asked}, below the most of ${format_dollars(limit)}, but its "
            "handicap counts on top; lower the price"
        )
    parts = [_asked_words(asked) for asked in status.asked if asked.best_micros is not None]
    return f"no lots above your floor: {'; '.join(parts)}" if parts else "no lots above your floor"


def _asked_words(asked: Asked) -> str:
    best = format_dollars(asked.best_micros or 0)
    return (
        f"the best {asked.kind} reserve is ${best} and your floor "
        f"${format_dollars(asked.floor_micros)}"
    )


def lease_words(lease: HeldLease, now_ms: int) -> str:
    """One lease on a line."""
    left = lease.ends_ms - now_ms
    time = f"{_span(left)} left" if left > 0 else "its time is over"
    return (
        f"{lease.kind} of {lease.num_units} units, {lease.stage.value}, {lease.steps} steps, "
        f"held for {_span(now_ms - lease.came_ms)}, {time}, pays "
        f"${format_dollars(lease.pay_micros)}, job {lease.job_id[:10]}…"
    )


def pay_words(status: WorkerStatus) -> str:
    """What was earned, claimed and is still to be claimed."""
    pay = status.pay
    owed = (
        "nothing looked up yet"
        if pay.claimable_micros is None
        else f"${format_dollars(pay.claimable_micros)} to be claimed"
    )
    return (
        f"${format_dollars(pay.earned_micros)} in all, {owed}, "
        f"${format_dollars(pay.claimed_micros)} claimed since the start; "
        f"{pay.accepted} accepted, {pay.rejected} rejected"
    )


def verdict_words(judgement: Judgement, now_ms: int) -> str:
    """One verdict on a line."""
    ago = _span(now_ms - judgement.at_ms)
    if judgement.accepted:
        return f"{ago} ago: accepted, ${format_dollars(judgement.pay_micros)}, {judgement.lease_id}"
    return f"{ago} ago: rejected, {judgement.reason}, {judgement.lease_id}"


def _last(status: WorkerStatus) -> str:
    return "" if status.last_error is None else f"; last error: {status.last_error}"


def _moment(at_ms: int) -> str:
    return datetime.fromtimestamp(at_ms / 1_000).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def _seconds(ms: int) -> str:
    """``ms`` with a tenth of a second, or as `_span` where that is nothing beside it."""
    return f"{ms / 1_000:.1f} s" if ms < 60_000 else _span(ms)


def _span(ms: int) -> str:
    """``ms`` in the two largest units.

    Example:
        >>> _span(3_723_000)
        '1 h 2 min'
    """
    seconds = max(0, ms) // 1_000
    for unit_s, unit, next_s, next_unit in (
        (86_400, "d", 3_600, "h"),
        (3_600, "h", 60, "min"),
        (60, "min", 1, "s"),
    ):
        if seconds >= unit_s:
            rest = seconds % unit_s // next_s
            return f"{seconds // unit_s} {unit}" + (f" {rest} {next_unit}" if rest else "")
    return f"{seconds} s"
