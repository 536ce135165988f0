"""What the chain must say before an orchestrator takes a worker: stake and node binding."""

from __future__ import annotations

from typing import Final, Protocol

from shoal.contracts.records import Mined, StakeInfo
from shoal.protocol.errors import Unauthorised
from shoal.protocol.money import Micros, format_dollars
from shoal.protocol.record import Record
from shoal.worker.events import log_event, log_failure
from shoal.worker.ports import ProviderChain
from shoal.worker.session import Credentials

_UNBOUND: Final = "0x" + "0" * 40


async def ensure_stake(
    chain: ProviderChain, account: str, minimum_micros: int, wanted_micros: Micros | None
) -> None:
    """The account's active stake is at least the minimum, and as large as the provider wants it.

    A stake that is above the minimum and cannot be raised further is left as it is, and logged.

    Args:
        chain: The chain, with the provider's account.
        account: The provider's account.
        minimum_micros: What the orchestrator asks for.
        wanted_micros: What the provider wants at stake in all; None to leave it as it is.

    Raises:
        Unauthorised: it is not, and cannot be made so; says what to do.
    """
    staked = (await chain.vault.stake_of(account)).active_micros
    if staked >= minimum_micros:
        if wanted_micros is not None and wanted_micros > staked:
            await _raise_stake(chain, account, wanted_micros - staked)
        return
    asked = (
        f"The account {account} has ${format_dollars(staked)} at stake and the orchestrator asks "
        f"for ${format_dollars(minimum_micros)}"
    )
    if wanted_micros is None:
        raise Unauthorised(
            f"{asked}; start the worker with --stake {format_dollars(minimum_micros)} to put up "
            "the rest.",
            code="no_stake",
        )
    if wanted_micros < minimum_micros:
        raise Unauthorised(
            f"{asked}; --stake {format_dollars(wanted_micros)} is not enough, "
            f"give at least --stake {format_dollars(minimum_micros)}.",
            code="stake_too_small",
        )
    await _put_up(chain, account, wanted_micros - staked)


async def _raise_stake(chain: ProviderChain, account: str, amount_micros: int) -> None:
    try:
        await _put_up(chain, account, amount_micros)
    except Unauthorised as error:
        # What is there suffices to join, and the rest may be earned.
        log_failure("stake_not_raised", error, amount_micros=amount_micros)


async def _put_up(chain: ProviderChain, account: str, amount_micros: int) -> None:
    await _require_funds(chain, account, amount_micros)
    mined = await chain.vault.stake(amount_micros)
    log_event("staked", amount_micros=amount_micros, tx_hash=mined.tx_hash)


class HeldStake(Protocol):
    """The stake vault, seen by who takes a stake back."""

    async def stake_of(self, account: str) -> StakeInfo:
        """The stake of ``account``."""
        ...

    async def request_unbond(self, amount_micros: int) -> Mined:
        """``amount_micros`` of our stake begin to leave."""
        ...

    async def withdraw_stake(self) -> Mined:
        """What has left is ours."""
        ...


class StakeHolder(Protocol):
    """The chain, seen by who takes a stake back."""

    @property
    def vault(self) -> HeldStake:
        """Where the stake is."""
        ...

    async def now_s(self) -> int:
        """The chain's clock, in Unix seconds."""
        ...


class Unstaked(Record):
    """What became of a stake.

    ``unbonding_micros`` can be withdrawn from ``ready_at_s`` on (Unix seconds; 0 when nothing
    is leaving).
    """

    withdrawn_micros: int
    unbonding_micros: int
    ready_at_s: int


async def take_back_stake(chain: StakeHolder, account: str) -> Unstaked:
    """What of the account's stake may leave has left, and the rest is leaving.

    Run once to begin and once more when the waiting time is over.  A stake that is leaving
    already is left in peace, because a new request would make it wait anew.
    """
    before = await chain.vault.stake_of(account)
    withdrawn_micros = 0
    if before.unbonding_micros and before.unbond_at_s <= await chain.now_s():
        await chain.vault.withdraw_stake()
        withdrawn_micros = before.unbonding_micros
    if before.active_micros and (withdrawn_micros or not before.unbonding_micros):
        await chain.vault.request_unbond(before.active_micros)
    after = await chain.vault.stake_of(account)
    return Unstaked(
        withdrawn_micros=withdrawn_micros,
        unbonding_micros=after.unbonding_micros,
        ready_at_s=after.unbond_at_s,
    )


async def ensure_bound(chain: ProviderChain, credentials: Credentials) -> None:
    """The chain says that the account answers for the node.

    Raises:
        Unauthorised: another account does.
    """
    key = credentials.identity.public_key
    owner = await chain.vault.node_owner(key)
    if owner is None or owner == _UNBOUND:
        mined = await chain.vault.bind_node(key)
        log_event("node_bound", node=credentials.node, tx_hash=mined.tx_hash)
    elif owner.lower() != credentials.address.lower():
        raise Unauthorised(
            f"The node key of {credentials.node} is bound to the account {owner} and not to "
            f"{credentials.address}; use that account, or move the node key away so that a new "
            "one is made.",
            code="node_taken",
        )


async def _require_funds(chain: ProviderChain, account: str, amount_micros: int) -> None:
    balance = await chain.token.balance(account)
    if balance < amount_micros:
        raise Unauthorised(
            f"The account {account} holds ${format_dollars(balance)}, less than the "
            f"${format_dollars(amount_micros)} to be staked; send it the rest.",
            code="balance_too_small",
        )
    if await chain.eth_balance(account) == 0:
        raise Unauthorised(
            f"The account {account} has no gas money to send its stake with; send it some.",
            code="no_gas",
        )
