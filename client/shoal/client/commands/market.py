"""``shoal market``."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shoal.client.commands.market_simulate import simulate
from shoal.client.commands.options import output_option, rpc_option, url_option
from shoal.client.output import Output
from shoal.protocol.errors import InvalidRequest

if TYPE_CHECKING:
    from shoal.client.accusation import Accusation
    from shoal.contracts.gateway import ChainGateway


@click.group("market")
def command() -> None:
    """Try the market out, or check what it did."""


@command.command("replay")
@click.argument("clearing", type=click.Path(path_type=Path), metavar="CERT")
@click.option("--orchestrator", metavar="ADDRESS", help="The account that should have signed it.")
@click.option(
    "--receipt",
    type=click.Path(path_type=Path),
    help="A worker's receipt, with its bid and salt, that may have been left out.",
)
@click.option(
    "--proof",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write what FaultCourt would accept here.",
)
@output_option
def replay(
    clearing: Path,
    orchestrator: str | None,
    receipt: Path | None,
    proof: Path | None,
    output: Output,
) -> int:
    """Recompute a clearing from its bids, byte by byte: PASS, or the first difference.

    CERT is the file that an orchestrator serves with a certificate. Exits with 0 for PASS and
    3 for FAIL.
    """
    from shoal.client.market_view import finding_json, finding_picture, replay_files, write_proofs

    finding = replay_files(clearing, orchestrator=orchestrator, receipt=receipt)
    if output.json_mode:
        output.emit(finding_json(finding))
    else:
        output.say(*finding_picture(finding))
    if proof is not None:
        write_proofs(finding, proof)
    return 0 if finding.passed else 3


@dataclass(frozen=True, kw_only=True)
class _Court:
    """How the court is reached and who pays for the transaction, as given, absent or not."""

    key: Path | None
    rpc_url: str | None
    url: str | None
    deployment: Path | None


def _court_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds how the court is reached, passed as one `_Court` ``court``."""

    @url_option
    @rpc_option
    @click.option(
        "--key",
        type=click.Path(path_type=Path, dir_okay=False),
        help="With --send: the provider's keystore, account.json of its data folder.",
    )
    @click.option(
        "--deployment",
        type=click.Path(path_type=Path, dir_okay=False),
        help="The contracts' addresses, where the orchestrator shall not be asked for them.",
    )
    @functools.wraps(command)
    def wrapped(
        *args: Any,
        key: Path | None,
        rpc_url: str | None,
        url: str | None,
        deployment: Path | None,
        **rest: Any,
    ) -> Any:
        court = _Court(key=key, rpc_url=rpc_url, url=url, deployment=deployment)
        return command(*args, court=court, **rest)

    return wrapped


@command.command("fault")
@click.option(
    "--evidence",
    type=click.Path(path_type=Path),
    required=True,
    help="drops.jsonl of the worker's evidence folder; or its bids.jsonl.",
)
@click.option(
    "--certificate",
    type=click.Path(path_type=Path),
    required=True,
    help="The clearing file of a lot of the epoch, as the orchestrator serves it.",
)
@click.option("--send", is_flag=True, help="Send the proofs to FaultCourt.")
@_court_options
@output_option
def fault(evidence: Path, certificate: Path, send: bool, court: _Court, output: Output) -> None:
    """Prove that an orchestrator left out a bid it had given a receipt for.

    Writes each proof as a JSON object, with the call that FaultCourt takes; whoever sends it,
    the bidder is the one who was wronged.
    """
    from shoal.client.accusation import accuse

    accusation = accuse(evidence, certificate)
    if send:
        asyncio.run(_send(accusation, court, output))
        return
    for proof in accusation.proofs:
        output.emit(proof.to_json())


async def _send(accusation: Accusation, court: _Court, output: Output) -> None:
    from shoal.client.accusation import send_proofs

    async with await _gateway(court) as gateway:
        cases = await send_proofs(gateway, accusation)
    for case, proof in zip(cases, accusation.proofs, strict=True):
        if output.json_mode:
            said = {"sentence": proof.sentence, "fault": case.fault.name.lower()}
            output.emit({"type": "case", **case.to_json(), **said})
        else:
            output.say(f"{case.status.value} against {case.accused}: {proof.sentence}")
            output.say(f"case {case.case_id}")


async def _gateway(court: _Court) -> ChainGateway:
    """The chain as the provider, through the orchestrator's proposals or its own addresses."""
    from shoal.client.api import ShoalClient
    from shoal.client.commands.target import resolve_url
    from shoal.client.submission import open_gateway
    from shoal.protocol.keystore import load_account

    if court.key is None:
        raise InvalidRequest(
            "--send needs the account that pays for the transaction; name the provider's keystore "
            "with --key.",
            code="no_key",
        )
    account = load_account(court.key)
    if court.deployment is None:
        async with ShoalClient(resolve_url(court.url)) as client:
            return await open_gateway(await client.info(), account, court.rpc_url)
    if court.rpc_url is None:
        raise InvalidRequest("--deployment names no chain node; name one with --rpc-url.")
    from shoal.contracts.deployment import load_deployment
    from shoal.contracts.gateway import ChainGateway

    return await ChainGateway.connect(court.rpc_url, load_deployment(court.deployment), account)


@command.command("book")
@click.argument("job_id", metavar="JOB")
@url_option
@output_option
def book(job_id: str, url: str | None, output: Output) -> None:
    """Show who bid for a job, who won what at which pay, and why.

    The newest clearing of each kind of its tasks, with the bids that competed.
    """
    from shoal.client.commands.target import resolve_url

    asyncio.run(_show_book(resolve_url(url), job_id, output))


async def _show_book(url: str, job_id: str, output: Output) -> None:
    from shoal.client.api import ShoalClient
    from shoal.client.commands.target import resolve_job
    from shoal.client.market_book_view import book_picture

    async with ShoalClient(url) as client:
        view = await client.book(await resolve_job(client, job_id))
    if output.json_mode:
        output.emit(view.model_dump(mode="json"))
    else:
        output.say(*book_picture(view))


@command.command("why")
@click.argument("lease_id", metavar="LEASE")
@url_option
@output_option
def why(lease_id: str, url: str | None, output: Output) -> None:
    """Say why a lease went to its node, and why at that price.

    `shoal market book JOB` and a worker's evidence name leases.
    """
    from shoal.client.commands.target import resolve_url

    asyncio.run(_show_lease(resolve_url(url), lease_id, output))


async def _show_lease(url: str, lease_id: str, output: Output) -> None:
    from shoal.client.api import ShoalClient
    from shoal.client.commands.target import require_lease_id
    from shoal.client.market_book_view import lease_picture

    async with ShoalClient(url) as client:
        view = await client.lease(require_lease_id(lease_id))
    if output.json_mode:
        output.emit(view.model_dump(mode="json"))
    else:
        output.say(*lease_picture(view, client.url))


command.add_command(simulate)
