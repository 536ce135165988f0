"""Whatever bytes arrive in place of a message: its reader has a message, or a typed error."""

from __future__ import annotations

import importlib
import itertools
import os
import pkgutil
import random
from collections.abc import Callable, Iterator

import psutil
import pytest
from malformed import Malformer
from wire_samples import Message, announcements, exchanges

import shoal.network
import shoal.protocol
from shoal.network.framing import HEADER_BYTES, Status, decode_error, decode_header, encode_header
from shoal.protocol.errors import InvalidRequest, PeerFault, ShoalError
from shoal.protocol.ids import PeerId

SEED = int(os.environ.get("SHOAL_FUZZ_SEED", "5"))
FEW = 2_000
MANY = 100_000
GROWTH_BYTES = 50 << 20
PEER = PeerId("12D3KooWtest")

MESSAGES = {
    f"{protocol} {side}": message
    for protocol, exchange in exchanges().items()
    for side, message in (("request", exchange.request), ("reply", exchange.reply))
    if message is not None
} | announcements()


def survive(message: Message, count: int, seed: int) -> int:
    """How many of `count` malformed messages were refused, all of them as they should be."""
    refused = 0
    for number, data in enumerate(itertools.islice(Malformer(message.valid, seed), count)):
        try:
            message.decode(data)
        except (PeerFault, InvalidRequest):
            refused += 1
        except Exception as error:
            raise AssertionError(
                f"message {number} of seed {seed} ended in {error!r}: {data[:300]!r}"
            ) from error
    return refused


@pytest.mark.parametrize("name", MESSAGES)
def test_any_bytes_are_a_message_or_a_typed_error(name: str) -> None:
    assert all(MESSAGES[name].decode(data) is not None for data in MESSAGES[name].valid)
    survive(MESSAGES[name], FEW, SEED)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", MESSAGES)
def test_a_hundred_thousand_messages_are_survived_in_bounded_memory(name: str) -> None:
    survive(MESSAGES[name], FEW, SEED)
    before = psutil.Process().memory_info().rss
    survive(MESSAGES[name], MANY, SEED + 1)
    assert psutil.Process().memory_info().rss - before < GROWTH_BYTES


def test_most_messages_made_are_malformed() -> None:
    request = exchanges()["/shoal/lease/1"].request
    assert survive(request, FEW, SEED) > FEW * 0.9


def test_reader_that_trusts_its_input_is_found_out() -> None:
    request = exchanges()["/shoal/heartbeat/1"].request

    def trusting(data: bytes) -> object:
        return data.decode()

    with pytest.raises(AssertionError, match="UnicodeDecodeError"):
        survive(Message(decode=trusting, valid=request.valid), FEW, SEED)


def test_a_seed_replays_its_messages() -> None:
    valid = exchanges()["/shoal/lease/1"].request.valid
    first, second = (list(itertools.islice(Malformer(valid, SEED), 200)) for _ in range(2))
    assert first == second
    assert first != list(itertools.islice(Malformer(valid, SEED + 1), 200))


def test_every_protocol_that_is_named_is_fuzzed() -> None:
    named = set(_protocols())
    # Pings are read by the transport itself, over sockets only.
    assert {name for name in named if name.startswith("/shoal/")} - {"/shoal/ping/1"} == set(
        exchanges()
    )
    assert {name for name in named if name.startswith("shoal/")} == set(announcements())


def _protocols() -> Iterator[str]:
    """Every protocol and topic that a module names."""
    for package in (shoal.protocol, shoal.network):
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            for name, value in vars(importlib.import_module(module.name)).items():
                if name.endswith(("_PROTOCOL", "_TOPIC")) and isinstance(value, str):
                    yield str(value)


def headers(seed: int) -> Iterator[bytes]:
    """Frame headers of every status, there or not, and every length."""
    draw = random.Random(seed)
    while True:
        length = draw.choice((draw.getrandbits(64), draw.randrange(100), 2**63, 2**64 - 1))
        yield length.to_bytes(8, "big") + bytes([draw.choice((0, 1, 2, draw.randrange(256)))])


def read_headers(decode: Callable[[bytes], int], count: int, cap: int) -> None:
    """Every header gave a length within `cap` or a typed error."""
    for number, header in enumerate(itertools.islice(headers(SEED), count)):
        try:
            assert 0 <= decode(header) <= cap, f"header {number} of seed {SEED}: {header.hex()}"
        except (PeerFault, InvalidRequest):
            continue


@pytest.mark.parametrize("count", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def test_frame_headers_are_within_the_cap_or_refused(count: int) -> None:
    expected = frozenset({Status.REQUEST})
    read_headers(
        lambda header: decode_header(header, peer=PEER, expected=expected, cap=1 << 20),
        count,
        1 << 20,
    )


def test_header_believed_without_a_cap_is_found_out() -> None:
    with pytest.raises(AssertionError, match="header"):
        read_headers(lambda header: int.from_bytes(header[:8], "big"), FEW, 1 << 20)


@pytest.mark.parametrize("count", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def test_error_bodies_are_always_a_shoal_error(count: int) -> None:
    valid = [b'{"error":"Unavailable","code":"x","message":"no","context":{"retry_after_s":1}}']
    for data in itertools.islice(Malformer(valid, SEED), count):
        assert isinstance(decode_error(data), ShoalError)


def test_valid_headers_pass() -> None:
    header = encode_header(Status.REQUEST, 7)
    assert len(header) == HEADER_BYTES
    assert decode_header(header, peer=PEER, expected=frozenset(Status), cap=7) == 7
