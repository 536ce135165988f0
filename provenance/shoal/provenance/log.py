"""The append-only log: one Merkle root for each epoch of a job, chained into a head.

The head is what ``ProvenanceLog.anchor`` keeps in a storage slot, so one 32-byte value read
from the chain fixes every statement of the job, and their order.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from eth_abi.abi import encode as abi_encode
from eth_utils.crypto import keccak

from shoal.protocol.merkle import EMPTY_ROOT, MerkleTree, hash_leaf
from shoal.provenance.statement import StatementKind

EMPTY_HEAD = b"\0" * 32


def leaf(
    kind: StatementKind,
    payload_sha256: str,
    contributor: str,
    *,
    job_id: str,
    epoch: int,
    seq: int,
) -> bytes:
    """The leaf of one statement.

    ``keccak(keccak(abi.encode(string kind, bytes32 sha256(payload), address contributor,
    bytes32 jobId, uint64 epoch, uint64 seq)))``; ``seq`` counts from 0 within the epoch.

    Source: docs/architecture, "Provenance"; test vectors in tests/vectors.
    """
    return hash_leaf(
        abi_encode(
            ["string", "bytes32", "address", "bytes32", "uint64", "uint64"],
            [
                kind.value,
                bytes.fromhex(payload_sha256),
                # Lower case, since mixed case is refused unless its checksum holds.
                contributor.lower(),
                bytes.fromhex(job_id.removeprefix("0x")),
                epoch,
                seq,
            ],
        )
    )


def next_head(head: bytes, root: bytes, num_leaves: int) -> bytes:
    """The head after one anchor.

    Source: ``ProvenanceLog.anchor``: ``keccak256(abi.encode(head, root, leaves))``.
    """
    return keccak(abi_encode(["bytes32", "bytes32", "uint64"], [head, root, num_leaves]))


def replay_head(anchors: Iterable[tuple[bytes, int]]) -> bytes:
    """The head after all ``(root, number of leaves)`` in order; zeros when there are none."""
    head = EMPTY_HEAD
    for root, num_leaves in anchors:
        head = next_head(head, root, num_leaves)
    return head


class EpochLog:
    """The statements of one job and epoch, in the order in which they were appended.

    Args:
        job_id: The job.
        epoch: The escrow's epoch number, which counts from 1.
    """

    def __init__(self, job_id: str, epoch: int) -> None:
        self._job_id = job_id
        self._epoch = epoch
        self._leaves: list[bytes] = []

    def __len__(self) -> int:
        return len(self._leaves)

    def append(self, kind: StatementKind, payload_sha256: str, contributor: str) -> int:
        """The statement is the log's last; its ``seq``."""
        seq = len(self._leaves)
        self._leaves.append(
            leaf(
                kind,
                payload_sha256,
                contributor,
                job_id=self._job_id,
                epoch=self._epoch,
                seq=seq,
            )
        )
        return seq

    @property
    def leaves(self) -> Sequence[bytes]:
        """The leaf hashes, in order."""
        return tuple(self._leaves)

    @property
    def root(self) -> bytes:
        """The epoch's root; 32 zero bytes when nothing was appended."""
        return MerkleTree(self._leaves).root if self._leaves else EMPTY_ROOT

    def proof(self, seq: int) -> list[bytes]:
        """The sibling hashes from statement ``seq`` up to the root."""
        return MerkleTree(self._leaves).proof(seq)
