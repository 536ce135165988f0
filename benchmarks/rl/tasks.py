"""Learns each example task and draws the held-out curves.

Every task's job runs once for each seed, in one process or (``--market``) over a whole market
on this machine.  A task improves significantly when the 95 % intervals of its first and its
last held-out evaluation do not overlap, for every seed.  Prints a Markdown table.

    python -m benchmarks.rl.tasks --seeds 0 1 2
    python -m benchmarks.rl.tasks --tasks gcd --set max_steps=20
    python -m benchmarks.rl.tasks --market --picture docs/images/curves-tasks.png
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from shoal.client.api import ShoalClient
from shoal.client.devnet import Devnet, DevnetOptions
from shoal.client.jobfile import load_job_file
from shoal.client.submission import open_gateway, submit_job
from shoal.protocol.errors import InvariantBroken
from shoal.protocol.job import JobSpec, JobState
from shoal.protocol.keystore import load_account
from shoal.rl.confidence import Estimate, Interval

EXAMPLES = Path(__file__).parents[2] / "examples"
TASKS = ("addition", "gcd", "leg_counting", "spell_backward")
LIMIT_S = 360.0
"""A job of this suite is to be done in as long on two cores."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One job's held-out avg@k by policy version; ``wall_s`` leaves out the base's making."""

    task: str
    seed: int
    versions: tuple[int, ...]
    scores: tuple[Estimate, ...]
    wall_s: float

    @property
    def improved(self) -> bool:
        """Whether the last evaluation is significantly better than the first."""
        return self.scores[-1].interval.is_above(self.scores[0].interval)


def learn_here(task: str, seed: int, spec: JobSpec, root: Path) -> Curve:
    """The job in this process, on one thread."""
    import torch

    from shoal.rl.base_models import fetch_base
    from shoal.rl.local import train_locally

    torch.set_num_threads(1)
    run = train_locally(spec, fetch_base(spec.model, root / "models", allow_local=False))
    return Curve(
        task=task,
        seed=seed,
        versions=tuple(run.scores),
        scores=tuple(score.average for score in run.scores.values()),
        wall_s=run.wall_s,
    )


async def learn_on_a_market(task: str, seed: int, spec: JobSpec, root: Path) -> Curve:
    """The job over a chain, an orchestrator and three workers on this machine."""
    options = DevnetOptions(data_dir=root / f"{task}-{seed}", models_dir=root / "models")
    async with Devnet(options) as devnet, ShoalClient(devnet.running.api_url) as client:
        account = load_account(devnet.running.requester_key)
        gateway = await open_gateway(devnet.info, account)
        async with gateway:
            submitted = await submit_job(client, gateway, spec, account)
            started_s = time.perf_counter()
            view = await client.wait(submitted.job_id)
            wall_s = time.perf_counter() - started_s
    if view.state is not JobState.COMPLETE:
        raise InvariantBroken(f"The job {task} ended as {view.state}: {view.reason}.")
    return Curve(
        task=task,
        seed=seed,
        versions=tuple(item.policy_version for item in view.evaluations),
        scores=tuple(
            Estimate(
                value=item.accuracy,
                interval=Interval(low=item.accuracy_low, high=item.accuracy_high),
            )
            for item in view.evaluations
        ),
        wall_s=wall_s,
    )


def table(curves: Sequence[Curve]) -> str:
    """The Markdown table of the runs."""
    rows = ["| task | seed | before | after | significant | wall |", "|---|---|---|---|---|---|"]
    for curve in curves:
        before, after = (
            f"{100 * score.value:.1f} ({100 * score.interval.low:.1f} to "
            f"{100 * score.interval.high:.1f})"
            for score in (curve.scores[0], curve.scores[-1])
        )
        verdict = "yes" if curve.improved else "no"
        rows.append(
            f"| {curve.task} | {curve.seed} | {before} | {after} | {verdict} "
            f"| {curve.wall_s:.0f} s |"
        )
    return "\n".join(rows)


def draw(curves: Sequence[Curve], path: Path) -> None:
    """The curves as a picture: a panel for each task, a line with its interval for each seed."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    tasks = list(dict.fromkeys(curve.task for curve in curves))
    figure, panels = plt.subplots(
        1, len(tasks), figsize=(3.2 * len(tasks), 3.0), sharey=True, squeeze=False
    )
    for panel, task in zip(panels[0], tasks, strict=True):
        for curve in (curve for curve in curves if curve.task == task):
            (line,) = panel.plot(
                curve.versions, [score.value for score in curve.scores], label=f"seed {curve.seed}"
            )
            panel.fill_between(
                curve.versions,
                [score.interval.low for score in curve.scores],
                [score.interval.high for score in curve.scores],
                color=line.get_color(),
                alpha=0.15,
                linewidth=0,
            )
        panel.set_title(task.replace("_", " "))
        panel.set_xlabel("policy version")
        panel.set_ylim(0, 1)
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("held-out avg@k, 95 % interval")
    panels[0][-1].legend(loc="lower right", fontsize="small")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def read_curves(path: Path) -> list[Curve]:
    """The curves an earlier call kept, none if it kept none."""
    if not path.exists():
        return []
    return [
        Curve(
            task=item["task"],
            seed=item["seed"],
            versions=tuple(item["versions"]),
            scores=tuple(
                Estimate(value=score["value"], interval=Interval(**score["interval"]))
                for score in item["scores"]
            ),
            wall_s=item["wall_s"],
        )
        for item in json.loads(path.read_text())
    ]


def main() -> int:
    """Runs the jobs that are not on record yet; 1 unless every task improved in time."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rl.tasks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--market", action="store_true")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--work", type=Path, default=Path("runs/tasks"))
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    kept = arguments.work / ("market.json" if arguments.market else "local.json")
    arguments.work.mkdir(parents=True, exist_ok=True)
    curves = read_curves(kept)
    for task in arguments.tasks:
        for seed in arguments.seeds:
            if any((curve.task, curve.seed) == (task, seed) for curve in curves):
                continue
            spec = load_job_file(EXAMPLES / f"{task}.toml", [*arguments.set, f"seed={seed}"])
            if arguments.market:
                curve = asyncio.run(learn_on_a_market(task, seed, spec, arguments.work))
            else:
                curve = learn_here(task, seed, spec, arguments.work)
            curves.append(curve)
            kept.write_text(json.dumps([asdict(curve) for curve in curves], indent=1) + "\n")
            print(f"{task} seed {seed}: {curve.scores[0].value:.3f} → {curve.scores[-1].value:.3f}")
    print(table(curves))
    if arguments.picture is not None:
        draw(curves, arguments.picture)
    return 0 if all(curve.improved and curve.wall_s <= LIMIT_S for curve in curves) else 1


if __name__ == "__main__":
    sys.exit(main())
