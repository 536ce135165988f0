"""`shoal worker backup` and `restore`: both keys, under one passphrase, and nothing replaced."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from eth_account import Account as EthAccount

from shoal.network import identity as identity_module
from shoal.network.identity import NodeIdentity
from shoal.protocol.errors import InvalidRequest, NotFound, Unauthorised
from shoal.protocol.keystore import create_account, load_account
from shoal.worker import backup, verbs
from shoal.worker.backup import back_up, read_note, restore
from shoal.worker.config import WorkerConfig, load_config

NOW_MS = 1_790_000_000_000
SECRET = "correct horse"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stretching a passphrase takes a second each time, which is its sense and not ours."""
    monkeypatch.setattr(backup, "_ITERATIONS", 2)
    monkeypatch.setattr(identity_module, "_SCRYPT_COST", 2)
    for variable in ("SHOAL_PASSPHRASE", "SHOAL_BACKUP_PASSPHRASE"):
        monkeypatch.delenv(variable, raising=False)


def configured(folder: Path) -> WorkerConfig:
    return load_config(None, {}, {"data_dir": folder})


@pytest.fixture
def config(tmp_path: Path) -> WorkerConfig:
    """A worker with keys."""
    config = configured(tmp_path / "worker")
    create_account(config.account_path)
    NodeIdentity.load_or_create(config.node_key_path)
    return config


def keys_of(config: WorkerConfig) -> tuple[str, str]:
    account = load_account(config.account_path)
    return account.address, NodeIdentity.load_or_create(config.node_key_path).peer_id


def test_both_keys_come_back_on_another_machine(config: WorkerConfig, tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    note = back_up(config, file, SECRET, NOW_MS)
    assert (note.account, note.node) == keys_of(config)
    assert file.stat().st_mode & 0o777 == 0o600
    other = configured(tmp_path / "other" / "worker")
    assert restore(other, file, SECRET) == note
    assert keys_of(other) == keys_of(config)
    for path in (other.account_path, other.node_key_path):
        assert path.stat().st_mode & 0o777 == 0o600
    # A second time changes nothing.
    assert restore(other, file, SECRET) == note


def test_the_note_says_when_and_whose_and_no_secret(config: WorkerConfig, tmp_path: Path) -> None:
    assert read_note(config.folder) is None
    note = back_up(config, tmp_path / "keys.json", SECRET, NOW_MS)
    assert read_note(config.folder) == note
    assert note.date == "2026-09-21"
    text = (config.folder / "backup.json").read_text()
    assert set(json.loads(text)) == {"at_ms", "node", "account"}
    (config.folder / "backup.json").write_text("{")
    assert read_note(config.folder) is None


def test_no_key_lies_open_in_the_backup(config: WorkerConfig, tmp_path: Path) -> None:
    back_up(config, tmp_path / "keys.json", SECRET, NOW_MS)
    content = (tmp_path / "keys.json").read_text().lower()
    account = load_account(config.account_path)
    identity = NodeIdentity.load_or_create(config.node_key_path)
    assert account.key.hex().removeprefix("0x") not in content
    assert identity.secret_seed().hex() not in content
    # The control: it would be found if it stood there.
    assert account.key.hex().removeprefix("0x") in content + account.key.hex()


def test_the_account_can_be_taken_out_by_any_wallet(config: WorkerConfig, tmp_path: Path) -> None:
    back_up(config, tmp_path / "keys.json", SECRET, NOW_MS)
    keystore = json.loads((tmp_path / "keys.json").read_text())["account"]
    assert EthAccount.decrypt(keystore, SECRET) == load_account(config.account_path).key


def test_the_wrong_passphrase_opens_nothing(config: WorkerConfig, tmp_path: Path) -> None:
    back_up(config, tmp_path / "keys.json", SECRET, NOW_MS)
    other = configured(tmp_path / "other")
    with pytest.raises(Unauthorised, match="does not open"):
        restore(other, tmp_path / "keys.json", "another")
    assert not other.folder.exists()


def test_the_restored_account_takes_the_workers_own_passphrase(
    config: WorkerConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    back_up(config, tmp_path / "keys.json", SECRET, NOW_MS)
    other = configured(tmp_path / "other")
    restore(other, tmp_path / "keys.json", SECRET)
    monkeypatch.setenv("SHOAL_PASSPHRASE", "x")
    with pytest.raises(Unauthorised):
        load_account(other.account_path)


def test_a_backup_needs_a_passphrase(config: WorkerConfig, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="needs a passphrase"):
        back_up(config, tmp_path / "keys.json", "", NOW_MS)
    with pytest.raises(InvalidRequest, match="needs a passphrase"):
        NodeIdentity.generate().sealed("")
    assert not (tmp_path / "keys.json").exists()


def test_there_must_be_keys(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="start the worker once"):
        back_up(configured(tmp_path / "none"), tmp_path / "keys.json", SECRET, NOW_MS)
    assert not (tmp_path / "none").exists()


def test_nothing_is_replaced(config: WorkerConfig, tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    file.write_text("mine")
    with pytest.raises(InvalidRequest, match="replaces nothing"):
        back_up(config, file, SECRET, NOW_MS)
    assert file.read_text() == "mine"
    file.unlink()
    back_up(config, file, SECRET, NOW_MS)
    other = configured(tmp_path / "other")
    for path in (other.account_path, other.node_key_path):
        if path == other.account_path:
            create_account(path)
        else:
            NodeIdentity.load_or_create(path)
        before = path.read_bytes()
        with pytest.raises(InvalidRequest, match="already holds"):
            restore(other, file, SECRET)
        assert path.read_bytes() == before
        path.unlink()


def test_a_file_that_cannot_be_written_is_one_sentence(
    config: WorkerConfig, tmp_path: Path
) -> None:
    with pytest.raises(InvalidRequest, match="cannot be written"):
        back_up(config, tmp_path / "none" / "keys.json", SECRET, NOW_MS)


@pytest.mark.parametrize(
    "change",
    [
        {"format": "another"},
        {"node": "zz"},
        {"node": "abc"},
        {"node": "00" * 76},
        {"node": "00"},
        {"account": {}},
        {"account": {"crypto": {"kdf": "none"}, "version": 3}},
        {"note": {}},
        {"more": 1},
    ],
)
def test_a_changed_backup_is_refused(
    config: WorkerConfig, tmp_path: Path, change: dict[str, Any]
) -> None:
    file = tmp_path / "keys.json"
    back_up(config, file, SECRET, NOW_MS)
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(InvalidRequest):
        restore(configured(tmp_path / "other"), file, SECRET)
    assert not (tmp_path / "other").exists()


def test_a_backup_of_swapped_keys_is_refused(config: WorkerConfig, tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    back_up(config, file, SECRET, NOW_MS)
    other = NodeIdentity.generate().sealed(SECRET).hex()
    file.write_text(json.dumps(json.loads(file.read_text()) | {"node": other}))
    with pytest.raises(InvalidRequest, match="tampered"):
        restore(configured(tmp_path / "other"), file, SECRET)


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff\xfe", b"{" * 100, b" " * 70_000])
def test_what_is_no_backup_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "keys.json").write_bytes(content)
    with pytest.raises(InvalidRequest):
        restore(configured(tmp_path / "other"), tmp_path / "keys.json", SECRET)
    with pytest.raises(NotFound):
        restore(configured(tmp_path / "other"), tmp_path / "none.json", SECRET)


def test_a_sealed_key_opens_for_its_passphrase_alone() -> None:
    identity = NodeIdentity.generate()
    sealed = identity.sealed(SECRET)
    assert NodeIdentity.from_sealed(sealed, SECRET).peer_id == identity.peer_id
    assert identity.sealed(SECRET) != sealed
    changed = bytes([*sealed[:-1], sealed[-1] ^ 1])
    for wrong, passphrase in ((sealed, "x"), (sealed, ""), (changed, SECRET)):
        with pytest.raises(Unauthorised):
            NodeIdentity.from_sealed(wrong, passphrase)


def test_a_passphrase_comes_from_the_environment_or_is_typed_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def ask(*typed: str, again: bool = True) -> str:
        answers = list(typed)
        return verbs.ask_passphrase("?", again=again, prompt=lambda _: answers.pop(0))

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stdin", io.StringIO())
    with pytest.raises(InvalidRequest, match="no terminal"):
        ask()
    monkeypatch.setattr("sys.stdin", Terminal())
    assert ask("one", "one") == "one"
    assert ask("one", again=False) == "one"
    with pytest.raises(InvalidRequest, match="differ"):
        ask("one", "two")
    monkeypatch.setenv("SHOAL_PASSPHRASE", "of the account")
    assert ask() == "of the account"
    monkeypatch.setenv("SHOAL_BACKUP_PASSPHRASE", "of the backup")
    assert ask() == "of the backup"
