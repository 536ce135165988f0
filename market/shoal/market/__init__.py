"""The market's pure rules: who wins a lot, who holds a lease, who is owed what.

Integers only, no I/O, and time is passed in; the orchestrator drives these functions and
keeps their records.
"""

from shoal.market.auction import Clearing, Rejection, RejectReason, clear
from shoal.market.book import BidBook, StandingBid
from shoal.market.lease import LeaseRecord, LeaseState
from shoal.market.settlement import Ledger, PayEntry, PayoutSet

__all__ = [
    "BidBook",
    "Clearing",
    "LeaseRecord",
    "LeaseState",
    "Ledger",
    "PayEntry",
    "PayoutSet",
    "RejectReason",
    "Rejection",
    "StandingBid",
    "clear",
]
