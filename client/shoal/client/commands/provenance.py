"""``shoal provenance``."""

from __future__ import annotations

from pathlib import Path

import click

from shoal.client.commands.options import output_option
from shoal.client.output import Output


@click.group("provenance")
def command() -> None:
    """Check where a model comes from."""


@command.command("verify")
@click.argument("bundle", type=click.Path(path_type=Path), metavar="BUNDLE")
@click.option(
    "--model",
    "model_dir",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="The downloaded adapter, whose files are then checked against the bundle.",
)
@click.option(
    "--head", metavar="HEX", help="The job's provenance head, as you read it from the chain."
)
@output_option
def verify(bundle: Path, model_dir: Path | None, head: str | None, output: Output) -> int:
    """Check a provenance bundle offline: PASS or FAIL, with a reason for each step.

    Exits with 0 for PASS and 3 for FAIL.
    """
    from shoal.client.provenance_check import check_bundle, parse_head, report_picture

    report = check_bundle(bundle, model_dir, parse_head(head))
    if output.json_mode:
        output.emit(report.to_json())
    else:
        output.say(*report_picture(report))
    return 0 if report.passed else 3
