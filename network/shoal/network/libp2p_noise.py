"""Noise with fewer system calls and copies: one read of the socket brings several packets.

py-libp2p asks the socket for a packet's two length bytes and then for the rest of it, so every
packet costs two trips through the kernel and the event loop at the least; and what it decrypts it
copies three times before anybody reads it.
"""

from __future__ import annotations

import io
from typing import Any, Final, cast

from libp2p.abc import IRawConnection
from libp2p.io.abc import ReadWriteCloser
from libp2p.io.exceptions import ConnectionClosedError, IncompleteReadError
from libp2p.security.noise import patterns
from libp2p.security.noise.io import (
    MAX_NOISE_MESSAGE_LEN,
    MAX_PLAINTEXT_LENGTH,
    SIZE_NOISE_MESSAGE_LEN,
    NoisePacketReadWriter,
    NoiseTransportReadWriter,
)
from libp2p.security.secure_session import SecureSession

PACKETS_AT_ONCE: Final = 3
"""The packets handed to the connection in one write; a WebSocket takes no more in a message."""
_READ_BYTES: Final = MAX_NOISE_MESSAGE_LEN + SIZE_NOISE_MESSAGE_LEN
# Asked for where the last read was full: there is more, and room for more costs little then.
_FULL_READ_BYTES: Final = 4 * _READ_BYTES


class Packets(NoisePacketReadWriter):
    """Packets of a connection that nobody else reads any more."""

    def __init__(self, connection: ReadWriteCloser) -> None:
        super().__init__(connection)
        self._come = bytearray()
        self._asked_bytes = _READ_BYTES

    async def read_msg(self) -> bytes:
        """The next packet.

        Raises:
            IncompleteReadError: The connection ended before it was complete.
        """
        await self._await_bytes(SIZE_NOISE_MESSAGE_LEN)
        end = SIZE_NOISE_MESSAGE_LEN + int.from_bytes(self._come[:SIZE_NOISE_MESSAGE_LEN], "big")
        await self._await_bytes(end)
        with memoryview(self._come) as view:
            packet = bytes(view[SIZE_NOISE_MESSAGE_LEN:end])
        del self._come[:end]
        return packet

    async def _await_bytes(self, num_bytes: int) -> None:
        while len(self._come) < num_bytes:
            part = await self.read_write_closer.read(self._asked_bytes)
            if not part:
                raise IncompleteReadError(
                    "the connection ended",
                    expected_bytes=num_bytes,
                    received_bytes=len(self._come),
                )
            is_full = len(part) == self._asked_bytes
            self._asked_bytes = _FULL_READ_BYTES if is_full else _READ_BYTES
            self._come += part


class _BufferedNoise(NoiseTransportReadWriter):
    def __init__(self, conn: IRawConnection, noise_state: Any) -> None:
        super().__init__(conn, noise_state)
        self.read_writer = Packets(cast(ReadWriteCloser, conn))

    async def write_msg(self, msg: bytes, prefix_encoded: bool = False) -> None:
        """The message was written, several packets at once."""
        if prefix_encoded:  # by no session of the library's
            await super().write_msg(msg, prefix_encoded)
            return
        packets = []
        for start in range(0, max(1, len(msg)), MAX_PLAINTEXT_LENGTH):
            packet = self.encrypt(msg[start : start + MAX_PLAINTEXT_LENGTH])
            packets.append(self.read_writer.encode_msg(packet))
        for first in range(0, len(packets), PACKETS_AT_ONCE):
            some = b"".join(packets[first : first + PACKETS_AT_ONCE])
            await self.read_writer.read_write_closer.write(some)


class _Session(SecureSession):
    """A session that hands out what a packet brought, copied once."""

    def _reset_internal_buffer(self) -> None:
        self._left = memoryview(b"")

    @property
    def num_ready(self) -> int:
        """The bytes that can be read without waiting."""
        return len(self._left)

    async def read(self, n: int | None = None) -> bytes:
        """Exactly `n` bytes, or fewer if the connection ends; without `n`, what is there.

        Raises:
            ConnectionClosedError: It ended before the first.
        """
        if n == 0:
            return b""
        if not self._left:
            self._left = memoryview(await self.conn.read_msg())
        # Gathered in one piece: kept apart, tiny packets would take a hundred times their size.
        gathered, missing = io.BytesIO(), len(self._left) if n is None else n
        while missing and self._left:
            part, self._left = self._left[:missing], self._left[missing:]
            missing -= gathered.write(part)
            if missing:
                self._left = memoryview(await self.conn.read_msg())
        if not gathered.tell():
            raise ConnectionClosedError("Connection closed")
        return gathered.getvalue()


def mend_noise() -> None:
    """From now on every Noise session of this process reads as this module says."""
    setattr(patterns, "SecureSession", _Session)  # noqa: B010
    setattr(patterns, "NoiseTransportReadWriter", _BufferedNoise)  # noqa: B010
