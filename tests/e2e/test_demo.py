"""The main job, short: run by `shoal demo`, then checked with what a stranger would use."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from shoal_command import run, settings

from shoal.client.demo import example_job
from shoal.client.jobfile import load_job_file
from shoal.rl.environments import Split, load_environment
from shoal.rl.prompts import eval_prompts

SETTINGS = ("max_steps=6", "eval.interval=3", "eval.num_examples=128")
pytestmark = pytest.mark.timeout(300)

# Stock libraries alone: what a stranger types after the download.
STOCK = """
import json, sys
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, max_new_tokens = sys.argv[1], int(sys.argv[2])
base = AutoModelForCausalLM.from_pretrained(folder + "/base")
model = PeftModel.from_pretrained(base, folder).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
texts = []
for prompt in json.load(sys.stdin):
    tokens = tokenizer(prompt, return_tensors="pt")
    drawn = model.generate(
        input_ids=tokens["input_ids"],
        attention_mask=tokens["attention_mask"],
        do_sample=False,
        max_new_tokens=max_new_tokens,
    )
    new = drawn[0, tokens["input_ids"].shape[1]:]
    texts.append(tokenizer.decode(new, skip_special_tokens=True))
assert not any(name.partition(".")[0] == "shoal" for name in sys.modules)
json.dump(texts, sys.stdout)
"""


@dataclass(frozen=True)
class Demo:
    folder: Path
    summary: dict[str, Any]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """A finished demo."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    arguments = ("demo", "--out", str(folder), "--json", "--svg", str(folder) + ".svg")
    done = run(*arguments, *settings(*SETTINGS), timeout_s=280)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary == json.loads((folder / "summary.json").read_text())
    return Demo(folder, summary)


def test_the_summary_has_its_keys_and_adds_up(demo: Demo) -> None:
    summary = demo.summary
    assert summary.keys() >= {
        *("reward_before", "reward_after", "steps", "wall_s", "tasks", "workers"),
        *("escrow", "chain", "model", "provenance"),
    }
    assert summary["steps"] == 6
    assert summary["tasks"].keys() == {"rollout", "gradient", "evaluate"}
    assert all(count > 0 for count in summary["tasks"].values())
    escrow, workers = summary["escrow"], summary["workers"]
    assert escrow["funded"] == escrow["paid"] + escrow["refunded"]
    assert escrow["paid"] == sum(worker["paid_micros"] for worker in workers) > 0
    for worker in workers:
        assert worker.keys() >= {"account", "node", "killed", "tasks", "accepted", "paid_micros"}
        assert worker["accepted"] <= worker["tasks"]
        # Nobody is paid for nothing, and nobody works for nothing: the killed one too.
        assert (worker["paid_micros"] > 0) == (worker["accepted"] > 0)
    assert sum(worker["accepted"] for worker in workers) == sum(summary["tasks"].values())
    assert summary["chain"]["chain_id"] == 31337
    assert summary["chain"]["gas_used"] > 0


def test_one_worker_was_killed_and_says_so(demo: Demo) -> None:
    assert [worker["killed"] for worker in demo.summary["workers"]] == [False, True, False]


def test_each_file_is_there(demo: Demo) -> None:
    for name in (
        *("adapter/adapter_model.safetensors", "adapter/adapter_config.json"),
        *("adapter/base/model.safetensors", "adapter/bundle.json", "bundle.json", "metrics.jsonl"),
    ):
        assert (demo.folder / name).stat().st_size > 0
    picture = demo.folder.with_name("out.svg").read_text()
    assert "PASS" in picture
    assert "@font-face" not in picture


def test_stock_libraries_give_exactly_the_reported_accuracy(demo: Demo) -> None:
    spec = load_job_file(example_job(), SETTINGS)
    environment = load_environment(spec.environments[0])
    sizes = [environment.num_tasks(Split.EVAL)]
    job_id = demo.summary["job_id"]
    prompts = eval_prompts(job_id, spec.environments, sizes, spec.evaluation.num_examples)
    texts = json.dumps([environment.prompt(Split.EVAL, prompt.index) for prompt in prompts])
    done = subprocess.run(
        [
            *(sys.executable, "-c", STOCK),
            *(str(demo.folder / "adapter"), str(spec.sampling.max_tokens)),
        ],
        input=texts,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    scores = [
        environment.score(Split.EVAL, prompt.index, text)
        for prompt, text in zip(prompts, json.loads(done.stdout), strict=True)
    ]
    assert sum(scores) / len(scores) == demo.summary["reward_after"]


def test_a_second_reader_comes_to_the_same_verdict_and_another_for_a_changed_model(
    demo: Demo,
) -> None:
    provenance = demo.summary["provenance"]
    assert provenance["verified"]
    assert provenance["statements"] > 0
    adapter = demo.folder / "adapter"
    verify = ("provenance", "verify", str(demo.folder / "bundle.json"), "--model", str(adapter))
    assert run(*verify).returncode == 0
    weights = adapter / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    try:
        assert run(*verify).returncode == 3
    finally:
        weights.write_bytes(content)
