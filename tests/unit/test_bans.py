"""Points fade, bans run out, and each is longer than the last."""

from __future__ import annotations

from shoal.network.bans import POINTS, Bans, Fault

PEER = "12D3KooWStranger"
ADDRESS = "203.0.113.7"


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def until_banned(bans: Bans, subject: str, fault: Fault, *, at_most: int = 2000) -> int:
    for number in range(1, at_most + 1):
        if bans.penalise(subject, fault):
            return number
    raise AssertionError(f"{at_most} faults led to no ban")


def test_a_few_bad_frames_ban_a_peer_for_a_minute() -> None:
    clock = Clock()
    bans = Bans(clock)
    assert until_banned(bans, PEER, Fault.BAD_FRAME) == 5
    assert bans.is_banned(PEER)
    assert [ban.reason for ban in bans.banned()] == ["bad_frame"]
    clock.now_s += 59.9
    assert bans.is_banned(PEER)
    clock.now_s += 0.2
    assert not bans.is_banned(PEER)
    assert bans.banned() == ()


def test_each_ban_is_twice_as_long_up_to_a_day() -> None:
    clock = Clock()
    bans = Bans(clock)
    lengths = []
    for _ in range(14):
        assert bans.penalise(PEER, Fault.FLOOD)
        (ban,) = bans.banned()
        lengths.append(ban.until_s - clock.now_s)
        clock.now_s = ban.until_s + 1
    assert lengths[:4] == [60, 120, 240, 480]
    assert lengths[-1] == 86_400


def test_a_day_of_peace_starts_afresh() -> None:
    clock = Clock()
    bans = Bans(clock)
    for _ in range(3):
        until_banned(bans, PEER, Fault.FLOOD)
        clock.now_s = bans.banned()[0].until_s + 1
    clock.now_s += 86_401
    bans.penalise(PEER, Fault.FLOOD)
    assert bans.banned()[0].until_s - clock.now_s == 60


def test_points_fade_so_a_rare_slip_never_adds_up() -> None:
    clock = Clock()
    bans = Bans(clock)
    for _ in range(500):
        clock.now_s += 600.0
        # Two half-lives' worth of points can never pass the threshold of five faults.
        assert not bans.penalise(PEER, Fault.BAD_FRAME)


def test_without_fading_the_same_slips_would_ban() -> None:
    """The control: at one moment the same faults do add up."""
    assert until_banned(Bans(Clock()), PEER, Fault.BAD_FRAME) < 500


def test_one_bad_record_bans_nobody() -> None:
    assert POINTS[Fault.BAD_RECORD] * 10 < 100
    assert not Bans(Clock()).penalise(PEER, Fault.BAD_RECORD)


def test_an_address_takes_more_than_a_peer() -> None:
    assert until_banned(Bans(Clock()), ADDRESS, Fault.BAD_FRAME) == 25


def test_this_machine_and_its_proxies_are_never_banned_by_faults() -> None:
    bans = Bans(Clock())
    for address in ("127.0.0.1", "::1"):
        assert not any(bans.penalise(address, Fault.FLOOD) for _ in range(100))
        assert not bans.is_banned(address)
    closed = Bans(Clock(), shared_addresses=())
    assert until_banned(closed, "127.0.0.1", Fault.FLOOD) == 5


def test_a_named_ban_is_never_shortened_and_can_be_lifted() -> None:
    clock = Clock()
    bans = Bans(clock)
    bans.ban(PEER, "fraud", 1e9)
    assert bans.banned()[0].until_s == clock.now_s + 86_400
    bans.ban(PEER, "fraud", 1)
    clock.now_s += 86_000
    assert bans.is_banned(PEER)
    bans.lift(PEER)
    assert not bans.is_banned(PEER)


def test_a_flood_of_names_does_not_wash_out_a_ban() -> None:
    bans = Bans(Clock())
    bans.ban(PEER, "fraud", 3600)
    for number in range(20_000):
        bans.penalise(f"12D3KooW{number}", Fault.UNKNOWN_PROTOCOL)
    assert bans.is_banned(PEER)
    assert len(bans._records) <= 8193
