"""What people judge and a coordinator answers with: the court and the bond, on a real anvil."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from eth_abi.abi import encode as abi_encode
from eth_account import Account as EthAccount
from eth_account.signers.local import LocalAccount

from shoal.contracts.anvil import Anvil, dev_account
from shoal.contracts.court import CaseStatus, CourtCase, Fault
from shoal.contracts.deployment import Terms, deploy
from shoal.contracts.gateway import ChainGateway
from shoal.contracts.records import EpochPost
from shoal.protocol.errors import ChainRejected
from shoal.protocol.merkle import EMPTY_ROOT, keccak

BUDGET = 10_000_000
STAKE, PENALTY, CASE_BOND, JOB_BOND = 3_000_000, 1_000_000, 500_000, 400_000
WINDOW_S, VOTING_S, DAY_S = 100, 60, 86_400
VERIFIERS = [dev_account(number) for number in (5, 6, 7)]
EVIDENCE = "0x" + "e1" * 32


@dataclass
class World:
    """A court with three verifiers of whom two decide, and one gateway per party."""

    url: str
    challenger: ChainGateway
    coordinator: ChainGateway
    requester: ChainGateway
    job_id: str

    async def pass_time(self, seconds: int) -> None:
        body = {"jsonrpc": "2.0", "id": 1}
        async with aiohttp.ClientSession() as session:
            for method, params in (("evm_increaseTime", [seconds]), ("evm_mine", [])):
                sent = body | {"method": method, "params": params}
                async with session.post(self.url, json=sent) as reply:
                    assert "error" not in await reply.json()

    def votes(
        self, case: CourtCase, voters: Sequence[LocalAccount], *, guilty: bool
    ) -> list[bytes]:
        """The voters' signatures, in the order in which the court wants them."""
        deployment = self.challenger.deployment
        domain = {
            "name": "Shoal",
            "version": "1",
            "chainId": deployment.chain_id,
            "verifyingContract": deployment.job_escrow,
        }
        types = {
            "Vote": [
                {"name": "caseId", "type": "bytes32"},
                {"name": "evidence", "type": "bytes32"},
                {"name": "guilty", "type": "bool"},
            ]
        }
        vote = {"caseId": case.case_id, "evidence": case.evidence, "guilty": guilty}
        ordered = sorted(voters, key=lambda voter: int(voter.address, 16))
        return [
            bytes(EthAccount.sign_typed_data(voter.key, domain, types, vote).signature)
            for voter in ordered
        ]

    async def stakes(self) -> tuple[int, int]:
        """What the challenger and the accused have at stake."""
        vault = self.challenger.vault
        both = [await vault.stake_of(g.account) for g in (self.challenger, self.coordinator)]
        return both[0].active_micros, both[1].active_micros


@asynccontextmanager
async def world(folder: Path) -> AsyncIterator[World]:
    terms = Terms(
        challenge_window_s=WINDOW_S,
        min_bond_micros=JOB_BOND,
        penalty_micros=PENALTY,
        challenge_bond_micros=CASE_BOND,
        voting_s=VOTING_S,
        verifiers=tuple(verifier.address for verifier in VERIFIERS),
        quorum=2,
    )
    async with Anvil(folder) as anvil:
        url = anvil.rpc_url
        deployment = await deploy(url, dev_account(0), terms=terms)
        async with (
            await ChainGateway.connect(url, deployment, dev_account(0)) as challenger,
            await ChainGateway.connect(url, deployment, dev_account(1)) as requester,
            await ChainGateway.connect(url, deployment, dev_account(2)) as coordinator,
        ):
            await challenger.token.fund(challenger.account, 0, 2 * CASE_BOND)
            await challenger.token.fund(requester.account, 0, BUDGET)
            await challenger.token.fund(coordinator.account, 0, STAKE + JOB_BOND)
            await coordinator.vault.stake(STAKE)
            digest = b"\x11" * 32
            deadline_s = await requester.now_s() + DAY_S
            await requester.escrow.open_job(digest, coordinator.account, BUDGET, deadline_s)
            packed = abi_encode(["address", "bytes32"], [requester.account, digest])
            job_id = "0x" + keccak(packed).hex()
            yield World(url, challenger, coordinator, requester, job_id)


async def refused(attempt: Any) -> str:
    """The contract's own name for why it refused."""
    with pytest.raises(ChainRejected) as caught:
        await attempt
    return str(caught.value.code)


def test_a_quorum_decides_a_case_once_and_the_penalty_is_shared(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            court = w.challenger.court
            assert await court.challenge_bond_micros() == CASE_BOND
            case = await court.challenge(w.job_id, w.coordinator.account, EVIDENCE)
            assert (case.fault, case.status) == (Fault.SUBJECTIVE, CaseStatus.OPEN)
            assert case.vote_by_s > await w.challenger.now_s()
            assert await w.challenger.token.balance(w.challenger.account) == CASE_BOND
            guilty = w.votes(case, VERIFIERS[:2], guilty=True)

            def resolve(votes: list[bytes], said: bool = True) -> Any:
                return court.resolve(case.case_id, guilty=said, signatures=votes)

            before = await w.stakes()
            stranger = w.votes(case, [VERIFIERS[0], dev_account(9)], guilty=True)
            assert await refused(resolve(guilty[:1])) == "TooFewVotes"
            assert await refused(resolve([guilty[0], guilty[0]])) == "VotesOutOfOrder"
            assert await refused(resolve(guilty[::-1])) == "VotesOutOfOrder"
            assert await refused(resolve(stranger)) == "NotAVerifier"
            # Votes for one answer are none for the other: they recover to nobody known.
            assert await refused(resolve(guilty, False)) == "NotAVerifier"
            assert await refused(court.lapse(case.case_id)) == "VotingNotOver"
            assert await w.stakes() == before == (0, STAKE)

            await resolve(guilty)
            assert (await court.case(case.case_id)).status is CaseStatus.UPHELD
            # The challenger has its bond and 30 % of the penalty, both as stake; the job 60 %.
            assert await w.stakes() == (CASE_BOND + PENALTY * 30 // 100, STAKE - PENALTY)
            job = await w.challenger.escrow.job(w.job_id)
            assert job.funded_micros == BUDGET + PENALTY * 60 // 100
            assert not job.frozen
            assert await refused(resolve(guilty)) == "CaseNotOpen"
            again = court.challenge(w.job_id, w.coordinator.account, EVIDENCE)
            assert await refused(again) == "CaseExists"

    asyncio.run(scenario())


def test_a_wrong_accusation_costs_its_bond(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            court = w.challenger.court
            case = await court.challenge(w.job_id, w.coordinator.account, EVIDENCE)
            votes = w.votes(case, VERIFIERS[1:], guilty=False)
            await court.resolve(case.case_id, guilty=False, signatures=votes)
            assert (await court.case(case.case_id)).status is CaseStatus.DISMISSED
            assert await w.stakes() == (0, STAKE + CASE_BOND)
            assert (await w.challenger.escrow.job(w.job_id)).funded_micros == BUDGET

    asyncio.run(scenario())


def test_a_case_nobody_decides_ends_and_gives_the_bond_back(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            court = w.challenger.court
            case = await court.challenge(w.job_id, w.coordinator.account, EVIDENCE)
            await w.pass_time(VOTING_S + 1)
            votes = w.votes(case, VERIFIERS[:2], guilty=True)
            late = court.resolve(case.case_id, guilty=True, signatures=votes)
            assert await refused(late) == "VotingOver"
            # Whoever calls, the challenger is who gets it.
            await w.requester.court.lapse(case.case_id)
            assert (await court.case(case.case_id)).status is CaseStatus.LAPSED
            assert await w.stakes() == (CASE_BOND, STAKE)
            assert await refused(court.lapse(case.case_id)) == "CaseNotOpen"

    asyncio.run(scenario())


def test_a_coordinator_answers_with_a_bond_and_has_it_back_after_the_job(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            escrow = w.coordinator.escrow
            post = EpochPost(
                job_id=w.job_id,
                epoch=1,
                pay_root="0x" + EMPTY_ROOT.hex(),
                prov_root="0x" + "01" * 32,
                cumulative_micros=0,
                num_tasks=0,
                num_statements=1,
            )
            assert await refused(escrow.post_epoch(post)) == "BondTooSmall"
            stranger = w.requester.escrow.put_up_bond(w.job_id, JOB_BOND)
            assert await refused(stranger) == "NotCoordinator"
            assert await refused(escrow.return_bond(w.job_id)) == "JobStillOpen"
            await escrow.put_up_bond(w.job_id, JOB_BOND // 2)
            assert await refused(escrow.post_epoch(post)) == "BondTooSmall"
            await escrow.put_up_bond(w.job_id, JOB_BOND - JOB_BOND // 2)
            assert (await escrow.job(w.job_id)).bond_micros == JOB_BOND
            assert await w.coordinator.token.balance(w.coordinator.account) == 0
            await escrow.post_epoch(post)
            await escrow.close_job(w.job_id)
            assert await refused(escrow.return_bond(w.job_id)) == "BondHeld"
            # The bond is no part of what the sponsor takes back.
            await w.requester.escrow.refund(w.job_id)
            assert await w.requester.token.balance(w.requester.account) == BUDGET
            await w.pass_time(WINDOW_S + 1)
            await w.requester.escrow.return_bond(w.job_id)
            assert await w.coordinator.token.balance(w.coordinator.account) == JOB_BOND
            assert (await escrow.job(w.job_id)).bond_micros == 0
            assert await refused(escrow.return_bond(w.job_id)) == "NoBond"

    asyncio.run(scenario())
