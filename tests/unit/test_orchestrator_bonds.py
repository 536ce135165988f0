"""The bond for a job: there before anything is leased, back after its end, once each."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from learning_fixtures import write_base
from orchestrator_chain import MemoryChain
from orchestrator_jobs import ended, submitted
from orchestrator_lab import Lab, open_lab, run

from shoal.contracts.delivery import Landing
from shoal.contracts.transactions import Call
from shoal.network.identity import NodeIdentity
from shoal.orchestrator import job_escrow
from shoal.orchestrator.jobrun import JobRun
from shoal.orchestrator.main import Orchestrator
from shoal.protocol.errors import ChainRejected, Unavailable

BOND = 3_000_000
WINDOW_S = 100
NOW_S = 1_000


class BondedChain(MemoryChain):
    """A chain whose escrow wants a bond, and a token that is taken by allowance."""

    def __init__(self, tokens: int = 10 * BOND) -> None:
        super().__init__()
        self.tokens = tokens
        self.allowed = False
        self.seconds = NOW_S
        self.bonded: list[tuple[str, int]] = []
        self.returned: list[str] = []

    async def now_s(self) -> int:
        return self.seconds

    async def challenge_window_s(self) -> int:
        return WINDOW_S

    async def min_bond_micros(self) -> int:
        self.answer()
        return BOND

    async def may_take_bonds(self) -> bool:
        self.answer()
        return self.allowed

    async def bonding(self, job_id: str, least_micros: int) -> Landing | None:
        self.answer()
        return Landing() if (job_id, least_micros) in self.bonded else None

    async def bond_return(self, job_id: str) -> Landing | None:
        self.answer()
        return Landing() if job_id in self.returned else None

    def allow_bonds_call(self) -> Call:
        return Call(to=self.address, data=b"a", purpose="allow bonds")

    def bond_call(self, job_id: str, amount_micros: int) -> Call:
        data = f"b{job_id}:{amount_micros}".encode()
        return Call(to=self.address, data=data, purpose="put up the job's bond")

    def return_bond_call(self, job_id: str) -> Call:
        return Call(to=self.address, data=b"r" + job_id.encode(), purpose="return the job's bond")

    def run(self, data: bytes, tx_hash: str, *, commit: bool) -> None:
        kind, said = data[:1], data[1:].decode(errors="replace")
        if kind == b"a":
            self.allowed = self.allowed or commit
        elif kind == b"b":
            self._bond(said, commit=commit)
        elif kind == b"r":
            self._return(said, commit=commit)
        else:
            super().run(data, tx_hash, commit=commit)
            if kind == b"c" and commit:
                self._change(said, deadline_s=self.seconds)

    def _bond(self, said: str, *, commit: bool) -> None:
        job_id, _, amount = said.partition(":")
        if not self.allowed or self.tokens < int(amount):
            raise ChainRejected("The token refused.", reason="ERC20InsufficientBalance")
        if commit:
            self.tokens -= int(amount)
            self.bonded.append((job_id, int(amount)))
            self._change(job_id, bond_micros=self.escrows[job_id].bond_micros + int(amount))

    def _return(self, job_id: str, *, commit: bool) -> None:
        job = self.escrows[job_id]
        if not job.closed or not job.bond_micros or self.seconds < job.deadline_s + WINDOW_S:
            raise ChainRejected("The escrow refused.", reason="BondHeld")
        if commit:
            self.tokens += job.bond_micros
            self.returned.append(job_id)
            self._change(job_id, bond_micros=0)

    def _change(self, job_id: str, **changes: Any) -> None:
        self.escrows[job_id] = self.escrows[job_id].model_copy(update=changes)


@asynccontextmanager
async def bonded(folder: Path) -> AsyncIterator[tuple[Lab, BondedChain, str]]:
    """A lab with a job whose bond is up."""
    chain = BondedChain()
    async with open_lab(folder, chain=chain) as lab:
        job = await lab.add_job()
        await lab.orchestrator.bonds.open()
        await lab.orchestrator.bonds.put_up(job)
        yield lab, chain, job


async def restarted(lab: Lab) -> Orchestrator:
    """Another process over the same database and chain."""
    orchestrator = Orchestrator(lab.context, "http://api.invalid", lambda: "http://b.invalid")
    await orchestrator.outbox.open()
    await orchestrator.bonds.open()
    return orchestrator


def test_a_bond_is_put_up_once_whatever_stops_in_between(tmp_path: Path) -> None:
    async def scenario() -> None:
        chain = BondedChain()
        async with open_lab(tmp_path, chain=chain) as lab:
            job = await lab.add_job()
            await lab.orchestrator.bonds.open()
            # The allowance is mined, and its answer lost; then the same with the bond.
            for _ in range(2):
                chain.fail_after_post = True
                with pytest.raises(Unavailable):
                    await lab.orchestrator.bonds.put_up(job)
                chain.down = False
                lab.orchestrator = await restarted(lab)
            for _ in range(2):
                await lab.orchestrator.bonds.put_up(job)
            assert chain.bonded == [(job, BOND)]
            assert chain.tokens == 9 * BOND
            # Of the next job the allowance is there already.
            other = await lab.add_job()
            sent = len(chain.ledger.broadcasts)
            await lab.orchestrator.bonds.put_up(other)
            assert len(chain.ledger.broadcasts) == sent + 1
            assert chain.escrows[other].bond_micros == BOND

    run(scenario)


def test_a_bond_comes_back_once_after_the_end_of_its_job_and_not_before(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with bonded(tmp_path) as (lab, chain, job):
            await lab.orchestrator.bonds.take_back()
            assert chain.escrows[job].bond_micros == BOND
            await lab.orchestrator.settler.close(job)
            # The court may still take it.
            chain.seconds += WINDOW_S - 1
            await lab.orchestrator.bonds.take_back()
            assert chain.escrows[job].bond_micros == BOND
            chain.seconds += 1
            chain.fail_after_post = True
            with pytest.raises(Unavailable):
                await lab.orchestrator.bonds.take_back()
            chain.down = False
            lab.orchestrator = await restarted(lab)
            for _ in range(2):
                await lab.orchestrator.bonds.take_back()
            assert (chain.returned, chain.tokens) == ([job], 10 * BOND)
            # Once it is final nobody asks the chain again.
            for _ in range(13):
                chain.ledger.mine()
            await lab.orchestrator.outbox.tick()
            chain.down = True
            await lab.orchestrator.bonds.take_back()

    run(scenario)


def test_a_bond_the_court_took_is_asked_back_by_nobody(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with bonded(tmp_path) as (lab, chain, job):
            sent = len(chain.ledger.broadcasts)
            chain._change(job, frozen=True, closed=True, bond_micros=0, deadline_s=NOW_S)
            chain.seconds += WINDOW_S
            for _ in range(2):
                await lab.orchestrator.bonds.take_back()
            assert len(chain.ledger.broadcasts) == sent

    run(scenario)


def test_a_deployment_without_bonds_costs_no_transaction(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_lab(tmp_path) as lab:
            job = await lab.add_job()
            await lab.orchestrator.bonds.open()
            await lab.orchestrator.bonds.put_up(job)
            await lab.orchestrator.bonds.take_back()
            assert lab.chain.ledger.broadcasts == []

    run(scenario)


@pytest.mark.parametrize("tokens", [BOND, BOND - 1])
def test_a_job_runs_only_once_its_bond_is_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokens: int
) -> None:
    monkeypatch.setattr(job_escrow, "_CHAIN_RETRY_S", 0)
    base = str(write_base(tmp_path / "base"))
    bonds_seen: list[int] = []

    async def scenario() -> None:
        chain = BondedChain(tokens)
        identity = NodeIdentity.generate()
        async with open_lab(
            tmp_path, chain=chain, identity=identity, allow_local_models=True
        ) as lab:

            async def play(job_run: JobRun) -> str:
                bonds_seen.append(chain.escrows[job_run.job_id].bond_micros)
                return ""

            monkeypatch.setattr(JobRun, "run", play)
            job = await submitted(lab, base)
            await lab.orchestrator.bonds.open()
            await lab.orchestrator.jobs.start(job)
            row = await ended(lab, job)
            assert chain.escrows[job].closed
            if tokens >= BOND:
                assert (row.state, bonds_seen) == ("complete", [BOND])
            else:
                assert (row.state, bonds_seen) == ("failed", [])
                assert "has to put up $3.00 of its own tokens" in row.reason

    run(scenario)
