"""Identifiers, one type each, and the shapes they must have on the wire.

A `NewType` keeps a lease id from being passed where a job id is meant; the `Annotated`
twins below it are what records use, so that a malformed id is refused on arrival.
"""

from __future__ import annotations

import secrets
from typing import Annotated, NewType

from pydantic import StringConstraints

JobId = NewType("JobId", str)
"""32 bytes as ``0x`` + 64 hex: keccak(requester, job digest); the id the chain knows."""
LotId = NewType("LotId", str)
TaskId = NewType("TaskId", str)
LeaseId = NewType("LeaseId", str)
BidId = NewType("BidId", str)
PeerId = NewType("PeerId", str)
"""libp2p peer id (base58 multihash of the node's Ed25519 public key)."""
Account = NewType("Account", str)
"""EVM address in EIP-55 checksum form."""
Digest = NewType("Digest", str)
"""SHA-256, 64 lower-case hex digits, no prefix."""

Hex32 = Annotated[str, StringConstraints(pattern=r"^0x[0-9a-f]{64}$")]
Hex64 = Annotated[str, StringConstraints(pattern=r"^0x[0-9a-f]{128}$")]
Hex65 = Annotated[str, StringConstraints(pattern=r"^0x[0-9a-f]{130}$")]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Address = Annotated[str, StringConstraints(pattern=r"^0x[0-9a-fA-F]{40}$")]
ShortId = Annotated[str, StringConstraints(pattern=r"^[a-z]{2,8}_[0-9a-z]{8,64}$")]
PeerIdStr = Annotated[str, StringConstraints(pattern=r"^[1-9A-HJ-NP-Za-km-z]{30,100}$")]
Name = Annotated[str, StringConstraints(pattern=r"^[\w .:/@+=-]{1,200}$")]


def new_id(prefix: str) -> str:
    """A fresh unguessable id, e.g. ``lease_5f0c…`` (80 random bits)."""
    return f"{prefix}_{secrets.token_hex(10)}"
