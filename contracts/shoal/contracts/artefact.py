"""The compiled contracts that ship with the package.

``artefacts/NAME.json`` is written by `shoal.contracts.build`; nothing here needs node or a
compiler.
"""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from typing import Any, NamedTuple

from eth_utils.crypto import keccak

CONTRACTS = ("DevUSD", "ProvenanceLog", "StakeVault", "JobEscrow", "FaultCourt", "ModelShares")
"""Every contract shipped, in the order of deployment."""


class Artefact(NamedTuple):
    """One compiled contract: its ABI and the creation code, before constructor arguments."""

    name: str
    abi: list[dict[str, Any]]
    bytecode: bytes


class ErrorType(NamedTuple):
    """A Solidity custom error: its name and its arguments' names and types."""

    name: str
    argument_names: tuple[str, ...]
    argument_types: tuple[str, ...]


@cache
def artefact(name: str) -> Artefact:
    """The compiled contract ``name``, one of `CONTRACTS`."""
    text = resources.files("shoal.contracts").joinpath("artefacts", f"{name}.json").read_text()
    data = json.loads(text)
    return Artefact(name, data["abi"], bytes.fromhex(data["bytecode"][2:]))


@cache
def error_types() -> dict[bytes, ErrorType]:
    """Every error any of our contracts can raise, by its four-byte selector.

    Source: the Solidity documentation, "Panic via assert and Error via require", for the
    two that every contract has.
    """
    found = {
        bytes.fromhex("08c379a0"): ErrorType("Error", ("message",), ("string",)),
        bytes.fromhex("4e487b71"): ErrorType("Panic", ("code",), ("uint256",)),
    }
    for name in CONTRACTS:
        for entry in artefact(name).abi:
            if entry["type"] != "error":
                continue
            types = tuple(field["type"] for field in entry["inputs"])
            selector = keccak(text=f"{entry['name']}({','.join(types)})")[:4]
            found[selector] = ErrorType(
                entry["name"], tuple(field["name"] for field in entry["inputs"]), types
            )
    return found
