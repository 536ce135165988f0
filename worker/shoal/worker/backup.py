"""The worker's two keys in one encrypted file, and back; and the note that a backup was made."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from eth_account import Account as EthAccount
from eth_account.signers.local import LocalAccount
from pydantic import Field, ValidationError

from shoal.network.identity import NodeIdentity
from shoal.protocol.errors import InvalidRequest, NotFound, Unauthorised
from shoal.protocol.ids import Address, PeerIdStr
from shoal.protocol.keystore import load_account, store_account
from shoal.protocol.record import MAX_INT, Record, first_fault
from shoal.worker.config import WorkerConfig

NOTE_NAME: Final = "backup.json"
_MAX_FILE_BYTES: Final = 64 << 10
_FORMAT: Final = "shoal worker keys 1"
_ITERATIONS: int | None = None
"""Of the keystore's key derivation; None is the library's own choice."""


class BackupNote(Record):
    """That a backup was made: when, and of which keys.  Holds no secret.

    Writer: `back_up` and `restore`.  Reader: the doctor.
    """

    at_ms: int = Field(ge=0, le=MAX_INT)
    node: PeerIdStr
    account: Address

    @property
    def date(self) -> str:
        """The day, as people write it."""
        return datetime.fromtimestamp(self.at_ms / 1_000, UTC).strftime("%Y-%m-%d")


class BackupFile(Record):
    """Both keys, each encrypted with the same passphrase.

    Writer: `back_up`.  Reader: `restore`, perhaps years later on another machine.

    ``account`` is a V3 keystore, which any Ethereum wallet reads; ``node`` a
    `NodeIdentity.sealed` key.
    """

    format: str = Field(pattern=f"^{_FORMAT}$")
    note: BackupNote
    node: str = Field(pattern=r"^([0-9a-f]{2}){1,512}$")
    account: dict[str, object]


def back_up(config: WorkerConfig, file: Path, passphrase: str, now_ms: int) -> BackupNote:
    """``file`` (mode 0600) holds the worker's keys, and the worker's folder a note of it.

    Raises:
        NotFound: there are no keys yet.
        InvalidRequest: ``file`` exists, or cannot be written; or a key is damaged.
        Unauthorised: the account's own passphrase does not open it.
    """
    _require_passphrase(passphrase)
    for path in (config.account_path, config.node_key_path):
        if not path.exists():
            raise NotFound(
                f"There is no key at {path}; start the worker once, or name its folder with "
                "--data-dir.",
                code="no_key",
            )
    account = load_account(config.account_path)
    identity = NodeIdentity.load_or_create(config.node_key_path)
    note = BackupNote(at_ms=now_ms, node=identity.peer_id, account=account.address)
    content = BackupFile(
        format=_FORMAT,
        note=note,
        node=identity.sealed(passphrase).hex(),
        account=EthAccount.encrypt(account.key, passphrase, iterations=_ITERATIONS),
    )
    _write_new(file, json.dumps(content.to_json(), indent=1) + "\n")
    _write_note(config.folder, note)
    return note


def restore(config: WorkerConfig, file: Path, passphrase: str) -> BackupNote:
    """The worker's folder holds the keys in ``file``; keys that are there already stay.

    The account is encrypted with the passphrase that the worker's own keystore takes.

    Raises:
        NotFound: there is no such file.
        InvalidRequest: it is no backup, or the folder holds other keys.
        Unauthorised: the passphrase does not open it.
    """
    content = _read(file)
    account = _open_account(content, file, passphrase)
    identity = NodeIdentity.from_sealed(bytes.fromhex(content.node), passphrase)
    _require_same(config, content.note, account.address, identity.peer_id)
    if not config.account_path.exists():
        store_account(config.account_path, account)
    identity.keep(config.node_key_path)
    _write_note(config.folder, content.note)
    return content.note


def read_note(folder: Path) -> BackupNote | None:
    """The note of the last backup; None when none was made, or the note is damaged."""
    try:
        data = (folder / NOTE_NAME).read_bytes()[:_MAX_FILE_BYTES]
        return BackupNote.model_validate_json(data)
    except (OSError, ValidationError):
        return None


def _require_passphrase(passphrase: str) -> None:
    if not passphrase:
        raise InvalidRequest(
            "A backup leaves this machine, so it needs a passphrase; set "
            "SHOAL_BACKUP_PASSPHRASE or type one.",
            code="no_passphrase",
        )


def _read(file: Path) -> BackupFile:
    try:
        if file.stat().st_size > _MAX_FILE_BYTES:
            raise InvalidRequest(f"{file} is too large to be a backup of keys.", code="no_backup")
        return BackupFile.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        raise NotFound(f"There is no file {file}; name the backup.", code="no_backup") from None
    except OSError as error:
        raise InvalidRequest(
            f"{file} cannot be read: {error.strerror}.", code="no_backup"
        ) from None
    except ValidationError as error:
        raise InvalidRequest(
            f"{file} is not a backup that `shoal worker backup` made: {first_fault(error)}.",
            code="no_backup",
        ) from None


def _open_account(content: BackupFile, file: Path, passphrase: str) -> LocalAccount:
    try:
        key = EthAccount.decrypt(content.account, passphrase)
    except ValueError:
        raise Unauthorised(f"The passphrase does not open {file}.", code="bad_passphrase") from None
    except (KeyError, TypeError):
        raise InvalidRequest(f"{file} holds no V3 keystore.", code="no_backup") from None
    account: LocalAccount = EthAccount.from_key(key)
    return account


def _require_same(config: WorkerConfig, note: BackupNote, account: str, node: str) -> None:
    if (account, node) != (note.account, note.node):
        raise InvalidRequest(
            f"The backup says it is of account {note.account} and node {note.node}, but holds "
            f"{account} and {node}; it was tampered with.",
            code="no_backup",
        )
    for path, theirs in ((config.account_path, account), (config.node_key_path, node)):
        if not path.exists():
            continue
        own = (
            load_account(path).address
            if path == config.account_path
            else NodeIdentity.load_or_create(path).peer_id
        )
        if own != theirs:
            raise InvalidRequest(
                f"{path} already holds {own}, and the backup is of {theirs}; restore into "
                "another --data-dir, or move that key away first.",
                code="other_key",
            )


def _write_new(file: Path, text: str) -> None:
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise InvalidRequest(
            f"{file} exists; a backup replaces nothing, name a new file.", code="file_exists"
        ) from None
    except OSError as error:
        raise InvalidRequest(
            f"{file} cannot be written: {error.strerror}.", code="not_written"
        ) from None
    with os.fdopen(descriptor, "w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def _write_note(folder: Path, note: BackupNote) -> None:
    draft = folder / f"{NOTE_NAME}.new"
    draft.write_bytes(note.encode())
    os.replace(draft, folder / NOTE_NAME)
