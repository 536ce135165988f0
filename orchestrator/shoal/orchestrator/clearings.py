"""Lots cleared over the present book: once each, and again where their work needs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from shoal.market.certificate import Session, clear_and_certify
from shoal.market.clearing import Auction, Cleared, Refusal, parcels_of
from shoal.market.frozen import TermsTable
from shoal.market.pricing import next_posted_price
from shoal.market.reserve import raised
from shoal.orchestrator.context import Context
from shoal.orchestrator.placement import Parcel, Placement
from shoal.orchestrator.sealer import SealedMarket, Sealer
from shoal.orchestrator.store.tables import CertificateRow
from shoal.orchestrator.track_record import TrackRecord
from shoal.orchestrator.workload import Workload
from shoal.protocol.canonical import canonical_bytes
from shoal.protocol.certificate import ClearingCertificate, ClearingRule, ReserveTerms
from shoal.protocol.errors import Unavailable
from shoal.protocol.market import TaskKind
from shoal.protocol.signing import sign


class Clearings:
    """Auctions lots and keeps the prices posted for each job and kind.

    Args:
        context: The orchestrator's surroundings.
        sealer: Whose book lots are cleared over.
        record: What receipts and stake say of the bidders.
        can_take: Whether a node may be leased so many units of a workload now, and has room.
    """

    def __init__(
        self,
        context: Context,
        sealer: Sealer,
        record: TrackRecord,
        can_take: Callable[[Workload, str, int], bool],
    ) -> None:
        self._context = context
        self._sealer = sealer
        self._record = record
        self._can_take = can_take
        self._posted: dict[tuple[str, TaskKind], int] = {}

    def forget(self, job_id: str) -> None:
        """No price is posted for the job any more."""
        for kind in TaskKind:
            self._posted.pop((job_id, kind), None)

    def placement(self, workload: Workload, parcel: Parcel) -> Placement | None:
        """The lot's clearing, made anew for another book, or where the parcel needs it."""
        market, placement = self._sealer.market, workload.placement
        if market is None:
            return placement
        reserve = workload.reserve
        if placement is not None and placement.needs_clearing(parcel):
            if placement.ladder.raises_reserve(parcel):
                reserve = raised(reserve)
        elif (
            placement is not None
            and placement.epoch == market.book.epoch
            and not self._is_shut(market, placement, workload, parcel)
        ):
            return placement
        workload.placement = self._clear(workload, reserve, parcel)
        workload.reserve = reserve
        return workload.placement

    def _is_shut(
        self, market: SealedMarket, placement: Placement, workload: Workload, parcel: Parcel
    ) -> bool:
        """Whether all whom the posted price lets in are away or busy, and it keeps out who is not.

        Then the price is too low for the work that waits, whatever was offered in all.
        """
        size = len(parcel)
        return not any(
            self._can_take(workload, node, size) for node in placement.ladder.nodes
        ) and self._keeps_out(market, placement.refused, workload, size)

    def _keeps_out(
        self,
        market: SealedMarket,
        refused: Mapping[bytes, Refusal],
        workload: Workload,
        num_units: int,
    ) -> bool:
        """Whether somebody who could take the units now asks more than the posted price."""
        kept_out = {
            digest for digest, refusal in refused.items() if refusal is Refusal.ABOVE_POSTED_PRICE
        }
        return bool(kept_out) and any(
            entry.digest in kept_out and self._can_take(workload, entry.bid.node, num_units)
            for entry in market.book.opened
        )

    def _clear(self, workload: Workload, reserve: ReserveTerms, parcel: Parcel) -> Placement:
        """What waits of the lot, and the parcel, is auctioned over the present book, once."""
        terms = self._record.terms(workload)
        sizes = [len(units) for units in {*workload.waiting, parcel}]
        cleared, certificate, posted_micros = self._auction(
            workload, reserve, sizes, terms, len(parcel)
        )
        signed = sign(certificate, self._context.domain, self._context.account)
        row = CertificateRow(
            sha256=certificate.digest(),
            job_id=workload.lot.job_id,
            lot_id=workload.lot.lot_id,
            epoch=certificate.epoch,
            certificate=signed.encode().decode(),
            terms=canonical_bytes([row.to_json() for row in terms.rows]).decode(),
            issued_ms=certificate.issued_at_ms,
        )
        before = workload.placement
        # Written with the lease that cites it; what is cleared again to the same end is there.
        if row.sha256 not in workload.certified:
            workload.unwritten.append(row)
            workload.untold.append(signed)
            workload.certified.add(row.sha256)
        # A task that is only done twice is no new demand.
        if posted_micros is not None and workload.waiting:
            self._posted[workload.lot.job_id, workload.kind] = posted_micros
        earlier = {} if before is None else before.carried(workload.undelivered)
        return Placement.of(signed, cleared, earlier)

    def _auction(
        self,
        workload: Workload,
        reserve: ReserveTerms,
        sizes: list[int],
        terms: TermsTable,
        wanted_units: int,
    ) -> tuple[Cleared, ClearingCertificate, int | None]:
        """The clearing and its certificate; under the posted rule, the next lot's price too."""
        market = self._sealer.market
        if market is None:
            raise Unavailable("No bid has been sealed yet.", code="no_book")
        update = {"num_units": sum(sizes), "reserve_micros": reserve.reserve_micros}
        lot = workload.lot.model_copy(update=update)
        session = Session(
            seal=market.seal.record,
            book=market.book,
            terms=terms,
            head=market.head,
        )
        posted = self._posted.get((lot.job_id, workload.kind), lot.reserve_micros)
        while True:
            cleared, certificate = clear_and_certify(
                Auction(lot=lot, parcels=parcels_of(sizes), posted_micros=posted),
                reserve,
                session,
                issued_at_ms=self._context.time.now_ms(),
            )
            if cleared.rule is not ClearingRule.POSTED:
                return cleared, certificate, None
            nodes = {rung.node for rung in cleared.ladder.rungs()}
            refused = dict(cleared.refused)
            is_taken = any(self._can_take(workload, node, wanted_units) for node in nodes) or (
                bool(nodes) and not self._keeps_out(market, refused, workload, wanted_units)
            )
            following = next_posted_price(
                cleared.clearing_price_micros,
                demand_units=lot.num_units,
                supply_units=cleared.supply_units if is_taken else 0,
                reserve_micros=lot.reserve_micros,
            )
            # A price nobody takes is no price, nor one taken by those alone who cannot work now.
            if is_taken or following <= cleared.clearing_price_micros:
                return cleared, certificate, following
            posted = following
