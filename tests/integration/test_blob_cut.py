"""An upload over a line that goes dead: it must not stay dead longer than its line."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest
from netlab import Host, NetLab, require

from shoal.network.blob_client import BlobClient
from shoal.network.blob_store import BlobStore
from shoal.protocol.errors import Unavailable

# Takes whatever it is sent, says when that begins, and answers nothing.
SINK = """
import socket
server = socket.create_server(("0.0.0.0", 5000))
print("up", flush=True)
link, _ = server.accept()
link.recv(1 << 16)
print("begun", flush=True)
while link.recv(1 << 16):
    pass
"""
UPLOAD = b"x" * (4 << 20)
# Left alone, TCP would not have given up by then, and its next try would be seconds away.
TIMEOUT_S = 25.0


def test_an_upload_whose_line_went_dead_breaks_and_does_not_wait_for_tcp(tmp_path: Path) -> None:
    require()
    with NetLab() as lab:
        holder = lab.host("holder")
        holder.shape(up_mbit=4, down_mbit=4)
        lab.here()
        asyncio.run(_put_and_cut(holder, tmp_path))


async def _put_and_cut(holder: Host, folder: Path) -> None:
    sink = await holder.start([sys.executable, "-c", SINK], stdout=asyncio.subprocess.PIPE)
    assert sink.stdout is not None
    assert await sink.stdout.readline() == b"up\n"
    async with BlobClient(BlobStore(folder, 1 << 30)) as client:
        url = f"http://{holder.ip}:5000"
        putting = asyncio.ensure_future(client.put(url, UPLOAD, "token", timeout_s=TIMEOUT_S))
        async with asyncio.timeout(TIMEOUT_S):
            assert await sink.stdout.readline() == b"begun\n"
        holder.cut()
        with pytest.raises(Unavailable) as caught:
            await putting
        assert caught.value.code == "upload_failed"
    sink.kill()
    await sink.wait()
