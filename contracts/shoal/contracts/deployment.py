"""Putting Shoal's contracts on a chain, and keeping their addresses in a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from eth_abi.abi import encode as abi_encode
from eth_account.signers.local import LocalAccount
from eth_utils.address import to_checksum_address
from pydantic import ValidationError
from web3 import AsyncHTTPProvider, AsyncWeb3

from shoal.contracts.artefact import artefact
from shoal.contracts.connection import open_connection
from shoal.contracts.records import ZERO_ADDRESS, Deployment
from shoal.contracts.rejection import chain_errors
from shoal.contracts.sender import Call, Sender
from shoal.protocol.errors import InvalidRequest, InvariantBroken
from shoal.protocol.record import first_fault

__all__ = ["Deployment", "deploy", "load_deployment", "store_deployment"]

DEFAULT_UNBONDING_S = 3600
_MAX_FILE_BYTES = 65_536


async def deploy(
    rpc_url: str,
    deployer: LocalAccount,
    *,
    challenge_window_s: int = 0,
    unbonding_s: int = DEFAULT_UNBONDING_S,
    court: str = ZERO_ADDRESS,
) -> Deployment:
    """The development token and the three contracts are on the chain at ``rpc_url``.

    Args:
        rpc_url: The chain's JSON-RPC address.
        deployer: Pays the gas, and is the token's faucet; it has no other right.
        challenge_window_s: Seconds before a posted root can be claimed under.
        unbonding_s: Seconds between asking for stake back and getting it.
        court: The only account that may slash; the zero address for nobody.

    Raises:
        Unavailable: the chain does not answer.
        ChainRejected: the deployer has no gas money, or the chain refuses a contract.
    """
    w3 = open_connection(rpc_url)
    try:
        with chain_errors("read the chain id", rpc_url):
            chain_id = await w3.eth.chain_id
        sender = Sender(w3, rpc_url, deployer, chain_id)
        token, block_number = await _create(w3, sender, "DevUSD", [], [])
        vault, _ = await _create(
            w3, sender, "StakeVault", ["address", "address", "uint64"], [token, court, unbonding_s]
        )
        log, _ = await _create(w3, sender, "ProvenanceLog", [], [])
        escrow, _ = await _create(
            w3,
            sender,
            "JobEscrow",
            ["address", "address", "uint64"],
            [token, log, challenge_window_s],
        )
    finally:
        await w3.provider.disconnect()
    return Deployment(
        chain_id=chain_id,
        token=token,
        stake_vault=vault,
        job_escrow=escrow,
        provenance_log=log,
        block_number=block_number,
    )


def store_deployment(path: Path, deployment: Deployment) -> None:
    """``path`` holds ``deployment`` as JSON."""
    path.write_text(deployment.model_dump_json(indent=1) + "\n", encoding="utf-8")


def load_deployment(path: Path) -> Deployment:
    """The deployment in the file ``path``.

    Raises:
        InvalidRequest: the file is missing, too large, or not a deployment.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
        if len(data) > _MAX_FILE_BYTES:
            raise InvalidRequest(f"{path} is too large for a deployment file.", code="oversize")
        return Deployment.model_validate_json(data)
    except OSError as error:
        raise InvalidRequest(
            f"The deployment file {path} cannot be read ({error.strerror}); deploy the contracts "
            "or name the right file.",
            code="no_deployment",
        ) from error
    except ValidationError as error:
        raise InvalidRequest(
            f"{path} is not a deployment file: {first_fault(error)}.", code="bad_deployment"
        ) from error


async def _create(
    w3: AsyncWeb3[AsyncHTTPProvider], sender: Sender, name: str, types: list[str], args: list[Any]
) -> tuple[str, int]:
    data = artefact(name).bytecode + abi_encode(types, args)
    mined = await sender.send(Call(to=None, data=data, purpose=f"deploy {name}"))
    with chain_errors(f"read the receipt of {name}", sender.rpc_url):
        receipt = await w3.eth.get_transaction_receipt(cast(Any, mined.tx_hash))
    address = receipt["contractAddress"]
    if address is None:
        raise InvariantBroken(f"The deployment of {name} in {mined.tx_hash} made no contract.")
    return to_checksum_address(address), mined.block_number
