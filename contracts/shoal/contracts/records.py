"""What the chain holds and what we ask of it, as plain records; importable without web3.

Money is in micros (base units of the six-decimal settlement token), gas money in wei.
"""

from __future__ import annotations

from pydantic import Field

from shoal.protocol.ids import Address, Hex32
from shoal.protocol.money import MicrosField
from shoal.protocol.node import ContractAddresses
from shoal.protocol.record import MAX_INT, Record

ZERO_ADDRESS = "0x" + "0" * 40


class Deployment(Record):
    """Where Shoal's contracts live on one chain.

    Writer: whoever deployed them; the orchestrator passes it on in its greeting.  Reader:
    every gateway, which refuses to work on another chain.

    Example:
        >>> a = "0x" + "1" * 40
        >>> Deployment(chain_id=31337, token=a, stake_vault=a, job_escrow=a,
        ...            provenance_log=a, fault_court=a, model_shares=a,
        ...            block_number=4).chain_id
        31337
    """

    chain_id: int = Field(gt=0, le=MAX_INT)
    token: Address
    stake_vault: Address
    job_escrow: Address
    provenance_log: Address
    fault_court: Address
    model_shares: Address
    block_number: int = Field(ge=0, le=MAX_INT)
    """Block of the first contract: logs are never searched below it."""

    def addresses(self) -> tuple[str, ...]:
        """Every contract's address."""
        return (
            self.token,
            self.stake_vault,
            self.job_escrow,
            self.provenance_log,
            self.fault_court,
            self.model_shares,
        )

    def contracts(self) -> ContractAddresses:
        """The addresses by name, as they are greeted with and bundled."""
        return ContractAddresses(**self.model_dump(exclude={"chain_id", "block_number"}))


class Mined(Record):
    """A transaction of ours that is in a block and succeeded."""

    tx_hash: Hex32
    block_number: int
    gas_used: int


class SendStats(Record):
    """What a gateway's own transactions came to since it connected."""

    transactions: int
    gas_used: int


class ChainTotals(Record):
    """All transactions of the chain since the deployment, ours or not."""

    blocks: int
    transactions: int
    gas_used: int


class StakeInfo(Record):
    """An account's stake: counted, leaving, and from when the leaving part may be withdrawn."""

    active_micros: int
    unbonding_micros: int
    unbond_at_s: int
    """Chain time in Unix seconds; 0 when nothing is unbonding."""


class EpochPost(Record):
    """What the coordinator states about one epoch of a job.

    ``cumulative_micros`` is the sum of all leaves under ``pay_root``: everything owed since
    the job began.  Writer: the settler.  Reader: ``JobEscrow.post``.
    """

    job_id: Hex32
    epoch: int = Field(ge=1, lt=2**32)
    pay_root: Hex32
    prov_root: Hex32
    cumulative_micros: MicrosField
    num_tasks: int = Field(ge=0, lt=2**64)
    num_statements: int = Field(ge=0, lt=2**64)


class PostedEpoch(EpochPost):
    """An `EpochPost` as found in the chain's log."""

    tx_hash: Hex32
    block_number: int
    block_hash: Hex32


class EscrowState(Record):
    """A job's money: ``claimed <= committed <= funded``, and ``refunded`` of the rest.

    ``pay_root`` is the root the job stands by: of a frozen job the last that was accepted.
    """

    job_id: Hex32
    sponsor: Address
    coordinator: Address
    deadline_s: int
    epoch: int
    funded_micros: int
    committed_micros: int
    claimed_micros: int
    refunded_micros: int
    closed: bool
    frozen: bool
    """Whether the court ended the job for its coordinator's fault; it is closed then."""
    bond_micros: int
    pay_root: Hex32
    ready_at_s: int
    """When ``pay_root`` becomes claimable; 0 on a chain without a challenge window."""


class Claim(Record):
    """One payee's proof that a job's root owes it ``cumulative_micros`` in all."""

    account: Address
    cumulative_micros: MicrosField
    proof: tuple[Hex32, ...] = Field(max_length=64)


class Payment(Record):
    """Money a job paid out, as found in the chain's log."""

    account: Address
    amount_micros: int
    cumulative_micros: int
    tx_hash: Hex32
    block_number: int


class SkippedClaim(Record):
    """A payee `claim_many` could not pay, and the decoded reason."""

    account: Address
    reason: str


class ClaimManyResult(Record):
    """What one `claim_many` transaction paid, and whom it could not."""

    mined: Mined
    payments: tuple[Payment, ...]
    skipped: tuple[SkippedClaim, ...]
