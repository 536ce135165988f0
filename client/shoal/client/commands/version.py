"""``shoal version``."""

from __future__ import annotations

import click

from shoal.client.commands.options import output_option
from shoal.client.output import Output


@click.command("version")
@output_option
def command(output: Output) -> None:
    """Show the installed version."""
    from shoal.protocol.node import PROTOCOL_VERSION
    from shoal.protocol.version import SOFTWARE_VERSION

    if output.json_mode:
        output.emit({"version": SOFTWARE_VERSION, "protocol_version": PROTOCOL_VERSION})
    else:
        output.say(f"shoal {SOFTWARE_VERSION} (protocol {PROTOCOL_VERSION})")
