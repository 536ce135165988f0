"""The chain as it really is: answers lost, logs cut short, blocks taken back."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from eth_abi.abi import encode as abi_encode
from eth_account import Account as EthAccount
from eth_utils.crypto import keccak

from shoal.contracts.anvil import Anvil, dev_account
from shoal.contracts.connection import MAX_ANSWER_BYTES, Connection
from shoal.contracts.delivery import Delivery, Policy, Stage
from shoal.contracts.deployment import deploy
from shoal.contracts.gateway import ChainGateway
from shoal.contracts.records import Deployment, EpochPost
from shoal.contracts.scanner import Checkpoint, LogId, LogScanner
from shoal.orchestrator.effects import EpochPosting, enqueue_epoch, epoch_key
from shoal.orchestrator.outbox import Outbox
from shoal.orchestrator.store.database import Database
from shoal.orchestrator.store.tables import EpochRow, JobRow, OutboxRow
from shoal.protocol.clock import SystemTime
from shoal.protocol.errors import ChainRejected, InvariantBroken, Unavailable
from shoal.protocol.merkle import EMPTY_ROOT

BUDGET = 10_000_000
NUM_EPOCHS = 12
NUM_JOBS = 2
MAX_BROADCASTS = 5

Meddle = Callable[[dict[str, Any], dict[str, Any]], dict[str, Any] | None]
"""Given the question and the chain's answer, the answer to give; None cuts the connection."""


class FaultProxy:
    """JSON-RPC between us and a real chain, which does as it is told."""

    def __init__(self, upstream: str) -> None:
        self._upstream = upstream
        self.meddle: Meddle = lambda question, answer: answer
        self.lose_broadcasts = False
        self.url = ""
        self.broadcasts: Counter[str] = Counter()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[FaultProxy]:
        app = web.Application()
        app.router.add_post("/", self._pass_on)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}/"
        try:
            async with aiohttp.ClientSession() as self._session:
                yield self
        finally:
            await runner.cleanup()

    async def _pass_on(self, request: web.Request) -> web.Response:
        question = json.loads(await request.read())
        if question["method"] == "eth_sendRawTransaction":
            self.broadcasts[question["params"][0]] += 1
            # Lost on the way there: the first two of every third transaction.
            is_third = len(self.broadcasts) % 3 == 0
            if self.lose_broadcasts and is_third and self.broadcasts[question["params"][0]] <= 2:
                return self._cut(request)
        async with self._session.post(self._upstream, json=question) as reply:
            answer = self.meddle(question, await reply.json())
        return self._cut(request) if answer is None else web.json_response(answer)

    @staticmethod
    def _cut(request: web.Request) -> web.Response:
        assert request.transport is not None
        request.transport.close()
        return web.Response()


async def rpc(url: str, method: str, *params: Any) -> Any:
    body = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
    async with aiohttp.ClientSession() as session, session.post(url, json=body) as reply:
        answer = await reply.json()
    assert "error" not in answer, answer
    return answer["result"]


def post_of(job_id: str, epoch: int) -> EpochPost:
    return EpochPost(
        job_id=job_id,
        epoch=epoch,
        pay_root="0x" + EMPTY_ROOT.hex(),
        prov_root="0x" + bytes([epoch] * 32).hex(),
        cumulative_micros=epoch * 10,
        num_tasks=1,
        num_statements=1,
    )


@asynccontextmanager
async def deployed(folder: Path) -> AsyncIterator[tuple[Anvil, Deployment]]:
    async with Anvil(folder) as anvil:
        yield anvil, await deploy(anvil.rpc_url, dev_account(0))


async def open_jobs(faucet: ChainGateway, requester: ChainGateway, coordinator: str) -> list[str]:
    await faucet.token.fund(requester.account, 0, BUDGET * NUM_JOBS)
    deadline_s = await requester.now_s() + 86_400
    jobs = []
    for number in range(NUM_JOBS):
        digest = bytes([number]) * 32
        await requester.escrow.open_job(digest, coordinator, BUDGET, deadline_s)
        packed = abi_encode(["address", "bytes32"], [requester.account, digest])
        jobs.append("0x" + keccak(packed).hex())
    return jobs


class Settlement:
    """A database with two jobs' epochs, and the outbox that posts them."""

    def __init__(self, folder: Path, gateway: ChainGateway, jobs: list[str], depth: int) -> None:
        self.database = Database(f"sqlite:///{folder / 'orchestrator.db'}")
        self.jobs = jobs
        self._gateway = gateway
        self._policy = Policy(depth=depth, retry_ms=50, stall_ms=60_000)

    def outbox(self) -> Outbox:
        """A new process's."""
        kinds = {"post_epoch": EpochPosting(self._gateway.escrow, SystemTime())}
        wallet = self._gateway.sender.transactions
        return Outbox(self.database, wallet, kinds, SystemTime(), self._policy)

    async def decide(self) -> None:
        """Each epoch's row and order in one transaction."""

        def write(session: Any) -> None:
            for job_id in self.jobs:
                fields = {"record": "{}", "base": "{}", "state": "running"}
                numbers = {"escrow_deadline_s": 1, "created_ms": 1}
                session.add(JobRow(job_id=job_id, **fields, **numbers))
                session.flush()
                for epoch in range(1, NUM_EPOCHS // NUM_JOBS + 1):
                    post = post_of(job_id, epoch)
                    session.add(EpochRow(**post.model_dump(), payouts="{}"))
                    enqueue_epoch(session, self._gateway.account, post)

        await self.database.run(write)

    async def post_all(self, outbox: Outbox) -> None:
        """Every epoch of both jobs, at the same time, as often as it takes."""

        async def post_job(job_id: str) -> None:
            for epoch in range(1, NUM_EPOCHS // NUM_JOBS + 1):
                while True:
                    try:
                        landing = await outbox.deliver(epoch_key(job_id, epoch))
                    except Unavailable:
                        continue
                    assert landing.succeeded
                    break

        await asyncio.gather(*(post_job(job_id) for job_id in self.jobs))

    async def deliveries(self) -> list[Delivery]:
        rows = await self.database.run(lambda s: s.query(OutboxRow).all())
        return [Delivery.model_validate_json(row.delivery) for row in rows]


def bad_connection(seed: int) -> Meddle:
    """One answer in ten is lost, one broadcast in five is answered with a lie or a half-truth."""
    dice = random.Random(seed)

    def meddle(question: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any] | None:
        if dice.random() < 0.1:
            return None
        if question["method"] == "eth_sendRawTransaction":
            words = dice.choice(["", "", "", "", "", "", "", "already known", "nonce too low"])
            if words:
                error = {"code": -32603, "message": words}
                return {"jsonrpc": "2.0", "id": question["id"], "error": error}
        if question["method"] == "eth_getBlockReceipts" and dice.random() < 0.3:
            return answer | {"result": answer["result"][:-1]}
        return answer

    return meddle


def test_every_epoch_is_posted_once_over_a_bad_connection(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with (
            deployed(tmp_path) as (anvil, deployment),
            FaultProxy(anvil.rpc_url).running() as proxy,
            await ChainGateway.connect(anvil.rpc_url, deployment, dev_account(0)) as faucet,
            await ChainGateway.connect(anvil.rpc_url, deployment, dev_account(1)) as requester,
            await ChainGateway.connect(proxy.url, deployment, dev_account(2)) as gateway,
        ):
            jobs = await open_jobs(faucet, requester, gateway.account)
            before = await faucet.totals()
            settlement = Settlement(tmp_path, gateway, jobs, depth=0)
            await settlement.decide()
            proxy.meddle, proxy.lose_broadcasts = bad_connection(seed=7), True
            outbox = settlement.outbox()
            while True:
                try:
                    await outbox.open()
                    break
                except Unavailable:
                    continue
            await settlement.post_all(outbox)
            proxy.meddle, proxy.lose_broadcasts = lambda question, answer: answer, False
            await outbox.tick()

            for job_id in jobs:
                assert (await faucet.escrow.job(job_id)).epoch == NUM_EPOCHS // NUM_JOBS
            after = await faucet.totals()
            # Neither a second posting nor a failed one: a transaction for each epoch.
            assert after.transactions - before.transactions == NUM_EPOCHS
            deliveries = await settlement.deliveries()
            assert {each.stage for each in deliveries} == {Stage.FINAL}
            nonces = sorted(each.landed_nonce or 0 for each in deliveries)
            assert nonces == list(range(NUM_EPOCHS))
            assert max(proxy.broadcasts.values()) <= MAX_BROADCASTS
            # Control: the proxy did break something.
            assert max(proxy.broadcasts.values()) > 1
            settlement.database.close()

    asyncio.run(scenario())


@pytest.mark.parametrize("fate", ["dropped", "kept", "another first", "nonce stolen"])
def test_a_posting_that_the_chain_took_back_is_posted_again(tmp_path: Path, fate: str) -> None:
    async def scenario() -> None:
        async with (
            deployed(tmp_path) as (anvil, deployment),
            await ChainGateway.connect(anvil.rpc_url, deployment, dev_account(0)) as faucet,
            await ChainGateway.connect(anvil.rpc_url, deployment, dev_account(1)) as requester,
            await ChainGateway.connect(anvil.rpc_url, deployment, dev_account(2)) as gateway,
        ):
            url = anvil.rpc_url
            [job_id, _] = await open_jobs(faucet, requester, gateway.account)
            settlement = Settlement(tmp_path, gateway, [job_id], depth=3)
            await settlement.decide()
            outbox = settlement.outbox()
            await outbox.open()
            first = await outbox.deliver(epoch_key(job_id, 1))
            second = await outbox.deliver(epoch_key(job_id, 2))
            if fate == "dropped":
                await rpc(url, "anvil_reorg", 2, [])
            elif fate == "kept":
                raws = [d.attempts[-1].raw for d in await settlement.deliveries() if d.attempts]
                await rpc(url, "anvil_reorg", 2, [[raw, 1] for raw in raws])
            else:
                await rpc(url, "anvil_reorg", 2, [])
                async with await ChainGateway.connect(url, deployment, dev_account(2)) as thief:
                    if fate == "another first":
                        await thief.escrow.post_epoch(post_of(job_id, 1))
                    else:
                        await thief.token.transfer(requester.account, 0)
            settlement_again = settlement.outbox()
            await settlement_again.open()
            for _ in range(3):
                await rpc(url, "evm_mine")
                await settlement_again.tick()
            for epoch in (1, 2):
                # With its nonce stolen the first is sent after the second, which is then refused.
                with contextlib.suppress(ChainRejected):
                    await settlement_again.deliver(epoch_key(job_id, epoch))
                await settlement_again.deliver(epoch_key(job_id, epoch))
            await rpc(url, "anvil_mine", "0x4")
            await settlement_again.tick()
            posted = await gateway.escrow.epochs(job_id)
            assert [each.epoch for each in posted] == [1, 2]
            rows = await settlement.database.run(
                lambda s: [s.get_one(EpochRow, (job_id, epoch)) for epoch in (1, 2)]
            )
            assert [row.tx_hash for row in rows] == [each.tx_hash for each in posted]
            stages = [d.stage for d in await settlement.deliveries() if d.attempts]
            assert set(stages) == {Stage.FINAL}
            assert second.block_hash != posted[1].block_hash
            assert first.block_hash != posted[0].block_hash
            settlement.database.close()

    asyncio.run(scenario())


TRANSFER_LOGS = 1


async def applied(scanner: LogScanner, book: dict[LogId, str], at: Checkpoint) -> Checkpoint:
    """``book`` after one scan: orphans taken back, new logs put in, none twice."""
    scan = await scanner.scan(at)
    for gone in scan.orphaned:
        del book[gone]
    for log in scan.logs:
        name = LogId(log["blockHash"].to_0x_hex(), log["logIndex"])
        assert name not in book
        book[name] = "0x" + bytes(log["topics"][2])[-20:].hex()
    return Checkpoint.decode(scan.checkpoint.encode())


def test_a_scan_takes_back_what_the_chain_takes_back(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with (
            deployed(tmp_path) as (anvil, deployment),
            await ChainGateway.connect(anvil.rpc_url, deployment, dev_account(0)) as faucet,
        ):
            url = anvil.rpc_url
            await faucet.token.fund(faucet.account, 0, BUDGET)
            start = await faucet.connection.block_number() + 1
            scanner = LogScanner(faucet.connection, [deployment.token], first_block=start, depth=5)
            book: dict[LogId, str] = {}
            payees = [EthAccount.create().address for _ in range(4)]
            checkpoint = Checkpoint()
            for payee in payees:
                await faucet.token.transfer(payee, 5)
                checkpoint = await applied(scanner, book, checkpoint)
                checkpoint = await applied(scanner, book, checkpoint)
            assert list(book.values()) == [payee.lower() for payee in payees]
            # The last three are gone; the last comes back in the first new block.
            block = await rpc(url, "eth_getBlockByNumber", hex(start + 1), True)
            assert block["transactions"]
            nonce = int(block["transactions"][0]["nonce"], 16)
            again = faucet.sender.transactions
            # The payee's balance is empty again then, and filling it costs more.
            call = replace(faucet.token.transfer_call(payees[3], 5), gas=100_000)
            raw = again.sign(call, nonce, await again.price(call)).raw
            await rpc(url, "anvil_reorg", 3, [[raw, 0]])
            checkpoint = await applied(scanner, book, checkpoint)
            assert list(book.values()) == [payees[0].lower(), payees[3].lower()]
            await rpc(url, "anvil_mine", "0x6")
            checkpoint = await applied(scanner, book, checkpoint)
            # A log that an earlier process lost is found where an overlap is read again.
            forgetful = Checkpoint(
                blocks=tuple(b.model_copy(update={"log_indices": ()}) for b in checkpoint.blocks)
            )
            assert not (await scanner.scan(forgetful)).logs
            await faucet.token.transfer(payees[1], 5)
            newest = await scanner.scan(checkpoint)
            lost = newest.checkpoint.blocks[-1].model_copy(update={"log_indices": ()})
            holed = Checkpoint(blocks=(*newest.checkpoint.blocks[:-1], lost))
            assert len((await scanner.scan(holed, overlap=2)).logs) == TRANSFER_LOGS
            # Control: deeper than final is no ordinary matter.
            await rpc(url, "anvil_reorg", 6, [])
            with pytest.raises(InvariantBroken) as caught:
                await scanner.scan(newest.checkpoint)
            assert caught.value.code == "deep_reorganisation"

    asyncio.run(scenario())


@pytest.mark.parametrize("cut", ["transaction", "log", "all"])
def test_logs_that_are_cut_short_are_noticed(tmp_path: Path, cut: str) -> None:
    async def scenario() -> None:
        async with (
            deployed(tmp_path) as (anvil, deployment),
            FaultProxy(anvil.rpc_url).running() as proxy,
            await ChainGateway.connect(proxy.url, deployment, dev_account(0)) as faucet,
        ):
            await faucet.token.fund(faucet.account, 0, BUDGET)
            start = await faucet.connection.block_number() + 1
            await faucet.token.transfer(EthAccount.create().address, 5)

            def shorten(question: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
                if question["method"] == "eth_getBlockReceipts":
                    if cut == "all":
                        return answer | {"result": []}
                    if cut == "transaction":
                        return answer | {"result": answer["result"][:-1]}
                    answer["result"][-1]["logs"].pop()
                return answer

            scanner = LogScanner(faucet.connection, [deployment.token], first_block=start, depth=0)
            proxy.meddle = shorten
            with pytest.raises(Unavailable) as caught:
                await scanner.scan(Checkpoint())
            assert caught.value.code == "truncated_logs"
            proxy.meddle = lambda question, answer: answer
            assert len((await scanner.scan(Checkpoint())).logs) == TRANSFER_LOGS

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "answer", [b"[" * 200_000, b'{"jsonrpc":"2.0","id":0,"result":"' + b"0" * MAX_ANSWER_BYTES]
)
def test_an_answer_too_deep_or_too_long_is_no_chains(answer: bytes) -> None:
    async def scenario() -> None:
        async def bomb(_: web.Request) -> web.Response:
            return web.Response(body=answer, content_type="application/json")

        app = web.Application()
        app.router.add_post("/", bomb)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        connection = Connection(f"http://127.0.0.1:{runner.addresses[0][1]}/")
        try:
            with pytest.raises(Unavailable, match="does not answer like a chain") as refused:
                await connection.chain_id()
            assert len(refused.value.message) < 1_000
        finally:
            await connection.close()
            await runner.cleanup()

    asyncio.run(scenario())


def test_no_contract_makes_us_fetch_a_url() -> None:
    async def scenario() -> None:
        connection = Connection("http://127.0.0.1:1")
        assert connection.w3.provider.global_ccip_read_enabled is False
        await connection.close()

    asyncio.run(scenario())
