"""``shoal worker``."""

from __future__ import annotations

import click

from shoal.client.commands.orchestrate import PASS_THROUGH, become


@click.group("worker")
def command() -> None:
    """Offer this machine's compute, and collect its pay."""


@command.command("join", context_settings=PASS_THROUGH)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="ADDRESS [OPTIONS]...")
def join(arguments: tuple[str, ...]) -> None:
    """Work for the orchestrator at ADDRESS: a libp2p address or the URL of its API.

    OPTIONS are those of `python -m shoal.worker`: --config FILE, --set KEY=VALUE, --dry-run.
    """
    if not arguments or arguments[0].startswith("-"):
        become("shoal.worker", arguments)
    address, *rest = arguments
    become("shoal.worker", ("--set", f"orchestrator={address}", *rest))


@command.command("claim", context_settings=PASS_THROUGH)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[OPTIONS]...")
def claim(arguments: tuple[str, ...]) -> None:
    """Claim all that jobs owe this worker's account, without working."""
    become("shoal.worker", ("--claim", *arguments))
