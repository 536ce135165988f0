"""``shoal submit``."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from shoal.client.commands.options import Wallet, output_option, wallet_options
from shoal.client.output import Output

if TYPE_CHECKING:
    from eth_account.signers.local import LocalAccount

    from shoal.client.api import ShoalClient
    from shoal.client.views import JobView
    from shoal.protocol.job import JobSpec

EXIT_BUDGET = 5
EXIT_FAILED_JOB = 6


@dataclass(frozen=True, kw_only=True)
class _Order:
    """How a job is submitted; an absent ``rpc_url`` takes the orchestrator's proposal."""

    url: str
    key: Path
    rpc_url: str | None
    follow: bool
    refund: bool


@click.command("submit")
@click.argument("job_file", type=click.Path(path_type=Path), metavar="JOB.toml")
@click.option("--follow", is_flag=True, help="Watch the job until it ends.")
@click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Override a key, e.g. seed=7."
)
@click.option("--dry-run", is_flag=True, help="Print the resolved job; submit and pay nothing.")
@click.option(
    "--no-refund", is_flag=True, help="With --follow: leave the rest of the budget in escrow."
)
@wallet_options
@output_option
def command(
    job_file: Path,
    follow: bool,
    settings: tuple[str, ...],
    dry_run: bool,
    no_refund: bool,
    wallet: Wallet,
    output: Output,
) -> int:
    """Submit a job file and put its budget in escrow.

    With --follow, what the job did not spend is refunded at its end. Exits with 3 if the job
    is invalid, 5 if the account does not hold the budget or the job uses it up and, with
    --follow, 6 if the job fails.
    """
    from shoal.client.commands.target import resolve_key, resolve_url
    from shoal.client.jobfile import load_job_file, render_job_file
    from shoal.rl.loss_traps import job_warnings

    spec = load_job_file(job_file, settings)
    for sentence in job_warnings(spec):
        output.warn(f"warning: {sentence}")
    if dry_run:
        if output.json_mode:
            output.emit(spec.to_json())
        else:
            click.echo(render_job_file(spec), nl=False)
        return 0
    order = _Order(
        url=resolve_url(wallet.url),
        key=resolve_key(wallet.key),
        rpc_url=wallet.rpc_url,
        follow=follow,
        refund=not no_refund,
    )
    return asyncio.run(_submit(spec, order, output))


async def _submit(spec: JobSpec, order: _Order, output: Output) -> int:
    from shoal.client.api import ShoalClient
    from shoal.client.picture import dollars
    from shoal.client.submission import open_gateway, submit_job
    from shoal.protocol.keystore import load_account

    account = load_account(order.key)
    async with ShoalClient(order.url) as client:
        async with await open_gateway(await client.info(), account, order.rpc_url) as gateway:
            submitted = await submit_job(client, gateway, spec, account)
        budget = dollars(spec.budget.max_total_micros)
        if output.json_mode:
            output.emit({"type": "submitted"} | submitted.model_dump(mode="json"))
        else:
            output.say(f"submitted [bold]{submitted.job_id}[/bold], {budget} in escrow")
        if not order.follow:
            return 0
        view = await watch(client, submitted.job_id, output)
        if order.refund:
            await _refund(client, view.job_id, account, order, output)
        return exit_code(view)


async def _refund(
    client: ShoalClient, job_id: str, account: LocalAccount, order: _Order, output: Output
) -> None:
    """The rest of the budget is back, or a sentence says when it can be."""
    from shoal.client.commands.refund import report_refund
    from shoal.client.escrow import refund_rest
    from shoal.client.submission import open_gateway
    from shoal.protocol.errors import ShoalError

    try:
        async with await open_gateway(await client.info(), account, order.rpc_url) as gateway:
            report_refund(await refund_rest(gateway, job_id), output)
    except ShoalError as error:
        # The job's own outcome decides the exit code; the money is not lost.
        output.warn(f"The rest of the budget was not refunded yet: {error.message}")


def exit_code(view: JobView) -> int:
    """What a command that watched the job exits with."""
    if view.state.value == "complete":
        return 0
    return EXIT_BUDGET if view.state.value == "paused" else EXIT_FAILED_JOB


async def watch(client: ShoalClient, job_id: str, output: Output) -> JobView:
    """The job once it has ended, shown until then and its outcome said; Ctrl-C detaches."""
    from shoal.client.follow import follow_job
    from shoal.client.picture import short_job

    try:
        view = await follow_job(client, job_id, output)
    except asyncio.CancelledError:
        output.say(
            "Detached; the job goes on. Watch again with "
            f"`shoal jobs {short_job(job_id)} --follow --url {client.url}`."
        )
        raise
    if output.json_mode:
        output.emit({"type": "result", "job": view.model_dump(mode="json")})
    elif view.state.value == "complete":
        output.say(
            "[green]complete[/green]; fetch the adapter with "
            f"`shoal models download {short_job(job_id)} --url {client.url}`."
        )
    else:
        output.say(f"[red]{view.state.value}[/red]: {view.reason or 'no reason was given'}")
    return view
