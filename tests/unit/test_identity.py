"""The node key: its file, its name, its signatures."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from shoal.network.identity import NodeIdentity, peer_id_of, public_key_of, verify
from shoal.protocol.errors import InvalidRequest
from shoal.protocol.ids import PeerId


def test_peer_id_matches_the_published_vector() -> None:
    # libp2p specs, peer-ids/peer-ids.md, "Test vectors": the Ed25519 public key, protobuf
    # encoded, whose last 32 bytes are the raw key.
    raw = bytes.fromhex("1ed1e8fae2c4a144b8be8fd4b47bf3d3b34b871c3cacf6010f0e42d474fce27e")
    assert public_key_of(peer_id_of(raw)) == raw
    assert peer_id_of(raw).startswith("12D3KooW")


def test_key_is_made_once_with_mode_0600(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "node.pem"
    first = NodeIdentity.load_or_create(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert NodeIdentity.load_or_create(path).peer_id == first.peer_id
    assert [entry.name for entry in path.parent.iterdir()] == ["node.pem"]


def test_key_that_others_may_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "node.pem"
    NodeIdentity.load_or_create(path)
    path.chmod(0o640)
    with pytest.raises(InvalidRequest, match="chmod 600"):
        NodeIdentity.load_or_create(path)
    path.chmod(0o600)
    NodeIdentity.load_or_create(path)


@pytest.mark.parametrize("content", [b"", b"not a key", b"x" * 10_000])
def test_damaged_key_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "node.pem"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(InvalidRequest, match="does not hold an Ed25519 key"):
        NodeIdentity.load_or_create(path)
    assert path.read_bytes() == content


def test_signature_verifies_only_what_was_signed() -> None:
    node, other = NodeIdentity.generate(), NodeIdentity.generate()
    signature = node.sign(b"message")
    assert verify(node.public_key, b"message", signature)
    assert not verify(node.public_key, b"messagf", signature)
    assert not verify(other.public_key, b"message", signature)
    assert not verify(node.public_key, b"message", signature[:-1])
    assert not verify(b"short", b"message", signature)


@pytest.mark.parametrize("text", ["", "12D3KooW", "0OIl", "Qm" + "a" * 44, "1" * 10_000, "é"])
def test_malformed_peer_id_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest):
        public_key_of(PeerId(text))
