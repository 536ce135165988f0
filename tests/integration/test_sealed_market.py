"""The sealed market on a real chain: thirty bidders, several epochs, and one forged book."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from chain_market import (
    BUDGET,
    JOB_BOND,
    PENALTY,
    RESERVE,
    STAKE,
    WINDOW_S,
    ChainMarket,
    Project,
    Provider,
    at_work,
    chain_market,
)
from sqlalchemy import select

from shoal.client.accusation import accuse
from shoal.client.command import run
from shoal.contracts.court import CaseStatus, Fault
from shoal.market.fault import CourtProof
from shoal.market.pricing import choose_rule
from shoal.market.replay import ClearingFile, replay
from shoal.orchestrator import sealer
from shoal.orchestrator.store.tables import CommitmentRow, LeaseRow
from shoal.protocol.certificate import ClearingRule
from shoal.protocol.errors import ChainRejected, InvalidRequest
from shoal.protocol.keystore import store_account
from shoal.protocol.market import Lease
from shoal.protocol.merkle import unhex
from shoal.protocol.sealing import StandingCommitment
from shoal.protocol.signing import Signed

NUM_BIDDERS = 30
NUM_CANCELLED, NUM_REPRICED = 5, 8
CHEAPEST = 40
BURNED = "0x000000000000000000000000000000000000dEaD"
PATIENCE_S = 100


def price_of(provider: Provider) -> int:
    """What a provider asks at first, in micros."""
    return 90 + provider.number


async def compete(
    market: ChainMarket, honest: Project, forged: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three market epochs of bids that come, change, are withdrawn, or are not shown in time."""
    assert await market.turn() == 0
    await market.sell(honest)
    await market.sell(forged)

    quitters = market.providers[-NUM_CANCELLED:]
    for provider in quitters:
        await provider.cancel(honest)
        await provider.cancel(forged)
    for provider in market.providers[:NUM_REPRICED]:
        await provider.bid(price_of(provider) + 10)
    assert await market.turn() == 1
    await market.sell(honest)

    silent = market.providers[8:10]
    for provider in silent:
        await provider.bid(CHEAPEST)
        provider.on_seal = asyncio.Event().wait
    with monkeypatch.context() as patched:
        # Nobody else has a bid to show, so nobody else can be late.
        patched.setattr(sealer, "_REVEAL_WINDOW_S", 0.05)
        assert await market.turn() == 2
    await market.sell(honest)

    for provider in silent:
        provider.on_seal = None
    for provider in quitters:
        await provider.bid(price_of(provider))


class Forgery:
    """One commitment that the orchestrator takes out of its book and its records, and puts back."""

    def __init__(self, market: ChainMarket, commitment: str) -> None:
        self._book = market.orchestrator.sealer._book
        self._database = market.context.database
        self._commitment = commitment
        self._entry: StandingCommitment = self._book.entry(commitment)

    async def __aenter__(self) -> None:
        del self._book._standing[self._commitment]
        self._book._of_node[self._entry.node].discard(self._commitment)

        def hide(session: Any) -> None:
            session.delete(session.get_one(CommitmentRow, self._commitment))

        await self._database.run(hide)

    async def __aexit__(self, *exc_info: object) -> None:
        self._book._keep(self._entry)


async def check_clearings(market: ChainMarket, project: Project) -> list[ClearingFile]:
    """Every certificate is recomputed from what is published, and every lease is as it says."""
    files = await market.certificates(project)
    for file in files:
        record = file.certificate.record
        assert replay(file, market.chain.account) is None
        assert record.rule is choose_rule(record.num_bidders)
        assert all(rung.pay_micros <= record.lot.reserve_micros <= RESERVE for rung in file.rungs)
        assert all(rung.pay_micros >= rung.price_micros for rung in file.rungs)
    published = {str(file.certificate.record.digest()): file for file in files}
    for row in await leases(market, project):
        lease = Signed[Lease].decode(row.record.encode()).record
        rung = published[lease.certificate_sha256].rungs[lease.rung]
        assert (rung.pay_micros, rung.node, rung.account) == (
            lease.unit_price_micros,
            lease.node,
            lease.account,
        )
        assert row.pay_micros == lease.num_units * rung.pay_micros
    return files


async def leases(market: ChainMarket, project: Project) -> list[LeaseRow]:
    def read(session: Any) -> list[LeaseRow]:
        return list(session.scalars(select(LeaseRow).where(LeaseRow.job_id == project.job_id)))

    return await market.context.database.run(read)


async def money(market: ChainMarket, project: Project, provider: Provider) -> tuple[Any, ...]:
    """Everything that a penalty would move."""
    chain = market.faucet
    return (
        await chain.vault.stake_of(market.chain.account),
        await chain.vault.stake_of(provider.credentials.address),
        await chain.escrow.job(project.job_id),
        await chain.token.balance(BURNED),
    )


def about(proof: CourtProof, file: ClearingFile) -> CourtProof:
    """The same proof, said of another certificate."""
    record = file.certificate.record
    message = record.eip712_message()
    values = tuple(message[name] for name, _ in record.eip712_fields)
    signed = (values, unhex(file.certificate.signature))
    return replace(proof, arguments=((*signed, *proof.arguments[0][2:]),))


def saved(folder: Path, file: ClearingFile) -> Path:
    path = folder / f"clearing-{file.certificate.record.epoch}.json"
    path.write_bytes(file.encode())
    return path


async def settled(market: ChainMarket, project: Project) -> Counter[str]:
    """The job's whole escrow is paid out or refunded; what each account was paid."""
    job_id, settler = project.job_id, market.orchestrator.settler
    assert not await settler.settle(job_id)
    owed: Counter[str] = Counter()
    for row in await leases(market, project):
        assert row.state == "accepted"
        owed[row.account] += row.pay_micros
    claims = [(await settler.proof(job_id, account)).claim for account in owed]
    paid = await market.faucet.escrow.claim_many(job_id, claims)
    assert not paid.skipped
    assert {each.account: each.amount_micros for each in paid.payments} == owed
    await settler.close(job_id)
    await market.faucet.escrow.refund(job_id)
    escrow = await market.faucet.escrow.job(job_id)
    assert escrow.closed
    assert escrow.claimed_micros == escrow.committed_micros == owed.total() > 0
    assert escrow.claimed_micros + escrow.refunded_micros == escrow.funded_micros == BUDGET
    return owed


def test_thirty_bidders_compete_and_a_dropped_bid_costs_the_orchestrator_its_stake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # On a machine as busy as may be, nobody is late who is not meant to be.
    monkeypatch.setattr(sealer, "_REVEAL_WINDOW_S", PATIENCE_S)

    async def scenario() -> None:
        async with asyncio.timeout(PATIENCE_S), chain_market(tmp_path) as market:
            honest, forged = await market.open_job(), await market.open_job()
            await market.join(NUM_BIDDERS)
            for provider in market.providers:
                await provider.bid(price_of(provider))
            async with at_work(market):
                await compete(market, honest, forged, monkeypatch)
                await market.orchestrator.settler.settle(honest.job_id)
                await market.pass_time(WINDOW_S + 1)
                victim = market.providers[NUM_BIDDERS // 2]
                await victim.bid(CHEAPEST - 10)
                dropped = victim.commitment(forged)
                async with Forgery(market, dropped):
                    assert await market.turn() == 3
                    await market.sell(honest)
                    await market.sell(forged)
                    await check_market(market, honest, forged, victim)
                    wronged = (await market.certificates(forged))[-1]
                assert await market.turn() == 4
                await market.sell(forged)
                for project in (honest, forged):
                    assert await market.orchestrator.settler.settle(project.job_id)
                await check_fault(market, forged, victim, wronged, capsys)
                await market.pass_time(WINDOW_S + 1)
                await check_money(market, honest, forged, victim)

    asyncio.run(scenario())


async def check_market(
    market: ChainMarket, honest: Project, forged: Project, victim: Provider
) -> None:
    """Thick lots had one price, thin ones each its own; and the dropped bid would have won."""
    files = await check_clearings(market, honest)
    records = [file.certificate.record for file in files]
    eligible = NUM_BIDDERS - NUM_CANCELLED
    uniform, own = ClearingRule.UNIFORM, ClearingRule.PAY_AS_BID
    assert [(r.epoch, r.rule, r.num_bidders) for r in records] == [
        (0, uniform, NUM_BIDDERS),
        (1, own, eligible),
        (2, own, eligible),
        (3, uniform, NUM_BIDDERS),
    ]
    # Who did not show a new bid in time competed at the old price, and later at the new one.
    silent = market.providers[8].credentials.node
    asked = [{r.node: r.price_micros for r in file.rungs}[silent] for file in files]
    assert asked == [99, 99, 99, CHEAPEST]

    node = victim.credentials.node
    for file in (files[-1], *await check_clearings(market, forged)):
        is_wronged = file.certificate.record.lot.job_id == forged.job_id
        asks = {rung.node: rung.price_micros for rung in file.rungs}
        assert asks[node] == (price_of(victim) if is_wronged else CHEAPEST - 10)
        assert (file.rungs[0].node == node) is not is_wronged


async def check_fault(
    market: ChainMarket,
    forged: Project,
    victim: Provider,
    wronged: ClearingFile,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The victim's own notes prove it to the court, and nothing that was honest."""
    first, listed, after = await market.certificates(forged)
    assert after.rungs[0].node == victim.credentials.node
    drops = victim.folder / "evidence" / "drops.jsonl"
    assert [
        json.loads(line)["seal"]["record"]["epoch"] for line in drops.read_text().splitlines()
    ] == [3]
    others = [p for p in market.providers if p is not victim]
    assert not any((p.folder / "evidence" / "drops.jsonl").exists() for p in others)

    key = victim.folder / "account.json"
    store_account(key, victim.credentials.account)
    command = ["market", "fault", "--evidence", str(drops), "--certificate"]
    (proof,) = accuse(drops, saved(folder := market.folder, wronged)).proofs
    # Put back into the records, the bid shows in a replay too, and the proof is the same.
    difference = replay(listed)
    assert difference is not None
    assert difference.field == "seal.commit_root"
    assert accuse(drops, saved(folder, listed)).proofs == (proof,)
    before = await money(market, forged, victim)
    for file in (first, after):
        with pytest.raises(InvalidRequest) as none:
            accuse(drops, saved(folder, file))
        assert none.value.code == "not_dropped"
        with pytest.raises(ChainRejected) as kept:
            await victim.chain.court.prove(about(proof, file).calldata())
        assert kept.value.reason.startswith(("EpochNotCovered(", "NotInTree("))
    assert await money(market, forged, victim) == before

    sending = ["--send", "--key", str(key), "--rpc-url", market.rpc_url, "--json"]
    sending += ["--deployment", str(market.context.config.deployment_file)]
    assert await asyncio.to_thread(run, [*command, str(saved(folder, wronged)), *sending]) == 0
    (case,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert (case["fault"], case["status"]) == ("dropped_bid", "upheld")
    found = await market.faucet.court.case(case["case_id"])
    assert (found.fault, found.status) == (Fault.DROPPED_BID, CaseStatus.UPHELD)
    assert (found.accused, found.challenger) == (market.chain.account, victim.credentials.address)
    await check_penalty(market, forged, victim, before)
    with pytest.raises(ChainRejected) as twice:
        await victim.chain.court.prove(proof.calldata())
    assert twice.value.reason.startswith("CaseExists(")


async def check_penalty(
    market: ChainMarket, forged: Project, victim: Provider, before: tuple[Any, ...]
) -> None:
    """60 % went to the job, 30 % to the victim, 10 % are burnt; the pending root is taken back."""
    accused, wronged, escrow, burned = before
    now = await money(market, forged, victim)
    taken = PENALTY + JOB_BOND
    assert now[0].active_micros == accused.active_micros - PENALTY == STAKE - PENALTY
    assert now[1].active_micros == wronged.active_micros + taken * 30 // 100
    assert now[3] == burned + taken // 10
    assert now[2].funded_micros == escrow.funded_micros + taken * 60 // 100
    assert (escrow.frozen, escrow.bond_micros) == (False, JOB_BOND)
    assert escrow.committed_micros > 0
    assert escrow.ready_at_s > await market.faucet.now_s()
    assert (now[2].frozen, now[2].closed, now[2].bond_micros) == (True, True, 0)
    assert now[2].committed_micros == 0


async def check_money(
    market: ChainMarket, honest: Project, forged: Project, victim: Provider
) -> None:
    """The honest job pays everybody; of the forged one's money nobody but its sponsor has any."""
    settler, escrow = market.orchestrator.settler, market.faucet.escrow
    token = market.faucet.token
    owed = await settled(market, honest)
    for provider in market.providers:
        address = provider.credentials.address
        assert await market.faucet.token.balance(address) == owed[address]
    row, *_ = await leases(market, forged)
    claim = (await settler.proof(forged.job_id, row.account)).claim
    with pytest.raises(ChainRejected) as frozen:
        await escrow.claim(forged.job_id, claim)
    assert frozen.value.reason.startswith("BadProof(")
    await escrow.refund(forged.job_id)
    await market.pass_time(WINDOW_S + 1)
    held = await token.balance(market.chain.account)
    for _ in range(2):
        await market.orchestrator.bonds.take_back()
    # Of the forged job the court took it: only the other one comes back, and once.
    assert await token.balance(market.chain.account) == held + JOB_BOND
    assert (await escrow.job(honest.job_id)).bond_micros == 0
    refunded = (await escrow.job(forged.job_id)).refunded_micros
    assert refunded == BUDGET + (PENALTY + JOB_BOND) * 60 // 100
    assert await token.balance(market.requester.account) == 2 * BUDGET - owed.total() + (
        refunded - BUDGET
    )
    assert await token.balance(market.chain.account) == JOB_BOND
    assert await token.balance(market.deployment.job_escrow) == 0
