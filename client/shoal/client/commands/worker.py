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
    """Work for the orchestrator at ADDRESS; --help lists the options."""
    become("shoal.worker", arguments)


@command.command("claim", context_settings=PASS_THROUGH)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[OPTIONS]...")
def claim(arguments: tuple[str, ...]) -> None:
    """Claim all that jobs owe this worker's account, without working.

    OPTIONS are those of `shoal worker join`, ADDRESS included.
    """
    become("shoal.worker", ("--claim", *arguments))


@command.command("unstake", context_settings=PASS_THROUGH)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[OPTIONS]...")
def unstake(arguments: tuple[str, ...]) -> None:
    """Take back this worker's stake: once to begin, once more when the wait is over.

    OPTIONS are those of `shoal worker join`, ADDRESS included.
    """
    become("shoal.worker", ("--unstake", *arguments))
