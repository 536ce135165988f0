"""`shoal up` on one machine: ready soon, stopped cleanly, and unmoved by bad input."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from shoal_command import Market, market, refused, run, settings, shoal

from shoal.client.demo import example_job
from shoal.contracts.anvil import Anvil
from shoal.protocol.keystore import load_or_create_account

JOB = str(example_job())
pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def one_worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Market]:
    """A market whose one worker all tests of this module share."""
    with market(tmp_path_factory.mktemp("market") / "net", "--workers", "1") as running:
        yield running


def test_up_stays_small_and_neither_ctrl_c_nor_a_kill_leaves_anything(tmp_path: Path) -> None:
    with market(tmp_path / "net") as first:
        children = first.family()
        assert len(children) == 5  # the chain, the orchestrator, three workers
        assert all(child.memory_info().rss < 700 << 20 for child in children)
    assert first.process.returncode == 0
    assert not any(child.is_running() for child in children)
    # The same folder starts again, from its saved chain.
    with market(tmp_path / "net", "--workers", "1") as again:
        assert again.ready["requester_key"] == first.ready["requester_key"]
        children = again.family()
        assert len(children) == 3
        again.process.kill()
        again.process.wait()
        _, alive = psutil.wait_procs(children, timeout=30)
        assert not alive


BAD_JOBS = (
    ("sede=1", 3, "'seed'"),
    ("max_steps='many'", 3, "max_steps"),
    ("env=[]", 3, "[[env]]"),
    ("env=[{id='additon'}]", 3, "'addition'"),
    ("budget.max_total='0'", 3, "budget.max_total is zero"),
    ("budget.max_total='0.01'", 5, "does not cover one policy update"),
    ("budget.max_total='1000000'", 5, "holds"),
    ("model='builtin:tiny-additoin'", 3, "'builtin:tiny-addition'"),
    ("model='/no/such/folder'", 3, "no such folder"),
    # Whatever the network: a hub that does not answer, or one that has no such model.
    ("model='no/such-model-anywhere'", 3, "no/such-model-anywhere"),
)


@pytest.fixture(scope="module")
def refusals(one_worker: Market) -> dict[str, tuple[int, str]]:
    """The exit code and the sentence for each bad job; two at a time, for most is start-up."""
    before = one_worker.num_jobs()

    def submit(setting: str) -> tuple[int, str]:
        return refused("submit", JOB, *one_worker.payer, *settings(setting))

    bad = [setting for setting, _, _ in BAD_JOBS]
    with ThreadPoolExecutor(2) as pool:
        found = dict(zip(bad, pool.map(submit, bad), strict=True))
    assert one_worker.num_jobs() == before
    return found


@pytest.mark.parametrize(("setting", "code", "words"), BAD_JOBS)
def test_a_bad_job_is_one_sentence_and_costs_nothing(
    one_worker: Market,
    refusals: dict[str, tuple[int, str]],
    setting: str,
    code: int,
    words: str,
) -> None:
    found, sentence = refusals[setting]
    assert (found, words in sentence) == (code, True), sentence
    assert one_worker.healthy()


def test_a_used_port_is_one_sentence(one_worker: Market, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        code, sentence = refused("up", "--data", str(tmp_path / "net"), "--port", port)
    assert (code, port in sentence) == (3, True), sentence


def test_a_devnet_that_runs_already_is_one_sentence(one_worker: Market) -> None:
    code, sentence = refused("up", "--data", str(one_worker.folder))
    assert (code, "already runs" in sentence) == (1, True), sentence
    assert one_worker.healthy()


def test_a_worker_without_stake_is_told_how_much(one_worker: Market, tmp_path: Path) -> None:
    own = ("--data-dir", str(tmp_path), "--set", f"log_file={tmp_path / 'log'}")
    code, sentence = refused("worker", "join", one_worker.url, *own)
    assert (code, "start the worker with --stake 1.00" in sentence) == (4, True), sentence
    code, sentence = refused("worker", "join", one_worker.url, *own, "--stake", "1.00")
    assert (code, "holds $0.00" in sentence) == (4, True), sentence
    done = run("worker", "unstake", one_worker.url, *own)
    assert json.loads(done.stdout) == {
        "withdrawn_micros": 0,
        "unbonding_micros": 0,
        "ready_at_s": 0,
    }
    assert one_worker.healthy()


def test_a_worker_on_another_chain_is_refused(one_worker: Market, tmp_path: Path) -> None:
    own = ("--data-dir", str(tmp_path / "own"), "--set", f"log_file={tmp_path / 'log'}")

    async def go() -> tuple[int, str]:
        other = Anvil(tmp_path / "chain")
        other.chain_id = 4242
        async with other:
            arguments = ("worker", "join", one_worker.url, *own, "--rpc-url", other.rpc_url)
            return await asyncio.to_thread(refused, *arguments)

    code, sentence = asyncio.run(go())
    assert (code, "4242" in sentence, "31337" in sentence) == (3, True, True), sentence
    assert one_worker.healthy()


def test_a_provider_looks_before_and_while_its_worker_works(
    one_worker: Market, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = ("--data-dir", str(one_worker.folder / "worker-1"))
    done = run("worker", "doctor", one_worker.url, *own, "--json")
    report = json.loads(done.stdout)
    failed = [finding for finding in report["findings"] if finding["level"] == "fail"]
    assert (done.returncode, failed, report["passed"]) == (0, [], True), done.stdout
    checks = {finding["check"] for finding in report["findings"]}
    assert checks >= {
        *("versions", "disk", "memory", "cpu", "files", "account_key", "node_key", "backup"),
        *("torch", "device", "api", "reach", "clock", "bandwidth", "nat", "blobs", "chain"),
        *("stake", "gas"),
    }

    monkeypatch.setenv("SHOAL_BACKUP_PASSPHRASE", "correct horse")
    done = run("worker", "backup", str(tmp_path / "keys"), *own)
    account = json.loads((one_worker.folder / "worker-1" / "account.json").read_text())["address"]
    assert account in done.stdout

    status = json.loads(run("worker", "status", *own, "--json").stdout)
    assert (status["running"], status["session"], status["idle"]) == (True, "joined", "no_jobs")
    assert "joined /ip4/127.0.0.1/tcp/" in status["state"]

    metrics = one_worker.text("/metrics")
    assert 'shoal_workers{state="connected"} 1.0' in metrics
    assert one_worker.healthy()


def test_a_job_is_watched_left_cancelled_and_refunded(one_worker: Market, tmp_path: Path) -> None:
    long = settings("max_steps=100000", "batch_size=64", "eval.num_examples=16")
    watching = subprocess.Popen(
        shoal("submit", JOB, "--follow", *one_worker.payer, *long),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert watching.stdout is not None
    submitted = watching.stdout.readline()
    job_id = next(word for word in submitted.split() if word.startswith("0x")).rstrip(",")
    while "version" not in watching.stdout.readline():
        pass
    watching.send_signal(signal.SIGINT)
    said, _ = watching.communicate(timeout=30)
    assert watching.returncode == 130
    assert f"shoal jobs {job_id[:12]} --follow" in said

    # The escrow is the job's while it runs, and nobody else's to cancel.
    code, sentence = refused("refund", job_id, *one_worker.payer)
    assert (code, "UTC" in sentence) == (3, True), sentence
    stranger = tmp_path / "stranger.json"
    load_or_create_account(stranger)
    assert refused("cancel", job_id, "--url", one_worker.url, "--key", str(stranger))[0] == 4

    done = run("cancel", job_id[:10], *one_worker.payer)
    assert (done.returncode, "shoal refund" in done.stdout) == (0, True), done.stderr
    assert run("jobs", job_id, "--follow", "--url", one_worker.url).returncode == 6
    refund = json.loads(run("refund", job_id, *one_worker.payer, "--json").stdout)
    view = json.loads(run("jobs", job_id, "--json", "--url", one_worker.url).stdout)
    assert view["state"] == "cancelled"
    assert refund["refunded_micros"] == view["budget_micros"] - view["committed_micros"] > 0
    assert "before" in run("refund", job_id, *one_worker.payer).stdout


def test_submit_follow_refunds_the_rest(one_worker: Market, tmp_path: Path) -> None:
    short = settings("max_steps=2", "batch_size=32", "eval.num_examples=16")
    done = run("submit", JOB, "--follow", "--json", *one_worker.payer, *short, timeout_s=120)
    assert done.returncode == 0, done.stderr
    documents = [json.loads(line) for line in done.stdout.splitlines()]
    result, refund = documents[-2:]
    job = result["job"]
    assert refund["refunded_micros"] == job["budget_micros"] - job["committed_micros"]
    assert refund["sent_now"]
    # What is downloaded says how it is opened.
    folder = tmp_path / "model"
    done = run("models", "download", job["job_id"], "-o", str(folder), "--url", one_worker.url)
    assert done.returncode == 0, done.stderr
    assert f"AutoModelForCausalLM.from_pretrained('{folder / 'base'}')" in done.stdout
    assert (folder / "bundle.json").is_file()
