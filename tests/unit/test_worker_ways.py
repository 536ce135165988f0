"""Where a worker dials its orchestrator: several addresses, what worked, what it was told."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from shoal.network.identity import NodeIdentity
from shoal.protocol.clock import ManualTime
from shoal.protocol.errors import InvalidRequest, PeerFault, Unavailable
from shoal.worker import ways as ways_module
from shoal.worker.ways import Ways

PEER = NodeIdentity(b"o" * 32).peer_id
URL = "https://orchestrator.example"


def at(host: str) -> str:
    return f"/ip4/{host}/tcp/4001/p2p/{PEER}"


def make(folder: Path, *configured: str) -> Ways:
    return Ways(configured, folder, ManualTime())


def addresses(ways: Ways) -> list[str]:
    async def collect() -> list[str]:
        return [address async for address, _ in ways.addresses()]

    return asyncio.run(collect())


def patience(ways: Ways) -> list[float]:
    async def collect() -> list[float]:
        return [timeout_s async for _, timeout_s in ways.addresses()]

    return asyncio.run(collect())


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """URLs that were asked; the first says two addresses, any other is down."""
    urls: list[str] = []

    async def get_json(url: str, *, timeout_s: float) -> Any:
        urls.append(url)
        if not url.startswith(URL):
            raise Unavailable(f"Nothing usable answers at {url}.")
        return {"p2p_addresses": [at("192.0.2.1"), at("192.0.2.2")]}

    monkeypatch.setattr(ways_module, "get_json", get_json)
    return urls


def test_addresses_come_in_the_order_written_down_and_once(
    tmp_path: Path, asked: list[str]
) -> None:
    ways = make(tmp_path, at("192.0.2.9"), URL, at("192.0.2.1"))
    assert addresses(ways) == [at("192.0.2.9"), at("192.0.2.1"), at("192.0.2.2")]


def test_where_it_was_reached_comes_first_and_no_url_is_asked(
    tmp_path: Path, asked: list[str]
) -> None:
    make(tmp_path, URL).note_reached(PEER, at("192.0.2.7"), ())

    async def first() -> str:
        async for address, _ in make(tmp_path, URL).addresses():
            return address
        raise AssertionError

    assert asyncio.run(first()) == at("192.0.2.7")
    assert asked == []


def test_what_it_said_of_itself_is_dialled_when_nothing_written_down_answers(
    tmp_path: Path, asked: list[str]
) -> None:
    dead = "http://former.example"
    said = (at("192.0.2.5"), at("0.0.0.0"), "/ip4/192.0.2.6/tcp/1/p2p/12D3KooWOther")
    ways = make(tmp_path, dead)
    ways.note_reached(PEER, at("192.0.2.4"), said)
    ways.note_failed(at("192.0.2.4"))
    # A wildcard cannot be dialled, and another node's address is none of its own.
    assert sorted(addresses(ways)) == [at("192.0.2.4"), at("192.0.2.5")]
    assert sorted(addresses(make(tmp_path, dead))) == [at("192.0.2.4"), at("192.0.2.5")]


def test_another_orchestrators_addresses_are_never_dialled(tmp_path: Path) -> None:
    make(tmp_path, at("192.0.2.1")).note_reached(PEER, at("192.0.2.1"), (at("192.0.2.2"),))
    assert addresses(make(tmp_path, at("192.0.2.8"))) == [at("192.0.2.8")]
    # The control: told of the same one, it does remember.
    assert addresses(make(tmp_path, at("192.0.2.1"))) == [at("192.0.2.1"), at("192.0.2.2")]


def test_one_of_several_may_take_little_time_at_first_and_more_in_each_round(
    tmp_path: Path,
) -> None:
    ways = make(tmp_path, at("192.0.2.1"), at("192.0.2.2"))
    assert [patience(ways) for _ in range(4)] == [[2.5] * 2, [5.0] * 2, [10.0] * 2, [10.0] * 2]
    ways.note_reached(PEER, at("192.0.2.1"), ())
    assert patience(ways) == [2.5, 2.5]
    assert patience(make(tmp_path, at("192.0.2.3"))) == [10.0]


def test_when_no_url_answers_the_last_ones_reason_is_told(tmp_path: Path, asked: list[str]) -> None:
    with pytest.raises(Unavailable, match=r"b\.example"):
        addresses(make(tmp_path, "http://a.example", "http://b.example"))


def test_a_url_of_something_else_is_said_to_be_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def get_json(url: str, *, timeout_s: float) -> Any:
        return {"p2p_addresses": []}

    monkeypatch.setattr(ways_module, "get_json", get_json)
    with pytest.raises(PeerFault, match="names no libp2p address"):
        addresses(make(tmp_path, URL))


def test_a_malformed_address_is_refused_before_anything_is_dialled(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="neither an address"):
        make(tmp_path, at("192.0.2.1"), "example.org")


def test_a_damaged_memory_is_forgotten(tmp_path: Path) -> None:
    make(tmp_path, at("192.0.2.1")).note_reached(PEER, at("192.0.2.1"), (at("192.0.2.2"),))
    (file,) = (tmp_path / "orchestrators").iterdir()
    assert json.loads(file.read_text())
    file.write_text("{")
    assert addresses(make(tmp_path, at("192.0.2.1"))) == [at("192.0.2.1")]
