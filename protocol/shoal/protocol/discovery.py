"""Who can be found where: the messages of the distributed table of providers.

Each node that can be dialled keeps a share of the table (Kademlia)::

    /shoal/find/1       anyone → node       FindRequest     → FindReply
    /shoal/provide/1    provider → node     ProvideRequest  → ProvideReply

A key is a SHA-256: a blob's digest, or a name known to all such as `ORCHESTRATORS_KEY`.
"""

from __future__ import annotations

import hashlib
from typing import Annotated

from pydantic import Field, StringConstraints

from shoal.protocol.ids import PeerIdStr, Sha256
from shoal.protocol.record import Record

FIND_PROTOCOL = "/shoal/find/1"
PROVIDE_PROTOCOL = "/shoal/provide/1"

ORCHESTRATORS_KEY = hashlib.sha256(b"shoal orchestrators/1").hexdigest()
"""The key that orchestrators provide, so that a worker with no address finds some."""

MAX_ADDRESSES = 4
MAX_CLOSER = 20
MAX_PROVIDERS = 16
MAX_FIND_BYTES = 64 << 10
MAX_PROVIDE_BYTES = 4 << 10

PeerAddress = Annotated[str, StringConstraints(pattern=r"^/[!-~]{1,299}$")]


class Contact(Record):
    """A peer and where it may be dialled.

    Writer: whoever tells of it, who need not be that peer.  Reader: whoever looks something
    up, and checks each address before it dials any.
    """

    peer: PeerIdStr
    addresses: tuple[PeerAddress, ...] = Field(max_length=MAX_ADDRESSES)


class FindRequest(Record):
    """Asks who provides ``key`` and who may know more.

    Writer: anyone.  Reader: a node with a share of the table.  ``addresses`` are the caller's
    own; without any it can not be dialled and is told to nobody.
    """

    key: Sha256
    addresses: tuple[PeerAddress, ...] = Field(default=(), max_length=MAX_ADDRESSES)


class FindReply(Record):
    """Writer: the node asked.  ``closer`` are the nodes it knows nearest to the key."""

    providers: tuple[Contact, ...] = Field(max_length=MAX_PROVIDERS)
    closer: tuple[Contact, ...] = Field(max_length=MAX_CLOSER)


class ProvideRequest(Record):
    """The sender provides ``key`` at ``addresses``, or no longer does if there are none.

    Writer: the provider itself; the connection proves who it is.  Reader: a node near the key.
    """

    key: Sha256
    addresses: tuple[PeerAddress, ...] = Field(max_length=MAX_ADDRESSES)


class ProvideReply(Record):
    """Writer: the node asked.  The record lapses after ``ttl_s`` unless provided again."""

    ttl_s: int = Field(ge=0, le=86_400)
