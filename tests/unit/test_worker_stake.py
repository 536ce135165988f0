"""What a worker does about its stake and its node key's binding."""

from __future__ import annotations

import asyncio

import pytest
from eth_account import Account as EthAccount
from worker_double import MemoryChain

from shoal.contracts.records import Mined, StakeInfo
from shoal.network.identity import NodeIdentity
from shoal.protocol.errors import Unauthorised
from shoal.protocol.money import Micros
from shoal.worker.session import Credentials
from shoal.worker.stake import ensure_bound, ensure_stake, take_back_stake

ACCOUNT = "0x" + "5" * 40
MINIMUM = 5_000_000


def ensure(chain: MemoryChain, allowed: int | None) -> None:
    allowed_micros = None if allowed is None else Micros(allowed)
    asyncio.run(ensure_stake(chain, ACCOUNT, MINIMUM, allowed_micros))


def test_enough_stake_moves_no_money() -> None:
    chain = MemoryChain(ACCOUNT, staked=MINIMUM, tokens=MINIMUM)
    ensure(chain, MINIMUM)
    assert (chain.staked, chain.tokens) == (MINIMUM, MINIMUM)


@pytest.mark.parametrize("staked", [1_000_000, MINIMUM, 7_999_999])
def test_a_stake_is_raised_to_what_is_wanted_in_all(staked: int) -> None:
    chain = MemoryChain(ACCOUNT, staked=staked, tokens=9_000_000)
    for _ in range(2):
        ensure(chain, 8_000_000)
        assert (chain.staked, chain.tokens) == (8_000_000, 9_000_000 - (8_000_000 - staked))


@pytest.mark.parametrize(("tokens", "wei"), [(999_999, 1), (1_000_000, 0)])
def test_a_stake_that_suffices_and_cannot_be_raised_stops_nobody(
    tokens: int, wei: int, caplog: pytest.LogCaptureFixture
) -> None:
    chain = MemoryChain(ACCOUNT, staked=MINIMUM, tokens=tokens)
    chain.wei = wei
    with caplog.at_level("INFO"):
        ensure(chain, MINIMUM + 1_000_000)
    assert (chain.staked, chain.tokens) == (MINIMUM, tokens)
    assert "stake_not_raised" in caplog.text


@pytest.mark.parametrize(
    ("allowed", "tokens", "wei", "code", "words"),
    [
        (None, 9_000_000, 1, "no_stake", r"\$1\.00 at stake .* \$5\.00.*--stake 5\.00 "),
        (4_999_999, 9_000_000, 1, "stake_too_small", r"at least --stake 5\.00"),
        (MINIMUM, 3_999_999, 1, "balance_too_small", r"send it the rest"),
        (MINIMUM, 4_000_000, 0, "no_gas", "gas money"),
    ],
)
def test_stake_that_cannot_be_put_up_is_said_in_one_sentence(
    allowed: int | None, tokens: int, wei: int, code: str, words: str
) -> None:
    chain = MemoryChain(ACCOUNT, staked=1_000_000, tokens=tokens)
    chain.wei = wei
    with pytest.raises(Unauthorised, match=words) as caught:
        ensure(chain, allowed)
    assert caught.value.code == code
    assert ACCOUNT in caught.value.message
    assert chain.staked == 1_000_000


def test_a_node_key_is_bound_once_and_never_taken_from_another() -> None:
    credentials = Credentials(account=EthAccount.create(), identity=NodeIdentity(b"w" * 32))
    chain = MemoryChain(credentials.address)
    asyncio.run(ensure_bound(chain, credentials))
    asyncio.run(ensure_bound(chain, credentials))
    key = credentials.identity.public_key
    assert chain.nodes == {key: credentials.address}
    chain.nodes[key] = ACCOUNT
    with pytest.raises(Unauthorised, match=ACCOUNT):
        asyncio.run(ensure_bound(chain, credentials))


class Vault:
    """An account's stake as the contract keeps it, with a waiting time of 100 s; and its chain."""

    def __init__(self, active: int) -> None:
        self.vault = self
        self.active, self.unbonding, self.unbond_at_s = active, 0, 0
        self.time_s = 1_000
        self.requests: list[int] = []

    async def now_s(self) -> int:
        return self.time_s

    async def stake_of(self, account: str) -> StakeInfo:
        return StakeInfo(
            active_micros=self.active,
            unbonding_micros=self.unbonding,
            unbond_at_s=self.unbond_at_s,
        )

    async def request_unbond(self, amount_micros: int) -> Mined:
        self.requests.append(amount_micros)
        self.active -= amount_micros
        self.unbonding += amount_micros
        self.unbond_at_s = self.time_s + 100
        return mined()

    async def withdraw_stake(self) -> Mined:
        assert self.time_s >= self.unbond_at_s
        self.unbonding, self.unbond_at_s = 0, 0
        return mined()


def mined() -> Mined:
    return Mined(tx_hash="0x" + "7" * 64, block_number=1, gas_used=1)


def test_a_stake_is_taken_back_in_two_steps_and_asking_often_delays_nothing() -> None:
    vault = Vault(5)

    def take() -> tuple[int, int, int]:
        outcome = asyncio.run(take_back_stake(vault, ACCOUNT))
        return outcome.withdrawn_micros, outcome.unbonding_micros, outcome.ready_at_s

    assert take() == (0, 5, 1_100)
    vault.time_s, vault.active = 1_050, 2
    assert take() == (0, 5, 1_100)
    vault.time_s = 1_100
    assert take() == (5, 2, 1_200)
    vault.time_s = 1_200
    assert take() == (2, 0, 0)
    assert take() == (0, 0, 0)
    assert vault.requests == [5, 2]
