"""Which lease offers a worker believes, and which it takes."""

from __future__ import annotations

from typing import Any

import pytest
from eth_account import Account as EthAccount
from worker_double import (
    BASE,
    CONTRACTS,
    JOB_ID,
    OrchestratorDouble,
    blob,
    make_task,
    replaced_policy,
)

from shoal.network.identity import NodeIdentity
from shoal.network.memory import MemoryHub, MemoryNetwork
from shoal.protocol.errors import PeerFault, Unauthorised
from shoal.protocol.market import TaskKind
from shoal.protocol.node import LeaseOffer
from shoal.protocol.policy import ModelFile
from shoal.protocol.signing import sign
from shoal.worker.config import WorkerConfig, load_config
from shoal.worker.offers import Parties, refusal_of, require_genuine
from shoal.worker.session import Credentials


class Fixture:
    def __init__(self) -> None:
        identity = NodeIdentity(b"o" * 32)
        self.double = OrchestratorDouble(MemoryNetwork(MemoryHub(), identity), identity)
        self.credentials = Credentials(
            account=EthAccount.create(), identity=NodeIdentity(b"w" * 32)
        )
        self.parties: Parties = self.credentials.parties(self.double.greeting)

    def offer(self, task: Any = None, **changes: Any) -> LeaseOffer:
        task = task or make_task(TaskKind.ROLLOUT)
        return self.double.offer(task, self.credentials.address, self.credentials.node, **changes)


@pytest.fixture(scope="module")
def fixture() -> Fixture:
    return Fixture()


def config(**options: Any) -> WorkerConfig:
    return load_config(None, {}, {"orchestrator": "http://a", **options})


@pytest.mark.parametrize("kind", list(TaskKind))
def test_a_genuine_offer_is_believed_and_taken(fixture: Fixture, kind: TaskKind) -> None:
    offer = fixture.offer(make_task(kind))
    require_genuine(offer, fixture.parties)
    assert refusal_of(offer, config(), capacity=64, units_held=0) is None


HOSTILE_LEASES: dict[str, dict[str, Any]] = {
    "another node": {"node": NodeIdentity(b"x" * 32).peer_id},
    "another account": {"account": CONTRACTS.token},
    "another task's digest": {"task_sha256": "0" * 64},
    "another task id": {"task_id": "task_99999999"},
    "another job": {"job_id": "0x" + "b" * 64},
    "another kind": {"kind": TaskKind.GRADIENT},
    "over before it began": {"deadline_ms": 1},
}


@pytest.mark.parametrize("changes", HOSTILE_LEASES.values(), ids=HOSTILE_LEASES.keys())
def test_a_lease_that_contradicts_itself_is_a_fault(
    fixture: Fixture, changes: dict[str, Any]
) -> None:
    offer = fixture.double.offer(
        make_task(TaskKind.ROLLOUT),
        **{"account": fixture.credentials.address, "node": fixture.credentials.node, **changes},
    )
    with pytest.raises(PeerFault, match="lease_00000000"):
        require_genuine(offer, fixture.parties)


def _with_pickle() -> Any:
    pickle = ModelFile(path="pytorch_model.bin", blob=blob(b"code"))
    base = BASE.model_copy(update={"files": (*BASE.files, pickle)})
    task = make_task(TaskKind.ROLLOUT).model_copy(update={"base": base})
    return replaced_policy(task, base_sha256=base.content_digest())


HOSTILE_TASKS: dict[str, Any] = {
    "policy of another job": replaced_policy(make_task(TaskKind.ROLLOUT), job_id="0x" + "c" * 64),
    "policy of another base": replaced_policy(make_task(TaskKind.ROLLOUT), base_sha256="0" * 64),
    "unpinned loss": make_task(TaskKind.GRADIENT).model_copy(update={"loss_sha256": "0" * 64}),
    "pickled weights": _with_pickle(),
}


@pytest.mark.parametrize("task", HOSTILE_TASKS.values(), ids=HOSTILE_TASKS.keys())
def test_a_task_that_contradicts_itself_is_a_fault(fixture: Fixture, task: Any) -> None:
    with pytest.raises(PeerFault):
        require_genuine(fixture.offer(task), fixture.parties)


def test_a_lease_signed_by_another_account_is_unauthorised(fixture: Fixture) -> None:
    offer = fixture.offer()
    forged = sign(offer.lease.record, fixture.parties.domain, EthAccount.create())
    with pytest.raises(Unauthorised):
        require_genuine(offer.model_copy(update={"lease": forged}), fixture.parties)


def test_a_lease_signed_for_another_chain_is_unauthorised(fixture: Fixture) -> None:
    offer = fixture.offer()
    elsewhere = fixture.parties.domain.model_copy(update={"chain_id": 1})
    forged = sign(offer.lease.record, elsewhere, fixture.double.account)
    with pytest.raises(Unauthorised):
        require_genuine(offer.model_copy(update={"lease": forged}), fixture.parties)


@pytest.mark.parametrize(
    ("changes", "options", "held", "reason"),
    [
        ({"unit_price_micros": 99}, {}, 0, "below the floor"),
        ({}, {"price.rollout": "0.000501"}, 0, "below the floor"),
        ({"num_units": 1}, {}, 0, "pays 1 units for a task of 2"),
        ({}, {"capacity.rollout": 3}, 2, "do not fit"),
        ({}, {"capacity.rollout": 0}, 0, "do not fit"),
        ({}, {"max_base_bytes": 3}, 0, "bytes"),
    ],
)
def test_a_genuine_offer_may_be_refused(
    fixture: Fixture, changes: dict[str, Any], options: dict[str, Any], held: int, reason: str
) -> None:
    limits = config(**options)
    capacity = limits.capacity.units(TaskKind.ROLLOUT)
    refusal = refusal_of(fixture.offer(**changes), limits, capacity=capacity, units_held=held)
    assert refusal is not None
    assert reason in refusal


def test_a_result_cap_too_small_for_the_task_is_refused(fixture: Fixture) -> None:
    offer = fixture.offer().model_copy(update={"max_result_bytes": 63})
    refusal = refusal_of(offer, config(), capacity=64, units_held=0)
    assert "cannot hold" in str(refusal)
    assert offer.lease.record.job_id == JOB_ID
