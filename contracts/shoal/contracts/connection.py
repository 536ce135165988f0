"""One JSON-RPC connection to a chain, with a deadline on everything asked of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final, cast

from aiohttp import ClientError, ClientTimeout
from eth_typing import ChecksumAddress
from eth_utils.address import is_address, to_checksum_address
from hexbytes import HexBytes
from web3 import AsyncHTTPProvider, AsyncWeb3
from web3._utils.http_session_manager import HTTPSessionManager
from web3.providers.rpc.utils import REQUEST_RETRY_ALLOWLIST, ExceptionRetryConfiguration
from web3.types import BlockData, BlockIdentifier, RPCResponse

from shoal.contracts.rejection import chain_errors
from shoal.protocol.canonical import parse_json
from shoal.protocol.errors import InvalidRequest

REQUEST_TIMEOUT_S = 20.0
CALL_TIMEOUT_S = 45.0
"""For one question, a second try and the waits between included."""
READ_ATTEMPTS = 2
"""A kept-alive socket may have died with a restarted chain; one fresh try tells."""
_READS = [name for name in REQUEST_RETRY_ALLOWLIST if name != "eth_sendRawTransaction"]
"""A broadcast is never repeated blindly: the second answer would hide the first's success."""
HASH_BYTES = 32
MAX_ANSWER_BYTES: Final = 32 << 20
"""Above the logs of the fullest range that is asked for."""


class _CappedSessions(HTTPSessionManager):
    """Reads no more of an answer than one can have."""

    async def async_make_post_request(
        self, endpoint_uri: Any, data: bytes | dict[str, Any], **kwargs: Any
    ) -> bytes:
        response = await self.async_get_response_from_post_request(
            endpoint_uri, data=data, **kwargs
        )
        response.raise_for_status()
        answer = bytearray()
        async for part in response.content.iter_any():
            answer += part
            if len(answer) > MAX_ANSWER_BYTES:
                response.close()
                raise ValueError(f"its answer is longer than {MAX_ANSWER_BYTES} bytes")
        return bytes(answer)


class _CappedProvider(AsyncHTTPProvider):
    """Speaks to a chain that somebody proposed: its answers may be anything."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._request_session_manager = _CappedSessions()

    @staticmethod
    def decode_rpc_response(raw_response: bytes) -> RPCResponse:
        """The answer; this parser bounds how deep it is nested."""
        return cast(RPCResponse, parse_json(raw_response))


class Connection:
    """A client of the chain at ``rpc_url``; nothing is sent before the first question.

    Off-chain lookups (EIP-3668) are off: a contract must not be able to make us fetch URLs.
    """

    def __init__(self, rpc_url: str) -> None:
        provider = _CappedProvider(
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
        self.rpc_url = rpc_url
        self.w3: AsyncWeb3[AsyncHTTPProvider] = AsyncWeb3(provider)

    async def close(self) -> None:
        """The connection is closed."""
        await self.w3.provider.disconnect()

    @asynccontextmanager
    async def asking(self, purpose: str) -> AsyncIterator[AsyncWeb3[AsyncHTTPProvider]]:
        """What goes wrong inside is ours by name, and it ends by the deadline.

        Args:
            purpose: What is being tried, as a verb phrase ("post epoch 3").

        Raises:
            ChainRejected: the chain understood and refused.
            Unavailable: it did not answer in time, or not like a chain.
        """
        with chain_errors(purpose, self.rpc_url):
            async with asyncio.timeout(CALL_TIMEOUT_S):
                yield self.w3

    async def chain_id(self) -> int:
        """The chain's id (EIP-155)."""
        async with self.asking("read the chain id") as w3:
            return await w3.eth.chain_id

    async def block(self, which: BlockIdentifier = "latest") -> BlockData:
        """The block ``which``, with its transactions' hashes."""
        async with self.asking("read a block") as w3:
            return await w3.eth.get_block(which)

    async def now_s(self) -> int:
        """The chain's own time: the latest block's timestamp, in Unix seconds."""
        return (await self.block())["timestamp"]

    async def block_number(self) -> int:
        """The latest block's number."""
        async with self.asking("read the block number") as w3:
            return await w3.eth.block_number

    async def has_code(self, address: str) -> bool:
        """Whether there is a contract at ``address``."""
        async with self.asking("read a contract's code") as w3:
            return bool(await w3.eth.get_code(checksum(address)))

    async def eth_balance(self, account: str) -> int:
        """``account``'s gas money, in wei."""
        async with self.asking("read a balance") as w3:
            return await w3.eth.get_balance(account_address(account))


def checksum(address: str) -> ChecksumAddress:
    """``address`` in EIP-55 form."""
    return to_checksum_address(address)


def account_address(account: str) -> ChecksumAddress:
    """``account`` in EIP-55 form, if it has the form of an account."""
    if not is_address(account):
        raise InvalidRequest(
            f"{account[:80]!r} is not an account; it is 0x and 40 hex digits.", code="bad_account"
        )
    return checksum(account)


def hash_bytes(what: str, value: bytes | str) -> bytes:
    """``value``, 32 bytes or 0x and 64 hex digits, as the chain's 32 bytes."""
    try:
        raw = bytes(HexBytes(value))
    except ValueError as error:
        raise InvalidRequest(
            f"{str(value)[:80]!r} is not a {what}; it is 0x and 64 hex digits.",
            code=f"bad_{what.replace(' ', '_')}",
        ) from error
    if len(raw) != HASH_BYTES:
        raise InvalidRequest(
            f"The {what} has {len(raw)} bytes; it must have {HASH_BYTES}.", code="bad_length"
        )
    return raw


def job_id_bytes(job_id: str) -> bytes:
    """``job_id`` as the chain's 32 bytes."""
    return hash_bytes("job id", job_id)
