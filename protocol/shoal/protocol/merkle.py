"""The one Merkle tree of Shoal: payouts and provenance both use it.

Leaves are double-hashed and pairs are sorted, so that a proof needs no positions and an
inner node can never be passed off as a leaf.

Source: OpenZeppelin ``MerkleProof`` (sorted pairs) and its ``merkle-tree`` package
(double-hashed ``abi.encode`` leaves).  An odd node is promoted unchanged, which is valid
under the same verification rule.
"""

from __future__ import annotations

from collections.abc import Sequence

from eth_abi.abi import encode as abi_encode
from tiny_keccak import keccak256 as keccak

from shoal.protocol.errors import InvalidRequest

__all__ = [
    "EMPTY_ROOT",
    "MerkleTree",
    "hash_leaf",
    "hex32",
    "keccak",
    "payout_leaf",
    "unhex",
    "verify",
    "word",
]

EMPTY_ROOT = b"\0" * 32
_WORD_BYTES = 32


def hash_leaf(encoded: bytes) -> bytes:
    """``keccak(keccak(encoded))``."""
    return keccak(keccak(encoded))


def word(value: int) -> bytes:
    """``value`` as Solidity's ``abi.encode`` writes an unsigned integer: 32 bytes."""
    return value.to_bytes(_WORD_BYTES, "big")


def hex32(data: bytes) -> str:
    """``data`` as records write it: ``0x`` and lower-case hex."""
    return "0x" + data.hex()


def unhex(text: str) -> bytes:
    """The bytes of ``0x…`` hex that a record has already checked."""
    return bytes.fromhex(text[2:])


def _hash_pair(a: bytes, b: bytes) -> bytes:
    return keccak(a + b) if a < b else keccak(b + a)


class MerkleTree:
    """A tree over 32-byte leaf hashes, in the order given.

    Example:
        >>> tree = MerkleTree([hash_leaf(b"a"), hash_leaf(b"b"), hash_leaf(b"c")])
        >>> verify(tree.root, hash_leaf(b"b"), tree.proof(1))
        True
    """

    def __init__(self, leaves: Sequence[bytes]) -> None:
        if any(len(leaf) != 32 for leaf in leaves):
            raise InvalidRequest("A Merkle leaf is not 32 bytes long.", code="bad_leaf")
        self._levels: list[list[bytes]] = [list(leaves)]
        while len(self._levels[-1]) > 1:
            below = self._levels[-1]
            above = [
                keccak(a + b) if a < b else keccak(b + a)
                for a, b in zip(below[::2], below[1::2], strict=False)
            ]
            if len(below) % 2:
                above.append(below[-1])
            self._levels.append(above)

    def __len__(self) -> int:
        return len(self._levels[0])

    @property
    def root(self) -> bytes:
        """The root; 32 zero bytes for a tree without leaves."""
        return self._levels[-1][0] if self._levels[-1] else EMPTY_ROOT

    def proof(self, index: int) -> list[bytes]:
        """The sibling hashes from leaf ``index`` up to the root."""
        if not 0 <= index < len(self):
            raise InvalidRequest(f"The tree has no leaf {index}.", code="no_such_leaf")
        path: list[bytes] = []
        for level in self._levels[:-1]:
            sibling = index ^ 1
            if sibling < len(level):
                path.append(level[sibling])
            index //= 2
        return path


def verify(root: bytes, leaf: bytes, proof: Sequence[bytes]) -> bool:
    """Whether ``leaf`` is in the tree of ``root``."""
    node = leaf
    for sibling in proof:
        node = _hash_pair(node, sibling)
    return node == root


def payout_leaf(
    chain_id: int, escrow: str, job_id: str, account: str, cumulative_micros: int
) -> bytes:
    """The leaf `JobEscrow` checks a claim against."""
    return hash_leaf(
        abi_encode(
            ["uint256", "address", "bytes32", "address", "uint256"],
            [chain_id, escrow, bytes.fromhex(job_id[2:]), account, cumulative_micros],
        )
    )
