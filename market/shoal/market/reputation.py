"""What a provider's record says of it: how likely its work is accepted, and how fast it comes.

Only what the orchestrator saw enters: how each lease ended, by its own clock and its own
verdict.  Nothing that a provider says of itself does, neither its device nor the computing
time in its results.  Acceptance is counted by account, so a fresh node key sheds nothing; speed
by node and *work*, for a node is one machine: its **hardware class** is what was measured of it.

Everything here is a function of the *set* of outcomes of the last thirty days: neither the
order in which they are noted nor a restart in between changes a digit.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache

from pydantic import Field

from shoal.market.beta import MAX_COUNT_PPM, PPM, beta_lower_bound_down
from shoal.market.lease import LeaseRecord, LeaseState, p90_up
from shoal.protocol.ids import Address, Name, PeerIdStr, ShortId
from shoal.protocol.node import FailureCause
from shoal.protocol.record import MAX_INT, Record

PRIOR_ACCEPTED = 4
PRIOR_REJECTED = 1
QUANTILE_PPM = 100_000
"""Acceptance is the 10 % lower bound of Beta(4 + accepted, 1 + rejected).

Source: docs/architecture, "Reputation".
"""

_EXACT_BELOW_PPM = 32 * PPM
_LEADING_BITS = 6

HALF_LIFE_MS = 3 * 86_400_000
STEPS_PER_HALF_LIFE = 24
STEP_MS = HALF_LIFE_MS // STEPS_PER_HALF_LIFE
"""Age is counted in steps of three hours, so that a weight is one of a few integers."""

HORIZON_STEPS = 10 * STEPS_PER_HALF_LIFE
"""Ten half-lives, thirty days: what is older weighs under a thousandth and is forgotten."""

MAX_SAMPLES = 50
"""Latest accepted results of a node by which its speed at a work is measured."""

_OF_THE_PROVIDER = frozenset(
    {
        FailureCause.OUT_OF_MEMORY,
        FailureCause.NOT_FETCHED,
        FailureCause.WRONG_BASE,
        FailureCause.TOO_SLOW,
        FailureCause.NODE,
    }
)


class Ending(StrEnum):
    """How a lease ended, as far as its provider answers for it."""

    ACCEPTED = "accepted"
    REJECTED = "rejected"
    EXPIRED = "expired"
    FAILED = "failed"
    REFUSED = "refused"

    @property
    def is_judged(self) -> bool:
        """Whether a result came and was judged: such an ending has a provider's receipt."""
        return self in (Ending.ACCEPTED, Ending.REJECTED)

    @property
    def costs_reputation(self) -> bool:
        """Whether it counts against acceptance; a refusal only cools down."""
        return self in (Ending.REJECTED, Ending.EXPIRED, Ending.FAILED)

    @property
    def is_broken_promise(self) -> bool:
        """Whether the provider did not do what its bid offered."""
        return self is not Ending.ACCEPTED


class Outcome(Record):
    """How one lease ended.

    Writer: the dispatcher, through `outcome_of`, once per lease.  Reader: reputation and
    cooldown; whoever recomputes a handicap.  ``work`` names what makes unit times comparable;
    ``unit_ms`` is what one unit took, by the orchestrator's clock, and is present when
    accepted.
    """

    lease_id: ShortId
    account: Address
    node: PeerIdStr
    work: Name
    ending: Ending
    unit_ms: int | None = Field(default=None, ge=1, le=MAX_INT)
    ended_at_ms: int = Field(ge=0, le=MAX_INT)


@dataclass(frozen=True, kw_only=True)
class Standing:
    """An account's record at a moment; counts are decayed, in millionths.

    ``acceptance_ppm`` is the lower bound that handicaps are made of.  ``num_receipts`` are the
    judged results of the last thirty days, undecayed.
    """

    accepted_ppm: int
    rejected_ppm: int
    acceptance_ppm: int
    num_receipts: int


def outcome_of(
    record: LeaseRecord, *, work: str, unit_ms: int | None = None, blameless: bool = False
) -> Outcome | None:
    """What the ended lease says of its provider; None where it says nothing.

    A lease we took back, one whose task was to blame, and one given back by a worker that
    stops in good order say nothing.

    Args:
        record: A lease that has ended.
        work: What makes unit times comparable, as ``kind:base:bucket:group size``.
        unit_ms: For an accepted lease, what one unit took; see `measured_unit_ms_up`.
        blameless: The result could not be judged, by a fault of ours.
    """
    ending = _ending(record)
    if ending is None or blameless or record.ended_at_ms is None:
        return None
    lease = record.lease
    return Outcome(
        lease_id=lease.lease_id,
        account=lease.account,
        node=lease.node,
        work=work,
        ending=ending,
        unit_ms=unit_ms if ending is Ending.ACCEPTED else None,
        ended_at_ms=record.ended_at_ms,
    )


def _ending(record: LeaseRecord) -> Ending | None:
    match record.state:
        case LeaseState.ACCEPTED:
            return Ending.ACCEPTED
        case LeaseState.REJECTED:
            return Ending.REJECTED
        case LeaseState.EXPIRED:
            return Ending.EXPIRED
        case LeaseState.REFUSED:
            return Ending.REFUSED
        case LeaseState.FAILED if record.cause in _OF_THE_PROVIDER:
            return Ending.FAILED
    return None


def measured_unit_ms_up(
    record: LeaseRecord, *, submitted_at_ms: int, expected_ms: int, backlog_ms: int
) -> int:
    """What one unit of the lease took, from its issue to its result, by our clock alone.

    The time is shared with what the node held before, in proportion to what each was expected
    to take.  So holding results back to hand in several at once gains nothing: the first of
    them takes the whole wait.

    Args:
        record: The lease.
        submitted_at_ms: When its result came.
        expected_ms: What its units usually take.
        backlog_ms: The same for what the node held when the lease was issued.
    """
    own, ahead = max(1, expected_ms), max(0, backlog_ms)
    taken_ms = max(1, submitted_at_ms - record.lease.issued_at_ms)
    return -(-taken_ms * own // ((own + ahead) * record.lease.num_units))


class Reputation:
    """The records of all accounts and nodes, kept up one outcome at a time.

    Example:
        >>> Reputation().standing("0x" + "1" * 40, now_ms=0).acceptance_ppm
        562341
    """

    def __init__(self, outcomes: Iterable[Outcome] = ()) -> None:
        self._tallies: dict[str, _Tally] = {}
        self._speeds: dict[tuple[str, str], list[_Sample]] = {}
        self._cached: dict[str, tuple[int, Standing]] = {}
        for outcome in outcomes:
            self.note(outcome)

    def note(self, outcome: Outcome) -> None:
        """The outcome counts; the caller notes each lease once, when it ends."""
        account, step = outcome.account.lower(), _step(outcome.ended_at_ms)
        tally = self._tallies.setdefault(account, _Tally())
        tally.add(outcome.ending, step)
        self._cached.pop(account, None)
        if outcome.unit_ms is not None:
            samples = self._speeds.setdefault((outcome.node, outcome.work), [])
            insort(samples, (outcome.ended_at_ms, outcome.lease_id, outcome.unit_ms))
            del samples[:-MAX_SAMPLES]

    def standing(self, account: str, *, now_ms: int) -> Standing:
        """The account's record now; of an unknown account, a newcomer's."""
        key, step = account.lower(), _step(now_ms)
        cached = self._cached.get(key)
        if cached is not None and cached[0] == step:
            return cached[1]
        tally = self._tallies.get(key)
        standing = NEWCOMER if tally is None else tally.standing(step)
        if tally is not None:
            self._cached[key] = step, standing
        return standing

    def unit_ms(self, node: str, work: str, *, now_ms: int) -> int | None:
        """The node's p90 time for a unit of this work; None when none is known."""
        samples = self._speeds.get((node, work), ())
        step = _step(now_ms)
        known = [time_ms for ended, _, time_ms in samples if _weight_ppm(_step(ended), step)]
        return p90_up(known) if known else None

    def target_unit_ms(self, nodes: Iterable[str], work: str, *, now_ms: int) -> int | None:
        """τ*: the lower median of these nodes' p90 times; None while none is known."""
        times = [self.unit_ms(node, work, now_ms=now_ms) for node in nodes]
        known = sorted(time for time in times if time is not None)
        return known[(len(known) - 1) // 2] if known else None

    def forget_old(self, *, now_ms: int) -> None:
        """Nothing is held any more that weighs nothing now; call it now and then."""
        oldest = _step(now_ms) - HORIZON_STEPS + 1
        for account, tally in list(self._tallies.items()):
            if tally.forget_before(oldest):
                del self._tallies[account]
                self._cached.pop(account, None)
        for key, samples in list(self._speeds.items()):
            if _step(samples[-1][0]) < oldest:
                del self._speeds[key]


_Sample = tuple[int, str, int]
"""End, lease, and time of a unit: ordered, so that the latest are the same in any order."""


@dataclass(slots=True)
class _Tally:
    """Outcomes of one account by step of three hours."""

    accepted: Counter[int] = field(default_factory=Counter)
    against: Counter[int] = field(default_factory=Counter)
    judged: Counter[int] = field(default_factory=Counter)

    def add(self, ending: Ending, step: int) -> None:
        if ending is Ending.ACCEPTED:
            self.accepted[step] += 1
        if ending.costs_reputation:
            self.against[step] += 1
        if ending.is_judged:
            self.judged[step] += 1

    def standing(self, now_step: int) -> Standing:
        accepted = _decayed_ppm(self.accepted, now_step)
        rejected = _decayed_ppm(self.against, now_step)
        return Standing(
            accepted_ppm=accepted,
            rejected_ppm=rejected,
            acceptance_ppm=_acceptance_ppm(accepted, rejected),
            num_receipts=sum(n for step, n in self.judged.items() if _weight_ppm(step, now_step)),
        )

    def forget_before(self, oldest_step: int) -> bool:
        """Drops older steps; whether none is left."""
        for counts in (self.accepted, self.against, self.judged):
            for step in [step for step in counts if step < oldest_step]:
                del counts[step]
        return not (self.accepted or self.against)


def _acceptance_ppm(accepted_ppm: int, rejected_ppm: int) -> int:
    """The lower bound, never above that of the exact counts.

    Long counts are taken with six leading bits, what speaks for the provider rounded down and
    what speaks against it up: the quantile costs milliseconds, and so few are ever needed.
    """
    accepted = _leading_bits_down(accepted_ppm)
    return _bound_ppm(accepted, -_leading_bits_down(-rejected_ppm))


def _leading_bits_down(count_ppm: int) -> int:
    """The count, from 32 outcomes on with six leading bits; rounded towards minus infinity."""
    size = abs(count_ppm)
    if size < _EXACT_BELOW_PPM:
        return count_ppm
    shift = size.bit_length() - _LEADING_BITS
    return (count_ppm >> shift) << shift


@lru_cache(maxsize=1 << 14)
def _bound_ppm(accepted_ppm: int, rejected_ppm: int) -> int:
    alpha, beta = PRIOR_ACCEPTED * PPM + accepted_ppm, PRIOR_REJECTED * PPM + rejected_ppm
    # Beyond a million outcomes the share alone matters, and scaling both keeps it.
    scale = -(-max(alpha, beta) // MAX_COUNT_PPM)
    return beta_lower_bound_down(
        max(PPM, alpha // scale), max(PPM, -(-beta // scale)), QUANTILE_PPM
    )


def _decayed_ppm(counts: Counter[int], now_step: int) -> int:
    return sum(count * _weight_ppm(step, now_step) for step, count in counts.items())


def _step(time_ms: int) -> int:
    return time_ms // STEP_MS


def _weight_ppm(step: int, now_step: int) -> int:
    """What an outcome of ``step`` weighs now; the same as now if our clock was set back."""
    age = max(0, now_step - step)
    return _WEIGHTS_PPM[age] if age < HORIZON_STEPS else 0


def _power_of_half_down(age_steps: int) -> int:
    """2^(-age ÷ half-life) in millionths, rounded down, in integers alone.

    It is the largest ``w`` with ``w^24 · 2^age ≤ 1,000,000^24``.
    """
    bound = PPM**STEPS_PER_HALF_LIFE >> age_steps
    low, high = 0, PPM + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if middle**STEPS_PER_HALF_LIFE <= bound else (low, middle)
    return low


_WEIGHTS_PPM = tuple(_power_of_half_down(age) for age in range(HORIZON_STEPS))

NEWCOMER = Standing(
    accepted_ppm=0, rejected_ppm=0, acceptance_ppm=_acceptance_ppm(0, 0), num_receipts=0
)
"""What is known of an account nobody has seen."""
