"""The options of `shoal worker join`: what they set, and how a wrong one is answered."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from shoal.protocol.errors import InvalidRequest
from shoal.worker import verbs
from shoal.worker.__main__ import build_parser, main, read_options
from shoal.worker.config import SamplingChoice, WorkerConfig, load_config


def configured(*arguments: str) -> WorkerConfig:
    options = read_options(build_parser().parse_args(["http://market", *arguments]))
    return load_config(None, {}, options)


def test_options_that_are_not_given_leave_the_defaults() -> None:
    assert configured() == WorkerConfig(orchestrator="http://market")


def test_each_option_sets_its_key() -> None:
    config = configured(
        *("--name", "attic", "--stake", "2.5", "--data-dir", "/keys", "--rpc-url", "http://node"),
        *("--price-rollout", "0.1", "--price-gradient", "0.2", "--price-evaluate", "0.3"),
        *("--capacity", "3", "--device", "cpu", "--engine", "vllm"),
    )
    assert (config.name, config.stake_micros, str(config.data_dir)) == ("attic", 2_500_000, "/keys")
    assert (config.rpc_url, config.device.value) == ("http://node", "cpu")
    assert config.engine is SamplingChoice.VLLM
    price, capacity = config.price, config.capacity
    assert (price.rollout, price.gradient, price.evaluate) == ("0.1", "0.2", "0.3")
    assert (capacity.rollout, capacity.gradient, capacity.evaluate) == (3, 3, 24)


def test_set_wins_over_an_option() -> None:
    assert configured("--capacity", "3", "--set", "capacity.rollout=9").capacity.rollout == 9


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--stake", "much"), "stake: the amount is 'much'"),
        (("--capacity", "-1"), "capacity"),
        (("--device", "abacus"), "device"),
        (("--engine", "steam"), "engine"),
        (("--set", "capacity"), "has no '='"),
    ],
)
def test_a_wrong_value_is_one_sentence(arguments: tuple[str, ...], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as caught:
        configured(*arguments)
    assert not caught.value.message.endswith("..")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "name the orchestrator"),
        (("http://market", "--stak", "2"), "--stak"),
        (("http://market", "--capacity", "many"), "'many'"),
        (("http://market", "--claim", "--unstake"), "not allowed"),
        (("--claim",), "name the orchestrator"),
        (("--backup",), "name one FILE"),
        (("--restore", "one", "two"), "name one FILE"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exits_with_2(
    arguments: tuple[str, ...],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("SHOAL_WORKER_ORCHESTRATOR", raising=False)
    monkeypatch.setattr(sys, "argv", ["worker", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_help_tells_the_defaults() -> None:
    text = " ".join(build_parser().format_help().split())
    for default in (
        "(worker)",
        "(~/.shoal/worker)",
        "(0.0001)",
        "(0.00001)",
        "(128 to roll",
        "(auto)",
    ):
        assert default in text


def test_several_addresses_are_ways_to_one_orchestrator() -> None:
    config = configured("/ip4/192.0.2.1/tcp/1/p2p/12D3")
    assert config.orchestrator == ("http://market", "/ip4/192.0.2.1/tcp/1/p2p/12D3")


@pytest.mark.parametrize("verb", ["status", "backup", "doctor"])
def test_verbs_beside_work_need_no_orchestrator(
    verb: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ran: list[WorkerConfig] = []

    def told(config: WorkerConfig, *_: object, as_json: bool) -> int:
        ran.append(config)
        return 7

    async def looked(config: WorkerConfig, *, as_json: bool) -> int:
        return told(config, as_json=as_json)

    for name, stand_in in (
        ("tell_status", told),
        ("run_backup", told),
        ("run_doctor", looked),
    ):
        monkeypatch.setattr(verbs, name, stand_in)
    words = ["FILE"] if verb == "backup" else []
    monkeypatch.setattr(
        sys, "argv", ["worker", f"--{verb}", *words, "--data-dir", str(tmp_path), "--json"]
    )
    assert main() == 7
    assert (ran[0].data_dir, ran[0].orchestrator) == (tmp_path, ())
