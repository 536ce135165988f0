"""``shoal up``."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from shoal.client.commands.options import data_option, output_option
from shoal.client.output import Output

if TYPE_CHECKING:
    from shoal.client.devnet import Devnet, DevnetOptions


@click.command("up")
@click.option("--workers", type=int, default=3, show_default=True, help="How many workers.")
@data_option
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="The API's; 0: any free.")
@click.option(
    "--chain-port", type=click.IntRange(0, 65535), default=0, help="The chain's; 0: any free."
)
@output_option
def command(workers: int, data_dir: Path, port: int, chain_port: int, output: Output) -> None:
    """Start a market on this machine: chain, orchestrator and workers, until Ctrl-C.

    The folder keeps keys, chain and jobs; starting again continues from there.
    """
    from shoal.client.devnet import DevnetOptions
    from shoal.client.interrupt import run_until_interrupted

    options = DevnetOptions(
        data_dir=data_dir, num_workers=workers, api_port=port, chain_port=chain_port
    )
    asyncio.run(run_until_interrupted(_serve(options, output)))


async def _serve(options: DevnetOptions, output: Output) -> None:
    from shoal.client.devnet import Devnet

    started_s = time.monotonic()
    devnet = Devnet(options, say=lambda line: output.say(f"[dim]{line}[/dim]"))
    greeted = False
    try:
        async with devnet:
            _greet(devnet, output, time.monotonic() - started_s)
            greeted = True
            try:
                await devnet.wait_for_failure()
            finally:
                output.say("[dim]stopping workers, orchestrator, chain[/dim]")
    finally:
        if greeted:
            output.say("[dim]stopped[/dim]")


def _greet(devnet: Devnet, output: Output, took_s: float) -> None:
    running = devnet.running
    if output.json_mode:
        output.emit(running.model_dump(mode="json") | {"ready_s": round(took_s, 2)})
        return
    address = running.p2p_addresses[0] if running.p2p_addresses else running.api_url
    output.say(
        f"[bold]The market is up[/bold] ({len(devnet.profiles)} workers, {took_s:.1f} s)",
        f"  API           {running.api_url}",
        f"  chain         {running.rpc_url}",
        f"  logs          {devnet.folder.root}",
        "",
        "In another terminal:",
        f"  shoal submit examples/addition.toml --follow --url {running.api_url}"
        f" --key {running.requester_key}",
        f"  shoal worker join {address}",
        "",
        "Ctrl-C stops everything.",
    )
