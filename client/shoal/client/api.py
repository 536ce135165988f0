"""The Python SDK: an orchestrator's HTTP API, typed."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any, Self

import aiohttp

from shoal.client.views import (
    ENDED,
    BookView,
    ConnectedWorker,
    JobEvent,
    JobStanding,
    JobView,
    LeaseView,
    MarketInfo,
    PublishedModel,
    SubmittedJob,
    parse_view,
)
from shoal.protocol.canonical import parse_json
from shoal.protocol.errors import Clock, Expired, PeerFault, Unavailable, error_from_wire
from shoal.protocol.job import Job, JobCommand, JobState
from shoal.protocol.signing import Signed

REQUEST_TIMEOUT_S = 20.0
SUBMIT_TIMEOUT_S = 1800.0
"""The first job on a base waits until the orchestrator has fetched or built it."""
POLL_INTERVAL_S = 0.5
_STATE_WAIT_S = 10.0
"""Below the timeout of a request."""
MAX_ANSWER_BYTES = 256 << 20
"""Bundles of long jobs are the largest answers; anything beyond is refused unread."""


class ShoalClient:
    """A requester's connection to one orchestrator.

    Args:
        url: The orchestrator's API, e.g. ``http://127.0.0.1:8700``.

    Example::

        async with ShoalClient("http://127.0.0.1:8700") as client:
            for job in await client.jobs():
                print(job.name, job.state)
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    @property
    def session(self) -> aiohttp.ClientSession:
        """The open HTTP session; for bulk bytes beside the API."""
        if self._session is None:
            raise RuntimeError("use `async with ShoalClient(url) as client`")
        return self._session

    async def healthy(self) -> bool:
        """Whether the orchestrator answers."""
        try:
            await self._get_bytes("/health")
        except Unavailable:
            return False
        return True

    async def info(self) -> MarketInfo:
        """Who the orchestrator is, and on which chain."""
        return parse_view(MarketInfo, await self._get("/v1/market/info"))

    async def workers(self) -> tuple[ConnectedWorker, ...]:
        """Every worker the orchestrator knows."""
        return tuple(
            parse_view(ConnectedWorker, item)
            for item in _items(await self._get("/v1/market/workers"), "workers")
        )

    async def submit(self, job: Signed[Job]) -> SubmittedJob:
        """The job is known to the orchestrator and waits for its escrow.

        Raises:
            InvalidRequest: the orchestrator refuses the job; the sentence says why.
        """
        return parse_view(
            SubmittedJob, _parse_json(await self._post("/v1/market/jobs", job.to_json()), self.url)
        )

    async def jobs(self) -> tuple[JobView, ...]:
        """Every job, newest first."""
        views = (
            parse_view(JobView, item) for item in _items(await self._get("/v1/market/jobs"), "jobs")
        )
        return tuple(sorted(views, key=lambda view: -view.created_ms))

    async def job(self, job_id: str) -> JobView:
        """One job as of now.

        Raises:
            NotFound: the orchestrator has no such job.
        """
        return parse_view(JobView, await self._get(f"/v1/market/jobs/{job_id}"))

    async def cancel(self, order: Signed[JobCommand]) -> JobView:
        """The job ends once what was handed in is settled; one that has ended stays as it is.

        Raises:
            NotFound: the orchestrator has no such job.
            Unauthorised: somebody else than the job's requester signed.
        """
        path = f"/v1/market/jobs/{order.record.job_id}/cancel"
        return parse_view(JobView, _parse_json(await self._post(path, order.to_json()), self.url))

    async def events(self, job_id: str, *, after: int = 0) -> tuple[JobEvent, ...]:
        """What happened after event number ``after``, oldest first."""
        answer = await self._get(f"/v1/market/jobs/{job_id}/events?after={after}")
        return tuple(parse_view(JobEvent, item) for item in _items(answer, "events"))

    async def follow_events(self, job_id: str) -> AsyncIterator[JobEvent]:
        """Every event from the first on, ending with the job.

        A connection lost for a moment is resumed where it stopped.
        """
        after = 0
        while True:
            # The state is read first: an event written between the two reads is then
            # either in this page or followed by another round.
            ended = (await self.job(job_id)).ended
            page = await self.events(job_id, after=after)
            for event in page:
                after = max(after, event.seq)
                yield event
            if ended and not page:
                return
            if not page:
                await asyncio.sleep(POLL_INTERVAL_S)

    async def state(self, job_id: str, *, wait_s: float = 0.0) -> JobState:
        """Where the job stands; far cheaper to ask for than the whole job.

        Of a job under way the orchestrator answers after ``wait_s``, or once it has ended.
        """
        path = f"/v1/market/jobs/{job_id}/state?wait_s={wait_s}"
        return parse_view(JobStanding, await self._get(path)).state

    async def wait(self, job_id: str, *, timeout_s: float | None = None) -> JobView:
        """The job, once it has ended.

        Raises:
            Expired: it did not finish within ``timeout_s``.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    asked_s = time.monotonic()
                    if await self.state(job_id, wait_s=_STATE_WAIT_S) in ENDED:
                        return await self.job(job_id)
                    # It may be at its own end, and answer at once.
                    await asyncio.sleep(asked_s + POLL_INTERVAL_S - time.monotonic())
        except TimeoutError:
            raise Expired(
                f"Job {job_id} did not finish within {timeout_s} s; it goes on, wait longer.",
                clock=Clock.REPLY,
            ) from None

    async def metrics(self, job_id: str) -> bytes:
        """The job's metrics so far, one JSON object a line, under TRL's names."""
        return await self._get_bytes(f"/v1/market/jobs/{job_id}/metrics")

    async def book(self, job_id: str) -> BookView:
        """The newest clearing of each kind of the job's tasks.

        Raises:
            NotFound: the orchestrator has no such job.
        """
        return parse_view(BookView, await self._get(f"/v1/market/jobs/{job_id}/book"))

    async def lease(self, lease_id: str) -> LeaseView:
        """One lease, with the clearing that gave it its price.

        Raises:
            NotFound: the orchestrator has no such lease.
        """
        return parse_view(LeaseView, await self._get(f"/v1/market/leases/{lease_id}"))

    async def model(self, job_id: str) -> PublishedModel:
        """The files of the job's published adapter."""
        return parse_view(PublishedModel, await self._get(f"/v1/models/{job_id}"))

    async def bundle(self, job_id: str) -> bytes:
        """The job's provenance bundle, as published.

        Raises:
            ShoalError: ``code`` says the bundle is not final yet.
        """
        return await self._get_bytes(f"/v1/provenance/{job_id}/bundle")

    async def _get(self, path: str) -> Any:
        return _parse_json(await self._get_bytes(path), self.url)

    async def _get_bytes(self, path: str) -> bytes:
        return await self._send("GET", path, None, REQUEST_TIMEOUT_S)

    async def _post(self, path: str, body: object) -> bytes:
        return await self._send("POST", path, body, SUBMIT_TIMEOUT_S)

    async def _send(self, method: str, path: str, body: object, timeout_s: float) -> bytes:
        timeout = aiohttp.ClientTimeout(total=timeout_s, connect=REQUEST_TIMEOUT_S)
        try:
            async with self.session.request(
                method, self.url + path, json=body, timeout=timeout
            ) as response:
                answer = await _read_capped(response)
        except (aiohttp.ClientConnectionError, aiohttp.InvalidURL, TimeoutError) as error:
            raise Unavailable(
                f"No orchestrator answers at {self.url} ({_cause(error)}); start one with "
                "`shoal up`, or name another with --url.",
                code="no_orchestrator",
            ) from None
        except aiohttp.ClientError as error:
            raise Unavailable(
                f"The connection to {self.url} broke ({_cause(error)}); try again.",
            ) from None
        if response.status >= 400:
            _require_speech(response, answer, self.url)
            raise error_from_wire(_parse_json(answer, self.url))
        return answer


async def _read_capped(response: aiohttp.ClientResponse) -> bytes:
    parts: list[bytes] = []
    size_bytes = 0
    async for part in response.content.iter_any():
        size_bytes += len(part)
        if size_bytes > MAX_ANSWER_BYTES:
            raise PeerFault(
                f"The orchestrator's answer exceeds {MAX_ANSWER_BYTES} bytes; it was dropped.",
                code="oversize",
            )
        parts.append(part)
    return b"".join(parts)


def _require_speech(response: aiohttp.ClientResponse, answer: bytes, url: str) -> None:
    """Tells an orchestrator, or a proxy before it, that broke down from one that refuses."""
    if response.status >= 500 and not answer.lstrip().startswith(b"{"):
        raise Unavailable(
            f"The orchestrator at {url} failed with HTTP status {response.status}; its log says "
            "why, try again later."
        )


def _parse_json(data: bytes, url: str) -> Any:
    try:
        return parse_json(data)
    except ValueError:
        raise PeerFault(
            f"What answers at {url} is not a Shoal orchestrator: its answer is not JSON; "
            "check the address.",
            code="malformed",
        ) from None


def _items(answer: object, name: str) -> list[object]:
    """The list in ``answer``, bare or under ``name``."""
    found = answer.get(name) if isinstance(answer, dict) else answer
    if not isinstance(found, list):
        raise PeerFault(f"The orchestrator's answer holds no list of {name}.", code="malformed")
    return found


def _cause(error: BaseException) -> str:
    if isinstance(error, aiohttp.ClientConnectorError) and error.os_error.errno:
        return os.strerror(error.os_error.errno)
    return str(error) or type(error).__name__
