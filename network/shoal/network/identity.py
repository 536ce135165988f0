"""The node key: an Ed25519 key that names the node and signs what the node says.

The peer id is libp2p's name for the key, computed here without importing libp2p.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Final

import base58
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import (
    Ed25519PrivateKey,
    Ed25519PublicKey,
)
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from shoal.protocol.errors import InvalidRequest, Unauthorised
from shoal.protocol.ids import PeerId

PUBLIC_KEY_BYTES: Final = 32
SIGNATURE_BYTES: Final = 64
_MAX_KEY_FILE_BYTES: Final = 4096
_SEED_BYTES: Final = 32
_SALT_BYTES: Final = 16
_NONCE_BYTES: Final = 12
_TAG_BYTES: Final = 16
_SCRYPT_COST = 2**17
"""Source: OWASP Password Storage Cheat Sheet, scrypt: N = 2^17, r = 8, p = 1."""

# Identity multihash (code 0x00, length 36) of the protobuf PublicKey message
# {Type: Ed25519 (field 1 = 1), Data: 32 bytes (field 2)}.
# Source: libp2p specs, peer-ids/peer-ids.md, "Ed25519" and "Peer Ids".
_PEER_ID_PREFIX: Final = bytes([0x00, 36, 0x08, 0x01, 0x12, PUBLIC_KEY_BYTES])


def peer_id_of(public_key: bytes) -> PeerId:
    """The peer id that libp2p derives from this Ed25519 public key.

    Raises:
        InvalidRequest: The key is not 32 bytes long.

    Example:
        >>> peer_id_of(bytes(32))[:8]
        '12D3KooW'
    """
    if len(public_key) != PUBLIC_KEY_BYTES:
        raise InvalidRequest(
            f"A node's public key is {PUBLIC_KEY_BYTES} bytes, not {len(public_key)}; "
            "pass the raw Ed25519 key."
        )
    return PeerId(base58.b58encode(_PEER_ID_PREFIX + public_key).decode("ascii"))


@functools.lru_cache(maxsize=4096)
def public_key_of(peer_id: PeerId) -> bytes:
    """The 32-byte Ed25519 public key inside a peer id.

    Raises:
        InvalidRequest: The text is not the peer id of an Ed25519 key.
    """
    fault = InvalidRequest(
        f"{peer_id[:64]!r} is not the peer id of an Ed25519 key; it should begin with 12D3KooW."
    )
    if len(peer_id) > 2 * (len(_PEER_ID_PREFIX) + PUBLIC_KEY_BYTES):
        raise fault
    try:
        raw = base58.b58decode(peer_id)
    except ValueError:
        raise fault from None
    if len(raw) != len(_PEER_ID_PREFIX) + PUBLIC_KEY_BYTES or not raw.startswith(_PEER_ID_PREFIX):
        raise fault
    return raw[len(_PEER_ID_PREFIX) :]


def verify(public_key: bytes, message: bytes, signature: bytes) -> bool:
    """True when `signature` is this key's Ed25519 signature of `message`; never raises."""
    if len(public_key) != PUBLIC_KEY_BYTES or len(signature) != SIGNATURE_BYTES:
        return False
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


class NodeIdentity:
    """An Ed25519 key with the peer id it implies.

    Args:
        seed: The 32 secret bytes the key is made from.

    Example:
        >>> NodeIdentity(bytes(32)).peer_id[:8]
        '12D3KooW'
    """

    def __init__(self, seed: bytes) -> None:
        try:
            self._key = Ed25519PrivateKey.from_private_bytes(seed)
        except ValueError:
            raise InvalidRequest(
                f"A node key is made from 32 bytes, not {len(seed)}; generate a new one."
            ) from None
        self.public_key: bytes = self._key.public_key().public_bytes_raw()
        self.peer_id: PeerId = peer_id_of(self.public_key)

    @classmethod
    def generate(cls) -> NodeIdentity:
        """A fresh identity that is kept nowhere."""
        return cls(os.urandom(32))

    @classmethod
    def load_or_create(cls, path: Path) -> NodeIdentity:
        """The identity kept at `path`, made first (mode 0600) when there is none.

        Raises:
            InvalidRequest: The file is not an Ed25519 key, or others may read it.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = cls.generate()
        try:
            _write_private(path, fresh._pem())
        except FileExistsError:
            return cls._load(path)
        return fresh

    @classmethod
    def _load(cls, path: Path) -> NodeIdentity:
        mode = path.stat().st_mode
        if mode & 0o077:
            raise InvalidRequest(
                f"The node key {path} may be read by other users (mode {mode & 0o777:o}); "
                f"run: chmod 600 {path}"
            )
        fault = InvalidRequest(
            f"The file {path} does not hold an Ed25519 key in PEM form; "
            "move it away and a new key is made at the next start."
        )
        if path.stat().st_size > _MAX_KEY_FILE_BYTES:
            raise fault
        try:
            key = serialization.load_pem_private_key(path.read_bytes(), password=None)
        except (ValueError, TypeError):
            raise fault from None
        if not isinstance(key, Ed25519PrivateKey):
            raise fault
        return cls(key.private_bytes_raw())

    @classmethod
    def from_sealed(cls, sealed: bytes, passphrase: str) -> NodeIdentity:
        """The identity that `sealed` made with the same passphrase.

        Raises:
            Unauthorised: The passphrase does not open it, or it was changed.
            InvalidRequest: It has not the length of a sealed key.
        """
        if len(sealed) != _SALT_BYTES + _NONCE_BYTES + _SEED_BYTES + _TAG_BYTES:
            raise InvalidRequest(
                f"A sealed node key does not have {len(sealed)} bytes; name another backup.",
                code="no_backup",
            )
        salt, rest = sealed[:_SALT_BYTES], sealed[_SALT_BYTES:]
        try:
            seed = AESGCM(_stretch(passphrase, salt)).decrypt(
                rest[:_NONCE_BYTES], rest[_NONCE_BYTES:], None
            )
        except InvalidTag:
            raise Unauthorised(
                "The passphrase does not open the node key in the backup.", code="bad_passphrase"
            ) from None
        return cls(seed)

    def sealed(self, passphrase: str) -> bytes:
        """The key encrypted for a backup: salt, nonce, then AES-256-GCM under scrypt.

        The usual encrypted PEM stretches a passphrase by 2,048 rounds of PBKDF2 only, which
        would make it the weakest way to a passphrase that opens the account too.

        Raises:
            InvalidRequest: The passphrase is empty.
        """
        if not passphrase:
            raise InvalidRequest(
                "A backup of the node key needs a passphrase; choose one.", code="no_passphrase"
            )
        salt, nonce = os.urandom(_SALT_BYTES), os.urandom(_NONCE_BYTES)
        return (
            salt
            + nonce
            + AESGCM(_stretch(passphrase, salt)).encrypt(nonce, self.secret_seed(), None)
        )

    def keep(self, path: Path) -> None:
        """`path` holds this identity, mode 0600.

        Raises:
            InvalidRequest: Another key is there already (code ``other_key``).
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            _write_private(path, self._pem())
        except FileExistsError:
            if self._load(path).peer_id != self.peer_id:
                raise InvalidRequest(
                    f"{path} holds another node's key; move it away first.", code="other_key"
                ) from None

    def sign(self, message: bytes) -> bytes:
        """The 64-byte Ed25519 signature of `message` under this node's key."""
        return self._key.sign(message)

    def secret_seed(self) -> bytes:
        """The 32 secret bytes, for handing to the transport; never log or send them."""
        return self._key.private_bytes_raw()

    def _pem(self) -> bytes:
        return self._key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )


def _stretch(passphrase: str, salt: bytes) -> bytes:
    """The AES-256 key of a passphrase.  Source: RFC 7914 (scrypt)."""
    return Scrypt(salt=salt, length=32, n=_SCRYPT_COST, r=8, p=1).derive(passphrase.encode())


def _write_private(path: Path, content: bytes) -> None:
    """Makes `path` with mode 0600, whole or not at all; FileExistsError when it is there."""
    if path.exists():
        raise FileExistsError(path)
    draft = path.with_name(f"{path.name}.{os.getpid()}.new")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # A hard link fails when another process made the key in the meantime; both then
        # load the same one.
        os.link(draft, path)
    finally:
        draft.unlink(missing_ok=True)
