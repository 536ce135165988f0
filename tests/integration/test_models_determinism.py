"""Equal tasks give equal bits in another process, whatever that process did before."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from learning_fixtures import write_base

SCRIPT = """
import hashlib, sys
from pathlib import Path
import torch
from learning_fixtures import stir
from shoal.models.engine import LoopEngine
from shoal.models.policy import Policy
from shoal.models.sampling import SeededUniforms
from shoal.protocol.learning import LoraSpec

policy = Policy.load(Path(sys.argv[1]), LoraSpec(r=4), seed=0)
stir(policy)
prompts = [policy.encode_prompt(text) for text in ("47+38=", "1+2=") for _ in range(8)]

def draw(engine, seed):
    return engine.generate(
        prompts, max_tokens=10, temperature=1.2, uniforms_bt=SeededUniforms(seed, range(16), 10)
    )

if sys.argv[2] == "busy":
    draw(policy.engine, 3)
    policy.logprobs_bt(prompts[:2], [[5, 6], [7]], 0.5)[0].sum().backward()
    for parameter in policy.trainable().values():
        parameter.grad = None
digest = hashlib.sha256()
for engine in (policy.engine, LoopEngine(policy.model, None, policy.eos_ids, policy.device)):
    drawn = draw(engine, 7)
    for tokens, logprobs in zip(drawn.token_ids, drawn.logprobs, strict=True):
        digest.update(tokens.tobytes() + logprobs.tobytes())
rows = [row.tolist() for row in drawn.token_ids]
policy.logprobs_bt(prompts, rows, 1.2)[0].sum().backward()
for parameter in policy.trainable().values():
    digest.update(parameter.grad.numpy().tobytes())
print(digest.hexdigest())
"""


def run(folder: Path, before: str) -> str:
    tests = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(tests), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), before],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    return done.stdout.strip()


@pytest.mark.timeout(300)
def test_samples_and_gradients_are_bit_equal_in_another_process(tmp_path: Path) -> None:
    folder = write_base(tmp_path)
    with ThreadPoolExecutor(2) as pool:
        fresh, busy = pool.map(run, (folder, folder), ("fresh", "busy"))
    assert fresh == busy
