"""The worker's configuration: order of sources, refusals by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.protocol.errors import InvalidRequest
from shoal.protocol.market import TaskKind
from shoal.worker.config import WorkerConfig, describe_config, load_config

URL = {"orchestrator": "http://127.0.0.1:8000"}


def test_command_line_beats_environment_beats_file_beats_defaults(tmp_path: Path) -> None:
    file = tmp_path / "worker.toml"
    file.write_text(
        'orchestrator = "http://a"\nname = "from-file"\nstake = "5.00"\n'
        '[price]\nrollout = "0.000300"\n[capacity]\ngradient = 3\n'
    )
    config = load_config(
        file,
        {"SHOAL_WORKER_NAME": "from-env", "SHOAL_WORKER_PRICE_EVALUATE": "0.000007", "HOME": "/"},
        {"price.rollout": "0.000400", "stake": None},
    )
    assert config.name == "from-env"
    assert config.price.micros(TaskKind.ROLLOUT) == 400
    assert config.price.micros(TaskKind.EVALUATE) == 7
    assert config.price.micros(TaskKind.GRADIENT) == 100
    assert config.capacity.units(TaskKind.GRADIENT) == 3
    assert config.stake_micros == 5_000_000


def test_an_orchestrator_may_have_several_addresses(tmp_path: Path) -> None:
    two = ("https://orchestrator.example", "/ip4/192.0.2.1/tcp/4001/p2p/12D3KooW")
    file = tmp_path / "worker.toml"
    file.write_text(f'orchestrator = ["{two[0]}", "{two[1]}"]\n')
    assert load_config(file, {}, {}).orchestrator == two
    text = f"{two[0]}, {two[1]}"
    assert load_config(None, {"SHOAL_WORKER_ORCHESTRATOR": text}, {}).orchestrator == two
    assert load_config(None, {}, {"orchestrator": text}).orchestrator == two
    assert load_config(None, {}, URL).orchestrator == (URL["orchestrator"],)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"orchestator": "x"}, "did you mean 'orchestrator'"),
        ({**URL, "price.rolout": "1"}, "did you mean 'price.rollout'"),
        ({**URL, "price.rollout": "cheap"}, "price.rollout"),
        ({**URL, "price.rollout": "0"}, "above zero"),
        ({**URL, "stake": "1.0000001"}, "stake"),
        ({**URL, "device": "tpu"}, "device"),
        ({**URL, "niceness": 99}, "niceness"),
        ({**URL, "blob_listen": "8701"}, "HOST:PORT"),
        ({**URL, "blob_listen": "0.0.0.0:65536"}, "HOST:PORT"),
        ({**URL, "blob_url": "ftp://example.org"}, "blob_url"),
        ({**URL, "blob_url": "http://me@example.org"}, "blob_url"),
        ({**URL, "upload_mbit": -1}, "upload_mbit"),
        ({**URL, "capacity.rollout": -1}, "capacity.rollout"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(options: dict[str, object], wanted: str) -> None:
    with pytest.raises(InvalidRequest, match=wanted.replace("(", r"\(")):
        load_config(None, {}, options)


def test_an_unknown_environment_variable_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="the environment sets 'prise_rollout'"):
        load_config(None, {"SHOAL_WORKER_PRISE_ROLLOUT": "1"}, URL)


@pytest.mark.parametrize("text", ["orchestrator = ", "\x00"])
def test_a_file_that_is_not_toml_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "worker.toml"
    file.write_text(text)
    with pytest.raises(InvalidRequest, match="cannot be read as TOML"):
        load_config(file, {}, {})
    with pytest.raises(InvalidRequest, match="no configuration file"):
        load_config(tmp_path / "absent.toml", {}, {})


def test_the_dry_run_shows_every_setting() -> None:
    config = load_config(None, {}, URL)
    shown = describe_config(config)
    assert set(shown) == set(WorkerConfig.model_fields)
    assert shown["price"]["rollout"] == "0.0001"
    assert "~" not in shown["data_dir"]
