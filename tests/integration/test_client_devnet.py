"""The devnet's parts with real processes and a real chain."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from shoal.client.children import Child
from shoal.client.devnet import Devnet, DevnetOptions
from shoal.protocol.errors import InvalidRequest, Unavailable
from shoal.protocol.process import claim_port

STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"  # noqa: E501
# Waits with the signal blocked: a handler that sets an event may interrupt the wait for it.
GENTLE = (
    "import signal; asked = {signal.SIGTERM}; signal.pthread_sigmask(signal.SIG_BLOCK, asked); "
    "print('up', flush=True); signal.sigtimedwait(asked, 60); print('bye', flush=True)"
)


async def started(tmp_path: Path, script: str) -> Child:
    child = await Child.start("The part", [sys.executable, "-c", script], tmp_path / "part.log")
    while child.running and "up" not in child.log_path.read_text():  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    return child


def test_a_child_is_asked_to_stop_first(tmp_path: Path) -> None:
    async def go() -> None:
        child = await started(tmp_path, GENTLE)
        await child.stop()
        assert not child.running
        assert child.log_path.read_text().split() == ["up", "bye"]

    asyncio.run(go())


def test_a_stubborn_child_is_forced(tmp_path: Path) -> None:
    async def go() -> None:
        child = await started(tmp_path, STUBBORN)
        await child.stop(grace_s=0.1)
        assert await child.wait() == -signal.SIGKILL

    asyncio.run(go())


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("import sys; sys.exit('shoal: The port is used.')", "shoal: The port is used."),
        (
            'print(\'{"event": "failed", "message": "No stake."}\'); raise SystemExit(3)',
            "No stake.",
        ),
        ("raise SystemExit(3)", "it said nothing."),
    ],
)
def test_a_child_s_last_words_are_in_the_sentence(tmp_path: Path, script: str, words: str) -> None:
    async def go() -> None:
        child = await started(tmp_path, script)
        await child.wait()
        with pytest.raises(Unavailable) as caught:
            child.require_running()
        assert words in caught.value.message

    asyncio.run(go())


def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    async def go() -> None:
        with pytest.raises(Unavailable, match="cannot be started"):
            await Child.start("The part", [str(tmp_path / "none")], tmp_path / "log")

    asyncio.run(go())


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_children_do_not_outlive_a_killed_parent(tmp_path: Path) -> None:
    script = f"""
import asyncio, sys
from pathlib import Path
from shoal.client.children import Child
async def go():
    log = Path({str(tmp_path / "log")!r})
    child = await Child.start("c", [sys.executable, "-c", {GENTLE!r}], log)
    while "up" not in log.read_text():
        await asyncio.sleep(0.01)
    print(child.pid, flush=True)
    await child.wait()
asyncio.run(go())
"""
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    handle = os.pidfd_open(pid)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    import select

    ready, _, _ = select.select([handle], [], [], 10)
    os.close(handle)
    assert ready, "the child still runs"


def test_a_used_port_is_one_sentence(tmp_path: Path) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InvalidRequest, match=f"Port {port}"):
            claim_port(port, "the API")
    assert claim_port(port, "the API") == port


async def chain_once(options: DevnetOptions) -> tuple[str, int]:
    async with Devnet.chain_only(options) as (_, deployment):
        return deployment.job_escrow, deployment.block_number


def test_the_contracts_are_deployed_once_for_the_life_of_the_folder(tmp_path: Path) -> None:
    options = DevnetOptions(data_dir=tmp_path / "net")
    first = asyncio.run(chain_once(options))
    saved = (tmp_path / "net/deployment.json").read_text()
    assert asyncio.run(chain_once(options)) == first
    assert (tmp_path / "net/deployment.json").read_text() == saved


def test_a_chain_that_lost_its_contracts_is_one_sentence(tmp_path: Path) -> None:
    options = DevnetOptions(data_dir=tmp_path / "net", num_workers=0)
    asyncio.run(chain_once(options))
    (tmp_path / "net/chain/chain.json").unlink()

    async def go() -> None:
        with pytest.raises(InvalidRequest, match="Delete the folder"):
            async with Devnet(options):
                pass

    asyncio.run(go())


def test_an_orchestrator_that_dies_at_start_is_one_sentence_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "shoal.client.devnet.module_command",
        lambda module, config, *extra: [sys.executable, "-c", "import sys; sys.exit('no luck')"],
    )
    devnet = Devnet(DevnetOptions(data_dir=tmp_path / "net", num_workers=2))

    async def go() -> None:
        with pytest.raises(Unavailable, match="no luck"):
            async with devnet:
                pass
        assert not any(child.running for child in devnet.workers.values())

    asyncio.run(go())
    with devnet.folder.locked():
        pass
