"""``shoal submit``."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

import click

from shoal.client.commands.options import output_option, url_option
from shoal.client.output import Output

if TYPE_CHECKING:
    from shoal.client.api import ShoalClient
    from shoal.protocol.job import JobSpec

EXIT_FAILED_JOB = 6


@click.command("submit")
@click.argument("job_file", type=click.Path(path_type=Path), metavar="JOB.toml")
@click.option("--follow", is_flag=True, help="Watch the job until it ends.")
@click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Override a key, e.g. seed=7."
)
@click.option("--dry-run", is_flag=True, help="Print the resolved job; submit and pay nothing.")
@url_option
@click.option(
    "--key",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The requester's keystore; the running devnet's when absent.",
)
@click.option("--rpc-url", help="A chain node you trust; the orchestrator's proposal when absent.")
@output_option
def command(
    job_file: Path,
    follow: bool,
    settings: tuple[str, ...],
    dry_run: bool,
    url: str | None,
    key: Path | None,
    rpc_url: str | None,
    output: Output,
) -> int:
    """Submit a job file and put its budget in escrow.

    Exits with 3 if the job is invalid, 5 if the account does not hold the budget and, with
    --follow, 6 if the job fails.
    """
    from shoal.client.commands.target import resolve_key, resolve_url
    from shoal.client.jobfile import load_job_file, render_job_file

    spec = load_job_file(job_file, settings)
    if dry_run:
        if output.json_mode:
            output.emit(spec.to_json())
        else:
            click.echo(render_job_file(spec), nl=False)
        return 0
    return asyncio.run(
        _submit(spec, resolve_url(url), resolve_key(key), rpc_url, output, follow=follow)
    )


async def _submit(
    spec: JobSpec, url: str, key: Path, rpc_url: str | None, output: Output, *, follow: bool
) -> int:
    from shoal.client.api import ShoalClient
    from shoal.client.picture import dollars
    from shoal.client.submission import open_gateway, submit_job
    from shoal.protocol.keystore import load_account

    account = load_account(key)
    async with ShoalClient(url) as client:
        gateway = await open_gateway(await client.info(), account, rpc_url)
        try:
            submitted = await submit_job(client, gateway, spec, account)
        finally:
            await gateway.close()
        budget = dollars(spec.budget.max_total_micros)
        if output.json_mode:
            output.emit({"type": "submitted"} | submitted.model_dump(mode="json"))
        else:
            output.say(f"submitted [bold]{submitted.job_id}[/bold], {budget} in escrow")
        if not follow:
            return 0
        return await watch(client, submitted.job_id, output)


async def watch(client: ShoalClient, job_id: str, output: Output) -> int:
    """Shows the job until it ends; Ctrl-C detaches. Returns the exit code."""
    from shoal.client.follow import follow_job
    from shoal.client.picture import short_job

    try:
        view = await follow_job(client, job_id, output)
    except asyncio.CancelledError:
        output.say(
            "Detached; the job goes on. Watch again with "
            f"`shoal jobs {short_job(job_id)} --follow --url {client.url}`."
        )
        raise
    if output.json_mode:
        output.emit({"type": "result", "job": view.model_dump(mode="json")})
    elif view.state.value == "complete":
        output.say(
            "[green]complete[/green]; fetch the adapter with "
            f"`shoal models download {short_job(job_id)} --url {client.url}`."
        )
    else:
        output.say(f"[red]{view.state.value}[/red]: {view.reason or 'no reason was given'}")
    return 0 if view.state.value == "complete" else EXIT_FAILED_JOB
