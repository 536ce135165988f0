"""``shoal models``."""

from __future__ import annotations

import asyncio
from pathlib import Path

import click

from shoal.client.commands.options import output_option, url_option
from shoal.client.output import Output


@click.group("models")
def command() -> None:
    """Download trained models."""


@command.command("download")
@click.argument("job_id", metavar="JOB_ID")
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where to; a folder named after the job when absent.",
)
@url_option
@output_option
def download(job_id: str, out: Path | None, url: str | None, output: Output) -> None:
    """Download a job's adapter: a PEFT folder, every file checked by its digest.

    With it come the job's provenance, once the job has ended, and the base model where that
    is on no model hub.
    """
    from shoal.client.commands.target import resolve_url

    asyncio.run(_download(resolve_url(url), job_id, out, output))


async def _download(url: str, job_id: str, out: Path | None, output: Output) -> None:
    from rich.markup import escape

    from shoal.client.api import ShoalClient
    from shoal.client.commands.target import resolve_job
    from shoal.client.download import download_model

    async with ShoalClient(url) as client:
        job_id = await resolve_job(client, job_id)
        folder = out or Path(f"adapter-{job_id[2:12]}")
        model = await download_model(client, job_id, folder)
    if output.json_mode:
        output.emit(
            {
                "job_id": job_id,
                "path": str(folder),
                "files": [path.name for path in model.files],
                "base": model.base,
                "bundle": None if model.bundle is None else str(model.bundle),
            }
        )
        return
    output.say(f"{len(model.files)} files, digests checked, in [bold]{folder}[/bold]")
    if model.bundle is not None:
        output.say(f"[dim]shoal provenance verify {model.bundle} --model {folder}[/dim]")
    output.say("", *(escape(line) for line in model.python()))
