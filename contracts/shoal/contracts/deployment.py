"""Putting Shoal's contracts on a chain, and keeping their addresses in a file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from eth_abi.abi import encode as abi_encode
from eth_account.signers.local import LocalAccount
from eth_utils.address import to_checksum_address
from pydantic import ValidationError
from web3.types import Nonce
from web3.utils.address import get_create_address

from shoal.contracts.artefact import artefact
from shoal.contracts.connection import Connection
from shoal.contracts.records import Deployment
from shoal.contracts.sender import Sender
from shoal.contracts.transactions import Call
from shoal.protocol.errors import InvalidRequest, InvariantBroken
from shoal.protocol.record import first_fault

__all__ = ["Deployment", "Terms", "deploy", "load_deployment", "store_deployment"]

DEFAULT_UNBONDING_S = 3600
_MAX_FILE_BYTES = 65_536


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What a set of contracts is deployed with, for good; the defaults suit a development chain.

    Args:
        challenge_window_s: Seconds before a posted root can be claimed under.
        unbonding_s: Seconds between asking for stake back and getting it; no shorter than a
            vote lasts.
        min_bond_micros: What a coordinator puts up for a job before it may post.
        penalty_micros: The stake that one fault costs, as far as there is any.
        challenge_bond_micros: What opening a case that people judge takes.
        voting_s: Seconds in which verifiers can decide such a case.
        verifiers: Who votes on them; nobody where none shall be heard.
        quorum: How many of them must say the same.
    """

    challenge_window_s: int = 0
    unbonding_s: int = DEFAULT_UNBONDING_S
    min_bond_micros: int = 0
    penalty_micros: int = 1_000_000
    challenge_bond_micros: int = 1_000_000
    voting_s: int = 600
    verifiers: tuple[str, ...] = ()
    quorum: int = 0


async def deploy(rpc_url: str, deployer: LocalAccount, *, terms: Terms | None = None) -> Deployment:
    """The development token and the contracts are on the chain at ``rpc_url``.

    Args:
        rpc_url: The chain's JSON-RPC address.
        deployer: Pays the gas, and is the token's faucet; it has no other right.
        terms: What they are deployed with; `Terms`'s defaults when absent.

    Raises:
        Unavailable: the chain does not answer.
        ChainRejected: the deployer has no gas money, or the chain refuses a contract.
    """
    connection = Connection(rpc_url)
    try:
        chain_id = await connection.chain_id()
        yard = _Yard(connection, Sender(connection, deployer, chain_id))
        return await _deploy_all(yard, chain_id, terms or Terms())
    finally:
        await connection.close()


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


async def _deploy_all(yard: _Yard, chain_id: int, terms: Terms) -> Deployment:
    token, block_number = await yard.create("DevUSD", [], [])
    log, _ = await yard.create("ProvenanceLog", [], [])
    # Vault, escrow and court name each other: the later two by addresses not yet in use.
    escrow_at, court_at = await yard.next_address(1), await yard.next_address(2)
    vault, _ = await yard.create(
        "StakeVault",
        ["address", "address", "address", "uint64"],
        [token, escrow_at, court_at, terms.unbonding_s],
    )
    escrow, _ = await yard.create(
        "JobEscrow",
        ["address", "address", "address", "address", "uint64", "uint128"],
        [token, log, vault, court_at, terms.challenge_window_s, terms.min_bond_micros],
    )
    court, _ = await yard.create(
        "FaultCourt",
        ["address", "address", "(uint128,uint128,uint64,uint256,address[])"],
        [
            vault,
            escrow,
            (
                terms.penalty_micros,
                terms.challenge_bond_micros,
                terms.voting_s,
                terms.quorum,
                list(terms.verifiers),
            ),
        ],
    )
    shares, _ = await yard.create("ModelShares", ["address", "address"], [token, escrow])
    return Deployment(
        chain_id=chain_id,
        token=token,
        stake_vault=vault,
        job_escrow=escrow,
        provenance_log=log,
        fault_court=court,
        model_shares=shares,
        block_number=block_number,
    )


class _Yard:
    """Where contracts are made, one after the other, by one account."""

    def __init__(self, connection: Connection, sender: Sender) -> None:
        self._connection = connection
        self._sender = sender

    async def create(self, name: str, types: list[str], args: list[Any]) -> tuple[str, int]:
        """The contract's address, and the block it is in."""
        data = artefact(name).bytecode + abi_encode(types, args)
        mined = await self._sender.send(Call(to=None, data=data, purpose=f"deploy {name}"))
        async with self._connection.asking(f"read the receipt of {name}") as w3:
            receipt = await w3.eth.get_transaction_receipt(cast(Any, mined.tx_hash))
        address = receipt["contractAddress"]
        if address is None:
            raise InvariantBroken(f"The deployment of {name} in {mined.tx_hash} made no contract.")
        return to_checksum_address(address), mined.block_number

    async def next_address(self, offset: int) -> str:
        """Where the contract after the next ``offset`` ones will be (yellow paper, section 7)."""
        nonce = await self._sender.transactions.num_spent("pending")
        return get_create_address(self._sender.account.address, cast(Nonce, nonce + offset))
