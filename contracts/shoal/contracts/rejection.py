"""What the chain's refusals mean: revert data to a named reason, library errors to ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from aiohttp import ClientError
from eth_abi.abi import decode as abi_decode
from eth_abi.exceptions import DecodingError
from web3.exceptions import (
    BadFunctionCallOutput,
    BadResponseFormat,
    ContractLogicError,
    Web3Exception,
    Web3RPCError,
)

from shoal.contracts.artefact import error_types
from shoal.protocol.errors import ChainRejected, ShoalError, Unavailable

MAX_REASON_CHARS = 300


def decode_revert(data: bytes) -> str:
    """The reason in ``data``, such as ``WrongEpoch(posted=3, expected=2)``.

    Data that no contract of ours can have written is shown as hex, cut short.
    """
    known = error_types().get(data[:4])
    if known is not None:
        try:
            values = abi_decode(known.argument_types, data[4:])
        except (DecodingError, UnicodeDecodeError):
            return known.name
        shown = (_show(value) for value in values)
        pairs = zip(known.argument_names, shown, strict=True)
        text = f"{known.name}({', '.join(f'{name}={value}' for name, value in pairs)})"
        return text[:MAX_REASON_CHARS]
    return f"0x{data.hex()}"[:MAX_REASON_CHARS] if data else "no reason given"


def rejection(error: ContractLogicError, purpose: str, *, tx_hash: str = "") -> ChainRejected:
    """``error`` as ours: the sentence says what was refused and why."""
    reason = revert_reason(error)
    return ChainRejected(
        f"The chain refused to {purpose}: {reason}.",
        reason=reason,
        tx_hash=tx_hash,
        code=_code(reason),
    )


def revert_reason(error: ContractLogicError) -> str:
    """The decoded reason of a revert web3 raised."""
    data = error.data
    if isinstance(data, str) and data.startswith("0x"):
        try:
            raw = bytes.fromhex(data[2:])
        except ValueError:
            raw = b""
        if raw[:4] in error_types():
            return decode_revert(raw)
    return str(error.message or error)[:MAX_REASON_CHARS]


@contextmanager
def chain_errors(purpose: str, rpc_url: str) -> Iterator[None]:
    """Turns whatever web3 raises inside into `ChainRejected` or `Unavailable`.

    Args:
        purpose: What is being tried, as a verb phrase ("post epoch 3").
        rpc_url: Named in the sentence when the chain does not answer.
    """
    try:
        yield
    except ShoalError:
        raise
    except ContractLogicError as error:
        raise rejection(error, purpose) from error
    except (ClientError, OSError, TimeoutError) as error:
        raise Unavailable(
            f"The chain at {rpc_url} does not answer (trying to {purpose}); check that it runs "
            "and that the address is right.",
            code="chain_unreachable",
        ) from error
    except (BadFunctionCallOutput, BadResponseFormat, ValueError) as error:
        raise Unavailable(
            f"{rpc_url} does not answer like a chain with Shoal's contracts (trying to {purpose}): "
            f"{str(error)[:MAX_REASON_CHARS]}",
            code="chain_garbled",
        ) from error
    except Web3Exception as error:
        reason = rpc_reason(error)
        raise ChainRejected(
            f"The chain refused to {purpose}: {reason}.", reason=reason, code="rpc_error"
        ) from error


def rpc_reason(error: Web3Exception) -> str:
    """The node's own words."""
    answer = error.rpc_response if isinstance(error, Web3RPCError) else None
    fault = answer.get("error") if answer else None
    message = fault.get("message") if isinstance(fault, dict) else None
    return str(message or error)[:MAX_REASON_CHARS].rstrip(".")


def _code(reason: str) -> str:
    name = reason.partition("(")[0]
    return name if name.isidentifier() else ChainRejected.default_code


def _show(value: object) -> str:
    return f"0x{value.hex()}" if isinstance(value, bytes) else str(value)
