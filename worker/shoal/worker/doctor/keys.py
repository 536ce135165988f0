"""The two keys on disk: there, private, open to this passphrase, and backed up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

from eth_utils.address import to_checksum_address

from shoal.network.identity import NodeIdentity
from shoal.protocol.errors import InvalidRequest, Unauthorised
from shoal.protocol.keystore import PASSPHRASE_VARIABLE, load_account
from shoal.worker.backup import BackupNote, read_note
from shoal.worker.config import WorkerConfig
from shoal.worker.doctor.report import Finding, fail, ok, warn

_MAX_KEYSTORE_BYTES: Final = 64 << 10
_OTHERS: Final = 0o077


def look_at_keys(config: WorkerConfig) -> list[Finding]:
    """Whether the worker's keys can be used, and would survive the disk."""
    node, node_finding = _node_key(config.node_key_path)
    account, account_finding = _account_key(config.account_path)
    findings = [account_finding, node_finding]
    if account is not None:
        findings.append(judge_backup(read_note(config.folder), node, account))
    return findings


def judge_backup(note: BackupNote | None, node: str | None, account: str) -> Finding:
    """Whether the last backup holds the keys that are in use."""
    mend = "shoal worker backup FILE, and keep FILE and its passphrase elsewhere"
    if note is None:
        return warn("backup", "key backup", "none was made: the account is the money", mend)
    if note.account.lower() != account.lower():
        return warn("backup", "key backup", f"made of another account, {note.account}", mend)
    if node is not None and note.node != node:
        return warn("backup", "key backup", "made before the node key was replaced", mend)
    return ok("backup", "key backup", f"made on {note.date}")


def account_of(config: WorkerConfig) -> str | None:
    """The account's address as its keystore names it, without opening it."""
    try:
        if config.account_path.stat().st_size > _MAX_KEYSTORE_BYTES:
            return None
        address = json.loads(config.account_path.read_text())["address"]
        return str(to_checksum_address(address))
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _node_key(path: Path) -> tuple[str | None, Finding]:
    if not path.exists():
        return None, ok("node_key", "node key", "none yet; the first start makes one")
    try:
        identity = NodeIdentity.load_or_create(path)
    except InvalidRequest as error:
        return None, fail("node_key", "node key", error.message, f"chmod 600 {path}, or move it")
    return identity.peer_id, ok("node_key", "node key", f"{identity.peer_id}, only yours to read")


def _account_key(path: Path) -> tuple[str | None, Finding]:
    if not path.exists():
        return None, ok("account_key", "account key", "none yet; the first start makes one")
    mode = path.stat().st_mode & 0o777
    if mode & _OTHERS:
        return None, fail(
            "account_key", "account key", f"{path} has mode {mode:o}", f"chmod 600 {path}"
        )
    try:
        account = load_account(path)
    except Unauthorised as error:
        return None, fail("account_key", "account key", error.message, f"set {PASSPHRASE_VARIABLE}")
    except InvalidRequest as error:
        return None, fail(
            "account_key", "account key", error.message, "shoal worker restore FILE, elsewhere"
        )
    return str(account.address), ok("account_key", "account key", f"{account.address}, opens")
