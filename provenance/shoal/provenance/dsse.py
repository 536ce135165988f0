"""Signed envelopes around statements.

Source: DSSE v1.0 (secure-systems-lab/dsse), protocol.md and envelope.md; Ed25519, RFC 8032.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from pydantic import ConfigDict, Field

from shoal.protocol.errors import InvalidRequest, PeerFault
from shoal.protocol.ids import PeerIdStr
from shoal.protocol.record import Record

PAYLOAD_TYPE = "application/vnd.in-toto+json"
MAX_PAYLOAD_BYTES = 128 << 10
MAX_ENVELOPE_BYTES = 200_000

_MAX_PAYLOAD_CHARS = -(-MAX_PAYLOAD_BYTES // 3) * 4
_PUBLIC_KEY_BYTES = 32
_SIGNATURE_BYTES = 64
_SIGNATURE_CHARS = 88


class EnvelopeSignature(Record):
    """One signature; ``keyid`` is the signing node's peer id."""

    keyid: PeerIdStr
    sig: str = Field(min_length=_SIGNATURE_CHARS, max_length=_SIGNATURE_CHARS)


class Envelope(Record):
    """A payload with the node's signature over it and its type.

    Writer: a worker (of its own work) or the orchestrator.  Reader: the orchestrator; whoever
    checks a bundle.  ``payload`` and ``sig`` are standard base64 with padding.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, populate_by_name=True)

    payload: str = Field(max_length=_MAX_PAYLOAD_CHARS)
    payload_type: str = Field(alias="payloadType", max_length=200)
    signatures: tuple[EnvelopeSignature, ...] = Field(min_length=1, max_length=1)

    def to_json(self) -> dict[str, Any]:
        """The envelope as plain JSON data, under DSSE's names."""
        return self.model_dump(mode="json", by_alias=True)

    def to_text(self) -> str:
        """The envelope as one line of JSON, as a result message carries it."""
        return self.encode().decode()

    @classmethod
    def from_text(cls, text: str) -> Envelope:
        """The envelope in ``text``, which came from a peer.

        Raises:
            PeerFault: ``text`` is too long or is not an envelope.
        """
        return cls.decode(text.encode("utf-8", "replace"), max_bytes=MAX_ENVELOPE_BYTES)

    @property
    def key_id(self) -> str:
        """The peer id of the node that signed."""
        return self.signatures[0].keyid

    def payload_bytes(self) -> bytes:
        """The signed bytes; not to be trusted before `verify`.

        Raises:
            PeerFault: the payload is not canonical base64.
        """
        return _decode_base64(self.payload, "payload")


def pae(payload_type: str, payload: bytes) -> bytes:
    """The pre-authentication encoding: the bytes that are signed.

    Source: DSSE protocol.md, "Signature Definition".

    Example:
        >>> pae("http://example.com/HelloWorld", b"hello world")
        b'DSSEv1 29 http://example.com/HelloWorld 11 hello world'
    """
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def sign(
    payload: bytes,
    *,
    key_id: str,
    sign: Callable[[bytes], bytes],
    payload_type: str = PAYLOAD_TYPE,
) -> Envelope:
    """``payload`` in an envelope signed by the node ``key_id``.

    Args:
        payload: The statement's bytes.
        key_id: The peer id of the node whose key signs.
        sign: Gives the 64-byte Ed25519 signature of a message under that key.
        payload_type: What the payload is.

    Raises:
        InvalidRequest: the payload is larger than a bundle's reader accepts.
    """
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise InvalidRequest(
            f"A statement of {len(payload)} bytes is larger than the {MAX_PAYLOAD_BYTES} "
            "allowed; put large arrays in a blob and name its digest.",
            code="oversize",
        )
    signature = sign(pae(payload_type, payload))
    return Envelope(
        payload=base64.b64encode(payload).decode(),
        payload_type=payload_type,
        signatures=(EnvelopeSignature(keyid=key_id, sig=base64.b64encode(signature).decode()),),
    )


def verify(envelope: Envelope, public_key: bytes) -> bytes:
    """The payload, which the holder of ``public_key`` signed.

    Raises:
        PeerFault: the type is not a statement's, the base64 is not canonical, or the
            signature is not this key's.
    """
    if envelope.payload_type != PAYLOAD_TYPE:
        raise PeerFault(
            f"The envelope's payload type is {envelope.payload_type!r}, not {PAYLOAD_TYPE!r}.",
            code="wrong_payload_type",
        )
    payload = envelope.payload_bytes()
    signature = _decode_base64(envelope.signatures[0].sig, "signature")
    if not verify_ed25519(public_key, pae(envelope.payload_type, payload), signature):
        raise PeerFault(
            f"The envelope's signature is not that of the node {envelope.key_id}.",
            code="bad_signature",
        )
    return payload


def verify_ed25519(public_key: bytes, message: bytes, signature: bytes) -> bool:
    """Whether ``signature`` is this key's Ed25519 signature of ``message``; never raises."""
    if len(public_key) != _PUBLIC_KEY_BYTES or len(signature) != _SIGNATURE_BYTES:
        return False
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


def _decode_base64(text: str, what: str) -> bytes:
    fault = PeerFault(f"The envelope's {what} is not canonical base64.", code="malformed")
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise fault from None
    # The unused bits of the last character would otherwise make two texts of one payload.
    if base64.b64encode(data).decode() != text:
        raise fault
    return data
