"""A small whole job, told in statements: two workers, three updates, one release.

`Story` has a knob for each thing a dishonest orchestrator or a tamperer could do, so that
each check of the verifier has a bundle that is wrong in that one way and consistent otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import base58
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from market_records import DOMAIN, account, node_key

from shoal.protocol.blob import BlobRef
from shoal.protocol.canonical import sha256_hex
from shoal.protocol.job import BudgetSpec, EnvSpec, Job, JobSpec, SamplingSpec
from shoal.protocol.learning import GradientSpec, LoraSpec, LossSpec, OptimizerSpec
from shoal.protocol.market import Lease, Payout
from shoal.protocol.merkle import MerkleTree, payout_leaf
from shoal.protocol.node import BoundNode, ContractAddresses, NodeBinding
from shoal.protocol.policy import BaseModelRef, ModelFile, PolicyVersion
from shoal.protocol.result import Check, CheckName, Result, Verdict
from shoal.protocol.signing import sign as sign_record
from shoal.protocol.task import EvaluateTask, GradientTask, PromptRef, RolloutTask, Task
from shoal.provenance import dsse, statement
from shoal.provenance.bundle import Bundle, BundleEpoch, LoggedStatement, released_files
from shoal.provenance.log import EpochLog, replay_head
from shoal.provenance.statement import ReleasePredicate, StatementKind, UpdatePredicate

ORCHESTRATOR = 9
BASE = BaseModelRef(
    name="tiny",
    files=(ModelFile(path="model.safetensors", blob=BlobRef(sha256="7" * 64, size_bytes=9)),),
    num_parameters=5,
)
ENVIRONMENT = EnvSpec(id="addition")
SPEC = JobSpec(
    name="story",
    model="tiny",
    max_steps=2,
    batch_size=8,
    rollouts_per_example=4,
    max_staleness=1,
    environments=(ENVIRONMENT,),
    budget=BudgetSpec(
        max_total_micros=10_000,
        max_rollout_micros=200,
        max_gradient_micros=200,
        max_evaluate_micros=200,
    ),
)
JOB = Job(spec=SPEC, requester=account(8).address, nonce=1)
JOB_ID = JOB.job_id()


def peer_of(key: Ed25519PrivateKey) -> str:
    """The peer id of a node key."""
    raw = key.public_key().public_bytes_raw()
    return base58.b58encode(bytes([0, 36, 8, 1, 18, 32]) + raw).decode()


def bound(number: int, **changes: object) -> BoundNode:
    """Account ``number`` and node key ``number``, bound by both."""
    key = node_key(number)
    fields: dict[str, object] = {
        "account": account(number).address,
        "node": peer_of(key),
        "node_key": "0x" + key.public_key().public_bytes_raw().hex(),
        "valid_from_ms": 0,
    }
    binding = NodeBinding.model_validate(fields | changes)
    return BoundNode(
        binding=sign_record(binding, DOMAIN, account(number)),
        node_signature="0x" + key.sign(binding.node_message()).hex(),
    )


def policy(version: int) -> PolicyVersion:
    """Policy version ``version`` of the story's job."""
    adapter = sha256_hex(adapter_bytes(version))
    return PolicyVersion(
        job_id=JOB_ID,
        version=version,
        base_sha256=BASE.content_digest(),
        adapter=BlobRef(sha256=adapter, size_bytes=len(adapter_bytes(version))),
    )


def adapter_bytes(version: int) -> bytes:
    """The adapter file of a version."""
    return b"adapter %d" % version


@dataclass
class Story:
    """Tells the job epoch by epoch; `bundle` is what a publisher would write.

    ``alter_verdict`` and ``alter_update`` change a predicate before it is signed and logged.
    """

    pay_factor: int = 1
    alter_verdict: Callable[[Verdict], Verdict] = lambda verdict: verdict
    alter_update: Callable[[UpdatePredicate], UpdatePredicate] = lambda update: update
    verdict_signer: int = ORCHESTRATOR
    rollout_versions: tuple[int, ...] = (0, 0, 1)
    with_environment: bool = True
    released_version: int = 3
    logged: list[LoggedStatement] = field(default_factory=list)
    epochs: list[BundleEpoch] = field(default_factory=list)
    log: EpochLog = field(default_factory=lambda: EpochLog(JOB_ID, 1))
    owed: dict[str, int] = field(default_factory=dict)
    count: int = 0

    def append(self, payload: bytes, signer: int, *, contributor: str | None = None) -> str:
        """The statement is signed by node ``signer`` and logged; its payload's digest."""
        key = node_key(signer)
        envelope = dsse.sign(payload, key_id=peer_of(key), sign=key.sign)
        kind = statement.decode(payload).kind
        sha256 = sha256_hex(payload)
        who = contributor or account(signer).address
        seq = self.log.append(kind, sha256, who)
        epoch = len(self.epochs) + 1
        self.logged.append(
            LoggedStatement(kind=kind, contributor=who, epoch=epoch, seq=seq, envelope=envelope)
        )
        return sha256

    def end_epoch(self) -> None:
        """The epoch is posted."""
        number = len(self.epochs) + 1
        leaves = [
            payout_leaf(DOMAIN.chain_id, DOMAIN.escrow, JOB_ID, who, self.owed[who])
            for who in sorted(self.owed, key=str.lower)
        ]
        self.epochs.append(
            BundleEpoch(
                number=number,
                pay_root="0x" + MerkleTree(leaves).root.hex(),
                provenance_root="0x" + self.log.root.hex(),
                num_statements=len(self.log),
                cumulative_micros=sum(self.owed.values()),
                tx_hash="0x" + f"{number:064x}",
                block_number=number,
            )
        )
        self.log = EpochLog(JOB_ID, number + 1)

    def work(self, task: Task, worker: int, *, accepted: bool = True) -> str:
        """The worker does ``task``, states it, and is judged; the statement's digest."""
        lease, result = self.deliver(task, worker)
        work_sha256 = self.append(statement.work_statement(lease, task, result), worker)
        self.judge(lease, result, work_sha256, accepted=accepted)
        return work_sha256

    def deliver(self, task: Task, worker: int) -> tuple[Lease, Result]:
        """The lease and the result of ``task``."""
        self.count += 1
        task_sha256 = task.digest()
        lease = Lease(
            lease_id=f"lease_{self.count:010d}",
            lease_epoch=1,
            lot_id="lot_0123456789",
            certificate_sha256="4" * 64,
            rung=0,
            job_id=JOB_ID,
            task_id=task.task_id,
            task_sha256=task_sha256,
            kind=task.kind,
            account=account(worker).address,
            node=peer_of(node_key(worker)),
            num_units=2,
            unit_price_micros=100 + worker,
            issued_at_ms=1,
            start_by_ms=2,
            deadline_ms=3,
            heartbeat_ms=1_000,
        )
        result = Result(
            lease_id=lease.lease_id,
            lease_epoch=1,
            task_id=task.task_id,
            task_sha256=task_sha256,
            kind=task.kind,
            policy_sha256=task.policy.policy_sha256(),
            payload=BlobRef(sha256=sha256_hex(lease.lease_id.encode()), size_bytes=5),
            num_units=2,
            num_tokens=40,
            compute_ms=7,
            engine="transformers",
            dtype="float32",
        )
        return lease, result

    def judge(
        self, lease: Lease, result: Result, work_sha256: str, *, accepted: bool = True
    ) -> None:
        """The verdict is logged, and the pay owed."""
        verdict = self.alter_verdict(
            Verdict(
                lease_id=lease.lease_id,
                lease_epoch=1,
                job_id=JOB_ID,
                result_sha256=result.digest(),
                accepted=accepted,
                num_units=2 if accepted else 0,
                pay_micros=2 * lease.unit_price_micros * self.pay_factor if accepted else 0,
                audited=True,
                checks=(Check(name=CheckName.REWARDS, passed=accepted, detail="measured"),),
            )
        )
        payload = statement.verification_statement(verdict, lease, work_sha256=work_sha256)
        self.append(payload, self.verdict_signer)
        if verdict.accepted:
            self.owed[lease.account] = self.owed.get(lease.account, 0) + verdict.pay_micros

    def rollout(self, version: int) -> RolloutTask:
        """A rollout task under ``version``."""
        return RolloutTask(
            task_id=f"task_{self.count:010d}",
            job_id=JOB_ID,
            batch=version,
            base=BASE,
            policy=policy(version),
            lora=LoraSpec(),
            environments=(ENVIRONMENT,),
            prompts=(PromptRef(environment=0, index=1), PromptRef(environment=0, index=2)),
            slots=(0, 1),
            group_size=4,
            sampling=SamplingSpec(max_tokens=4),
            seed=3,
        )

    def gradient(self, version: int) -> GradientTask:
        """A gradient task under ``version``."""
        return GradientTask(
            task_id=f"task_{self.count:010d}",
            job_id=JOB_ID,
            batch=version,
            base=BASE,
            policy=policy(version),
            lora=LoraSpec(),
            loss=LossSpec(),
            loss_sha256=LossSpec().digest(),
            gradient=GradientSpec(),
            optimizer=OptimizerSpec(),
            learning_rate=1e-3,
            temperature=1.0,
            max_tokens=4,
            slice=BlobRef(sha256="8" * 64, size_bytes=4),
            num_rows=8,
            num_groups=2,
        )

    def evaluate(self, version: int) -> EvaluateTask:
        """An evaluation of ``version``."""
        return EvaluateTask(
            task_id=f"task_{self.count:010d}",
            job_id=JOB_ID,
            base=BASE,
            policy=policy(version),
            lora=LoraSpec(),
            environments=(ENVIRONMENT,),
            prompts=(PromptRef(environment=0, index=1),),
            slots=(0,),
            samples_per_prompt=1,
            temperature=0.0,
            max_tokens=4,
            seed=3,
        )

    def update(self, version: int, rollouts: tuple[str, ...], gradients: tuple[str, ...]) -> str:
        """The update from ``version`` to the next is stated; its digest."""
        predicate = UpdatePredicate(
            job_id=JOB_ID,
            batch=version,
            parent=policy(version),
            policy=policy(version + 1),
            rollouts=rollouts,
            gradients=gradients,
            num_tokens=80,
            optimizer_sha256=SPEC.optimizer.digest(),
        )
        return self.append(statement.update_statement(self.alter_update(predicate)), ORCHESTRATOR)

    def tell(self, folder: Path) -> Bundle:
        """The whole story; the released files are in ``folder``."""
        if self.with_environment:
            self.append(
                statement.environment_statement(JOB_ID, ENVIRONMENT, "6" * 64, num_eval_tasks=10),
                ORCHESTRATOR,
            )
        self.append(
            statement.dataset_statement(JOB_ID, "pairs", "5" * 64, licence="CC0-1.0"),
            ORCHESTRATOR,
        )
        evaluations = [self.work(self.evaluate(0), 2)]
        self.work(self.rollout(0), 2, accepted=False)
        self.end_epoch()
        last = ""
        for version, sampled in enumerate(self.rollout_versions):
            rollouts = (self.work(self.rollout(sampled), 1),)
            gradients = tuple(self.work(self.gradient(version), n) for n in (1, 2))
            last = self.update(version, rollouts, gradients)
            self.end_epoch()
        evaluations.append(self.work(self.evaluate(3), 1))
        self.release(folder, last, evaluations)
        self.end_epoch()
        return self.bundle(folder)

    def release(self, folder: Path, last: str, evaluations: list[str]) -> None:
        """The files are written, and stated."""
        for name, content in self.files().items():
            (folder / name).write_bytes(content)
        payload = statement.release_statement(
            ReleasePredicate(
                job_id=JOB_ID,
                policy=policy(self.released_version),
                base_name=BASE.name,
                update_sha256=last,
                evaluations=tuple(evaluations),
            ),
            {name: sha256_hex(content) for name, content in self.files().items()},
        )
        self.append(payload, ORCHESTRATOR)

    def files(self) -> Mapping[str, bytes]:
        """The released files."""
        return {
            "adapter_model.safetensors": adapter_bytes(self.released_version),
            "adapter_config.json": b"{}",
        }

    def bundle(self, folder: Path) -> Bundle:
        """What has been told so far."""
        head = replay_head(
            (bytes.fromhex(e.provenance_root[2:]), e.num_statements) for e in self.epochs
        )
        released = any(entry.kind is StatementKind.RELEASE for entry in self.logged)
        number = len(self.epochs)
        return Bundle(
            domain=DOMAIN,
            contracts=ContractAddresses(
                token="0x" + "1" * 40,
                stake_vault="0x" + "2" * 40,
                job_escrow=DOMAIN.escrow,
                provenance_log="0x" + "3" * 40,
                fault_court="0x" + "4" * 40,
                model_shares="0x" + "5" * 40,
            ),
            orchestrator=account(ORCHESTRATOR).address,
            job_id=JOB_ID,
            job=sign_record(JOB, DOMAIN, account(8)),
            base=BASE,
            nodes=tuple(bound(n) for n in (1, 2, ORCHESTRATOR)),
            statements=tuple(self.logged),
            epochs=tuple(self.epochs),
            payouts=tuple(
                Payout(job_id=JOB_ID, epoch=number, account=who, cumulative_micros=micros)
                for who, micros in sorted(self.owed.items(), key=lambda pair: pair[0].lower())
            ),
            head="0x" + head.hex(),
            files=released_files({name: folder / name for name in self.files()})
            if released
            else (),
        )
