"""Noise with fewer system calls: one read of the socket brings a whole packet, or several.

py-libp2p asks the socket for a packet's two length bytes and then for the rest of it, so every
packet costs two trips through the kernel and the event loop at the least.
"""

from __future__ import annotations

from typing import Any, Final, cast

from libp2p.abc import IRawConnection
from libp2p.io.abc import ReadWriteCloser
from libp2p.io.exceptions import IncompleteReadError
from libp2p.security.noise import patterns
from libp2p.security.noise.io import (
    MAX_NOISE_MESSAGE_LEN,
    SIZE_NOISE_MESSAGE_LEN,
    NoisePacketReadWriter,
    NoiseTransportReadWriter,
)

_READ_BYTES: Final = MAX_NOISE_MESSAGE_LEN + SIZE_NOISE_MESSAGE_LEN


class Packets(NoisePacketReadWriter):
    """Packets of a connection that nobody else reads any more."""

    def __init__(self, connection: ReadWriteCloser) -> None:
        super().__init__(connection)
        self._come = bytearray()

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
            part = await self.read_write_closer.read(_READ_BYTES)
            if not part:
                raise IncompleteReadError(
                    "the connection ended",
                    expected_bytes=num_bytes,
                    received_bytes=len(self._come),
                )
            self._come += part


class _BufferedNoise(NoiseTransportReadWriter):
    def __init__(self, conn: IRawConnection, noise_state: Any) -> None:
        super().__init__(conn, noise_state)
        self.read_writer = Packets(cast(ReadWriteCloser, conn))


def mend_noise() -> None:
    """From now on every Noise session of this process reads as this module says."""
    setattr(patterns, "NoiseTransportReadWriter", _BufferedNoise)  # noqa: B010
