"""The command line: exit codes, one sentence for each error, JSON apart from words."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from shoal.client import command
from shoal.protocol.errors import Clock as ErrorClock
from shoal.protocol.errors import (
    Expired,
    InvalidRequest,
    OverBudget,
    ShoalError,
    Unauthorised,
    Unavailable,
)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Makes every command line raise the exception given."""

    def install(error: BaseException) -> None:
        def fail(**_: object) -> None:
            raise error

        monkeypatch.setattr(command.cli, "main", fail)

    return install


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InvalidRequest("The job is wrong."), 3),
        (Unauthorised("No right."), 4),
        (OverBudget("No money."), 5),
        (Unavailable("Not now."), 1),
        (Expired("Too late.", clock=ErrorClock.REPLY), 1),
        (KeyboardInterrupt(), 130),
        (click.Abort(), 130),
    ],
)
def test_each_error_has_its_exit_code(
    failing: Callable[[BaseException], None],
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
) -> None:
    failing(error)
    assert command.run(["jobs"]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    if isinstance(error, ShoalError):
        assert captured.err == f"shoal: {error.message}\n"


def test_errors_are_json_when_json_is_asked(
    failing: Callable[[BaseException], None], capsys: pytest.CaptureFixture[str]
) -> None:
    failing(OverBudget("No money.", balance_micros=3))
    assert command.run(["jobs", "--json"]) == 5
    captured = capsys.readouterr()
    assert captured.out == ""
    assert json.loads(captured.err) == {
        "error": "OverBudget",
        "code": "over_budget",
        "message": "No money.",
        "context": {"balance_micros": 3},
    }


def test_a_defect_shows_a_sentence_and_keeps_the_trace(
    failing: Callable[[BaseException], None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(command.DEBUG_VARIABLE, raising=False)
    failing(ZeroDivisionError("inside"))
    assert command.run(["jobs", "--json"]) == 1
    error = json.loads(capsys.readouterr().err)
    log = Path(error["context"]["log"])
    assert "ZeroDivisionError: inside" in log.read_text()
    assert "Traceback" not in error["message"]
    log.unlink()


def test_debug_shows_the_trace(
    failing: Callable[[BaseException], None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(command.DEBUG_VARIABLE, "1")
    failing(InvalidRequest("The job is wrong."))
    assert command.run(["jobs"]) == 3
    assert "Traceback" in capsys.readouterr().err


def test_a_misspelt_command_is_answered_with_the_nearest(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command.run(["submti"]) == 2
    assert "Did you mean 'submit'?" in capsys.readouterr().err


def test_an_unknown_option_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.run(["version", "--bogus"]) == 2
    assert "--bogus" in capsys.readouterr().err


def test_version_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.run(["version", "--json"]) == 0
    assert json.loads(capsys.readouterr().out).keys() == {"version", "protocol_version"}


@pytest.mark.parametrize("name", [n for n in command._COMMANDS if n != "orchestrate"])
def test_every_command_explains_itself(capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert command.run([name, "--help"]) == 0
    assert "Usage: shoal" in capsys.readouterr().out


def test_orchestrate_is_listed() -> None:
    assert isinstance(
        command.cli.get_command(click.Context(command.cli), "orchestrate"), click.Command
    )


def test_without_a_devnet_the_sentence_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SHOAL_URL", raising=False)
    assert command.run(["jobs"]) == 1
    assert "shoal up" in capsys.readouterr().err


def test_a_url_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.run(["jobs", "--url", "localhost:1"]) == 3
    assert "'localhost:1'" in capsys.readouterr().err


def test_a_missing_job_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert command.run(["submit", str(tmp_path / "none.toml")]) == 3
    assert "none.toml" in capsys.readouterr().err


def test_a_missing_bundle(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert command.run(["provenance", "verify", str(tmp_path / "bundle.json")]) == 3
    assert "cannot be read" in capsys.readouterr().err


HUGE = "9" * 5_000
JOB = str(Path(__file__).parents[2] / "examples" / "addition.toml")
SOMEBODY = "/ip4/127.0.0.1/tcp/1/p2p/12D3KooWGRUfCBWvPAfsaL3HdvLbZ8WrQAvzuX8WJtQKdZiqWyMR"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("submit --dry-run huge.toml", "huge.toml is not valid TOML"),
        (f"submit --dry-run {JOB} --set seed={HUGE}", "seed"),
        (f"plan {JOB} --pool huge.toml", "huge.toml is not valid TOML"),
        (f"plan {JOB} --model deep.json", "deep.json is not JSON"),
        (f"plan {JOB} --completion-tokens nan", "'nan' is no finite number"),
        (f"plan {JOB} --teaching-share nan", "'nan' is no finite number"),
        (f"cancel 0x{'a' * 64} --url http://127.0.0.1:1 --key deep.json", "is not a V3 keystore"),
        ("orchestrate --dry-run --config huge.toml", "huge.toml is not TOML"),
        (f"worker join {SOMEBODY} --config huge.toml --data-dir w", "cannot be read as TOML"),
        ("worker join http://[::1 --data-dir w", "'http://[::1' is neither an address"),
        (f"worker join {SOMEBODY} --data-dir deep.json/w", "cannot be written: Not a directory"),
        ("worker status --data-dir deep.json", "cannot be read: Not a directory"),
    ],
)
def test_hostile_input_ends_in_one_sentence(tmp_path: Path, arguments: str, sentence: str) -> None:
    (tmp_path / "deep.json").write_text("[" * 200_000)
    (tmp_path / "huge.toml").write_text(f"seed = {HUGE}\n")
    # As a process: the worker's and the orchestrator's commands replace the client's.
    ended = subprocess.run(
        [sys.executable, "-m", "shoal.client", *arguments.split()],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    *log, told = ended.stderr.splitlines()
    assert sentence in told
    assert all(line.startswith("{") for line in log), log
    assert ended.returncode in {2, 3}


def test_a_malformed_head(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    bundle = tmp_path / "bundle.json"
    assert command.run(["provenance", "verify", str(bundle), "--head", "0x12"]) == 3
    assert "--head" in capsys.readouterr().err


def test_a_closed_pipe_ends_the_command_quietly() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run(
        [sys.executable, "-m", "shoal.client", "version"],
        stdout=write_end,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(write_end)
    assert done.returncode == 141
    assert done.stderr == b""


def test_help_needs_no_heavy_import() -> None:
    script = (
        "import sys\n"
        "from shoal.client.command import run\n"
        "run(['--help'])\n"
        "heavy = {'torch', 'web3', 'rich', 'aiohttp', 'pydantic', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
