"""What the contracts package promises without a chain."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from eth_abi.abi import encode as abi_encode
from pydantic import ValidationError
from web3.exceptions import ContractCustomError, Web3RPCError

from shoal.contracts.anvil import dev_account
from shoal.contracts.artefact import CONTRACTS, artefact, error_types
from shoal.contracts.build import SETTINGS, checkout_root, source_digests
from shoal.contracts.connection import job_id_bytes
from shoal.contracts.deployment import load_deployment, store_deployment
from shoal.contracts.records import Claim, Deployment
from shoal.contracts.rejection import chain_errors, decode_revert
from shoal.protocol.errors import ChainRejected, InvalidRequest, Unavailable

HERE = "0x" + "12" * 20


def deployment() -> Deployment:
    return Deployment(
        chain_id=31337,
        token=HERE,
        stake_vault=HERE,
        job_escrow=HERE,
        provenance_log=HERE,
        fault_court=HERE,
        model_shares=HERE,
        block_number=3,
    )


def selector(name: str) -> bytes:
    return next(key for key, error in error_types().items() if error.name == name)


@pytest.mark.parametrize("name", CONTRACTS)
def test_every_artefact_is_of_the_sources_in_this_checkout(name: str) -> None:
    folder = checkout_root() / "contracts/shoal/contracts/artefacts"
    record = json.loads((folder / f"{name}.json").read_text())
    assert record["sources"] == source_digests(checkout_root())
    assert record["settings"] == SETTINGS
    assert len(artefact(name).bytecode) > 500


def test_forge_compiles_with_the_settings_of_the_artefacts() -> None:
    text = (checkout_root() / "contracts/solidity/foundry.toml").read_text()
    profile = tomllib.loads(text)["profile"]["default"]
    assert profile["evm_version"] == SETTINGS["evmVersion"]
    assert profile["optimizer"] is SETTINGS["optimizer"]["enabled"]
    assert profile["optimizer_runs"] == SETTINGS["optimizer"]["runs"]
    assert profile["bytecode_hash"] == SETTINGS["metadata"]["bytecodeHash"]
    assert profile["cbor_metadata"] is SETTINGS["metadata"]["appendCBOR"]


def test_a_custom_error_is_named_with_its_arguments() -> None:
    data = selector("WrongEpoch") + abi_encode(["uint64", "uint64"], [3, 2])
    assert decode_revert(data) == "WrongEpoch(posted=3, expected=2)"
    text = bytes.fromhex("08c379a0") + abi_encode(["string"], ["no"])
    assert decode_revert(text) == "Error(message=no)"


def test_unknown_or_torn_revert_data_is_shown_and_capped() -> None:
    assert decode_revert(b"") == "no reason given"
    assert decode_revert(b"\xde\xad\xbe\xef") == "0xdeadbeef"
    assert len(decode_revert(b"\xde" * 10_000)) == 300
    assert decode_revert(selector("WrongEpoch") + b"\1") == "WrongEpoch"


def test_library_errors_become_ours() -> None:
    data = "0x" + (selector("JobClosed") + b"\7" * 32).hex()
    with (
        pytest.raises(ChainRejected, match=r"refused to close: JobClosed\(jobId=0x0707") as caught,
        chain_errors("close", "http://chain"),
    ):
        raise ContractCustomError(data, data=data)
    assert caught.value.code == "JobClosed"
    with pytest.raises(Unavailable, match="http://chain"), chain_errors("close", "http://chain"):
        raise ConnectionRefusedError
    with (
        pytest.raises(ChainRejected, match="refused to close: nonce too low"),
        chain_errors("close", "http://chain"),
    ):
        raise Web3RPCError("x", rpc_response={"error": {"code": 1, "message": "nonce too low"}})


def test_an_error_of_ours_passes_unchanged() -> None:
    mine = InvalidRequest("mine")
    with pytest.raises(InvalidRequest) as caught, chain_errors("close", "http://chain"):
        raise mine
    assert caught.value is mine


def test_a_deployment_file_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "deployment.json"
    store_deployment(path, deployment())
    assert load_deployment(path) == deployment()


def test_a_wrong_deployment_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "deployment.json"
    with pytest.raises(InvalidRequest, match="cannot be read"):
        load_deployment(path)
    path.write_text('{"chain_id": 1}')
    with pytest.raises(InvalidRequest, match="not a deployment file: token"):
        load_deployment(path)
    path.write_bytes(b" " * 70_000)
    with pytest.raises(InvalidRequest, match="too large"):
        load_deployment(path)


def test_the_dev_accounts_are_the_known_ones() -> None:
    assert dev_account(0).address == "0xf39Fd6e51aad88F6F4ce6aB8827279cffFb92266"
    with pytest.raises(InvalidRequest, match="no account 20"):
        dev_account(20)


def test_hostile_lengths_are_refused() -> None:
    with pytest.raises(ValidationError):
        Claim(account=HERE, cumulative_micros=1, proof=("0x" + "00" * 32,) * 65)
    with pytest.raises(InvalidRequest):
        job_id_bytes("0x" + "00" * 31)
    with pytest.raises(InvalidRequest):
        job_id_bytes("0xzz")


def test_records_come_without_web3() -> None:
    code = "import shoal.contracts.records, sys; sys.exit('web3' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=False, env={"PYTHONPATH": _path()})
    assert done.returncode == 0


def _path() -> str:
    return ":".join(p for p in sys.path if p)
