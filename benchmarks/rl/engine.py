"""``python -m benchmarks.rl.engine [--repeats 9]``: what sampling costs, part by part.

Every figure is a median over repeats of CPU seconds, the variants in turn inside each
repeat, one torch thread.  *seeded* draws by inverse CDF from one Philox uniform a token;
*multinomial* is the same loop drawing by ``torch.multinomial``; *plain model* is the loop
over the model's own forward pass; *one row a call* has no batch and nothing to share.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from shoal.models import engine as engine_module
from shoal.models.engine import Completions, LoopEngine
from shoal.models.policy import Policy
from shoal.models.sampling import SeededUniforms, UniformTable
from shoal.protocol.job import EnvSpec
from shoal.protocol.learning import LoraSpec
from shoal.rl.base_models import fetch_base
from shoal.rl.environments import Split, load_environment

GROUPS = 64
GROUP_SIZE = 8
TEMPERATURES = (1.0, 2.0)
"""At the higher one completions run to the length limit and share little."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """CPU seconds of one call, and the tokens it drew."""

    cpu_s: float
    num_tokens: int


class NoUniforms:
    """A table for a sampler that draws by itself."""

    def __getitem__(
        self, key: tuple[np.ndarray[tuple[int], np.dtype[np.int64]], object], /
    ) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        """Zeros."""
        return np.zeros(len(key[0]))


def draw_multinomial(logprobs_nv: torch.Tensor, uniforms_ng: torch.Tensor) -> torch.Tensor:
    """As many draws from each distribution as there are uniforms, which are not looked at."""
    return torch.multinomial(logprobs_nv.exp(), uniforms_ng.shape[1], replacement=True)


@contextlib.contextmanager
def multinomial() -> Iterator[None]:
    """While it lasts the loop draws by ``torch.multinomial``."""
    with mock.patch.object(engine_module, "select_tokens_ng", draw_multinomial):
        yield


def timed(call: Callable[[], Completions]) -> Cost:
    """The cost of ``call``."""
    started_s = time.process_time()
    drawn = call()
    return Cost(cpu_s=time.process_time() - started_s, num_tokens=sum(map(len, drawn.token_ids)))


class Workload:
    """The acceptance workload's base and prompts."""

    def __init__(self, folder: Path, max_tokens: int, temperature: float) -> None:
        environment = load_environment(EnvSpec(id="addition"))
        self.policy = Policy.load(folder, LoraSpec(r=16, alpha=32), seed=0)
        texts = [environment.prompt(Split.TRAIN, index) for index in range(GROUPS)]
        prompts = self.policy.encode_prompts(texts)
        self.rows = [prompt for prompt in prompts for _ in range(GROUP_SIZE)]
        self.max_tokens = max_tokens
        self.temperature = temperature
        self.plain = LoopEngine(self.policy.model, None, self.policy.eos_ids, self.policy.device)

    def uniforms(self) -> SeededUniforms:
        """A fresh table: drawing from it is part of the cost."""
        return SeededUniforms(7, range(len(self.rows)), self.max_tokens)

    def draw(
        self, engine: engine_module.SamplingEngine, rows: Sequence[list[int]], table: UniformTable
    ) -> Completions:
        """One call."""
        return engine.generate(
            rows, max_tokens=self.max_tokens, temperature=self.temperature, uniforms_bt=table
        )

    def variants(self) -> dict[str, Cost]:
        """Each variant once."""
        fast = self.policy.engine
        costs = {
            "seeded": timed(lambda: self.draw(fast, self.rows, self.uniforms())),
            "plain model": timed(lambda: self.draw(self.plain, self.rows, self.uniforms())),
            "one row a call": timed(lambda: self.draw(fast, self.rows[:1], self.uniforms())),
        }
        with multinomial():
            costs["multinomial"] = timed(lambda: self.draw(fast, self.rows, NoUniforms()))
        return costs


def main() -> None:
    """Prints one table per temperature."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rl.engine", description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--max-tokens", type=int, default=32)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="shoal-engine-") as name:
        folder = fetch_base("builtin:tiny-addition", Path(name), allow_local=False)
        for temperature in TEMPERATURES:
            load = Workload(folder, arguments.max_tokens, temperature)
            load.variants()
            costs = [load.variants() for _ in range(arguments.repeats)]
            print(f"\ntemperature {temperature:g}\n\n| variant | tokens | CPU ms | tok/CPU s |")
            print("|---|---:|---:|---:|")
            for variant in costs[0]:
                cpu_s = statistics.median(c[variant].cpu_s for c in costs)
                tokens = statistics.median(c[variant].num_tokens for c in costs)
                print(f"| {variant} | {tokens:.0f} | {1e3 * cpu_s:.1f} | {tokens / cpu_s:,.0f} |")
            ratio = statistics.median(
                (c["seeded"].cpu_s / c["seeded"].num_tokens)
                / (c["multinomial"].cpu_s / c["multinomial"].num_tokens)
                for c in costs
            )
            print(f"\nseeded ÷ multinomial, CPU per token: {ratio:.3f}", flush=True)


if __name__ == "__main__":
    main()
