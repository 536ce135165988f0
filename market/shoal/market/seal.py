"""A sealed epoch: all its commitments under one root, with proofs of what is in and what is not."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from shoal.protocol.errors import InvalidRequest, NotFound
from shoal.protocol.merkle import MerkleTree, hex32, unhex
from shoal.protocol.sealing import BookSeal, CommitProof, commit_leaf


class SealedEpoch:
    """The commitments of one epoch under one root.

    Args:
        seal: What the orchestrator signs.
        commitments: Sorted, as they lie in the tree.
        tree: The tree over them.
    """

    def __init__(self, seal: BookSeal, commitments: Sequence[bytes], tree: MerkleTree) -> None:
        self.seal = seal
        self.commitments = commitments
        self._tree = tree
        self._places = {commitment: n for n, commitment in enumerate(commitments)}

    @classmethod
    def of(cls, epoch: int, commitments: Sequence[bytes], *, sealed_at_ms: int) -> SealedEpoch:
        """The seal over ``commitments``, in whatever order they come."""
        ordered = sorted(set(commitments))
        count = len(ordered)
        tree = MerkleTree([commit_leaf(n, count, item) for n, item in enumerate(ordered)])
        seal = BookSeal(
            epoch=epoch,
            commit_root=hex32(tree.root),
            num_commitments=count,
            sealed_at_ms=sealed_at_ms,
        )
        return cls(seal, ordered, tree)

    def again(self, epoch: int, *, sealed_at_ms: int) -> SealedEpoch:
        """The same commitments, sealed for another epoch."""
        update = {"epoch": epoch, "sealed_at_ms": sealed_at_ms}
        return SealedEpoch(self.seal.model_copy(update=update), self.commitments, self._tree)

    def proof(self, index: int) -> CommitProof:
        """Where commitment ``index`` lies."""
        return CommitProof(
            index=index,
            commitment=hex32(self.commitments[index]),
            path=tuple(map(hex32, self._tree.proof(index))),
        )

    def inclusion(self, commitment: str) -> CommitProof:
        """Where ``commitment`` lies.

        Raises:
            NotFound: it is not in the sealed book.
        """
        place = self._places.get(unhex(commitment))
        if place is None:
            raise NotFound(
                f"Commitment {commitment} is not in the book sealed for market epoch "
                f"{self.seal.epoch}; compare the epochs of its receipt.",
                code="not_sealed",
            )
        return self.proof(place)

    def gap(self, commitment: str) -> tuple[CommitProof, ...]:
        """The neighbours between which ``commitment`` would lie, one or two of them.

        Together with the seal they prove that it is not in the book: two whose indices are
        next to each other, or the first or the last one alone.  An empty book has no
        neighbours, and needs none.

        Raises:
            InvalidRequest: the commitment is in the book.
        """
        wanted = unhex(commitment)
        if wanted in self._places:
            raise InvalidRequest(
                f"Commitment {commitment} is in the book sealed for market epoch "
                f"{self.seal.epoch}; it was not dropped.",
                code="not_dropped",
            )
        place = bisect_left(self.commitments, wanted)
        around = [n for n in (place - 1, place) if 0 <= n < len(self.commitments)]
        return tuple(self.proof(n) for n in around)
