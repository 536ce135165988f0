"""A lot's clearing at work: the certificate that priced it, and the ladder that places it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from shoal.market.clearing import Cleared, Refusal
from shoal.market.ladder import RunningLadder
from shoal.protocol.certificate import ClearingCertificate, Rung
from shoal.protocol.ids import Account, Digest
from shoal.protocol.market import Award, Lease
from shoal.protocol.signing import Signed

Parcel = tuple[int, ...]
"""Units of a workload that always make one task together, whoever does it."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """What one clearing says of a lot: who is given its parcels, at what pay.

    ``failed`` are the parcels that failed since.
    """

    certificate: Signed[ClearingCertificate]
    sha256: Digest
    ladder: RunningLadder[Parcel]
    refused: dict[bytes, Refusal]
    failed: set[Parcel] = field(default_factory=set)

    @classmethod
    def of(
        cls,
        certificate: Signed[ClearingCertificate],
        cleared: Cleared,
        earlier: Mapping[Parcel, int],
    ) -> Placement:
        """The clearing, ready to place parcels, which bring their ``earlier`` failures."""
        return cls(
            certificate=certificate,
            sha256=certificate.record.digest(),
            ladder=RunningLadder(cleared.ladder.rungs(), earlier=earlier),
            refused=dict(cleared.refused),
        )

    @property
    def epoch(self) -> int:
        """The market epoch whose book was cleared."""
        return self.certificate.record.epoch

    def needs_clearing(self, parcel: Parcel) -> bool:
        """Whether the parcel failed since, and only a new clearing can place it again.

        Without a failure since, the same book would only be cleared to the same end.
        """
        return parcel in self.failed and self.ladder.needs_clearing(parcel, len(parcel))

    def carried(self, parcels: Iterable[Parcel]) -> dict[Parcel, int]:
        """The failures that these parcels bring to the lot's next clearing."""
        return {parcel: failures for parcel in parcels if (failures := self.ladder.carried(parcel))}

    def note_failure(self, parcel: Parcel, lease: Lease) -> None:
        """The parcel failed under the lease; it goes to a rung below the one the lease cites."""
        self.failed.add(parcel)
        if lease.certificate_sha256 == self.sha256:
            self.ladder.note_failure(parcel, lease.rung)
        else:
            self.ladder.note_earlier_failure(parcel)

    def award(self, rung: Rung, num_units: int) -> Award:
        """The rung's right to a task of this many units."""
        return Award(
            lot_id=self.certificate.record.lot.lot_id,
            certificate_sha256=self.sha256,
            rung=rung.rung,
            account=Account(rung.account),
            node=rung.node,
            num_units=num_units,
            unit_price_micros=rung.pay_micros,
        )
