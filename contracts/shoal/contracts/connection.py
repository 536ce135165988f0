"""One JSON-RPC connection to a chain."""

from __future__ import annotations

from typing import Any, cast

from aiohttp import ClientError, ClientTimeout
from eth_typing import ChecksumAddress
from eth_utils.address import to_checksum_address
from web3 import AsyncHTTPProvider, AsyncWeb3
from web3.contract.async_contract import AsyncContract
from web3.providers.rpc.utils import REQUEST_RETRY_ALLOWLIST, ExceptionRetryConfiguration

from shoal.contracts.artefact import artefact

REQUEST_TIMEOUT_S = 20.0
READ_ATTEMPTS = 2
"""A kept-alive socket may have died with a restarted chain; one fresh try tells."""
_READS = [name for name in REQUEST_RETRY_ALLOWLIST if name != "eth_sendRawTransaction"]
"""A broadcast is never repeated blindly: the second answer would hide the first's success."""


def open_connection(rpc_url: str) -> AsyncWeb3[AsyncHTTPProvider]:
    """A client of the chain at ``rpc_url``; nothing is sent yet.

    Off-chain lookups (EIP-3668) are off: a contract must not be able to make us fetch URLs.
    """
    provider = AsyncHTTPProvider(
        rpc_url,
        request_kwargs={"timeout": ClientTimeout(total=REQUEST_TIMEOUT_S)},
        exception_retry_configuration=ExceptionRetryConfiguration(
            errors=(ClientError, TimeoutError),
            retries=READ_ATTEMPTS,
            backoff_factor=0.05,
            method_allowlist=_READS,
        ),
    )
    provider.global_ccip_read_enabled = False
    return AsyncWeb3(provider)


def bind_contract(w3: AsyncWeb3[AsyncHTTPProvider], name: str, address: str) -> AsyncContract:
    """Our contract ``name`` at ``address``."""
    return w3.eth.contract(address=checksum(address), abi=cast(Any, artefact(name).abi))


def checksum(address: str) -> ChecksumAddress:
    """``address`` in EIP-55 form."""
    return to_checksum_address(address)
