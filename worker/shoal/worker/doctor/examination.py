"""Checks under deadlines, side by side: none can hang, break or hide another."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass

from shoal.protocol.errors import ShoalError
from shoal.worker.doctor.report import Finding, fail

Findings = Sequence[Finding]


@dataclass(frozen=True, kw_only=True)
class Check:
    """One look at something.

    Attributes:
        name: Stable name, for findings of its own making.
        what: The same in words.
        look: What looks.
        deadline_s: How long it may take.
    """

    name: str
    what: str
    look: Callable[[], Awaitable[Findings]]
    deadline_s: float


async def look(check: Check) -> Findings:
    """What the check found; that it hung or broke is a finding too."""
    try:
        async with asyncio.timeout(check.deadline_s):
            return await check.look()
    except TimeoutError:
        return [
            fail(
                check.name,
                check.what,
                f"no answer within {check.deadline_s:g} s",
                "run the doctor again; if it stays so, whatever it asks hangs",
            )
        ]
    except ShoalError as error:
        return [fail(check.name, check.what, error.message, "mend what the sentence names")]
    except Exception as error:  # a defect in one check must not hide the others' findings
        return [
            fail(
                check.name,
                check.what,
                f"this check broke: {type(error).__name__}: {error}",
                "a defect of Shoal, please report this line",
            )
        ]


async def look_at_all(checks: Iterable[Check]) -> list[Findings]:
    """What each check found, in the order of ``checks``; they run side by side."""
    return list(await asyncio.gather(*(look(check) for check in checks)))
