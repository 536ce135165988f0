"""``python -m benchmarks.rl.site [--actors 2] [--set max_steps=60] [--json]``: a job on Ray.

The same job runs over two markets on this machine, each of two workers that ask equal prices:
a plain worker beside a site (a worker whose tasks are computed by the actors of a Ray cluster),
and two plain workers.  The site's share is counted in the accepted rollout groups of the job's
provenance bundle, which is checked against the chain.  A job's prompts and draws follow from
its id, which no two jobs share: so the results are compared by the 95 % intervals of their
held-out accuracies.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from shoal.client.api import ShoalClient
from shoal.client.demo import final_bundle
from shoal.client.devnet import Devnet, DevnetOptions
from shoal.client.devnet_files import WorkerProfile
from shoal.client.jobfile import load_job_file
from shoal.client.provenance_check import check_bundle
from shoal.client.submission import open_gateway, submit_job
from shoal.protocol.canonical import sha256_hex
from shoal.protocol.errors import InvariantBroken
from shoal.protocol.job import JobSpec, JobState
from shoal.protocol.keystore import load_account
from shoal.provenance.bundle import Bundle, read_bundle
from shoal.provenance.statement import (
    StatementKind,
    VerificationPredicate,
    WorkPredicate,
    decode,
)
from shoal.rl.confidence import Estimate, Interval

EXAMPLE: Final = Path(__file__).parents[2] / "examples/addition.toml"
SETTINGS: Final = ("max_steps=120", "batch_size=512", "tasks.rollout=16", "tasks.gradient=32")
"""In tasks small enough that two workers share every batch, and for long enough that what is
learnt stands out from what a held-out evaluation leaves open."""
CAPACITY: Final = {"rollout": 32, "gradient": 32}
"""Equal for both: a site of several actors would by default hold as many times more."""
SITE: Final = "site"
PLAIN: Final = "plain"
SHARE: Final = Interval(low=0.25, high=0.75)
"""What of the rollouts the site is to have done for the comparison to mean something."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a job came to: accepted rollout groups by worker, accuracy, whether its bundle holds.

    ``wall_s`` is from submission to completion.
    """

    groups: dict[str, int]
    before: Estimate
    after: Estimate
    provenance: bool
    wall_s: float

    @property
    def site_share(self) -> float:
        """The site's part of the accepted rollout groups."""
        return self.groups[SITE] / sum(self.groups.values())


def worker(name: str, num_actors: int | None = None) -> WorkerProfile:
    """A worker that asks what all of them ask; with ``num_actors``, a site of as many."""
    site = {} if num_actors is None else {"ray": {"address": "local", "actors": num_actors}}
    return WorkerProfile(
        name=name,
        rollout_price="0.0002",
        gradient_price="0.0001",
        evaluate_price="0.00001",
        niceness=0,
        tables={"capacity": CAPACITY, **site},
    )


async def run_job(spec: JobSpec, root: Path, profiles: tuple[WorkerProfile, ...]) -> Outcome:
    """The job, over a fresh market of these workers."""
    options = DevnetOptions(data_dir=root, profiles=profiles)
    async with Devnet(options) as devnet, ShoalClient(devnet.running.api_url) as client:
        account = load_account(devnet.running.requester_key)
        async with await open_gateway(devnet.info, account) as gateway:
            submitted = await submit_job(client, gateway, spec, account)
            started_s = time.perf_counter()
            view = await client.wait(submitted.job_id)
            wall_s = time.perf_counter() - started_s
            if view.state is not JobState.COMPLETE:
                raise InvariantBroken(f"The job ended as {view.state}: {view.reason}.")
            path = root / "bundle.json"
            path.write_bytes(await final_bundle(client, view.job_id))
            head, _ = await gateway.provenance.head(gateway.escrow.address, view.job_id)
    before, after = (
        Estimate(
            value=item.accuracy, interval=Interval(low=item.accuracy_low, high=item.accuracy_high)
        )
        for item in (view.evaluations[0], view.evaluations[-1])
    )
    accounts = {
        load_account(devnet.folder.worker_key(profile.name)).address.lower(): profile.name
        for profile in profiles
    }
    done = rollout_groups(read_bundle(path))
    return Outcome(
        groups={name: done[account] for account, name in accounts.items()},
        before=before,
        after=after,
        provenance=check_bundle(path, None, head).passed,
        wall_s=wall_s,
    )


def rollout_groups(bundle: Bundle) -> Counter[str]:
    """How many groups of accepted rollouts each account (lower case) has contributed."""
    accepted: set[str | None] = set()
    work: dict[str, WorkPredicate] = {}
    for statement in bundle.statements:
        payload = statement.envelope.payload_bytes()
        predicate = decode(payload).predicate
        if isinstance(predicate, VerificationPredicate) and predicate.verdict.accepted:
            accepted.add(predicate.work_sha256)
        elif statement.kind is StatementKind.ROLLOUT_BATCH and isinstance(predicate, WorkPredicate):
            work[sha256_hex(payload)] = predicate
    groups: Counter[str] = Counter()
    for digest, predicate in work.items():
        if digest in accepted:
            groups[predicate.lease.account.lower()] += predicate.lease.num_units
    return groups


def agree(one: Estimate, other: Estimate) -> bool:
    """Whether neither is significantly better than the other: their intervals overlap."""
    return not (one.interval.is_above(other.interval) or other.interval.is_above(one.interval))


def describe(label: str, outcome: Outcome) -> str:
    """The outcome as a row of the Markdown table."""
    before, after = (
        f"{score.value:.3f} ({score.interval.low:.3f} to {score.interval.high:.3f})"
        for score in (outcome.before, outcome.after)
    )
    groups = ", ".join(f"{name} {count:,}" for name, count in outcome.groups.items())
    provenance = "PASS" if outcome.provenance else "FAIL"
    return f"| {label} | {groups} | {before} | {after} | {provenance} | {outcome.wall_s:.0f} s |"


def main() -> int:
    """Runs both jobs; 0 if the site did its share, the results agree and the bundles hold."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rl.site",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    arguments = parser.parse_args()
    spec = load_job_file(EXAMPLE, [*SETTINGS, *arguments.set])
    with tempfile.TemporaryDirectory(prefix="shoal-site-") as name:
        mixed, plain = (
            asyncio.run(run_job(spec, Path(name) / label, (worker(PLAIN), other)))
            for label, other in (
                ("mixed", worker(SITE, arguments.actors)),
                ("plain", worker("plain-2")),
            )
        )
    same = agree(mixed.after, plain.after)
    if arguments.json:
        figures = {"mixed": asdict(mixed), "plain": asdict(plain)}
        print(json.dumps({**figures, "site_share": mixed.site_share, "agree": same}))
    else:
        print("| workers | accepted rollout groups | before | after | provenance | wall |")
        print("|---|---|---|---|---|---:|")
        print(describe("plain and site", mixed))
        print(describe("two plain", plain))
        print(f"site's share {mixed.site_share:.1%}; intervals {'overlap' if same else 'differ'}")
    shared = SHARE.low <= mixed.site_share <= SHARE.high
    return 0 if same and shared and mixed.provenance and plain.provenance else 1


if __name__ == "__main__":
    sys.exit(main())
