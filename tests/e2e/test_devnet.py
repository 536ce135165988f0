"""The whole market as its users start it: `shoal up`, `shoal submit`, `shoal demo`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

SHORT_JOB = ("max_steps=6", "batch_size=64", "eval.interval=3", "eval.num_examples=64")


def shoal(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "shoal.client", *arguments]


@contextmanager
def devnet(folder: Path, *arguments: str) -> Iterator[tuple[dict[str, Any], subprocess.Popen[str]]]:
    """`shoal up`, ready; stopped by Ctrl-C."""
    process = subprocess.Popen(
        shoal("up", "--data", str(folder), "--json", *arguments), stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line, "shoal up ended before it was ready"
        yield json.loads(line), process
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)
        process.stdout.close()


def family(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def test_up_is_ready_soon_and_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    with devnet(tmp_path / "net") as (ready, process):
        children = family(process.pid)
        assert len(children) == 5  # the chain, the orchestrator, three workers
        assert ready["ready_s"] < 15
    assert process.returncode == 0
    assert not any(child.is_running() for child in children)
    # The same folder starts again, from its saved chain.
    with devnet(tmp_path / "net", "--workers", "1") as (again, _):
        assert again["requester_key"] == ready["requester_key"]


def test_a_killed_devnet_leaves_nothing(tmp_path: Path) -> None:
    with devnet(tmp_path / "net", "--workers", "1") as (_, process):
        children = family(process.pid)
        process.kill()
        process.wait()
        _, alive = psutil.wait_procs(children, timeout=30)
        assert not alive


def test_bad_input_costs_nothing_and_the_orchestrator_lives(tmp_path: Path) -> None:
    with devnet(tmp_path / "net", "--workers", "1") as (ready, _):
        common = ("--url", ready["api_url"], "--key", ready["requester_key"])

        def refused(*settings: str) -> tuple[int, str]:
            sets = [part for setting in settings for part in ("--set", setting)]
            done = subprocess.run(
                shoal("submit", "examples/addition.toml", *common, *sets),
                capture_output=True,
                text=True,
                check=False,
            )
            assert "Traceback" not in done.stderr
            assert len(done.stderr.splitlines()) == 1
            return done.returncode, done.stderr

        assert refused("model='no/such-model-anywhere'")[0] == 3
        assert refused("budget.max_total='1000000'")[0] == 5
        code, sentence = refused("sede=1")
        assert code == 3
        assert "'seed'" in sentence
        listed = subprocess.run(
            shoal("jobs", "--json", "--url", ready["api_url"]), capture_output=True, check=True
        )
        assert json.loads(listed.stdout) == []


@pytest.mark.timeout(600)
def test_a_short_demo_settles_and_verifies(tmp_path: Path) -> None:
    sets = [part for setting in SHORT_JOB for part in ("--set", setting)]
    done = subprocess.run(
        shoal("demo", "--out", str(tmp_path / "demo"), "--json", *sets),
        capture_output=True,
        text=True,
        check=False,
        timeout=540,
        env={**os.environ, "COLUMNS": "100"},
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary == json.loads((tmp_path / "demo/summary.json").read_text())
    assert summary["steps"] == 6
    assert summary["escrow"]["funded"] == summary["escrow"]["paid"] + summary["escrow"]["refunded"]
    assert summary["escrow"]["paid"] == sum(w["paid_micros"] for w in summary["workers"])
    assert [worker["killed"] for worker in summary["workers"]] == [False, True, False]
    assert summary["provenance"]["verified"]
    assert summary["provenance"]["statements"] > 0
    for name in (
        "adapter/adapter_model.safetensors",
        "adapter/adapter_config.json",
        "metrics.jsonl",
        "bundle.json",
    ):
        assert (tmp_path / "demo" / name).stat().st_size > 0
    # A second reader comes to the same verdict, and to the other for a changed model.
    verify = shoal(
        "provenance",
        "verify",
        str(tmp_path / "demo/bundle.json"),
        "--model",
        str(tmp_path / "demo/adapter"),
    )
    assert subprocess.run(verify, capture_output=True, check=False).returncode == 0
    weights = tmp_path / "demo/adapter/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x55")
    assert subprocess.run(verify, capture_output=True, check=False).returncode == 3
