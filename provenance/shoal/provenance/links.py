"""Whether the statements of a job fit together: from work to verdict, pay, update, release.

Everything here has been authenticated already; what is checked is that it tells one story.
Each function returns what it compared, in words, or raises `PeerFault`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from eth_utils.address import to_checksum_address

from shoal.protocol.errors import PeerFault
from shoal.protocol.ids import Account
from shoal.protocol.job import Release
from shoal.protocol.merkle import MerkleTree, payout_leaf
from shoal.protocol.money import format_dollars
from shoal.protocol.policy import PolicyVersion
from shoal.provenance.bundle import Bundle, LoggedStatement
from shoal.provenance.statement import (
    WORK_KINDS,
    EnvironmentPredicate,
    Predicate,
    ReleasePredicate,
    Statement,
    StatementKind,
    UpdatePredicate,
    VerificationPredicate,
    WorkPredicate,
)


@dataclass(frozen=True, kw_only=True)
class Chain:
    """A job's updates in order, and its policy versions by number."""

    updates: Sequence[Entry]
    versions: Mapping[int, PolicyVersion]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """An authenticated statement: where it is logged, what it says, its payload's digest."""

    logged: LoggedStatement
    statement: Statement
    sha256: str

    @property
    def predicate(self) -> Predicate:
        """What it says."""
        return self.statement.predicate

    @property
    def place(self) -> str:
        """Where it is in the log, in words."""
        return f"statement {self.logged.seq} of epoch {self.logged.epoch}"


def _fault(message: str) -> PeerFault:
    return PeerFault(message, code="broken_link")


def check_roles(bundle: Bundle, entries: Sequence[Entry]) -> str:
    """Each statement is about this job and signed by the party whose statement it is."""
    orchestrator = bundle.orchestrator.lower()
    work = 0
    for entry in entries:
        if entry.statement.job_id != bundle.job_id:
            raise _fault(f"{entry.place} speaks of job {entry.statement.job_id}, not of this one.")
        contributor = entry.logged.contributor.lower()
        predicate = entry.predicate
        if isinstance(predicate, WorkPredicate):
            _check_work(entry, predicate)
            work += 1
        elif contributor != orchestrator:
            raise _fault(
                f"{entry.place} is a {entry.statement.kind.value} statement by {contributor}; "
                f"only the orchestrator {orchestrator} makes those."
            )
    return f"{work} by workers, {len(entries) - work} by the orchestrator, all of this job"


def _check_work(entry: Entry, work: WorkPredicate) -> None:
    lease, result = work.lease, work.result
    if entry.logged.envelope.key_id != lease.node:
        raise _fault(f"{entry.place} is signed by another node than held its lease.")
    if entry.logged.contributor.lower() != lease.account.lower():
        raise _fault(f"{entry.place} is by another account than held its lease.")
    same = (
        result.lease_id == lease.lease_id,
        result.lease_epoch == lease.lease_epoch,
        result.task_id == lease.task_id,
        result.task_sha256 == lease.task_sha256,
        result.kind is lease.kind,
        result.num_units <= lease.num_units,
        WORK_KINDS[lease.kind] is entry.statement.kind,
        work.policy.job_id == lease.job_id,
        result.policy_sha256 == work.policy.policy_sha256(),
        entry.statement.subjects[0].digests.sha256 == result.payload.sha256,
    )
    if not all(same):
        raise _fault(f"{entry.place} has a lease, a result and a policy that do not agree.")


def check_environments(bundle: Bundle, entries: Sequence[Entry]) -> str:
    """Every environment of the job is stated, and no worker used another."""
    wanted = {spec.digest() for spec in bundle.job.record.spec.environments}
    stated = {
        entry.predicate.environment.digest()
        for entry in entries
        if isinstance(entry.predicate, EnvironmentPredicate)
    }
    missing = wanted - stated
    if missing:
        raise _fault(f"{len(missing)} of the job's {len(wanted)} environments are stated nowhere.")
    for entry in entries:
        work = entry.predicate
        if isinstance(work, WorkPredicate) and any(
            spec.digest() not in wanted for spec in work.environments
        ):
            raise _fault(f"{entry.place} used an environment the job does not name.")
    return f"{len(wanted)} environments, each stated with its digest"


def check_pay(bundle: Bundle, entries: Sequence[Entry]) -> tuple[str, Mapping[str, Entry]]:
    """Accepted verdicts add up to every epoch's payout root, total and the final payouts.

    Returns:
        What was compared, and the accepted work by its statement's digest.
    """
    work = {e.sha256: e for e in entries if isinstance(e.predicate, WorkPredicate)}
    accepted: dict[str, Entry] = {}
    paid_tasks: set[str] = set()
    owed: dict[Account, int] = {}
    total = 0
    verdicts = iter([e for e in entries if isinstance(e.predicate, VerificationPredicate)])
    upcoming = next(verdicts, None)
    for epoch in bundle.epochs:
        while upcoming is not None and upcoming.logged.epoch <= epoch.number:
            account, micros = _pay_of(upcoming, work, accepted, paid_tasks)
            if micros:
                owed[account] = owed.get(account, 0) + micros
                total += micros
            upcoming = next(verdicts, None)
        root = MerkleTree(list(_payout_leaves(bundle, owed))).root
        if "0x" + root.hex() != epoch.pay_root or total != epoch.cumulative_micros:
            raise _fault(
                f"Epoch {epoch.number} posted the payout root {epoch.pay_root} over "
                f"{epoch.cumulative_micros} micros; its accepted verdicts give "
                f"0x{root.hex()} over {total}."
            )
    _check_final_payouts(bundle, owed, total)
    detail = (
        f"{len(accepted)} accepted verdicts pay {len(owed)} accounts "
        f"{format_dollars(total)} dollars, as posted"
    )
    return detail, accepted


def _pay_of(
    verdict: Entry,
    work: Mapping[str, Entry],
    accepted: dict[str, Entry],
    paid_tasks: set[str],
) -> tuple[Account, int]:
    """Who is paid what by the verdict; an accepted one is matched with its work."""
    says = verdict.predicate
    if not isinstance(says, VerificationPredicate):
        raise _fault(f"{verdict.place} is not a verdict.")
    ruling = says.verdict
    account = Account(to_checksum_address(says.account))
    if not ruling.accepted:
        if ruling.pay_micros:
            raise _fault(f"{verdict.place} rejects a result and pays for it.")
        return account, 0
    done = work.get(says.work_sha256 or "")
    if done is None or not isinstance(done.predicate, WorkPredicate):
        raise _fault(f"{verdict.place} accepts work that is stated nowhere.")
    _check_ruling(verdict, says, done, done.predicate)
    if ruling.pay_micros:
        if says.task_id in paid_tasks:
            raise _fault(f"{verdict.place} pays task {says.task_id} a second time.")
        paid_tasks.add(says.task_id)
    accepted[done.sha256] = done
    return account, ruling.pay_micros


def _check_ruling(
    verdict: Entry, says: VerificationPredicate, done: Entry, work: WorkPredicate
) -> None:
    """An accepted verdict is about this work, and pays no more than its lease agreed."""
    ruling, lease, result = says.verdict, work.lease, work.result
    same = (
        ruling.lease_id == lease.lease_id,
        ruling.lease_epoch == lease.lease_epoch,
        ruling.result_sha256 == result.digest(),
        says.task_id == lease.task_id,
        says.kind is lease.kind,
        says.node == lease.node,
        says.account.lower() == lease.account.lower(),
        bool(ruling.checks) and all(check.passed for check in ruling.checks),
    )
    if not all(same):
        raise _fault(f"{verdict.place} and {done.place}, which it accepts, do not agree.")
    if ruling.num_units > result.num_units:
        raise _fault(f"{verdict.place} accepts more units than were done.")
    if ruling.pay_micros > ruling.num_units * lease.unit_price_micros:
        raise _fault(f"{verdict.place} pays more than the lease's price for its units.")


def _payout_leaves(bundle: Bundle, owed: Mapping[Account, int]) -> Iterator[bytes]:
    for account in sorted(owed, key=lambda account: account.lower()):
        yield payout_leaf(
            bundle.domain.chain_id,
            bundle.domain.escrow.lower(),
            bundle.job_id,
            account,
            owed[account],
        )


def _check_final_payouts(bundle: Bundle, owed: Mapping[Account, int], total: int) -> None:
    listed = {Account(to_checksum_address(p.account)): p.cumulative_micros for p in bundle.payouts}
    if listed != dict(owed) or len(listed) != len(bundle.payouts):
        raise _fault("The bundle's payouts are not what its accepted verdicts add up to.")
    last = bundle.epochs[-1].number if bundle.epochs else 0
    if any(p.job_id != bundle.job_id or p.epoch != last for p in bundle.payouts):
        raise _fault("A payout of the bundle is of another job or epoch.")
    budget = bundle.job.record.spec.budget.max_total_micros
    if total > budget:
        raise _fault(f"The job paid {total} micros, above its budget of {budget}.")


def check_updates(
    bundle: Bundle, entries: Sequence[Entry], accepted: Mapping[str, Entry]
) -> tuple[str, Chain]:
    """The updates form one unbroken chain of versions made of accepted work, each used once.

    Returns:
        What was compared, and the chain.
    """
    updates = [entry for entry in entries if isinstance(entry.predicate, UpdatePredicate)]
    versions: dict[int, PolicyVersion] = {}
    used: set[str] = set()
    for position, entry in enumerate(updates):
        update = entry.predicate
        if not isinstance(update, UpdatePredicate):
            continue
        if position == 0:
            if update.parent.version != 0:
                raise _fault(f"{entry.place}, the first update, does not begin at version 0.")
            versions[0] = update.parent
        parent = versions[position]
        if update.parent != parent or update.policy.version != parent.version + 1:
            raise _fault(
                f"{entry.place} goes from version {update.parent.version} to "
                f"{update.policy.version}; the version before it was {parent.version}."
            )
        _check_versions(bundle, entry, update)
        for sha256 in (*update.rollouts, *update.gradients):
            if sha256 in used:
                raise _fault(f"{entry.place} uses the work {sha256} a second time.")
            used.add(sha256)
        _check_ingredients(bundle, entry, update, versions, accepted)
        versions[position + 1] = update.policy
    detail = f"{len(updates)} updates in an unbroken chain, of {len(used)} pieces of work"
    return detail, Chain(updates=updates, versions=versions)


def _check_versions(bundle: Bundle, entry: Entry, update: UpdatePredicate) -> None:
    base = bundle.base.content_digest()
    for policy in (update.parent, update.policy):
        if policy.job_id != bundle.job_id or policy.base_sha256 != base:
            raise _fault(f"{entry.place} is about another job's or base's policy.")
    if entry.statement.subjects[0].digests.sha256 != update.policy.adapter.sha256:
        raise _fault(f"{entry.place} has another subject than its adapter.")


def _check_ingredients(
    bundle: Bundle,
    entry: Entry,
    update: UpdatePredicate,
    versions: Mapping[int, PolicyVersion],
    accepted: Mapping[str, Entry],
) -> None:
    max_staleness = bundle.job.record.spec.max_staleness
    for digests, kind in (
        (update.rollouts, StatementKind.ROLLOUT_BATCH),
        (update.gradients, StatementKind.GRADIENT_BATCH),
    ):
        for sha256 in digests:
            done = accepted.get(sha256)
            if (
                done is None
                or not isinstance(done.predicate, WorkPredicate)
                or done.statement.kind is not kind
            ):
                raise _fault(f"{entry.place} uses {kind.value} {sha256}, never accepted.")
            if done.logged.epoch > entry.logged.epoch:
                raise _fault(f"{entry.place} uses {done.place}, which was logged later.")
            policy = done.predicate.policy
            if versions.get(policy.version) != policy:
                raise _fault(f"{done.place} used a policy that is none of the job's versions.")
            allowed = max_staleness if kind is StatementKind.ROLLOUT_BATCH else 0
            if update.parent.version - policy.version > allowed:
                raise _fault(
                    f"{entry.place} uses {done.place}, made under version "
                    f"{policy.version}, more than {allowed} before {update.parent.version}."
                )


def check_release(
    bundle: Bundle, entries: Sequence[Entry], accepted: Mapping[str, Entry], chain: Chain
) -> str:
    """The released files are those stated, and the adapter is the version's the job asks for.

    A bundle without a release is one of a job still running; it must name no files.
    """
    releases = [entry for entry in entries if isinstance(entry.predicate, ReleasePredicate)]
    if not releases:
        if bundle.files:
            raise _fault("The bundle names files, and no release statement does.")
        return "nothing is released yet"
    if len(releases) > 1:
        raise _fault(f"There are {len(releases)} release statements; a job has one.")
    entry, release = releases[0], releases[0].predicate
    if not isinstance(release, ReleasePredicate):
        raise _fault(f"{entry.place} is not a release.")
    stated = {subject.name: subject.digests.sha256 for subject in entry.statement.subjects}
    if stated != {file.path: file.sha256 for file in bundle.files}:
        raise _fault("The bundle's files are not those of its release statement.")
    if release.policy.adapter.sha256 not in stated.values():
        raise _fault("None of the released files is the released policy version's adapter.")
    if release.policy.base_sha256 != bundle.base.content_digest():
        raise _fault("The released policy stands on another base than the bundle names.")
    rule = bundle.job.record.spec.checkpoint.release
    _check_released_version(release, chain, rule)
    _check_evaluations(release, accepted, chain)
    which = f"version {release.policy.version}, the {rule.value}"
    return f"{which}; {len(stated)} files, its adapter among them"


def _check_released_version(release: ReleasePredicate, chain: Chain, rule: Release) -> None:
    if not chain.updates:
        if release.policy.version != 0 or release.update_sha256 is not None:
            raise _fault("The release names an update, and none is logged.")
        return
    version = release.policy.version
    if rule is Release.LAST and version != max(chain.versions):
        raise _fault("The released adapter is not that of the last update.")
    made = chain.updates[version - 1].sha256 if 0 < version < len(chain.versions) else None
    if release.update_sha256 != made or release.policy != chain.versions.get(version):
        raise _fault("The released adapter is not that of the update the release names.")


def _check_evaluations(
    release: ReleasePredicate, accepted: Mapping[str, Entry], chain: Chain
) -> None:
    versions = {**chain.versions, release.policy.version: release.policy}
    for sha256 in release.evaluations:
        done = accepted.get(sha256)
        if done is None or done.statement.kind is not StatementKind.EVALUATION:
            raise _fault(f"The release cites the evaluation {sha256}, never accepted.")
        work = done.predicate
        if isinstance(work, WorkPredicate) and versions.get(work.policy.version) != work.policy:
            raise _fault(f"{done.place} evaluated a policy that is none of the job's versions.")
