"""``shoal refund``."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

import click

from shoal.client.commands.options import Wallet, output_option, wallet_options
from shoal.client.output import Output

if TYPE_CHECKING:
    from shoal.client.escrow import Refund


@click.command("refund")
@click.argument("job_id", metavar="JOB_ID")
@wallet_options
@output_option
def command(job_id: str, wallet: Wallet, output: Output) -> None:
    """Take back what an ended job did not spend.

    The money goes to whoever funded the job; the key only pays for the transaction.
    """
    from shoal.client.commands.target import resolve_key, resolve_url

    asyncio.run(
        _refund(resolve_url(wallet.url), job_id, resolve_key(wallet.key), wallet.rpc_url, output)
    )


async def _refund(url: str, job_id: str, key: Path, rpc_url: str | None, output: Output) -> None:
    from shoal.client.api import ShoalClient
    from shoal.client.commands.target import resolve_job
    from shoal.client.escrow import refund_rest
    from shoal.client.submission import open_gateway
    from shoal.protocol.keystore import load_account

    account = load_account(key)
    async with ShoalClient(url) as client:
        job_id = await resolve_job(client, job_id)
        async with await open_gateway(await client.info(), account, rpc_url) as gateway:
            report_refund(await refund_rest(gateway, job_id), output)


def report_refund(refund: Refund, output: Output) -> None:
    """Says what came back."""
    from shoal.protocol.money import format_dollars

    amount = f"[bold]${format_dollars(refund.refunded_micros)}[/bold]"
    if output.json_mode:
        output.emit(
            {
                "type": "refund",
                "refunded_micros": refund.refunded_micros,
                "sent_now": refund.sent_now,
            }
        )
    elif refund.sent_now:
        output.say(f"refunded {amount}")
    elif refund.refunded_micros:
        output.say(f"{amount} were refunded before")
    else:
        output.say("Nothing is left to refund.")
