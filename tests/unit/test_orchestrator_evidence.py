"""An audited gradient with error feedback is paid only if its worker shows its residuals."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from learning_fixtures import Lab as School
from learning_fixtures import write_base
from orchestrator_court import gradient_sale, taught
from orchestrator_lab import Lab, Peer, open_lab, run, until

from shoal.protocol.canonical import sha256_hex
from shoal.protocol.errors import Unauthorised
from shoal.protocol.ids import LeaseId, PeerId
from shoal.protocol.learning import CodecKind, CodecSpec, GradientSpec
from shoal.protocol.node import EVIDENCE_PROTOCOL, EvidenceReply, EvidenceRequest
from shoal.protocol.result import Verdict
from shoal.protocol.task import GradientTask
from shoal.rl import codec
from shoal.rl.gradient import run_gradient

SPEC = GradientSpec(
    codec=CodecSpec(kind=CodecKind.TOPK, chunk=256, keep=64, bits=2, error_feedback=0.9)
)


@pytest.fixture(scope="module")
def school(tmp_path_factory: pytest.TempPathFactory) -> School:
    return School.open(write_base(tmp_path_factory.mktemp("base")))


class Bench:
    """A job of gradients with error feedback, its judge, and a worker that keeps residuals."""

    def __init__(self, lab: Lab, school: School, job: str, peer: Peer) -> None:
        self.lab, self.school, self.job, self.peer = lab, school, job, peer
        self.kept: dict[str, bytes] = {}
        self.asked: list[EvidenceRequest] = []
        self.shows: Callable[[bytes], bytes | None] = lambda data: data
        self.held_back: Awaitable[object] | None = None
        peer.network.serve(EVIDENCE_PROTOCOL, self._on_evidence)

    async def gradient(self, residual: bytes | None = None) -> tuple[Verdict, bytes]:
        """One leased gradient that continues from ``residual``: its verdict, what it left."""
        sale, rows = await gradient_sale(self.lab, self.school, self.job, SPEC)
        offer, live = await self.lab.lease(self.peer, sale)
        task = cast(GradientTask, offer.task)
        data = self.lab.context.blobs.read(task.slice.sha256)
        output = run_gradient(self.school.policy, task, data, residual=residual)
        assert output.residual is not None
        self.kept |= {sha256_hex(r): r for r in (residual, output.residual) if r is not None}
        self.lab.context.blobs.put_bytes(output.payload)
        message = self.peer.message(offer, output.payload, num_tokens=rows.num_tokens)
        await self.peer.submit(message)
        await until(lambda: live.record.state.is_final)
        member = self.lab.orchestrator.roster.member(self.peer.node)
        signed = member.undelivered[LeaseId(live.lease.lease_id)]
        return signed.record, output.residual

    async def _on_evidence(self, peer: PeerId, data: bytes) -> bytes:
        request = EvidenceRequest.decode(data)
        self.asked.append(request)
        if self.held_back is not None:
            await self.held_back
        shown = self.shows(self.kept[request.blob_sha256])
        if shown is not None:
            authorise = self.lab.orchestrator.authorise_upload
            await authorise(request.upload_token, sha256_hex(shown), len(shown))
            self.lab.context.blobs.put_bytes(shown)
        return EvidenceReply(lease_id=request.lease_id, uploaded=shown is not None).encode()

    def trust(self) -> None:
        """The worker is no newcomer, and the draw never falls on it."""
        member = self.lab.orchestrator.roster.member(self.peer.node)
        member.audited = member.consecutive_valid = 1_000
        self.lab.orchestrator.verifier._draw = lambda: 1.0


@asynccontextmanager
async def bench(folder: Path, school: School) -> AsyncIterator[Bench]:
    async with open_lab(folder) as lab:
        job = await taught(lab, school)
        lab.start(lab.orchestrator.verifier.run())
        yield Bench(lab, school, job, await lab.peer())


def test_a_chain_of_gradients_is_audited_with_its_residuals(tmp_path: Path, school: School) -> None:
    async def scenario() -> None:
        async with bench(tmp_path, school) as case:
            verdict, residual = await case.gradient()
            assert verdict.accepted, verdict.reason()
            assert verdict.audited
            assert [r.blob_sha256 for r in case.asked] == [sha256_hex(residual)]
            verdict, after = await case.gradient(residual)
            assert verdict.accepted, verdict.reason()
            assert [r.blob_sha256 for r in case.asked[1:]] == [
                sha256_hex(residual),
                sha256_hex(after),
            ]
            # Spent is spent: the same residual does not count twice.
            verdict, _ = await case.gradient(residual)
            assert "no accepted gradient left" in verdict.reason()
            # From nothing, as after a restart, one may always begin again.
            verdict, _ = await case.gradient()
            assert verdict.accepted, verdict.reason()

    run(scenario)


@pytest.mark.parametrize("shows", ["nothing", "another", "too much"])
def test_a_worker_that_does_not_show_its_residual_fails_the_audit(
    tmp_path: Path, school: School, shows: str
) -> None:
    async def scenario() -> None:
        async with bench(tmp_path, school) as case:
            forged = {
                "nothing": lambda data: None,
                "another": lambda data: bytes(len(data)),
                "too much": lambda data: data + b"more",
            }
            case.shows = forged[shows]
            verdict, _ = await case.gradient()
            assert not verdict.accepted
            assert "was not produced when asked for" in verdict.reason()
            # The control: unaudited it would have passed, and is not asked.
            case.trust()
            asked = len(case.asked)
            verdict, _ = await case.gradient()
            assert verdict.accepted, verdict.reason()
            assert (verdict.audited, len(case.asked)) == (False, asked)
            # Its place in the chain is looked at all the same.
            size = codec.num_values(school.policy.shapes())
            made_up = codec.encode_residual(np.full(size, 0.1, dtype=np.float32))
            verdict, _ = await case.gradient(made_up)
            assert "no accepted gradient left" in verdict.reason()

    run(scenario)


def test_others_are_judged_while_evidence_is_on_its_way(tmp_path: Path, school: School) -> None:
    async def scenario() -> None:
        async with bench(tmp_path, school) as case:
            gate = asyncio.Event()
            case.held_back = gate.wait()
            waiting = asyncio.create_task(case.gradient())
            await until(lambda: bool(case.asked))
            other = Bench(case.lab, school, case.job, await case.lab.peer())
            verdict, _ = await other.gradient()
            assert verdict.accepted, verdict.reason()
            assert not waiting.done()
            gate.set()
            verdict, _ = await waiting
            assert verdict.accepted, verdict.reason()

    run(scenario)


def test_a_residual_of_another_node_is_not_ones_own(tmp_path: Path, school: School) -> None:
    async def scenario() -> None:
        async with bench(tmp_path, school) as case:
            verdict, residual = await case.gradient()
            assert verdict.accepted, verdict.reason()
            other = Bench(case.lab, school, case.job, await case.lab.peer())
            verdict, _ = await other.gradient(residual)
            assert "no accepted gradient left" in verdict.reason()

    run(scenario)


def test_a_token_for_evidence_takes_those_bytes_and_no_others(
    tmp_path: Path, school: School
) -> None:
    async def scenario() -> None:
        async with bench(tmp_path, school) as case:
            _, residual = await case.gradient()
            authorise = case.lab.orchestrator.authorise_upload
            used = case.asked[0].upload_token
            with pytest.raises(Unauthorised):
                await authorise(used, sha256_hex(residual), len(residual))
            desk = case.lab.orchestrator.verifier.evidence_desk
            desk._expected["7" * 32] = (sha256_hex(residual), len(residual))
            await authorise("7" * 32, sha256_hex(residual), len(residual))
            for digest, size in ((sha256_hex(b"x"), len(residual)), (sha256_hex(residual), 1)):
                with pytest.raises(Unauthorised):
                    await authorise("7" * 32, digest, size)

    run(scenario)


def test_a_residual_continued_from_while_evidence_is_on_its_way_is_spent(
    tmp_path: Path, school: School
) -> None:
    async def scenario() -> None:
        async with bench(tmp_path, school) as case:
            verdict, residual = await case.gradient()
            assert verdict.accepted, verdict.reason()
            gate = asyncio.Event()

            def show_and_wait(data: bytes) -> bytes:
                case.held_back = asyncio.ensure_future(gate.wait())
                return data

            case.shows = show_and_wait
            asked = len(case.asked)
            waiting = asyncio.create_task(case.gradient(residual))
            # The residual before it is here; for the one after it the worker takes its time.
            await until(lambda: len(case.asked) == asked + 2)
            case.trust()
            verdict, _ = await case.gradient(residual)
            assert (verdict.accepted, verdict.audited) == (True, False)
            gate.set()
            verdict, _ = await waiting
            assert verdict.audited
            assert "no accepted gradient left" in verdict.reason()

    run(scenario)
