"""From accepted verdicts to what each account is owed, never more than the job holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from eth_utils.address import to_checksum_address
from pydantic import Field, model_validator

from shoal.protocol.errors import InvalidRequest, InvariantBroken, NotFound, OverBudget
from shoal.protocol.ids import Account, Address, Hex32, ShortId
from shoal.protocol.market import MAX_UNITS, Payout
from shoal.protocol.merkle import MerkleTree, payout_leaf
from shoal.protocol.money import Micros, MicrosField, format_dollars
from shoal.protocol.record import Record
from shoal.protocol.signing import Domain

MAX_PAYEES = 1_000_000


class PayEntry(Record):
    """One task's pay, from its accepted verdict.

    Writer: settlement, once per *task*: its leases cannot be paid twice.  Reader: settlement.

    ``claim_id`` names the work, whoever does it, and is the same for every lease of it, rivals
    included; absent, the task id, which then must be.
    """

    task_id: ShortId
    lease_id: ShortId
    account: Address
    pay_micros: MicrosField
    claim_id: ShortId | None = None

    @property
    def claim(self) -> str:
        """What is paid at most once."""
        return self.claim_id or self.task_id


class PayoutSet(Record):
    """Everything a job owes, account by account, at the end of an epoch.

    Writer: settlement.  Reader: the escrow, which is given the root and the total; providers,
    who claim with `proof`.  ``payouts`` are in the order of the accounts' bytes, each
    account once.
    """

    job_id: Hex32
    epoch: int = Field(ge=0, le=MAX_UNITS)
    payouts: tuple[Payout, ...] = Field(max_length=MAX_PAYEES)
    total_micros: MicrosField

    @model_validator(mode="after")
    def _is_consistent(self) -> PayoutSet:
        accounts = [payout.account.lower() for payout in self.payouts]
        if accounts != sorted(set(accounts)):
            raise ValueError("payouts are not in account order, each account once")
        if sum(payout.cumulative_micros for payout in self.payouts) != self.total_micros:
            raise ValueError("total_micros is not the sum of the payouts")
        if any(p.job_id != self.job_id or p.epoch != self.epoch for p in self.payouts):
            raise ValueError("a payout is of another job or epoch")
        return self

    def tree(self, domain: Domain) -> MerkleTree:
        """The tree the escrow checks claims against."""
        return MerkleTree(
            [
                payout_leaf(
                    domain.chain_id, domain.escrow, self.job_id, p.account, p.cumulative_micros
                )
                for p in self.payouts
            ]
        )

    def root(self, domain: Domain) -> bytes:
        """The payout root to post; 32 zero bytes while nobody is owed anything."""
        return self.tree(domain).root

    def proof(self, domain: Domain, account: str) -> tuple[Micros, list[bytes]]:
        """What the account may claim in all, and the proof of it.

        Raises:
            NotFound: the account is owed nothing.
        """
        for index, payout in enumerate(self.payouts):
            if payout.account.lower() == account.lower():
                return Micros(payout.cumulative_micros), self.tree(domain).proof(index)
        raise NotFound(
            f"Job {self.job_id} owes {account} nothing up to epoch {self.epoch}.",
            code="nothing_owed",
        )


def payout_set(job_id: str, epoch: int, owed: Iterable[tuple[str, int]]) -> PayoutSet:
    """Accounts and what they are owed in micros, as the payout set of ``epoch``.

    An account may come more than once, and in several cases: the chain knows only one.
    """
    totals: Counter[Account] = Counter()
    for account, micros in owed:
        totals[Account(to_checksum_address(account))] += micros
    payouts = tuple(
        Payout(job_id=job_id, epoch=epoch, account=account, cumulative_micros=micros)
        for account, micros in sorted(totals.items(), key=lambda item: item[0].lower())
        if micros
    )
    return PayoutSet(job_id=job_id, epoch=epoch, payouts=payouts, total_micros=totals.total())


class Ledger:
    """One job's money: funded, held for running leases, owed to accounts.

    At all times ``owed + held ≤ funded``: money is held when a lease is issued, so a verdict
    can never owe what is not there.

    Args:
        job_id: The job.
        funded_micros: What its escrow holds.
        entries: Pay already decided, to resume from.

    Raises:
        InvariantBroken: the entries to resume from pay a task twice or exceed the funds.

    Example:
        >>> ledger = Ledger("0x" + "0" * 64, 1_000)
        >>> ledger.hold("lease_0123456789", 600)
        >>> entry = PayEntry(task_id="task_0123456789", lease_id="lease_0123456789",
        ...                  account="0x" + "1" * 40, pay_micros=500)
        >>> ledger.accept(entry), ledger.accept(entry), ledger.free_micros
        (500, 0, 500)
    """

    def __init__(self, job_id: str, funded_micros: int, entries: Iterable[PayEntry] = ()) -> None:
        self._job_id = job_id
        self._funded = funded_micros
        self._held: dict[str, int] = {}
        self._owed: dict[str, int] = {}
        self._total = 0
        self._paid: dict[str, PayEntry] = {}
        for entry in entries:
            if entry.claim in self._paid:
                raise InvariantBroken(
                    f"The stored ledger of job {job_id} pays task {entry.claim} twice."
                )
            self._record(entry)
        if self._total > funded_micros:
            raise InvariantBroken(
                f"The stored ledger of job {job_id} owes {self._total} micros of "
                f"{funded_micros} funded."
            )

    @property
    def funded_micros(self) -> Micros:
        """What the escrow holds for the job."""
        return Micros(self._funded)

    @property
    def held_micros(self) -> Micros:
        """What running leases may yet cost."""
        return Micros(sum(self._held.values()))

    @property
    def owed_micros(self) -> Micros:
        """The sum of all accepted pay since the job began."""
        return Micros(self._total)

    @property
    def free_micros(self) -> Micros:
        """What new leases may still hold."""
        return Micros(self._funded - self._total - self.held_micros)

    @property
    def entries(self) -> Sequence[PayEntry]:
        """Every pay entry so far, in the order accepted."""
        return tuple(self._paid.values())

    def refund(self) -> Micros:
        """What goes back to the requester after the last epoch: all that nobody is owed.

        So payouts and refund together are the escrow, to the micro.

        Raises:
            InvalidRequest: leases still hold money.
        """
        if self._held:
            raise InvalidRequest(
                f"{len(self._held)} leases of job {self._job_id} still hold money; end them before "
                "the refund.",
                code="leases_open",
                job_id=self._job_id,
            )
        return Micros(self._funded - self._total)

    def top_up(self, micros: int) -> None:
        """The escrow holds ``micros`` more."""
        if micros < 0:
            raise InvalidRequest(
                f"A top-up of {micros} micros is negative; funds only grow.", code="bad_amount"
            )
        self._funded += micros

    def hold(self, lease_id: str, micros: int) -> None:
        """The most this lease can cost is set aside; the same hold again changes nothing.

        Raises:
            OverBudget: the job's free money does not cover it; nothing is held.
            InvalidRequest: the lease already holds another amount, or ``micros`` is negative.
        """
        if micros < 0 or self._held.get(lease_id, micros) != micros:
            raise InvalidRequest(
                f"Lease {lease_id} cannot hold {micros} micros"
                + (f": it holds {self._held[lease_id]}." if lease_id in self._held else "."),
                code="bad_hold",
                lease_id=lease_id,
            )
        if lease_id in self._held:
            return
        if micros > self.free_micros:
            raise OverBudget(
                f"Job {self._job_id} has {format_dollars(self.free_micros)} dollars free and a "
                f"lease needs {format_dollars(micros)}; top up its escrow or let it end.",
                job_id=self._job_id,
                free_micros=self.free_micros,
                needed_micros=micros,
            )
        self._held[lease_id] = micros

    def release(self, lease_id: str) -> Micros:
        """Nothing is held for this lease any more; what was."""
        return Micros(self._held.pop(lease_id, 0))

    def accept(self, entry: PayEntry) -> Micros:
        """The task is paid, once, out of what its lease held; what this call added.

        A second acceptance of the same claim adds nothing, whichever lease it comes from; the
        rest of the hold is free again.

        Raises:
            InvariantBroken: the pay exceeds what the lease held.
        """
        if entry.claim in self._paid:
            self._held.pop(entry.lease_id, None)
            return Micros(0)
        held = self._held.get(entry.lease_id, 0)
        if entry.pay_micros > held:
            raise InvariantBroken(
                f"Lease {entry.lease_id} holds {held} micros and its verdict pays "
                f"{entry.pay_micros}.",
                lease_id=entry.lease_id,
            )
        self._held.pop(entry.lease_id, None)
        self._record(entry)
        return Micros(entry.pay_micros)

    def payouts(self, epoch: int) -> PayoutSet:
        """What is owed now, as the payout set of ``epoch``."""
        return payout_set(self._job_id, epoch, self._owed.items())

    def _record(self, entry: PayEntry) -> None:
        self._owed[entry.account] = self._owed.get(entry.account, 0) + entry.pay_micros
        self._total += entry.pay_micros
        self._paid[entry.claim] = entry
