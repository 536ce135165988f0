"""The end of a job: the adapter folder, the release statement, the provenance bundle."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from shoal.market.settlement import PayoutSet
from shoal.orchestrator.context import Context
from shoal.orchestrator.jobrun import JobRun
from shoal.orchestrator.journal import Journal
from shoal.orchestrator.learner import Learner
from shoal.orchestrator.store.tables import EpochRow, EventRow, JobRow, NodeRow, StatementRow
from shoal.protocol.errors import InvariantBroken, NotFound, Unavailable
from shoal.protocol.job import Job, JobState, Release
from shoal.protocol.market import Payout
from shoal.protocol.node import BoundNode
from shoal.protocol.policy import BaseModelRef, ModelFile, PolicyVersion
from shoal.protocol.signing import Signed
from shoal.provenance.bundle import (
    BUNDLE_FILE,
    Bundle,
    BundleEpoch,
    LoggedStatement,
    released_files,
    write_bundle,
)
from shoal.provenance.dsse import Envelope
from shoal.provenance.log import EMPTY_HEAD, replay_head
from shoal.provenance.statement import (
    ReleasePredicate,
    StatementKind,
    UpdatePredicate,
    decode,
    release_statement,
)

_RELEASE_INDEX = "release.json"
_MAX_PAYOUTS_BYTES = 1 << 30
_MAX_LINKS = 1024
_TERMINAL = (JobState.COMPLETE, JobState.CANCELLED, JobState.FAILED, JobState.PAUSED)


class Publisher:
    """Writes what a requester downloads and a reader verifies."""

    def __init__(self, context: Context, journal: Journal, own_binding: BoundNode) -> None:
        self._context = context
        self._journal = journal
        self._own_binding = own_binding

    async def publish(self, run: JobRun) -> None:
        """The job's last or best version is a downloadable folder, and its release is stated.

        A PEFT folder for an adapter, a plain model folder for a model trained whole.
        """
        if run.policy is None or await self._is_stated(run.job_id):
            return
        policy = await self._context.computed(lambda: self._chosen(run.learner, run.policy))
        folder = self._folder(run.job_id)
        metrics = await self.metrics(run.job_id)
        card = _card(run, policy)
        await self._context.computed(
            lambda: self._write(run.learner, policy, folder, card, metrics)
        )
        files = {path.name: path for path in sorted(folder.iterdir())}
        released = released_files(files)
        index = [
            ModelFile(path=name, blob=self._context.blobs.put_file(path, pin=True)).to_json()
            for name, path in files.items()
        ]
        statement = release_statement(
            ReleasePredicate(
                job_id=run.job_id,
                policy=policy,
                base_name=run.learner.base.name,
                update_sha256=await self._update_of(policy),
                evaluations=run.evaluations.statements(policy.version)[:_MAX_LINKS],
            ),
            {file.path: file.sha256 for file in released},
        )
        # Before it is stated, because what is stated is never written again.
        (folder.parent / _RELEASE_INDEX).write_text(json.dumps(index))
        row = self._journal.state(run.job_id, StatementKind.RELEASE, statement)
        await self._context.database.run(lambda session: session.add(row))
        await self._journal.event(
            run.job_id,
            "model_published",
            {"policy_version": policy.version, "adapter_sha256": policy.adapter.sha256},
        )

    async def _is_stated(self, job_id: str) -> bool:
        """Whether the job's release was stated before this process was restarted."""
        kind = StatementKind.RELEASE.value
        query = select(StatementRow.seq).where(
            StatementRow.job_id == job_id, StatementRow.kind == kind
        )
        return await self._context.database.run(
            lambda session: session.scalar(query.limit(1)) is not None
        )

    async def _update_of(self, policy: PolicyVersion) -> str | None:
        """The digest of the last statement of the update that made ``policy``."""
        if policy.version == 0:
            return None

        def read(session: Session) -> str | None:
            rows = session.scalars(
                select(StatementRow)
                .where(
                    StatementRow.job_id == policy.job_id,
                    StatementRow.kind == StatementKind.UPDATE.value,
                )
                .order_by(StatementRow.seq.desc())
            )
            return next((row.payload_sha256 for row in rows if _made(row) == policy), None)

        return await self._context.database.run(read)

    def _chosen(self, learner: Learner, last: PolicyVersion | None) -> PolicyVersion:
        """The version the job releases: its best, where it asks for that and has one."""
        best = None
        if learner.spec.checkpoint.release is Release.BEST:
            best = learner.best(self._context.blobs)
        chosen = best or last
        if chosen is None:
            raise InvariantBroken("A release was asked for before any version was published.")
        return chosen

    def _write(
        self, learner: Learner, policy: PolicyVersion, folder: Path, card: str, metrics: str
    ) -> None:
        if learner.policy.adapter_sha256() != policy.adapter.sha256:
            # The best version, or the last where an update was computed and never stated.
            learner.policy.load_adapter(self._context.blobs.read(policy.adapter.sha256))
        base = learner.base
        learner.policy.save_folder(folder, base.name, base.content_digest(), card)
        (folder / "job.json").write_text(learner.job.model_dump_json(indent=2))
        (folder / "metrics.jsonl").write_text(metrics)

    def _folder(self, job_id: str) -> Path:
        return self._context.config.data_dir / "jobs" / job_id / "adapter"

    def files(self, job_id: str) -> list[ModelFile]:
        """The released files.

        Raises:
            NotFound: the job has released nothing yet.
        """
        index = self._folder(job_id).parent / _RELEASE_INDEX
        if not index.exists():
            raise NotFound(
                f"Job {job_id} has released no model yet; wait until it is complete.",
                code="no_model",
            )
        return [ModelFile.model_validate(item) for item in json.loads(index.read_text())]

    async def metrics(self, job_id: str) -> str:
        """The job's metrics, one JSON object per line: updates and evaluations in order."""

        def read(session: Session) -> str:
            rows = session.scalars(
                select(EventRow)
                .where(EventRow.job_id == job_id, EventRow.type.in_(("update", "evaluation")))
                .order_by(EventRow.seq)
            )
            return "".join(_metrics_line(row) for row in rows)

        return await self._context.database.run(read)

    async def bundle(self, job_id: str) -> Path:
        """The job's provenance bundle.

        Raises:
            NotFound: there is no such job.
            Unavailable: the job is not at its end yet.
        """
        path = self._folder(job_id).parent / BUNDLE_FILE
        if path.exists():
            return path
        bundle = await self._context.database.run(lambda session: self._bundle(session, job_id))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bundle(bundle, path)
        return path

    def _bundle(self, session: Session, job_id: str) -> Bundle:
        row = session.get(JobRow, job_id)
        if row is None:
            raise NotFound(f"There is no job {job_id}; `shoal jobs` lists them.", code="no_job")
        if JobState(row.state) not in _TERMINAL:
            raise Unavailable(
                f"Job {job_id} is {row.state}; its bundle is ready when it has ended.",
                code="not_final",
                retry_after_s=5,
            )
        epochs = session.scalars(
            select(EpochRow).where(EpochRow.job_id == job_id).order_by(EpochRow.epoch)
        ).all()
        nodes = [
            BoundNode.model_validate_json(node.bound_node)
            for node in session.scalars(select(NodeRow).order_by(NodeRow.node))
        ]
        anchors = [(bytes.fromhex(e.prov_root[2:]), e.num_statements) for e in epochs]
        head = replay_head(anchors) if anchors else EMPTY_HEAD
        folder = self._folder(job_id)
        files = {path.name: path for path in folder.iterdir()} if folder.exists() else {}
        return Bundle(
            domain=self._context.domain,
            contracts=self._context.deployment.contracts(),
            orchestrator=self._context.account.address,
            job_id=job_id,
            job=Signed[Job].model_validate_json(row.record),
            base=BaseModelRef.model_validate_json(row.base),
            nodes=(self._own_binding, *nodes),
            statements=_statements(session, job_id),
            epochs=tuple(_bundle_epoch(epoch) for epoch in epochs),
            payouts=_last_payouts(epochs),
            head="0x" + head.hex(),
            files=released_files(files),
        )


def _statements(session: Session, job_id: str) -> tuple[LoggedStatement, ...]:
    rows = session.scalars(
        select(StatementRow).where(StatementRow.job_id == job_id).order_by(StatementRow.seq)
    )
    logged: list[LoggedStatement] = []
    for row in rows:
        # The log counts within an epoch; the table counts over the whole job.
        follows = bool(logged) and logged[-1].epoch == row.epoch
        logged.append(
            LoggedStatement(
                kind=StatementKind(row.kind),
                contributor=row.contributor,
                epoch=row.epoch,
                seq=logged[-1].seq + 1 if follows else 0,
                envelope=Envelope.from_text(row.envelope),
            )
        )
    return tuple(logged)


def _bundle_epoch(row: EpochRow) -> BundleEpoch:
    return BundleEpoch(
        number=row.epoch,
        pay_root=row.pay_root,
        provenance_root=row.prov_root,
        num_statements=row.num_statements,
        cumulative_micros=row.cumulative_micros,
        tx_hash=row.tx_hash,
        block_number=row.block_number,
    )


def _last_payouts(epochs: Sequence[EpochRow]) -> tuple[Payout, ...]:
    if not epochs:
        return ()
    last = PayoutSet.decode(epochs[-1].payouts.encode(), max_bytes=_MAX_PAYOUTS_BYTES)
    return last.payouts


def _made(row: StatementRow) -> PolicyVersion | None:
    """The version whose making ``row`` states."""
    predicate = decode(Envelope.from_text(row.envelope).payload_bytes()).predicate
    return predicate.policy if isinstance(predicate, UpdatePredicate) else None


def _metrics_line(row: EventRow) -> str:
    data: dict[str, Any] = json.loads(row.data)
    if row.type == "evaluation":
        figures = {name: value for name, value in data.items() if name.startswith("eval/")}
        data = figures | {
            "policy_version": data["policy_version"],
            "eval/accuracy": data["accuracy"],
            "eval/num_examples": data["num_examples"],
        }
    return json.dumps({"at_ms": row.at_ms, **data}, sort_keys=True) + "\n"


def _card(run: JobRun, policy: PolicyVersion) -> str:
    spec, base = run.learner.spec, run.learner.base
    rows = "\n".join(
        f"| {version} | {average.value:.4f} |"
        for version, average in run.evaluations.reported().items()
    )
    environments = ", ".join(f"`{env.id}`" for env in spec.environments)
    if spec.lora is None:
        library, tag, what = "transformers", "full-fine-tuning", f"`{base.name}`, every weight"
    else:
        library, tag, what = "peft", "lora", f"A LoRA adapter for `{base.name}`,"
    return f"""---
base_model: {base.name}
library_name: {library}
tags: [reinforcement-learning, {tag}, shoal]
---
# {spec.name}

{what} trained by reinforcement learning on {environments} with
workers that bid for each task.  This is policy version {policy.version}.

| policy version | held-out accuracy |
| ---: | ---: |
{rows}

- Job: `{run.job_id}`
- Base content digest (SHA-256): `{base.content_digest()}`
- Weights digest (SHA-256): `{policy.adapter.sha256}`

`bundle.json` of the job lists every contribution and payment;
`shoal provenance verify bundle.json --model .` checks it offline.
"""
