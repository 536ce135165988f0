"""``shoal chain``."""

from __future__ import annotations

import asyncio
from pathlib import Path

import click

from shoal.client.commands.options import data_option, output_option
from shoal.client.output import Output


@click.command("chain")
@data_option
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="0 takes a free port.")
@output_option
def command(data_dir: Path, port: int, output: Output) -> None:
    """Run a local chain with the contracts deployed, until Ctrl-C."""
    from shoal.client.interrupt import run_until_interrupted

    asyncio.run(run_until_interrupted(_serve(data_dir, port, output)))


async def _serve(data_dir: Path, port: int, output: Output) -> None:
    from shoal.client.devnet import Devnet, DevnetOptions

    options = DevnetOptions(data_dir=data_dir, chain_port=port)
    async with Devnet.chain_only(options) as (rpc_url, deployment):
        if output.json_mode:
            output.emit({"rpc_url": rpc_url, "deployment": deployment.to_json()})
        else:
            output.say(f"chain {deployment.chain_id} at {rpc_url}; Ctrl-C stops it")
            output.say(*(f"  {name:15} {value}" for name, value in deployment.to_json().items()))
        await asyncio.Event().wait()
