"""Clearing and signature checks, in CPU seconds of one thread.

``python -m benchmarks.market`` prints two tables; see README.md beside this file.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Callable

import numpy as np
from eth_account import Account as EthAccount

from shoal.market.certificate import Chainhead, Session, clear_and_certify
from shoal.market.clearing import Auction, parcels_of
from shoal.market.frozen import FrozenBook, OpenedBid, TermsTable
from shoal.market.reserve import reserve_for
from shoal.market.seal import SealedEpoch
from shoal.protocol.certificate import BidderTerms
from shoal.protocol.market import ANY_JOB, Bid, Lot, LotClass, TaskKind
from shoal.protocol.merkle import keccak
from shoal.protocol.signing import Domain, Signed, sign, signing_digest

NOW_MS = 1_700_000_000_000
RESERVE = 200
EPOCH = 7
BID_BYTES = 352
"""A bid in EIP-712's encoding: its type and ten fields, 32 bytes each."""
_BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"


def cpu_s(work: Callable[[], object], rounds: int) -> float:
    """The least CPU time of ``rounds``; what others do to the machine only adds."""
    times = []
    for _ in range(rounds):
        begin = time.process_time()
        work()
        times.append(time.process_time() - begin)
    return min(times)


def opened_bids(count: int) -> list[OpenedBid]:
    """As many different bids of as many providers, already shown.

    Their digests are stand-ins: a bid's digest is computed when it is shown, not here.
    """
    rng = random.Random(count)
    made = []
    for number in range(count):
        record = Bid.model_construct(
            job_id=ANY_JOB,
            kind=TaskKind.ROLLOUT,
            epoch_from=0,
            epoch_to=100,
            price_micros=rng.randint(20, RESERVE - 20),
            capacity=rng.randint(1, 8),
            account=f"0x{number + 1:040x}",
            node="12D3KooW" + "".join(_BASE58[number // 58**k % 58] for k in range(40)),
            valid_until_ms=NOW_MS + 60_000,
            nonce=number,
        )
        digest, salt = keccak(b"%d" % number), keccak(b"salt %d" % number)
        made.append(
            OpenedBid(
                signed=Signed[Bid].model_construct(record=record, signature="0x" + "00" * 65),
                digest=digest,
                commitment=keccak(digest + salt),
                salt=salt,
            )
        )
    return made


def bidder_terms(opened: list[OpenedBid]) -> list[BidderTerms]:
    """A record for each provider, with a handicap of its own."""
    return [
        BidderTerms.model_construct(
            account=entry.bid.account,
            node=entry.bid.node,
            handicap_micros=number % 20,
            bound_units=8,
            num_receipts=number % 100,
            staked=True,
        )
        for number, entry in enumerate(opened)
    ]


def clearing_row(count: int, units: int, rounds: int) -> str:
    """One line of the table: what an epoch and a lot of it cost."""
    opened = opened_bids(count)
    terms = TermsTable(bidder_terms(opened))
    book = FrozenBook(EPOCH, opened)
    sealed = SealedEpoch.of(EPOCH, [entry.commitment for entry in opened], sealed_at_ms=NOW_MS)

    def epoch() -> None:
        frozen = FrozenBook(EPOCH, opened)
        table = TermsTable(terms.rows)
        SealedEpoch.of(EPOCH, [entry.commitment for entry in opened], sealed_at_ms=NOW_MS)
        _ = frozen.reveal_root, frozen.salts_hash, table.handicap_root, table.sha256

    lot = Lot(
        lot_id="lot_0123456789",
        job_id="0x" + "ab" * 32,
        epoch=1,
        lot_class=LotClass(
            kind=TaskKind.ROLLOUT,
            environment_sha256="1" * 64,
            policy_sha256="2" * 64,
            token_bucket=64,
        ),
        num_units=units,
        reserve_micros=RESERVE,
    )
    head = Chainhead(block_hash="0x" + "b1" * 32, block_number=1)
    session = Session(seal=sealed.seal, book=book, terms=terms, head=head)
    auction = Auction(lot=lot, parcels=parcels_of([1] * units), posted_micros=RESERVE)
    reserve = reserve_for(RESERVE)
    _ = book.reveal_root, book.salts_hash, terms.handicap_root, terms.sha256

    def one_lot() -> None:
        _, certificate = clear_and_certify(auction, reserve, session, issued_at_ms=NOW_MS)
        certificate.digest()

    encoded = [bytes([number % 256]) * BID_BYTES for number in range(count)]
    prices = book.price_micros

    def baseline() -> None:
        np.argsort(prices)
        for item in encoded:
            keccak(item)

    least, lot_s, epoch_s = cpu_s(baseline, rounds), cpu_s(one_lot, rounds), cpu_s(epoch, 1)
    scale = 1e9 / (count * math.log2(count))
    return (
        f"| {count:,} | {least * 1e3:.1f} | {lot_s * 1e3:.1f} | {lot_s / least:.2f} | "
        f"{lot_s * scale:.0f} | {epoch_s * 1e3:.0f} |"
    )


def signature_rows(rounds: int) -> list[str]:
    """EIP-712 checks and signatures per second."""
    domain = Domain(chain_id=31337, escrow="0x" + "5" * 40)
    accounts = [EthAccount.from_key(number.to_bytes(32, "big")) for number in range(1, 9)]
    bids = [entry.bid for entry in opened_bids(200)]
    signed = [sign(bid, domain, accounts[n % 8]) for n, bid in enumerate(bids)]
    measured = {
        "check (`Signed.signer`)": lambda: [item.signer(domain) for item in signed],
        "sign": lambda: [sign(bid, domain, accounts[0]) for bid in bids],
        "digest alone": lambda: [signing_digest(bid, domain) for bid in bids],
    }
    return [
        f"| {name} | {len(bids) / cpu_s(work, rounds):,.0f} |" for name, work in measured.items()
    ]


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bids", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--units", type=int, default=1_000)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    print("| bids | sort + hash, ms | lot, ms | ratio | lot ÷ n log₂ n, ns | epoch, ms |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: |")
    for count in options.bids:
        print(clearing_row(count, options.units, options.rounds), flush=True)
    print("\n| EIP-712, bids | per second |\n| --- | ---: |")
    print("\n".join(signature_rows(options.rounds)))


if __name__ == "__main__":
    main()
