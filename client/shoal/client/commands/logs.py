"""``shoal logs``."""

from __future__ import annotations

import asyncio
import datetime
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from shoal.client.commands.options import output_option, url_option
from shoal.client.output import Output

if TYPE_CHECKING:
    from shoal.client.views import JobEvent


@click.command("logs")
@click.argument("job_id", metavar="JOB_ID")
@click.option("--follow", is_flag=True, help="Keep printing until the job ends.")
@url_option
@output_option
def command(job_id: str, follow: bool, url: str | None, output: Output) -> None:
    """Show what happened to a job, one line an event."""
    from shoal.client.commands.target import resolve_url

    asyncio.run(_show(resolve_url(url), job_id, output, follow=follow))


async def _show(url: str, job_id: str, output: Output, *, follow: bool) -> None:
    from shoal.client.api import ShoalClient
    from shoal.client.commands.target import resolve_job

    async with ShoalClient(url) as client:
        job_id = await resolve_job(client, job_id)
        if follow:
            async for event in client.follow_events(job_id):
                _print(event, output)
            return
        after = 0
        while page := await client.events(job_id, after=after):
            for event in page:
                _print(event, output)
            after = page[-1].seq


def _print(event: JobEvent, output: Output) -> None:
    if output.json_mode:
        output.emit(event.model_dump(mode="json"))
        return
    from rich.markup import escape

    moment = datetime.datetime.fromtimestamp(event.at_ms / 1000).astimezone()
    output.say(f"[dim]{moment:%H:%M:%S}[/dim]  {escape(event.type):24} {escape(_details(event))}")


def _details(event: JobEvent) -> str:
    if event.type == "health":
        return health_words(event.data)
    return "  ".join(f"{key}={value}" for key, value in event.data.items())


def health_words(data: Mapping[str, Any]) -> str:
    """A health event as a sentence: what began to be wrong and what to do, or what is over."""
    if data.get("active"):
        return f"{data.get('finding')}: {data.get('remedy')}"
    return f"{data.get('code')} is over"
