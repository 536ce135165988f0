"""Accepted work for tests that only look at what was delivered."""

from __future__ import annotations

from typing import Any

from shoal.orchestrator.workload import Delivery


def made_up_delivery(units: tuple[int, ...], payload: object) -> Delivery:
    """A delivery of which only the units, the payload and a digest are looked at."""
    nothing: Any = None
    return Delivery(
        units=units,
        task=nothing,
        lease=nothing,
        result=nothing,
        payload=payload,
        statement_sha256=f"{units[0]:064d}",
    )
