"""The HTTP API: jobs in, progress, payouts, models and provenance out."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, StreamingResponse
from starlette.exceptions import HTTPException

from shoal.orchestrator.certificates import listed_certificates, published_clearing
from shoal.orchestrator.context import Context
from shoal.orchestrator.intake import Intake
from shoal.orchestrator.jobs import Jobs
from shoal.orchestrator.journal import Event, Journal
from shoal.orchestrator.market_book import explained_lease, job_book
from shoal.orchestrator.metrics import METRICS_TYPE
from shoal.orchestrator.publisher import Publisher
from shoal.orchestrator.roster import Roster
from shoal.orchestrator.settler import Settler
from shoal.orchestrator.store.tables import JobRow
from shoal.orchestrator.views import Views
from shoal.protocol.errors import (
    InvalidRequest,
    InvariantBroken,
    NotFound,
    PeerFault,
    ShoalError,
    Unavailable,
)
from shoal.protocol.job import Job, JobCommand, JobState
from shoal.protocol.node import PROTOCOL_VERSION
from shoal.protocol.policy import BaseModelRef
from shoal.protocol.record import MAX_RECORD_BYTES
from shoal.protocol.signing import Signed
from shoal.protocol.version import SOFTWARE_VERSION

_HEARTBEAT_S = 15.0
"""Whoever waits for news gets an answer at least this often."""
_ENDED = {
    state.value
    for state in (JobState.COMPLETE, JobState.CANCELLED, JobState.FAILED, JobState.PAUSED)
}


class Api:
    """The routes, over the parts that answer them."""

    def __init__(
        self,
        context: Context,
        intake: Intake,
        jobs: Jobs,
        journal: Journal,
        settler: Settler,
        publisher: Publisher,
        views: Views,
        roster: Roster,
    ) -> None:
        self._context = context
        self._intake = intake
        self._jobs = jobs
        self._journal = journal
        self._settler = settler
        self._publisher = publisher
        self._views = views
        self._roster = roster

    def app(self) -> FastAPI:
        """The FastAPI application."""
        app = FastAPI(title="Shoal orchestrator", version=SOFTWARE_VERSION)
        app.add_exception_handler(ShoalError, _shoal_error)
        app.add_exception_handler(RequestValidationError, _validation_error)
        app.add_exception_handler(HTTPException, _http_error)
        app.add_exception_handler(Exception, _defect)
        market, job = "/v1/market", "/v1/market/jobs/{job_id}"
        app.get("/health")(self.health)
        app.get("/metrics")(self.vital_metrics)
        app.get(f"{market}/info")(self.info)
        app.get(f"{market}/workers")(self._views.workers)
        app.get(f"{market}/jobs")(self._views.jobs)
        app.post(f"{market}/jobs", status_code=201)(self.submit)
        app.get(f"{job}/state")(self.state)
        app.get(job)(self.job)
        app.post(f"{job}/cancel")(self.cancel)
        app.get(f"{job}/events")(self.events)
        app.get(f"{job}/events/stream")(self.event_stream)
        app.get(f"{job}/metrics")(self.metrics)
        app.get(f"{job}/book")(self.book)
        app.get(f"{job}/certificates")(self.certificates)
        app.get(f"{market}/certificates/{{sha256}}")(self.certificate)
        app.get(f"{market}/leases/{{lease_id}}")(self.lease)
        app.get(f"{job}/payouts")(self.payouts)
        app.get(f"{job}/payouts/{{account}}")(self.payout)
        app.get("/v1/models/{job_id}")(self.model)
        app.get("/v1/provenance/{job_id}/bundle")(self.bundle)
        return app

    async def health(self) -> JSONResponse:
        """Whether database, chain and network answer; status 503 when one does not."""
        parts = await self._views.vitals.health()
        is_well = all(state == "ok" for state in parts.values())
        answer = {
            "status": "ok" if is_well else "failing",
            "software_version": SOFTWARE_VERSION,
            "parts": parts,
        }
        return JSONResponse(answer, status_code=200 if is_well else Unavailable.http_status)

    async def vital_metrics(self) -> Response:
        """The orchestrator's figures for Prometheus."""
        return Response(await self._views.vitals.metrics(), media_type=METRICS_TYPE)

    async def info(self) -> dict[str, Any]:
        """Who this orchestrator is and where its parts are."""
        deployment = self._context.deployment
        return {
            "software_version": SOFTWARE_VERSION,
            "protocol_version": PROTOCOL_VERSION,
            "domain": self._context.domain.to_json(),
            "contracts": deployment.contracts().to_json(),
            "deployment": deployment.to_json(),
            "orchestrator": self._context.account.address,
            "peer_id": self._context.network.peer_id,
            "p2p_addresses": self._roster.p2p_addresses,
            "blob_urls": self._roster.blob_urls,
            "api_url": self._roster.api_url,
            "rpc_urls": [self._context.config.rpc_url],
            "min_stake_micros": self._context.config.min_stake_micros,
            "challenge_window_s": await self._context.chain.escrow.challenge_window_s(),
        }

    async def submit(self, request: Request) -> dict[str, Any]:
        """Takes a signed job; the requester then funds its escrow."""
        body = await _capped_body(request, MAX_RECORD_BYTES)
        try:
            signed = Signed[Job].decode(body)
        except PeerFault as error:
            raise InvalidRequest(error.message, code="malformed_job") from None
        row = await self._intake.submit(signed)
        return {
            "job_id": row.job_id,
            "state": row.state,
            "job_digest": "0x" + signed.record.job_digest().hex(),
            "coordinator": self._context.account.address,
            "escrow_deadline_s": row.escrow_deadline_s,
        }

    async def state(self, job_id: str, wait_s: float = 0.0) -> dict[str, Any]:
        """Only where the job stands, as soon as it has ended; after ``wait_s`` in any case."""
        row = await self._intake.require(job_id)
        if wait_s > 0 and row.state not in _ENDED:
            row = await self._ended_within(job_id, min(wait_s, _HEARTBEAT_S))
        return {"job_id": job_id, "state": row.state, "reason": row.reason}

    async def _ended_within(self, job_id: str, wait_s: float) -> JobRow:
        # In this order, an end that comes in between is not missed.
        end = self._journal.end_of(job_id)
        row = await self._intake.require(job_id)
        if row.state in _ENDED:
            return row
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                await end.wait()
        return await self._intake.require(job_id)

    async def job(self, job_id: str) -> JSONResponse:
        """Everything about one job; as it is, since followers ask for it all the time."""
        return JSONResponse(await self._views.job(job_id))

    async def cancel(self, job_id: str, request: Request) -> dict[str, Any]:
        """Takes a signed order to end the job; answers with the job as it is then."""
        body = await _capped_body(request, MAX_RECORD_BYTES)
        try:
            command = Signed[JobCommand].decode(body)
        except PeerFault as error:
            raise InvalidRequest(error.message, code="malformed_command") from None
        if command.record.job_id != job_id:
            raise InvalidRequest(
                f"The order is for job {command.record.job_id}; send it to that job.",
                code="wrong_job",
            )
        await self._jobs.cancel(command)
        return await self._views.job(job_id)

    async def events(self, job_id: str, after: int = 0) -> dict[str, Any]:
        """The job's events after a sequence number."""
        await self._intake.require(job_id)
        return {"events": [_event(event) for event in await self._journal.events(job_id, after)]}

    async def event_stream(self, job_id: str, request: Request) -> StreamingResponse:
        """The job's events as they happen, until it ends (server-sent events)."""
        await self._intake.require(job_id)
        last = request.headers.get("last-event-id", "0")
        after = int(last) if last.isdecimal() and len(last) < 19 else 0
        return StreamingResponse(self._stream(job_id, after), media_type="text/event-stream")

    async def _stream(self, job_id: str, after: int) -> AsyncIterator[str]:
        while True:
            # In this order, nothing that happens in between is missed.
            change = self._journal.next_change(job_id)
            ended = (await self._intake.require(job_id)).state in _ENDED
            events = await self._journal.events(job_id, after)
            for event in events:
                after = event.seq
                yield f"id: {event.seq}\nevent: {event.type}\ndata: {json.dumps(_event(event))}\n\n"
            if events:
                continue
            if ended:
                return
            try:
                async with asyncio.timeout(_HEARTBEAT_S):
                    await change.wait()
            except TimeoutError:
                yield ": still here\n\n"

    async def metrics(self, job_id: str) -> PlainTextResponse:
        """The job's metrics, one JSON object per line."""
        await self._intake.require(job_id)
        return PlainTextResponse(await self._publisher.metrics(job_id))

    async def certificates(
        self, job_id: str, before_ms: int | None = None, limit: int = 50
    ) -> dict[str, Any]:
        """The clearings of the job's lots, the newest first."""
        await self._intake.require(job_id)
        listed = await listed_certificates(
            self._context, job_id, before_ms=before_ms, limit=max(1, limit)
        )
        return {"certificates": listed}

    async def certificate(self, sha256: str) -> Response:
        """One clearing with all it was made of, for `shoal market replay`."""
        clearing = await published_clearing(self._context, sha256)
        return Response(clearing.encode(), media_type="application/json")

    async def book(self, job_id: str) -> dict[str, Any]:
        """The newest clearing of each kind of the job's tasks: who won, who did not, why."""
        return await job_book(self._context, job_id)

    async def lease(self, lease_id: str) -> dict[str, Any]:
        """One lease with the clearing and the rung that gave it its price."""
        return await explained_lease(self._context, lease_id)

    async def payouts(self, job_id: str) -> dict[str, Any]:
        """What the last settled epoch owes everybody."""
        epoch, payouts = await self._settler.payouts(job_id)
        return {"epoch": epoch, **payouts.to_json()}

    async def payout(self, job_id: str, account: str) -> dict[str, Any]:
        """What one account may claim, with its proof."""
        row = await self._intake.require(job_id)
        proof = await self._settler.proof(job_id, account)
        return {
            "job_id": job_id,
            "epoch": proof.epoch,
            "account": proof.claim.account,
            "cumulative_micros": proof.claim.cumulative_micros,
            "proof": proof.claim.proof,
            "claimed_micros": await self._context.chain.escrow.claimed(job_id, proof.claim.account),
            "final": row.state in _ENDED,
        }

    async def model(self, job_id: str) -> dict[str, Any]:
        """The released files and the base they belong to."""
        row = await self._intake.require(job_id)
        return {
            "job_id": job_id,
            "files": [_file(file) for file in self._publisher.files(job_id)],
            "base": BaseModelRef.model_validate_json(row.base).to_json(),
        }

    async def bundle(self, job_id: str) -> FileResponse:
        """The job's provenance bundle."""
        path = await self._publisher.bundle(job_id)
        return FileResponse(path, media_type="application/json", filename="bundle.json")


def _event(event: Event) -> dict[str, Any]:
    return {"seq": event.seq, "at_ms": event.at_ms, "type": event.type, "data": event.data}


def _file(file: Any) -> dict[str, Any]:
    return {"path": file.path, **file.blob.to_json()}


async def _capped_body(request: Request, max_bytes: int) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise InvalidRequest(
                f"The request is larger than the {max_bytes} bytes allowed.", code="oversize"
            )
    return bytes(body)


async def _shoal_error(_request: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, ShoalError):
        raise error
    return JSONResponse(error.to_wire(), status_code=error.http_status)


async def _validation_error(_request: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, RequestValidationError):
        raise error
    fault = error.errors()[0]
    where = ".".join(str(part) for part in fault["loc"])
    wire = InvalidRequest(f"The request is not valid: {where}: {fault['msg']}.")
    return JSONResponse(wire.to_wire(), status_code=wire.http_status)


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, HTTPException):
        raise error
    wire = NotFound(f"{request.method} {request.url.path}: {error.detail}.", code="http")
    return JSONResponse(wire.to_wire(), status_code=error.status_code)


async def _defect(request: Request, error: Exception) -> JSONResponse:
    # Starlette logs the trace; the caller gets a sentence and no internals.
    wire = InvariantBroken(
        f"{request.method} {request.url.path} met a defect of the orchestrator; its log has the "
        "details."
    )
    return JSONResponse(wire.to_wire(), status_code=wire.http_status)
