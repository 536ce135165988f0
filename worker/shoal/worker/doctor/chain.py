"""The chain and the account on it: the right chain, its contracts, stake and gas money."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from shoal.protocol.errors import ShoalError
from shoal.protocol.money import format_dollars
from shoal.protocol.node import HelloReply
from shoal.worker.config import WorkerConfig
from shoal.worker.doctor.line import judge_offset
from shoal.worker.doctor.report import Finding, fail, ok, warn

if TYPE_CHECKING:
    from shoal.contracts.gateway import ChainGateway

_NODE_S: Final = 5.5
_GOOD_AGE_S: Final = 300
"""Public chains make a block every few seconds."""
_GAS_FOR_A_SEASON_WEI: Final = 10**15
_WEI: Final = 10**18


async def look_at_chain(
    config: WorkerConfig, greeting: HelloReply, account: str | None, now_s: float
) -> list[Finding]:
    """Whether stake can be put up and pay claimed, over each node that the worker would ask."""
    urls: Sequence[str] = (config.rpc_url,) if config.rpc_url else greeting.rpc_urls
    if not urls:
        mend = "set rpc_url to a chain node of your own"
        return [fail("chain", "chain node", "the orchestrator names none", mend)]
    looks = await asyncio.gather(*(_look_over(url, greeting, account, now_s) for url in urls))
    findings = [finding for found, _ in looks for finding in found]
    holdings = next((holds for _, holds in looks if holds is not None), None)
    if account is not None and holdings is not None:
        findings += judge_holdings(account, holdings, greeting.min_stake_micros, config)
    elif account is None:
        findings.append(
            ok("account", "account", "none yet; the first start makes one, to be funded then")
        )
    return findings


@dataclass(frozen=True, kw_only=True)
class Holdings:
    """What an account has on the chain.

    Attributes:
        balance_micros: Settlement tokens.
        stake_micros: Active stake.
        gas_wei: Gas money.
    """

    balance_micros: int
    stake_micros: int
    gas_wei: int


async def _look_over(
    url: str, greeting: HelloReply, account: str | None, now_s: float
) -> tuple[list[Finding], Holdings | None]:
    # Loaded here: web3 costs a second.
    from shoal.contracts.gateway import ChainGateway
    from shoal.contracts.records import Deployment

    what = f"chain node {url}"
    deployment = Deployment(
        chain_id=greeting.domain.chain_id, block_number=0, **greeting.contracts.model_dump()
    )
    gateway: ChainGateway | None = None
    try:
        async with asyncio.timeout(_NODE_S):
            gateway = await ChainGateway.connect(url, deployment)
            head_s = await gateway.now_s()
            holdings = None if account is None else await _holdings(gateway, account)
    except TimeoutError:
        mend = "set rpc_url to a node that answers"
        return [fail("chain", what, f"no answer within {_NODE_S:g} s", mend)], None
    except ShoalError as error:
        return [fail("chain", what, error.message, _mend_of(error))], None
    finally:
        if gateway is not None:
            await gateway.close()
    return judge_head(what, deployment.chain_id, head_s, now_s), holdings


async def _holdings(gateway: ChainGateway, account: str) -> Holdings:
    balance, stake, gas = await asyncio.gather(
        gateway.token.balance(account),
        gateway.vault.stake_of(account),
        gateway.eth_balance(account),
    )
    return Holdings(balance_micros=balance, stake_micros=stake.active_micros, gas_wei=gas)


def judge_head(what: str, chain_id: int, head_s: int, now_s: float) -> list[Finding]:
    """What the newest block's time says of the chain node, and of this machine's clock."""
    age_s = now_s - head_s
    measured = f"chain {chain_id} with Shoal's contracts, newest block {max(0, age_s):.0f} s old"
    findings = []
    if age_s > _GOOD_AGE_S:
        findings.append(
            warn(
                "chain",
                what,
                measured,
                "a node that fell behind shows old money: ask another (rpc_url); a development "
                "chain that makes blocks on demand is fine",
            )
        )
    else:
        findings.append(ok("chain", what, measured))
    if age_s < 0:
        findings.append(judge_offset("the chain's newest block", 1_000 * age_s, 1_000))
    return findings


def judge_holdings(
    account: str, holds: Holdings, min_stake_micros: int, config: WorkerConfig
) -> list[Finding]:
    """Whether the account can join, and pay for its transactions."""
    return [
        _judge_stake(account, holds, min_stake_micros, config.stake_micros),
        _judge_gas(account, holds.gas_wei),
    ]


def _judge_stake(
    account: str, holds: Holdings, min_stake_micros: int, wanted_micros: int | None
) -> Finding:
    staked, least = format_dollars(holds.stake_micros), format_dollars(min_stake_micros)
    measured = f"${staked} at stake (least ${least}), ${format_dollars(holds.balance_micros)} held"
    if holds.stake_micros >= min_stake_micros:
        return ok("stake", "stake", measured)
    if wanted_micros is None:
        mend = f"start the worker with --stake {least} or more"
        if holds.balance_micros + holds.stake_micros < min_stake_micros:
            mend = f"send {account} the settlement token, and {mend}"
        return fail("stake", "stake", measured, mend)
    if wanted_micros < min_stake_micros:
        return fail("stake", "stake", measured, f"raise --stake to {least} or more")
    if holds.balance_micros < wanted_micros - holds.stake_micros:
        missing = wanted_micros - holds.stake_micros - holds.balance_micros
        return fail("stake", "stake", measured, f"send {account} ${format_dollars(missing)} more")
    return ok("stake", "stake", f"{measured}; the start puts up ${format_dollars(wanted_micros)}")


def _judge_gas(account: str, gas_wei: int) -> Finding:
    measured = f"{gas_wei / _WEI:.6g} of the chain's coin"
    if gas_wei == 0:
        mend = f"send {account} some: stake, binding and claims are transactions"
        return fail("gas", "gas money", measured, mend)
    if gas_wei < _GAS_FOR_A_SEASON_WEI:
        return warn("gas", "gas money", measured, f"send {account} some before it runs out")
    return ok("gas", "gas money", measured)


def _mend_of(error: ShoalError) -> str:
    if error.code in {"wrong_chain", "no_contract"}:
        return "set rpc_url to a node of the orchestrator's chain"
    return "set rpc_url to a node that answers, or wait"
