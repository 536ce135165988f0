"""`shoal plan`: what it says, to people and to programs, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from shoal.client import command
from shoal.client.plan_view import count, seconds, size
from shoal.client.poolfile import load_pool_file, parse_pool
from shoal.protocol.errors import InvalidRequest

EXAMPLES = Path(__file__).parents[2] / "examples"
JOB = str(EXAMPLES / "addition.toml")
POOL = str(EXAMPLES / "pool.toml")
MACHINE = """\
[[provider]]
name = "card"
count = 2
memory_gib = 24
up_mbps = 40
down_mbps = 250
price_per_hour = "0.40"
rollout_tokens_per_s = 1000
gradient_tokens_per_s = 500
"""


def plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert command.run(["plan", JOB, "--json", *arguments]) == 0
    document = json.loads(capsys.readouterr().out)
    assert isinstance(document, dict)
    return document


def test_a_plan_is_made_without_torch_and_without_a_machine() -> None:
    code = (
        "import sys\n"
        "from shoal.client.command import run\n"
        f"code = run(['plan', {JOB!r}, '--model', '8B', '--pool', {POOL!r}, '--json'])\n"
        "heavy = {'torch', 'transformers', 'web3', 'ray'} & set(sys.modules)\n"
        "sys.exit(code or len(heavy))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model"] == "meta-llama/Llama-3.1-8B"


def test_the_jobs_own_model_is_planned_for(capsys: pytest.CaptureFixture[str]) -> None:
    document = plan(capsys)
    assert document["model"] == "builtin:tiny-addition"
    assert document["num_parameters"] == 659_584
    assert document["trained_values"] == 122_880
    assert document["expected"]["prompt_tokens"] == 6
    assert document["tasks"]["rollout"]["tokens"] == 1024 * 4
    assert document["budget"]["covered_steps"] == 300
    assert document["pool"] is None
    parts = dict(document["memory_bytes"]["gradient"])
    assert parts.pop("total") == sum(parts.values())


@pytest.mark.parametrize("model", ["1B", "8B", "70B", "1T", "builtin:tiny-gcd"])
def test_every_size_is_planned_on_the_example_pool(
    capsys: pytest.CaptureFixture[str], model: str
) -> None:
    document = plan(capsys, "--model", model, "--pool", POOL, "--set", "sampling.max_tokens=256")
    pool = document["pool"]
    assert len(pool["classes"]) == 4
    if model in ("70B", "1T"):
        assert pool["timing"] is None
        assert not any(item["rollout"]["fits"] for item in pool["classes"])
    else:
        bounds = pool["timing"]["bounds_s"]
        assert pool["timing"]["update_s"] == max(bounds.values())
        assert bounds[pool["timing"]["bound"]] == max(bounds.values())


def test_expectations_change_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--completion-tokens", "2.5", "--prompt-tokens", "9", "--teaching-share", "0.5"]
    document = plan(capsys, *options)
    assert document["tasks"]["rollout"]["tokens"] == 1024 * 2.5
    assert document["tasks"]["gradient"]["tokens"] == 1024 * 2.5 / 2
    assert document["tasks"]["gradient"]["context_tokens"] == 128 * 9


def test_a_person_reads_tables_and_what_to_change(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", "8B", "--pool", POOL, "--set", "sampling.max_tokens=512"]
    assert command.run(["plan", JOB, *arguments]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "meta-llama/Llama-3.1-8B 8.03 G parameters" in text
    assert "rollout worker gradient worker orchestrator" in text
    assert "RTX 3060 at home, rollout: needs" in text
    assert "(not available yet)" in text
    assert "what bounds it" in text
    assert "the budget is $40.00" in text


def test_another_base_is_said_not_to_be_available(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.run(["plan", JOB, "--model", "8B", "--base", "int4"]) == 0
    assert "A base in int4 is not available yet." in capsys.readouterr().out
    assert plan(capsys, "--base", "int4")["base_available"] is False


def test_traps_are_warned_about_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in (["plan"], ["submit", "--dry-run"]):
        assert command.run([*verb, JOB, "--json", "--set", "algorithm.type=grpo"]) == 0
        captured = capsys.readouterr()
        assert captured.err.startswith('shoal: warning: algorithm.type "grpo" divides')
        json.loads(captured.out)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--model", "Llama-3.1-8"], "does not know the model 'Llama-3.1-8'; the nearest"),
        (["--model", "absent.json"], "There is no model configuration at absent.json"),
        (["--pool", "absent.toml"], "There is no pool file at absent.toml"),
        (["--set", "lora.target_modules=q_prj"], "names no module of builtin:tiny-addition"),
        (["--set", "env.0.id=additoin"], "additoin"),
    ],
)
def test_bad_input_is_one_sentence(
    capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str
) -> None:
    assert command.run(["plan", JOB, *arguments]) == 3
    captured = capsys.readouterr()
    assert expected in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("memory_gib", "memory_gb", r"no key 'memory_gb' in \[provider\[0\]\]; .*'memory_gib'"),
        ("[[provider]]", "[[providers]]", "no key 'providers'; .*'provider'"),
        ("[[provider]]", "[provider]", "there is no provider; write"),
        ("count = 2", "count = 0", r"provider\[0\]\.count is 0; it should be greater"),
        ("count = 2", "count = 1.5", r"provider\[0\]\.count is 1\.5"),
        ("count = 2", "", r"provider\[0\]\.count; Field required"),
        ("count = 2", "count = 2000-01-01", r"provider\[0\]\.count is 'the date"),
        ("= 24", "= nan", r"provider\[0\]\.memory_gib is nan"),
        ('"0.40"', "0.40", r"provider\[0\]\.price_per_hour is no text"),
        ('"0.40"', '"free"', r"provider\[0\]\.price_per_hour is 'free'"),
        ('"0.40"', '"99999999999"', "give at most"),
        ("gradient_tokens_per_s = 500", "", "the speed of 'card' is not known; give"),
        ("[[provider]]", "orchestrator = 3\n[[provider]]", "orchestrator is no table"),
        ("[[provider]]", "[orchestrator]\nup = 3\n[[provider]]", r"in \[orchestrator\]; .*up_mbps"),
        ("count = 2", "count = ", "is not valid TOML"),
    ],
)
def test_a_bad_pool_is_one_sentence(old: str, new: str, expected: str) -> None:
    with pytest.raises(InvalidRequest, match=expected) as caught:
        parse_pool(MACHINE.replace(old, new, 1), "pool.toml")
    assert caught.value.exit_code == 3
    assert "\n" not in caught.value.message


def test_a_pool_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "pool.toml"
    path.write_text("[orchestrator]\nupdate_s = 2.0\n" + MACHINE)
    pool = load_pool_file(path)
    assert pool.learner.update_s == 2.0
    assert pool.providers[0].price_per_hour_micros == 400_000
    assert pool.providers[0].rollout_tokens_per_s == 1000
    assert [item.name for item in load_pool_file(Path(POOL)).providers][1] == "RTX 4090 at home"


def test_figures_are_short() -> None:
    assert [count(v) for v in (3, 1234, 41.9e6, 8.03e9, 1.03e12)] == [
        "3",
        "1.23 k",
        "41.9 M",
        "8.03 G",
        "1.03 T",
    ]
    assert [size(v) for v in (12, 1020, 168e6)] == ["12 B", "1.02 kB", "168 MB"]
    assert [seconds(v) for v in (0.0123, 12.3, 1200, 36_000)] == [
        "12.3 ms",
        "12.3 s",
        "20 min",
        "10 h",
    ]
