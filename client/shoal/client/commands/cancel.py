"""``shoal cancel``."""

from __future__ import annotations

import asyncio
from pathlib import Path

import click

from shoal.client.commands.options import key_option, output_option, url_option
from shoal.client.output import Output


@click.command("cancel")
@click.argument("job_id", metavar="JOB_ID")
@key_option
@url_option
@output_option
def command(job_id: str, key: Path | None, url: str | None, output: Output) -> None:
    """End one of your jobs; what was handed in until now is judged and paid.

    The last policy version stays downloadable. `shoal refund` returns the rest of the budget.
    """
    from shoal.client.commands.target import resolve_key, resolve_url

    asyncio.run(_cancel(resolve_url(url), job_id, resolve_key(key), output))


async def _cancel(url: str, job_id: str, key: Path, output: Output) -> None:
    from shoal.client.api import ShoalClient
    from shoal.client.commands.target import resolve_job
    from shoal.client.picture import short_job
    from shoal.protocol.job import JobCommand, JobCommandKind
    from shoal.protocol.keystore import load_account
    from shoal.protocol.signing import sign

    account = load_account(key)
    async with ShoalClient(url) as client:
        job_id = await resolve_job(client, job_id)
        order = JobCommand(job_id=job_id, kind=JobCommandKind.CANCEL)
        view = await client.cancel(sign(order, (await client.info()).domain, account))
    if output.json_mode:
        output.emit(view.model_dump(mode="json"))
    elif view.ended:
        output.say(f"The job has ended: [bold]{view.state.value}[/bold].")
    else:
        output.say(
            "The job is being ended; once its providers' work is settled, the rest of the "
            f"budget is yours: `shoal refund {short_job(job_id)} --url {url}`."
        )
