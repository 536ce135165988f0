"""``shoal demo``."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

import click

from shoal.client.commands.options import output_option
from shoal.client.output import Output

if TYPE_CHECKING:
    from shoal.client.demo import DemoOptions

EXIT_INTERRUPTED = 130
_PICTURE_WIDTH = 88


@click.command("demo")
@click.option(
    "--job",
    "job_file",
    type=click.Path(path_type=Path),
    help="The job file; the addition example when absent.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("runs/demo"),
    show_default=True,
    help="Where the adapter, the bundle and the summary go.",
)
@click.option("--workers", type=int, default=3, show_default=True, help="How many workers.")
@click.option("--seed", type=int, help="The job's seed; the job file's when absent.")
@click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Override a key of the job."
)
@click.option(
    "--svg",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Also draw what the terminal showed to this file.",
)
@click.option("--no-kill", is_flag=True, help="Do not kill a worker half-way.")
@output_option
def command(
    job_file: Path | None,
    out: Path,
    workers: int,
    seed: int | None,
    settings: tuple[str, ...],
    svg: Path | None,
    no_kill: bool,
    output: Output,
) -> int:
    """Run a whole job on this machine, start to finish, and check it.

    Starts a chain, an orchestrator and workers, submits the job, kills one worker half-way,
    pays the providers, refunds the rest, and verifies the model's provenance offline.
    """
    from shoal.client.demo import DemoOptions
    from shoal.client.interrupt import run_until_interrupted

    if seed is not None:
        settings = (*settings, f"seed={seed}")
    options = DemoOptions(
        job_file=job_file, out=out, num_workers=workers, settings=settings, kill=not no_kill
    )
    if svg is not None:
        output = Output(json_mode=output.json_mode, picture_width=_PICTURE_WIDTH)
    outcome = asyncio.run(run_until_interrupted(_run(options, output)))
    if svg is not None and outcome is not None:
        output.save_picture(svg, "shoal demo")
    return EXIT_INTERRUPTED if outcome is None else outcome


async def _run(options: DemoOptions, output: Output) -> int:
    from shoal.client.demo import run_demo
    from shoal.client.summary import summary_picture

    summary = await run_demo(options, output)
    if output.json_mode:
        output.emit(summary.to_json())
        output.keep(*summary_picture(summary))
    else:
        output.say(*summary_picture(summary))
        output.say("", f"[dim]written to {options.out}[/dim]")
    return 0 if summary.provenance.verified else 1
