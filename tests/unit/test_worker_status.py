"""`shoal worker status`: what a worker says of itself, in a file and in words."""

from __future__ import annotations

import asyncio
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from eth_account import Account as EthAccount
from rich.console import Console
from worker_double import (
    JOB_ID,
    MemoryBlobs,
    MemoryChain,
    OrchestratorDouble,
    ScriptedEngine,
    make_task,
)

from shoal.network.identity import NodeIdentity
from shoal.network.memory import MemoryHub, MemoryNetwork
from shoal.protocol.clock import ManualTime
from shoal.protocol.errors import InvalidRequest, NotFound, ShoalError, Unauthorised
from shoal.protocol.ids import PeerId
from shoal.protocol.market import TaskKind
from shoal.protocol.node import JOIN_PROTOCOL, IdleDetail, IdleReason
from shoal.worker.config import load_config
from shoal.worker.node import Parts, WorkerNode
from shoal.worker.ports import ProviderChain
from shoal.worker.session import Credentials, SessionState
from shoal.worker.status import (
    Asked,
    BaseFetch,
    HeldLease,
    Judgement,
    Pay,
    Stage,
    StatusFile,
    WorkerStatus,
)
from shoal.worker.status_view import idle_words, show_status, state_words, status_json

NOW_MS = 1_790_000_100_000
WORKER = NodeIdentity(b"w" * 32)
ORCHESTRATOR = NodeIdentity(b"o" * 32)
NODE = WORKER.peer_id
ACCOUNT = EthAccount.create().address


def status(**changes: Any) -> WorkerStatus:
    usual: dict[str, Any] = {
        "pid": 7,
        "started_ms": NOW_MS - 3_723_000,
        "at_ms": NOW_MS,
        "name": "attic",
        "node": NODE,
        "account": ACCOUNT,
        "session": SessionState.JOINED,
        "session_since_ms": NOW_MS - 60_000,
        "address": "/ip4/192.0.2.1/tcp/4001",
        "round_trip_ms": 12,
        "num_joins": 1,
        "num_jobs": 2,
        "idle": IdleReason.NO_WORK,
    }
    return WorkerStatus(**{**usual, **changes})


def idle(reason: IdleReason | None, detail: IdleDetail | None = None, **changes: Any) -> str:
    return idle_words(status(idle=reason, idle_detail=detail, **changes))


ROLLOUT = TaskKind.ROLLOUT


@pytest.mark.parametrize(
    ("reason", "detail", "words"),
    [
        (None, None, "has not said yet"),
        (IdleReason.WORKING, None, "it works"),
        (IdleReason.NO_JOBS, None, "no job is open"),
        (
            IdleReason.STAKE_TOO_SMALL,
            IdleDetail(kind=ROLLOUT, needed_stake_micros=420_000, free_stake_micros=100_000),
            "stake too small for this class: its smallest task needs $0.42 and $0.10 is free",
        ),
        (IdleReason.STAKE_TOO_SMALL, None, "larger --stake"),
        (
            IdleReason.TASK_TOO_LARGE,
            IdleDetail(kind=ROLLOUT, task_units=64, capacity_units=8),
            "the smallest has 64 units and this worker takes 8; raise capacity.rollout",
        ),
        (IdleReason.TASK_TOO_LARGE, None, "raise capacity"),
        (
            IdleReason.OUTBID,
            IdleDetail(kind=ROLLOUT, place=4, places=9, price_micros=300),
            "outbid: 4. of 9 on the ladder for rollout at $0.0003",
        ),
        (IdleReason.OUTBID, None, "others stand before it"),
        (
            IdleReason.TOO_SLOW,
            IdleDetail(kind=ROLLOUT, task_ms=3_100, usual_ms=1_000),
            "done in about 3.1 s, its way over the line included, and takes others 1.0 s;",
        ),
        (IdleReason.TOO_SLOW, None, "mend a slow line"),
        (IdleReason.PAUSED, IdleDetail(wait_ms=75_000), "left out for another 1 min 15 s"),
        (IdleReason.PAUSED, None, "broken promises"),
        (
            IdleReason.ABOVE_RESERVE,
            IdleDetail(kind=ROLLOUT, limit_micros=80, price_micros=100),
            "it asks $0.0001 for a unit of rollout and the most is $0.00008",
        ),
        (
            IdleReason.ABOVE_RESERVE,
            IdleDetail(kind=ROLLOUT, limit_micros=100, price_micros=99),
            "its handicap counts on top",
        ),
        (IdleReason.FETCHING_BASE, None, "a base is on its way"),
        (IdleReason.NO_WORK, None, "nothing it bids for"),
        (IdleReason.STARTING, None, "no bid of its own"),
    ],
)
def test_every_idle_minute_has_a_reason_with_its_figures(
    reason: IdleReason | None, detail: IdleDetail | None, words: str
) -> None:
    assert words in idle(reason, detail)


def test_every_idle_reason_has_words() -> None:
    assert all(idle(reason) for reason in IdleReason)


def test_a_worker_priced_out_by_its_own_floor_says_by_how_much() -> None:
    asked = Asked(kind=ROLLOUT, floor_micros=100, best_micros=80)
    unknown = Asked(kind=TaskKind.GRADIENT, floor_micros=100)
    assert idle(IdleReason.ABOVE_RESERVE, asked=(asked, unknown)) == (
        "no lots above your floor: the best rollout reserve is $0.00008 and your floor $0.0001"
    )


def test_a_base_on_its_way_says_how_far() -> None:
    fetch = BaseFetch(model="Qwen", fetched_bytes=1 << 30, size_bytes=4 << 30)
    assert "Qwen 1 GiB of 4 GiB" in idle(IdleReason.FETCHING_BASE, fetching=(fetch,))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "up for 1 h 2 min; joined /ip4/192.0.2.1/tcp/4001 for 1 min, answers in 12 ms"),
        ({"num_joins": 3}, "join number 3"),
        (
            {"session": SessionState.DIALLING, "last_error": "Nobody answers."},
            "dialling /ip4/192.0.2.1/tcp/4001 for 1 min; last error: Nobody answers.",
        ),
        ({"session": SessionState.JOINING}, "joining"),
        (
            {"session": SessionState.WAITING, "address": None, "retry_at_ms": NOW_MS + 4_000},
            "not joined, dialling again in 4 s",
        ),
        ({"session": SessionState.STOPPED}, "not joined yet"),
    ],
)
def test_how_things_stand(changes: dict[str, Any], words: str) -> None:
    assert words in state_words(status(**changes), running=True, now_ms=NOW_MS)


def test_a_worker_that_is_gone_is_told_by_its_last_words() -> None:
    told = state_words(status(ended="No stake."), running=False, now_ms=NOW_MS)
    assert told.startswith("stopped, last heard 20")
    assert told.endswith("(No stake.); it had run for 1 h 2 min")
    assert "without saying why" in state_words(status(), running=False, now_ms=NOW_MS)


LEASE = HeldLease(
    lease_id="lease_00000001",
    job_id=JOB_ID,
    kind=ROLLOUT,
    num_units=8,
    pay_micros=800,
    stage=Stage.COMPUTING,
    steps=3,
    came_ms=NOW_MS - 5_000,
    ends_ms=NOW_MS + 60_000,
)
VERDICT = Judgement(
    at_ms=NOW_MS - 2_000,
    lease_id="lease_00000000",
    job_id=JOB_ID,
    accepted=False,
    pay_micros=0,
    reason="rewards: \x1b[31m differ",
)


def test_the_whole_reads_as_lines() -> None:
    stream = io.StringIO()
    told = status(
        leases=(LEASE,),
        verdicts=(VERDICT,),
        pay=Pay(accepted=4, rejected=1, earned_micros=3_200, claimable_micros=1_000),
        cache_bytes=1 << 20,
        cache_limit_bytes=22 << 30,
        uploaded_bytes=2_048,
    )
    show_status(told, Console(file=stream, width=40), running=True, now_ms=NOW_MS)
    lines = stream.getvalue().splitlines()
    assert lines[3] == "work           1 lease of 8 units, 2 open jobs"
    assert lines[4] == (
        "               rollout of 8 units, computing, 3 steps, held for 5 s, 1 min left, pays "
        "$0.0008, job 0xaaaaaaaa…"
    )
    assert lines[5] == (
        "earned         $0.0032 in all, $0.001 to be claimed, $0.00 claimed since the start; "
        "4 accepted, 1 rejected"
    )
    assert lines[6] == "last verdicts  2 s ago: rejected, rewards: [31m differ, lease_00000000"
    assert lines[7] == "cache          1 MiB of 22 GiB"
    assert "why idle" not in stream.getvalue()


def test_the_whole_for_programs() -> None:
    data = json.loads(json.dumps(status_json(status(), running=True, now_ms=NOW_MS)))
    assert data["running"] is True
    assert data["idle"] == "no_work"
    assert data["idle_words"] == "nothing it bids for is waiting; wait"
    assert data["session"] == "joined"


def test_who_never_ran_and_a_damaged_file_are_told_apart(tmp_path: Path) -> None:
    file = StatusFile(tmp_path)
    assert not file.is_claimed()
    with pytest.raises(NotFound, match="No worker has run") as caught:
        file.read()
    assert caught.value.code == "never_run"
    for damage in (b"", b"{", b"[1]", b"{}", b"\xff" * 100):
        (tmp_path / "status.json").write_bytes(damage)
        with pytest.raises(InvalidRequest, match="cannot be read"):
            file.read()
    (tmp_path / "status.json").write_bytes(b" " * ((4 << 20) + 1))
    with pytest.raises(InvalidRequest, match="too large"):
        file.read()


def test_a_file_belongs_to_one_worker_until_it_ends(tmp_path: Path) -> None:
    first, second, reader = (StatusFile(tmp_path) for _ in range(3))
    assert first.claim()
    assert not second.claim()
    assert reader.is_claimed()
    first.write(status())
    assert reader.read() == status()
    first.release()
    assert not reader.is_claimed()
    assert reader.read() == status()
    assert second.claim()
    second.release()


def test_a_worker_that_is_killed_lets_go_of_its_file(tmp_path: Path) -> None:
    holds = (
        "import sys, pathlib; from shoal.worker.status import StatusFile; "
        "file = StatusFile(pathlib.Path(sys.argv[1])); print(file.claim(), flush=True); "
        "sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holds, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "True\n"
        assert StatusFile(tmp_path).is_claimed()
        child.kill()
        child.wait()
    assert not StatusFile(tmp_path).is_claimed()


class World:
    """A worker at work for an orchestrator in this process; its file is written when told."""

    def __init__(self, folder: Path) -> None:
        self.hub = MemoryHub()
        self.double = OrchestratorDouble(MemoryNetwork(self.hub, ORCHESTRATOR), ORCHESTRATOR)
        self.engine = ScriptedEngine()
        self.account = EthAccount.create()
        address = f"/memory/1/p2p/{ORCHESTRATOR.peer_id}"
        chain = MemoryChain(self.account.address)

        async def connect(_: object) -> ProviderChain:
            return chain

        config = load_config(
            None, {}, {"orchestrator": address, "data_dir": folder, "price.rollout": "0.0001"}
        )
        self.worker = WorkerNode(
            config,
            Parts(
                network=MemoryNetwork(self.hub, WORKER, listens=False),
                credentials=Credentials(account=self.account, identity=WORKER),
                connect_chain=connect,
                blobs=MemoryBlobs(folder / "blobs"),
                engine=self.engine,
                device="cpu",
                time=ManualTime(NOW_MS),
            ),
        )
        self.file = StatusFile(folder)
        self.stop = asyncio.Event()

    def told(self) -> WorkerStatus:
        self.worker.reporter.refresh()
        return self.file.read()

    async def beats(self, condition: Callable[[], bool]) -> None:
        """Returns after the beat that makes ``condition`` true."""
        while not condition():
            await self.double.inbox.beats.get()


def test_a_running_workers_file_says_what_it_does(tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(tmp_path)
        await world.double.network.start()
        running = asyncio.create_task(world.worker.run(world.stop))
        async with asyncio.timeout(20):
            await world.double.inbox.joins.get()
            await world.beats(lambda: world.worker.idle_reason is not None)
            told = world.told()
            assert (told.session, told.num_joins, told.leases) == (SessionState.JOINED, 1, ())
            assert told.address == f"/memory/1/p2p/{ORCHESTRATOR.peer_id}"
            assert told.pid == os.getpid()
            assert world.file.is_claimed()

            detail = IdleDetail(needed_stake_micros=420_000, free_stake_micros=100_000)
            world.double.beat = world.double.beat.model_copy(
                update={"idle_reason": IdleReason.STAKE_TOO_SMALL, "idle_detail": detail}
            )
            await world.beats(lambda: world.worker.idle_detail is not None)
            assert "needs $0.42 and $0.10 is free" in idle_words(world.told())

            world.engine.free.clear()
            account = world.account.address
            offer = world.double.offer(make_task(ROLLOUT), account, WORKER.peer_id)
            await world.double.send(offer, WORKER.peer_id)
            await world.beats(lambda: bool(world.worker.assignments()))
            (lease,) = world.told().leases
            assert lease.lease_id == offer.lease.record.lease_id
            assert lease.ends_ms > lease.came_ms
            world.engine.free.set()
            message = await world.double.inbox.results.get()
            verdict = world.double.verdict(message)
            world.double.beat = world.double.beat.model_copy(update={"verdicts": (verdict,)})
            await world.beats(lambda: world.worker.reporter.status().pay.accepted == 1)
            told = world.told()
            assert told.leases == ()
            assert told.pay.earned_micros == verdict.record.pay_micros > 0
            assert told.verdicts[0].lease_id == lease.lease_id
            world.stop.set()
            await running
        told = world.file.read()
        assert told.ended == "it was told to stop"
        assert not world.file.is_claimed()

    asyncio.run(scenario())


def test_a_worker_that_cannot_go_on_says_why(tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(tmp_path)

        async def refuse(peer: PeerId, payload: bytes) -> bytes:
            raise Unauthorised("No stake.")

        world.double.network.serve(JOIN_PROTOCOL, refuse)
        await world.double.network.start()
        with pytest.raises(ShoalError):
            await asyncio.wait_for(world.worker.run(world.stop), 20)
        assert world.file.read().ended == "No stake."

    asyncio.run(scenario())


def test_nothing_is_written_while_nothing_changes_and_a_full_disk_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(tmp_path)
    reporter = world.worker.reporter
    writes: list[WorkerStatus] = []
    monkeypatch.setattr(StatusFile, "write", lambda self, status: writes.append(status))
    reporter.refresh()
    assert writes == []  # not ours before it is claimed
    reporter._is_ours = True
    reporter.refresh()
    reporter.refresh()
    assert len(writes) == 1

    def full(self: StatusFile, status: WorkerStatus) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(StatusFile, "write", full)
    reporter._written = None
    reporter.refresh()
    reporter.refresh()
    reporter.close("it was told to stop")
