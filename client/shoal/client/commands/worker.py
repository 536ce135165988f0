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


@command.command("doctor", context_settings=PASS_THROUGH)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[ADDRESS]... [OPTIONS]...")
def doctor(arguments: tuple[str, ...]) -> None:
    """Check machine, keys, network and chain, and say how to mend what is wrong.

    OPTIONS are those of `shoal worker join`. Nothing is made, moved or joined. The exit code
    is 0 unless a line says FAIL.
    """
    become("shoal.worker", ("--doctor", *arguments))


@command.command("status", context_settings=PASS_THROUGH)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[OPTIONS]...")
def status(arguments: tuple[str, ...]) -> None:
    """Say what the worker on this machine is doing and, when it does nothing, why.

    --data-dir names its folder, where that is not the usual one; --json is for programs.
    """
    become("shoal.worker", ("--status", *arguments))


@command.command("backup", context_settings=PASS_THROUGH)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="FILE [OPTIONS]...")
def backup(arguments: tuple[str, ...]) -> None:
    """Put the account's key and the node's, encrypted, into a new FILE.

    The passphrase is SHOAL_BACKUP_PASSPHRASE, else SHOAL_PASSPHRASE, else asked for.
    """
    become("shoal.worker", ("--backup", *arguments))


@command.command("restore", context_settings=PASS_THROUGH)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="FILE [OPTIONS]...")
def restore(arguments: tuple[str, ...]) -> None:
    """Bring the keys in FILE into the worker's folder; keys that are there stay.

    The passphrase is SHOAL_BACKUP_PASSPHRASE, else SHOAL_PASSPHRASE, else asked for.
    """
    become("shoal.worker", ("--restore", *arguments))
