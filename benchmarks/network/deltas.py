"""How small a policy version is as a delta from the one before, by learning rate.

AdamW on the built-in model, its adapter (LoRA) and all of its weights, as fp32 and as bf16,
cross-entropy on sums; the version after 20 updates and the four that follow.
"""

from __future__ import annotations

import io
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from benchmarks.network.table import Finding, main_of
from shoal.orchestrator.deltas import WORTH_SHARE
from shoal.protocol.learning import LoraSpec

if TYPE_CHECKING:
    from shoal.models.policy import Policy

_RATES: Final = (1e-6, 1e-5, 1e-4, 1e-3)
_WARM_UP: Final = 20
_VERSIONS: Final = 4
_ROWS: Final = 32


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One kind of weights at one learning rate.

    Attributes:
        weights: Which weights, in which format.
        rate: The learning rate.
        share: The delta's part of the whole version, on average.
        zlib_share: What zlib makes of the whole version, likewise.
        make_mb_per_s: Megabytes of version that a second of one core turns into a delta.
        apply_mb_per_s: And back, digest included.
    """

    weights: str
    rate: float
    share: float
    zlib_share: float
    make_mb_per_s: float
    apply_mb_per_s: float


def findings(*, quick: bool) -> Iterator[Finding]:
    """The delta's part of the whole version, for each kind of weights and learning rate."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    rates = _RATES[1:3] if quick else _RATES
    for lora in (True, False):
        for rate in rates:
            for outcome in _measure(rate, lora=lora):
                yield Finding(
                    what=f"{outcome.weights}, learning rate {outcome.rate:g}",
                    measured=f"delta {100 * outcome.share:.1f} % of the version "
                    f"(zlib alone {100 * outcome.zlib_share:.0f} %), "
                    f"{'kept' if outcome.share < WORTH_SHARE else 'not kept'}; made at "
                    f"{outcome.make_mb_per_s:.0f} MB/s, applied at "
                    f"{outcome.apply_mb_per_s:.0f} MB/s",
                )


def _measure(rate: float, *, lora: bool) -> Iterable[Outcome]:
    from shoal.models.tiny import build_model, build_tokenizer

    model = build_model(0, len(build_tokenizer()))
    policy = built_policy(model, LoraSpec(r=32) if lora else None)
    versions = list(train_versions(policy, rate, _VERSIONS + 1))
    name = "adapter" if lora else "all weights"
    for kind, convert in (("fp32", lambda data: data), ("bf16", _as_bf16)):
        blobs = [convert(data) for data in versions]
        yield _outcome(f"{name}, {kind}", rate, blobs)


def built_policy(model: Any, lora: LoraSpec | None) -> Policy:
    """``model`` as a policy, with the built-in tokenizer, whose vocabulary it has."""
    from shoal.models.policy import Policy
    from shoal.models.tiny import build_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        build_tokenizer().save_pretrained(folder)
        return Policy.load(Path(folder), lora, seed=0)


def train_versions(policy: Policy, rate: float, num_versions: int) -> Iterator[bytes]:
    """Consecutive versions of the weights, as they would travel, after a warm-up."""
    import torch

    torch.set_num_threads(1)
    weights = list(policy.trainable().values())
    optimizer = torch.optim.AdamW(weights, lr=rate, betas=(0.9, 0.999), weight_decay=0.0)
    draw = torch.Generator().manual_seed(0)
    for step in range(_WARM_UP + num_versions):
        terms = torch.randint(10, 50, (_ROWS, 2), generator=draw).tolist()
        rows = [policy.tokenizer(f"{a}+{b}={a + b}")["input_ids"] for a, b in terms]
        tokens = torch.tensor(rows)
        optimizer.zero_grad()
        policy.model(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        if step >= _WARM_UP:
            yield policy.adapter_bytes()


def _as_bf16(data: bytes) -> bytes:
    import safetensors.torch
    import torch

    arrays = safetensors.torch.load(data)
    return safetensors.torch.save(
        {name: array.to(torch.bfloat16) for name, array in arrays.items()}
    )


def _outcome(weights: str, rate: float, blobs: list[bytes]) -> Outcome:
    import hashlib
    import zlib

    from shoal.network.blob_delta import apply_delta, write_delta

    shares, made_s, applied_s = [], 0.0, 0.0
    for base, target in itertools.pairwise(blobs):
        parts: list[bytes] = []
        started = time.process_time()
        write_delta(
            io.BytesIO(base), io.BytesIO(target), len(base), parts.append, max_bytes=1 << 40
        )
        made_s += time.process_time() - started
        delta = b"".join(parts)
        started = time.process_time()
        digest = hashlib.sha256()
        for block in apply_delta(io.BytesIO(base), io.BytesIO(delta), len(base)):
            digest.update(block)
        applied_s += time.process_time() - started
        if digest.digest() != hashlib.sha256(target).digest():
            raise SystemExit("a delta did not give back the version it was made of")
        shares.append(len(delta) / len(target))
    num_mb = sum(map(len, blobs[1:])) / 1e6
    return Outcome(
        weights=weights,
        rate=rate,
        share=statistics.fmean(shares),
        zlib_share=len(zlib.compress(blobs[-1], 1)) / len(blobs[-1]),
        make_mb_per_s=num_mb / made_s,
        apply_mb_per_s=num_mb / applied_s,
    )


if __name__ == "__main__":
    main_of(__doc__, findings)
