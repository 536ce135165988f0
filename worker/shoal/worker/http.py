"""Small JSON answers from the orchestrator's API, capped before they are read."""

from __future__ import annotations

from typing import Any, Final

from shoal.protocol.canonical import parse_json
from shoal.protocol.errors import PeerFault, Unavailable

_TIMEOUT_S: Final = 10.0
_MAX_BYTES: Final = 256 << 10
_NOT_FOUND: Final = 404
_OK: Final = 200


async def get_json(url: str, *, timeout_s: float = _TIMEOUT_S) -> Any:
    """The JSON at ``url``; None when the server knows nothing there.

    Raises:
        Unavailable: nothing answers, or it answers with an error.
        PeerFault: the answer is oversized or not JSON.
    """
    # aiohttp is loaded only by a worker that talks HTTP, which keeps `shoal --help` quick.
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=timeout_s)
    try:
        async with (
            aiohttp.ClientSession(timeout=timeout, trust_env=False) as session,
            session.get(url, allow_redirects=False) as answer,
        ):
            if answer.status == _NOT_FOUND:
                return None
            body = await _read_capped(answer.content, url)
            if answer.status != _OK:
                raise Unavailable(
                    f"{url} answered with HTTP status {answer.status}; try again later.",
                    code="http_status",
                )
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
        raise Unavailable(
            f"Nothing usable answers at {url} ({type(error).__name__}); check the address and "
            "that the orchestrator runs.",
            code="api_unreachable",
        ) from error
    try:
        return parse_json(body)
    except ValueError:
        raise PeerFault(f"{url} answered with something that is not JSON.") from None


async def _read_capped(content: Any, url: str) -> bytes:
    body = bytearray()
    async for part in content.iter_chunked(16 << 10):
        body += part
        if len(body) > _MAX_BYTES:
            raise PeerFault(f"{url} answered with more than {_MAX_BYTES} bytes.", code="oversize")
    return bytes(body)
