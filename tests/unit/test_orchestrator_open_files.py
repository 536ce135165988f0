"""The limit of open files is raised as far as the system allows, and never lowered."""

from __future__ import annotations

import resource

import pytest

from shoal.orchestrator.open_files import allow_connections

INFINITY = resource.RLIM_INFINITY


@pytest.mark.parametrize(
    ("soft", "hard", "reached", "is_enough"),
    [
        (1024, 20_000, 3072, True),
        (1024, 2000, 2000, False),
        (20_000, 20_000, 20_000, True),
        (1024, INFINITY, 3072, True),
        (INFINITY, INFINITY, INFINITY, True),
    ],
)
def test_the_limit_is_raised_as_far_as_it_goes(
    monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, reached: int, is_enough: bool
) -> None:
    limits = [soft, hard]

    def set_limits(_which: int, wanted: tuple[int, int]) -> None:
        limits[:] = wanted

    monkeypatch.setattr(resource, "getrlimit", lambda _which: tuple(limits))
    monkeypatch.setattr(resource, "setrlimit", set_limits)
    assert allow_connections(1024) is is_enough
    assert limits == [reached, hard]
