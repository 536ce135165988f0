"""The orchestrator's configuration: where values come from, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from shoal.network.identity import NodeIdentity
from shoal.orchestrator.__main__ import main
from shoal.orchestrator.config import load_config
from shoal.protocol.errors import InvalidRequest

GIVEN = {
    "data_dir": "/data",
    "rpc_url": "http://127.0.0.1:8545",
    "deployment_file": "/deployment.json",
    "key_file": "/key.json",
}


def test_the_command_line_goes_before_the_file_and_both_before_defaults(tmp_path: Path) -> None:
    file = tmp_path / "orchestrator.toml"
    file.write_text('api_port = 9000\nepoch_ms = 2000\nrpc_url = "http://file"\n')
    config = load_config(file, {**GIVEN, "api_port": "9001", "max_attempts": None})
    assert (config.api_port, config.epoch_ms, config.max_attempts) == (9001, 2000, 8)
    assert config.rpc_url == GIVEN["rpc_url"]
    assert config.resolved_database_url() == "sqlite:////data/orchestrator.db"


def test_a_database_may_be_named() -> None:
    url = "postgresql+psycopg://me@host/name"
    assert load_config(None, {**GIVEN, "database_url": url}).resolved_database_url() == url


@pytest.mark.parametrize(
    ("key", "says"), [("api_prot", "'api_port'"), ("epoch", "'epoch_ms'"), ("zzz", "remove it")]
)
def test_an_unknown_key_is_refused_with_the_nearest(tmp_path: Path, key: str, says: str) -> None:
    file = tmp_path / "orchestrator.toml"
    file.write_text(f"{key} = 1\n")
    for source, overrides in ((file, GIVEN), (None, {**GIVEN, key: 1})):
        with pytest.raises(InvalidRequest) as caught:
            load_config(source, overrides)
        assert caught.value.code == "unknown_key"
        assert repr(key) in caught.value.message
        assert says in caught.value.message


@pytest.mark.parametrize(
    "changes", [{"api_port": 65536}, {"epoch_ms": 99}, {"heartbeat_ms": "soon"}, {"data_dir": None}]
)
def test_a_value_out_of_range_is_named(changes: dict[str, object]) -> None:
    given = {**GIVEN, **changes}
    with pytest.raises(InvalidRequest) as caught:
        load_config(None, given)
    assert next(iter(changes)) in caught.value.message


@pytest.mark.parametrize("content", [b"api_port = ", b"\xff\xfe\x00", None])
def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "orchestrator.toml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InvalidRequest) as caught:
        load_config(file, GIVEN)
    assert str(file) in caught.value.message


def test_mirrors_are_a_list_or_one_text_with_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    both = ("https://a.example", "http://b.example:8080/x")
    assert load_config(None, {**GIVEN, "mirrors": both}).mirrors == both
    monkeypatch.setenv("SHOAL_ORCHESTRATOR_MIRRORS", ", ".join(both))
    assert load_config(None, GIVEN).mirrors == both


@pytest.mark.parametrize("mirror", ["ftp://a", "http://me@a", "http://a/?b", "a.example"])
def test_a_mirror_is_an_http_base(mirror: str) -> None:
    with pytest.raises(InvalidRequest, match="mirrors"):
        load_config(None, {**GIVEN, "mirrors": (mirror,)})


def test_bootstrap_nodes_are_addresses_that_name_their_peer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    node = f"/dns4/node.example/tcp/4001/p2p/{NodeIdentity(bytes(32)).peer_id}"
    monkeypatch.setenv("SHOAL_ORCHESTRATOR_BOOTSTRAP", f"{node}, {node}")
    assert load_config(None, GIVEN).bootstrap == (node, node)
    assert not load_config(None, GIVEN).mdns
    for wrong in ("/ip4/192.0.2.1/tcp/4001", "node.example:4001", "/p2p/12D3KooW", node + "/x"):
        with pytest.raises(InvalidRequest, match="bootstrap"):
            load_config(None, {**GIVEN, "bootstrap": (wrong,)})


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["orchestrator", *arguments])
    return main()


def test_a_dry_run_prints_the_whole_configuration(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = [part for key, value in GIVEN.items() for part in ("--set", f"{key}={value}")]
    assert command(monkeypatch, "--dry-run", *pairs) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["data_dir"] == "/data"
    assert printed["lease_ceiling_ms"] == 3_600_000


def test_a_bad_option_is_one_sentence_and_the_exit_code_of_bad_input(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, "--set", "api_prot=1") == 3
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "'api_port'" in said


def test_it_relays_unless_told_otherwise_and_within_a_rate() -> None:
    config = load_config(None, GIVEN)
    assert config.relay
    assert config.relay_mbit == 32
    assert not load_config(None, {**GIVEN, "relay": "false"}).relay
    with pytest.raises(InvalidRequest, match="relay_mbit"):
        load_config(None, {**GIVEN, "relay_mbit": 0})


def test_it_listens_at_several_addresses_and_announces_others() -> None:
    assert load_config(None, GIVEN).p2p_listen == ("/ip4/127.0.0.1/tcp/0",)
    given = {
        **GIVEN,
        "p2p_listen": "/ip4/0.0.0.0/tcp/4001, /ip4/127.0.0.1/tcp/4002/ws",
        "p2p_announce": ["/dns4/my-market.example.org/tcp/443/tls/ws"],
    }
    config = load_config(None, given)
    assert config.p2p_listen == ("/ip4/0.0.0.0/tcp/4001", "/ip4/127.0.0.1/tcp/4002/ws")
    assert config.p2p_announce == ("/dns4/my-market.example.org/tcp/443/tls/ws",)
    for name, wrong in (("p2p_listen", ""), ("p2p_listen", "0.0.0.0:4001"), ("p2p_announce", "x")):
        with pytest.raises(InvalidRequest, match=name):
            load_config(None, {**GIVEN, name: wrong})
