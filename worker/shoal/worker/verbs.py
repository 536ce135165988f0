"""What ``shoal worker`` does beside working: doctor, status, backup and restore."""

from __future__ import annotations

import getpass
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from shoal.protocol.clock import SystemTime
from shoal.protocol.errors import InvalidRequest
from shoal.protocol.keystore import PASSPHRASE_VARIABLE
from shoal.worker.backup import BackupNote, back_up, restore
from shoal.worker.config import WorkerConfig
from shoal.worker.doctor.report import show
from shoal.worker.doctor.visit import visit_really
from shoal.worker.status import StatusFile
from shoal.worker.status_view import show_status, status_json

BACKUP_VARIABLE = "SHOAL_BACKUP_PASSPHRASE"
"""For a backup of keys that lie without a passphrase, or under another one."""

Prompt = Callable[[str], str]


async def run_doctor(config: WorkerConfig, *, as_json: bool) -> int:
    """The report is on standard output; 0, or 1 where something keeps the worker from working."""
    report = await visit_really(config)
    if as_json:
        _print_json(report.to_json())
    else:
        show(report, Console(highlight=False))
    return report.exit_code


def tell_status(config: WorkerConfig, *, as_json: bool) -> int:
    """What the worker in the folder does is on standard output.

    Raises:
        NotFound: no worker ever ran there.
        InvalidRequest: its file is damaged.
    """
    file = StatusFile(config.folder)
    # In this order: a worker that ends in between is told as running, with what it said last.
    running = file.is_claimed()
    status = file.read()
    now_ms = SystemTime().now_ms()
    if as_json:
        _print_json(status_json(status, running=running, now_ms=now_ms))
    else:
        show_status(status, Console(highlight=False), running=running, now_ms=now_ms)
    return 0


def run_backup(config: WorkerConfig, file: Path, *, as_json: bool) -> int:
    """The keys are in ``file``, encrypted."""
    passphrase = ask_passphrase("Passphrase for the backup: ", again=True)
    note = back_up(config, file, passphrase, SystemTime().now_ms())
    _tell(
        note,
        f"{file} holds the keys of account {note.account} and node {note.node}. Keep it and its "
        "passphrase on another machine.",
        as_json=as_json,
    )
    return 0


def run_restore(config: WorkerConfig, file: Path, *, as_json: bool) -> int:
    """The worker's folder holds the keys in ``file``."""
    note = restore(config, file, ask_passphrase("Passphrase of the backup: ", again=False))
    _tell(
        note,
        f"{config.folder} holds the keys of account {note.account} and node {note.node}, backed "
        f"up on {note.date}.",
        as_json=as_json,
    )
    return 0


def ask_passphrase(question: str, *, again: bool, prompt: Prompt = getpass.getpass) -> str:
    """The passphrase in the environment, or one that somebody types.

    Raises:
        InvalidRequest: neither; or the two that were typed differ.
    """
    for variable in (BACKUP_VARIABLE, PASSPHRASE_VARIABLE):
        if os.environ.get(variable):
            return os.environ[variable]
    if not sys.stdin.isatty():
        raise InvalidRequest(
            f"There is no terminal to type a passphrase at; set {BACKUP_VARIABLE}.",
            code="no_passphrase",
        )
    typed = prompt(question)
    if again and prompt("Once more: ") != typed:
        raise InvalidRequest("The two passphrases differ; try again.", code="passphrases_differ")
    return typed


def _tell(note: BackupNote, sentence: str, *, as_json: bool) -> None:
    if as_json:
        _print_json(note.to_json())
    else:
        sys.stdout.write(sentence + "\n")


def _print_json(data: object) -> None:
    sys.stdout.write(json.dumps(data, indent=2) + "\n")
