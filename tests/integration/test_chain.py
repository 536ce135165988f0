"""The contracts and the gateway on a real anvil."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from eth_abi.abi import encode as abi_encode
from eth_account import Account as EthAccount
from eth_account.signers.local import LocalAccount
from eth_utils.crypto import keccak

from shoal.contracts.anvil import Anvil, dev_account
from shoal.contracts.deployment import Terms, deploy
from shoal.contracts.gateway import ChainGateway
from shoal.contracts.records import Claim, Deployment, EpochPost
from shoal.protocol.errors import (
    ChainRejected,
    InvalidRequest,
    NotFound,
    ShoalError,
    Unauthorised,
    Unavailable,
)
from shoal.protocol.merkle import EMPTY_ROOT, MerkleTree, payout_leaf

DIGEST = b"\x11" * 32
BUDGET = 10_000_000
DAY_S = 86_400


@dataclass
class World:
    """A chain with contracts, and one gateway per party."""

    anvil: Anvil
    deployment: Deployment
    requester: ChainGateway
    coordinator: ChainGateway
    faucet: ChainGateway

    def job_id(self) -> str:
        packed = abi_encode(["address", "bytes32"], [self.requester.account, DIGEST])
        return "0x" + keccak(packed).hex()

    async def open(self) -> str:
        deadline_s = await self.requester.now_s() + DAY_S
        await self.requester.escrow.open_job(DIGEST, self.coordinator.account, BUDGET, deadline_s)
        return self.job_id()

    def tree(self, job_id: str, owed: Mapping[Any, int]) -> tuple[MerkleTree, list[Claim]]:
        escrow, chain_id = self.deployment.job_escrow, self.deployment.chain_id
        tree = MerkleTree(
            [payout_leaf(chain_id, escrow, job_id, who, owes) for who, owes in owed.items()]
        )
        claims = [
            Claim(
                account=who,
                cumulative_micros=owes,
                proof=tuple("0x" + node.hex() for node in tree.proof(i)),
            )
            for i, (who, owes) in enumerate(owed.items())
        ]
        return tree, claims

    def post(self, job_id: str, epoch: int, root: bytes, total: int) -> EpochPost:
        return EpochPost(
            job_id=job_id,
            epoch=epoch,
            pay_root="0x" + root.hex(),
            prov_root="0x" + bytes([epoch] * 32).hex(),
            cumulative_micros=total,
            num_tasks=epoch * 2,
            num_statements=epoch * 3,
        )


@asynccontextmanager
async def world(directory: Path, *, challenge_window_s: int = 0) -> AsyncIterator[World]:
    async with Anvil(directory) as anvil:
        deployment = await deploy(
            anvil.rpc_url,
            dev_account(0),
            terms=Terms(challenge_window_s=challenge_window_s, unbonding_s=60, voting_s=60),
        )
        url = anvil.rpc_url
        async with (
            await ChainGateway.connect(url, deployment, dev_account(0)) as faucet,
            await ChainGateway.connect(url, deployment, dev_account(1)) as requester,
            await ChainGateway.connect(url, deployment, dev_account(2)) as coordinator,
        ):
            await faucet.token.fund(requester.account, 0, BUDGET)
            yield World(anvil, deployment, requester, coordinator, faucet)


async def rpc(url: str, method: str, *params: Any) -> Any:
    body = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
    async with aiohttp.ClientSession() as session, session.post(url, json=body) as reply:
        return (await reply.json())["result"]


def fresh() -> LocalAccount:
    account: LocalAccount = EthAccount.create()
    return account


def test_a_job_is_funded_paid_and_refunded(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            job_id = await w.open()
            alice, bob = fresh().address, fresh().address
            tree1, claims1 = w.tree(job_id, {alice: 1_000_000})
            posted1 = await w.coordinator.escrow.post_epoch(
                w.post(job_id, 1, tree1.root, 1_000_000)
            )
            await w.faucet.escrow.claim(job_id, claims1[0])
            tree2, claims2 = w.tree(job_id, {alice: 1_500_000, bob: 2_000_000})
            await w.coordinator.escrow.post_epoch(w.post(job_id, 2, tree2.root, 3_500_000))
            await asyncio.gather(*(w.faucet.escrow.claim(job_id, claim) for claim in claims2))
            again = await w.faucet.escrow.claim(job_id, claims2[0])
            assert await w.faucet.token.balance(alice) == 1_500_000
            assert await w.faucet.token.balance(bob) == 2_000_000
            await w.coordinator.escrow.close_job(job_id)
            await w.faucet.escrow.refund(job_id)

            state = await w.requester.escrow.job(job_id)
            assert (state.funded_micros, state.committed_micros) == (BUDGET, 3_500_000)
            assert state.claimed_micros + state.refunded_micros == BUDGET
            assert state.closed
            assert await w.requester.token.balance(w.requester.account) == BUDGET - 3_500_000
            assert await w.requester.token.balance(w.deployment.job_escrow) == 0
            assert await w.requester.escrow.claimed(job_id, bob) == 2_000_000

            payments = await w.requester.escrow.payments(job_id)
            paid = sorted((p.account, p.amount_micros) for p in payments)
            assert paid == sorted([(alice, 1_000_000), (alice, 500_000), (bob, 2_000_000)])
            assert again.tx_hash not in {p.tx_hash for p in payments}
            epochs = await w.requester.escrow.epochs(job_id)
            assert [(e.epoch, e.cumulative_micros) for e in epochs] == [
                (1, 1_000_000),
                (2, 3_500_000),
            ]
            assert epochs[0].tx_hash == posted1.tx_hash
            assert epochs[1].prov_root == "0x" + "02" * 32

            head, seq = await w.requester.provenance.head(w.deployment.job_escrow, job_id)
            expected = b"\0" * 32
            for epoch in epochs:
                expected = keccak(
                    abi_encode(
                        ["bytes32", "bytes32", "uint64"],
                        [expected, bytes.fromhex(epoch.prov_root[2:]), epoch.num_statements],
                    )
                )
            assert (head, seq) == (expected, 2)

            stats, totals = w.coordinator.stats, await w.coordinator.totals()
            assert stats.transactions == 3
            assert stats.gas_used >= posted1.gas_used
            assert totals.transactions == 16
            assert totals.gas_used > stats.gas_used

    asyncio.run(scenario())


def test_the_escrow_refuses_by_name(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            job_id = await w.open()
            post = w.post(job_id, 1, EMPTY_ROOT, 0)
            stranger = "0x" + "77" * 20
            attempts = {
                "NotCoordinator": w.requester.escrow.post_epoch(post),
                "WrongEpoch": w.coordinator.escrow.post_epoch(w.post(job_id, 2, EMPTY_ROOT, 0)),
                "TotalAboveFunds": w.coordinator.escrow.post_epoch(
                    w.post(job_id, 1, EMPTY_ROOT, BUDGET + 1)
                ),
                "NoSuchJob": w.coordinator.escrow.close_job("0x" + "ab" * 32),
                "RefundTooEarly": w.requester.escrow.refund(job_id),
                "BadProof": w.requester.escrow.claim(
                    job_id, Claim(account=stranger, cumulative_micros=5, proof=())
                ),
                "JobExists": w.open(),
                "DeadlinePassed": w.requester.escrow.open_job(b"\x22" * 32, stranger, 5, 1),
                "NotMinter": w.requester.token.fund(stranger, 0, 5),
                "ERC20InsufficientBalance": w.coordinator.token.transfer(stranger, 5),
            }
            for reason, attempt in attempts.items():
                with pytest.raises(ChainRejected) as caught:
                    await attempt
                assert caught.value.code == reason, caught.value
                assert caught.value.reason.startswith(reason + "(")
            assert "posted=2, expected=1" in str(await refusal(w, job_id))
            # Negative control: the same gateways do what they have a right to.
            await w.coordinator.escrow.post_epoch(post)

    asyncio.run(scenario())


async def refusal(w: World, job_id: str) -> ShoalError:
    try:
        await w.coordinator.escrow.post_epoch(w.post(job_id, 2, EMPTY_ROOT, 0))
    except ShoalError as error:
        return error
    raise AssertionError("epoch 2 was accepted before epoch 1")


def test_an_account_without_gas_money_is_told_so(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            poor = fresh()
            async with await ChainGateway.connect(w.anvil.rpc_url, w.deployment, poor) as gateway:
                with pytest.raises(ChainRejected, match=r"(?i)insufficient funds"):
                    await gateway.vault.bind_node(b"\x01" * 32)
                await w.faucet.token.fund(poor.address, 10**18, 5)
                await gateway.vault.bind_node(b"\x01" * 32)
                assert await gateway.eth_balance(poor.address) < 10**18
                assert await gateway.token.balance(poor.address) == 5

    asyncio.run(scenario())


def test_gas_stays_under_its_ceilings(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            job_id = await w.open()
            whos = [fresh().address for _ in range(100)]
            gas = {}
            for epoch in (1, 2):
                tree, claims = w.tree(job_id, dict.fromkeys(whos, 50 * epoch))
                posted = await w.coordinator.escrow.post_epoch(
                    w.post(job_id, epoch, tree.root, 5_000 * epoch)
                )
                one = await w.faucet.escrow.claim(job_id, claims[0])
                many = await w.faucet.escrow.claim_many(job_id, claims)
                assert len(many.payments) == 99
                gas[epoch] = (posted.gas_used, one.gas_used, many.mined.gas_used // 99)
            ceilings = {1: (160_000, 120_000, 65_000), 2: (70_000, 75_000, 30_000)}
            for epoch, caps in ceilings.items():
                assert all(used <= cap for used, cap in zip(gas[epoch], caps, strict=True)), gas

    asyncio.run(scenario())


def test_one_bad_payee_stops_nobody_else(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            job_id = await w.open()
            owed = {fresh().address: 10_000 + i for i in range(40)}
            tree, claims = w.tree(job_id, owed)
            await w.coordinator.escrow.post_epoch(w.post(job_id, 1, tree.root, sum(owed.values())))
            claims[3] = claims[3].model_copy(update={"cumulative_micros": 999_999})
            result = await w.faucet.escrow.claim_many(job_id, claims)
            assert len(result.payments) == 39
            assert [s.account for s in result.skipped] == [claims[3].account]
            assert result.skipped[0].reason.startswith("BadProof(")
            for claim in claims[:3] + claims[4:]:
                balance = await w.faucet.token.balance(claim.account)
                assert balance == claim.cumulative_micros
            assert await w.faucet.token.balance(claims[3].account) == 0
            with pytest.raises(InvalidRequest, match="1 to 100"):
                await w.faucet.escrow.claim_many(job_id, [])

    asyncio.run(scenario())


def test_stake_is_staked_bound_and_withdrawn(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            me, key = w.requester.account, b"\x42" * 32
            await w.requester.vault.stake(3_000_000)
            await w.requester.vault.stake(1_000_000)
            assert await w.requester.vault.node_owner(key) is None
            await w.requester.vault.bind_node(key)
            await w.requester.vault.bind_node(b"\x43" * 32)
            assert await w.coordinator.vault.node_owner(key) == me
            with pytest.raises(ChainRejected, match="NodeKeyTaken"):
                await w.coordinator.vault.bind_node(key)
            await w.requester.vault.request_unbond(1_500_000)
            with pytest.raises(ChainRejected, match="StillUnbonding"):
                await w.requester.vault.withdraw_stake()
            info = await w.requester.vault.stake_of(me)
            assert (info.active_micros, info.unbonding_micros) == (2_500_000, 1_500_000)
            assert info.unbond_at_s > await w.requester.now_s()
            await rpc(w.anvil.rpc_url, "evm_increaseTime", 61)
            await rpc(w.anvil.rpc_url, "evm_mine")
            await w.requester.vault.withdraw_stake()
            assert await w.requester.token.balance(me) == BUDGET - 2_500_000
            assert (await w.requester.vault.stake_of(me)).unbonding_micros == 0

    asyncio.run(scenario())


def test_a_root_waits_for_its_challenge_window(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path, challenge_window_s=100) as w:
            assert await w.requester.escrow.challenge_window_s() == 100
            job_id = await w.open()
            who = fresh().address
            tree, claims = w.tree(job_id, {who: 7})
            await w.coordinator.escrow.post_epoch(w.post(job_id, 1, tree.root, 7))
            with pytest.raises(ChainRejected, match="BadProof"):
                await w.faucet.escrow.claim(job_id, claims[0])
            with pytest.raises(ChainRejected, match="InsideChallengeWindow"):
                await w.coordinator.escrow.post_epoch(w.post(job_id, 2, tree.root, 7))
            await rpc(w.anvil.rpc_url, "evm_increaseTime", 101)
            await rpc(w.anvil.rpc_url, "evm_mine")
            await w.faucet.escrow.claim(job_id, claims[0])
            assert await w.faucet.token.balance(who) == 7

    asyncio.run(scenario())


def test_many_tasks_send_one_after_the_other(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            targets = [fresh().address for _ in range(30)]
            await asyncio.gather(*(w.requester.token.transfer(t, 5) for t in targets))
            balances = await asyncio.gather(*(w.requester.token.balance(t) for t in targets))
            assert set(balances) == {5}
            # Another sender of the same key is noticed: the nonce is asked for each time.
            other = await ChainGateway.connect(w.anvil.rpc_url, w.deployment, dev_account(1))
            async with other:
                await other.token.transfer(targets[0], 5)
            await w.requester.token.transfer(targets[1], 5)
            assert await w.requester.token.balance(targets[1]) == 10

    asyncio.run(scenario())


def test_the_court_and_the_shares_answer(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            job_id = await w.open()
            with pytest.raises(NotFound, match="no case"):
                await w.faucet.court.case("0x" + "ab" * 32)
            with pytest.raises(InvalidRequest, match="no proof of a fault"):
                await w.faucet.court.prove(b"\x01\x02\x03\x04")
            with pytest.raises(ChainRejected) as caught:
                await w.faucet.court.challenge(job_id, w.coordinator.account, "0x" + "cd" * 32)
            assert caught.value.code == "NoVerifiers"

            with pytest.raises(NotFound, match="released no model shares"):
                await w.faucet.shares.model(job_id)
            who = fresh().address
            chain_id, shares = w.deployment.chain_id, w.deployment.model_shares
            types = ["uint256", "address", "uint256", "address", "uint96"]
            leaf = keccak(keccak(abi_encode(types, [chain_id, shares, int(job_id, 16), who, 70])))
            root = "0x" + leaf.hex()
            with pytest.raises(ChainRejected) as caught:
                await w.requester.shares.release(job_id, root, 70)
            assert caught.value.code == "NotCoordinator"
            await w.coordinator.shares.release(job_id, root, 70)
            await w.faucet.shares.mint(job_id, who, 70, [])
            await w.faucet.token.fund(w.faucet.account, 0, 1_000)
            await w.faucet.shares.deposit_revenue(job_id, 1_000)
            owed = await w.faucet.shares.revenue_owed(job_id, who)
            assert 999 <= owed <= 1_000
            await w.faucet.shares.claim_revenue(job_id, who)
            assert await w.faucet.token.balance(who) == owed
            model = await w.faucet.shares.model(job_id)
            assert (model.minted_points, model.total_points, model.transferable) == (70, 70, False)
            assert await w.faucet.shares.balance(job_id, who) == 70

    asyncio.run(scenario())


def test_top_up_raises_the_cap(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            job_id = await w.open()
            await w.faucet.token.fund(w.coordinator.account, 0, 500)
            await w.coordinator.escrow.top_up(job_id, 500)
            assert (await w.requester.escrow.job(job_id)).funded_micros == BUDGET + 500
            await w.coordinator.escrow.post_epoch(w.post(job_id, 1, EMPTY_ROOT, BUDGET + 500))

    asyncio.run(scenario())


def test_a_gateway_refuses_the_wrong_chain(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            url, deployment = w.anvil.rpc_url, w.deployment
            with pytest.raises(InvalidRequest) as caught:
                await ChainGateway.connect(url, deployment.model_copy(update={"chain_id": 1}))
            assert caught.value.code == "wrong_chain"
            moved = deployment.model_copy(update={"job_escrow": "0x" + "12" * 20})
            with pytest.raises(InvalidRequest) as caught:
                await ChainGateway.connect(url, moved)
            assert caught.value.code == "no_contract"
            async with await ChainGateway.connect(url, deployment) as reader:
                with pytest.raises(Unauthorised, match="only reads"):
                    await reader.vault.stake(1)
                with pytest.raises(NotFound, match="no job"):
                    await reader.escrow.job("0x" + "00" * 32)
                with pytest.raises(InvalidRequest, match="not a job id"):
                    await reader.escrow.job("job_1")
                with pytest.raises(InvalidRequest, match="not an account"):
                    await reader.token.balance("alice")
        with pytest.raises(Unavailable, match="does not answer"):
            await ChainGateway.connect(url, deployment)

    asyncio.run(scenario())


def test_something_else_on_the_port_is_named(tmp_path: Path) -> None:
    async def scenario() -> None:
        async def hello(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read(4096)
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello")
            await writer.drain()
            writer.close()

        server = await asyncio.start_server(hello, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        here = "0x" + "12" * 20
        deployment = Deployment(
            chain_id=31337,
            token=here,
            stake_vault=here,
            job_escrow=here,
            provenance_log=here,
            fault_court=here,
            model_shares=here,
            block_number=0,
        )
        async with server:
            with pytest.raises(Unavailable, match="does not answer like a chain"):
                await ChainGateway.connect(f"http://127.0.0.1:{port}", deployment)

    asyncio.run(scenario())


def test_a_stopped_chain_goes_on_where_it_was(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            job_id = await w.open()
            who = fresh().address
            tree, claims = w.tree(job_id, {who: 7})
            await w.coordinator.escrow.post_epoch(w.post(job_id, 1, tree.root, 7))
            deployment, block = w.deployment, await w.coordinator.connection.block_number()
        async with (
            Anvil(tmp_path) as anvil,
            await ChainGateway.connect(anvil.rpc_url, deployment, dev_account(2)) as again,
        ):
            assert await again.connection.block_number() == block
            assert [e.epoch for e in await again.escrow.epochs(job_id)] == [1]
            await again.escrow.claim(job_id, claims[0])
            await again.escrow.post_epoch(w.post(job_id, 2, tree.root, 7))
            assert [e.epoch for e in await again.escrow.epochs(job_id)] == [1, 2]
            assert await again.token.balance(who) == 7

    asyncio.run(scenario())


def test_a_used_port_is_refused(tmp_path: Path) -> None:
    async def scenario(port: int) -> None:
        with pytest.raises(InvalidRequest, match=f"Port {port}"):
            await Anvil(tmp_path, port=port).start()

    with socket.create_server(("127.0.0.1", 0)) as taken:
        asyncio.run(scenario(taken.getsockname()[1]))


def test_a_missing_binary_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_ANVIL", str(tmp_path / "nothing"))
    with pytest.raises(Unavailable, match="SHOAL_ANVIL names"):
        asyncio.run(Anvil(tmp_path).start())


def test_a_broken_state_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "chain.json").write_text("garbage")
    with pytest.raises(Unavailable, match=r"ended with status .*chain\.json") as caught:
        asyncio.run(Anvil(tmp_path).start())
    assert caught.value.code == "chain_not_started"


_PARENT = """
import asyncio, sys
from pathlib import Path
from shoal.contracts.anvil import Anvil

async def main():
    async with Anvil(Path(sys.argv[1])) as chain:
        print(chain.pid, flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child of a killed parent")
def test_the_chain_dies_with_a_killed_parent(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    with subprocess.Popen(
        [sys.executable, "-c", _PARENT, str(tmp_path)], stdout=subprocess.PIPE, env=environment
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        watcher = os.pidfd_open(pid)
        parent.send_signal(signal.SIGKILL)
        asyncio.run(_ended(watcher))
        os.close(watcher)


async def _ended(watcher: int) -> None:
    gone = asyncio.Event()
    asyncio.get_running_loop().add_reader(watcher, gone.set)
    await asyncio.wait_for(gone.wait(), 15)


@pytest.mark.timeout(600)  # A compiler in WebAssembly, on a machine that may be busy.
def test_a_rebuild_gives_the_shipped_artefacts() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "shoal.contracts.build", "--check"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 stale" in done.stdout
