"""The sockets of an orchestrator process."""

from __future__ import annotations

import asyncio
import socket

import pytest

from shoal.orchestrator.main import _bind
from shoal.protocol.errors import InvalidRequest


@pytest.mark.parametrize("is_ours", [True, False])
def test_answers_of_the_api_do_not_wait_for_acknowledgements(is_ours: bool) -> None:
    async def scenario() -> bool:
        listening = _bind("127.0.0.1", 0) if is_ours else socket.create_server(("127.0.0.1", 0))
        accepted: asyncio.Queue[asyncio.StreamWriter] = asyncio.Queue()
        server = await asyncio.start_server(lambda _, writer: accepted.put(writer), sock=listening)
        _, dialled = await asyncio.open_connection(*listening.getsockname())
        writer = await accepted.get()
        made = writer.get_extra_info("socket")
        at_once = made.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        for end in (writer, dialled):
            end.close()
            await end.wait_closed()
        server.close()
        await server.wait_closed()
        return bool(at_once)

    # The control: of a socket whose protocol is not named asyncio changes nothing.
    assert asyncio.run(scenario()) is is_ours


def test_a_port_in_use_is_told_with_what_to_do() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(InvalidRequest, match=f"127.0.0.1:{port}") as caught:
            _bind("127.0.0.1", port)
    assert caught.value.code == "port_in_use"
