"""``shoal jobs``."""

from __future__ import annotations

import asyncio

import click

from shoal.client.commands.options import output_option, url_option
from shoal.client.output import Output


@click.command("jobs")
@click.argument("job_id", required=False, metavar="[JOB_ID]")
@click.option("--follow", is_flag=True, help="Watch the job until it ends.")
@url_option
@output_option
def command(job_id: str | None, follow: bool, url: str | None, output: Output) -> int:
    """List jobs, or show one."""
    from shoal.client.commands.target import resolve_url

    if follow and job_id is None:
        raise click.UsageError("--follow needs a JOB_ID.")
    if job_id is None:
        return asyncio.run(_list(resolve_url(url), output))
    return asyncio.run(_show(resolve_url(url), job_id, output, follow=follow))


async def _list(url: str, output: Output) -> int:
    from rich.table import Table

    from shoal.client.api import ShoalClient
    from shoal.client.picture import dollars, short_job

    async with ShoalClient(url) as client:
        jobs = await client.jobs()
    if output.json_mode:
        output.emit([job.model_dump(mode="json") for job in jobs])
        return 0
    if not jobs:
        output.say("No jobs yet; submit one with `shoal submit JOB.toml`.")
        return 0
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", show_edge=False)
    for title in ("job", "name", "state", "version", "budget"):
        table.add_column(title, no_wrap=True)
    for job in jobs:
        table.add_row(
            short_job(job.job_id),
            job.name,
            job.state.value,
            f"{job.policy_version}/{job.max_steps}",
            dollars(job.budget_micros),
        )
    output.say(table)
    return 0


async def _show(url: str, job_id: str, output: Output, *, follow: bool) -> int:
    from shoal.client.api import ShoalClient
    from shoal.client.commands.submit import exit_code, watch
    from shoal.client.commands.target import resolve_job
    from shoal.client.picture import picture_of

    async with ShoalClient(url) as client:
        job_id = await resolve_job(client, job_id)
        if follow:
            return exit_code(await watch(client, job_id, output))
        view = await client.job(job_id)
    if output.json_mode:
        output.emit(view.model_dump(mode="json"))
    else:
        rewards = [] if view.reward_recent is None else [view.reward_recent]
        output.say(picture_of(view, rewards))
    return 0
