"""Which orchestrator a command talks to, and with whose key."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from shoal.client.devnet_files import find_running
from shoal.protocol.errors import InvalidRequest, NotFound, Unavailable

if TYPE_CHECKING:
    from shoal.client.api import ShoalClient

_FULL_ID = re.compile(r"^0x[0-9a-f]{64}$")
_LEASE_ID = re.compile(r"^lease_[0-9a-z]{8,64}$")
_ID_START = re.compile(r"^(?:0x)?([0-9a-f]{4,64})$")


def resolve_url(url: str | None) -> str:
    """``url``, or that of the devnet running under the working directory.

    Raises:
        InvalidRequest: ``url`` is no HTTP address.
        Unavailable: none was named and no devnet runs here.
    """
    if url is not None:
        if not url.startswith(("http://", "https://")):
            raise InvalidRequest(
                f"{url!r} is not the address of an orchestrator; write for example "
                "http://127.0.0.1:8700."
            )
        return url
    running = find_running()
    if running is None:
        raise Unavailable(
            "No devnet runs under this folder; start one with `shoal up`, or name an "
            "orchestrator with --url.",
            code="no_orchestrator",
        )
    return running.api_url


def resolve_key(key: Path | None) -> Path:
    """``key``, or the requester's of the running devnet.

    Raises:
        InvalidRequest: none was named and no devnet runs here.
    """
    if key is not None:
        return key
    running = find_running()
    if running is None:
        raise InvalidRequest(
            "No devnet runs under this folder to take a requester's key from; name a keystore "
            "file with --key.",
            code="no_key",
        )
    return running.requester_key


async def resolve_job(client: ShoalClient, text: str) -> str:
    """The id of the job that ``text`` is, or is the beginning of.

    Raises:
        InvalidRequest: ``text`` is no beginning of a job id, or that of several jobs.
        NotFound: no job's id begins so.
    """
    if _FULL_ID.match(text):
        return text
    match = _ID_START.match(text.lower())
    if match is None:
        raise InvalidRequest(
            f"{text[:80]!r} is not a job id; write 0x and at least its first four hex digits."
        )
    found = [j.job_id for j in await client.jobs() if j.job_id[2:].startswith(match.group(1))]
    if not found:
        raise NotFound(f"No job's id begins with {text}; `shoal jobs` lists them.", code="no_job")
    if len(found) > 1:
        raise InvalidRequest(f"{len(found)} jobs' ids begin with {text}; write more digits.")
    return found[0]


def require_lease_id(text: str) -> str:
    """``text``, if it is the id of a lease.

    Raises:
        InvalidRequest: it is not.
    """
    if _LEASE_ID.match(text) is None:
        raise InvalidRequest(
            f"{text[:80]!r} is not a lease's id, such as lease_5f0c1e2d3b4a59687f6e; "
            "`shoal market book JOB` names the newest ones of a job."
        )
    return text
