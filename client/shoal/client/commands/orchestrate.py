"""``shoal orchestrate``."""

from __future__ import annotations

import click

PASS_THROUGH = {"ignore_unknown_options": True, "help_option_names": []}
"""The process behind the command knows its own options, ``--help`` among them."""


@click.command("orchestrate", context_settings=PASS_THROUGH)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def command(arguments: tuple[str, ...]) -> None:
    """Run an orchestrator; options are those of `python -m shoal.orchestrator`."""
    become("shoal.orchestrator", arguments)


def become(module: str, arguments: tuple[str, ...]) -> None:
    """This process is now ``python -m module``: signals and exit code are its own."""
    import os
    import sys

    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", module, *arguments])
