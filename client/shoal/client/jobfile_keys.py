"""The job file's keys, and where each stands in a `JobSpec`."""

from __future__ import annotations

from collections.abc import Sequence

_CODEC = ("gradient", "codec")
_CORRECTION = ("loss", "correction")


def _same(table: tuple[str, ...], *keys: str) -> dict[str, tuple[str, ...]]:
    """Keys that the file and the spec call alike."""
    return {key: (*table, key) for key in keys}


KEYS: dict[str, dict[str, tuple[str, ...]]] = {
    "": {
        "schema": ("schema_version",),
        **_same((), "name", "model", "model_sha256", "seed", "max_steps", "batch_size"),
        **_same((), "rollouts_per_example", "dynamic_sampling_rounds"),
        **_same(("optimizer",), "learning_rate"),
        **_same((), "max_staleness"),
    },
    "algorithm": {
        "type": ("loss", "kind"),
        **_same(("loss",), "clip_low", "clip_high", "clip_delta", "kl_beta", "kl_bias_correction"),
        **_same(("loss",), "sapo_temperature_positive", "sapo_temperature_negative"),
        **_same(("loss",), "advantage_scale", "mask_truncated"),
    },
    "correction": {
        **_same(_CORRECTION, "old_policy", "token_bound", "token_min", "token_max"),
        **_same(_CORRECTION, "sequence_bound", "sequence_statistic"),
        **_same(_CORRECTION, "sequence_min", "sequence_max"),
    },
    "optimizer": {
        **_same(("optimizer",), "warmup_steps", "final_lr_fraction", "beta1", "beta2"),
        **_same(("optimizer",), "weight_decay", "max_grad_norm"),
    },
    "lora": _same(("lora",), "r", "alpha", "target_modules"),
    "gradient": {
        "codec": (*_CODEC, "kind"),
        **_same(_CODEC, "chunk", "keep", "bits", "error_feedback"),
        **_same(("gradient",), "local_steps", "outer_learning_rate", "outer_momentum"),
    },
    "tasks": _same(("tasks",), "rollout", "gradient", "evaluate"),
    "sampling": _same(("sampling",), "max_tokens", "temperature"),
    "eval": {
        **_same(("evaluation",), "interval", "num_examples", "samples_per_example"),
        **_same(("evaluation",), "temperature", "patience", "target"),
    },
    "checkpoint": _same(("checkpoint",), "interval", "keep_last", "release"),
    "verify": _same(("verify",), "spot_check_rate", "logprob_tolerance"),
}
"""File key → path in the spec, table by table; ``""`` is the top of the file."""

TUNING = "tuning"
TUNINGS = ("lora", "full")
ENV_KEYS = ("id", "weight", "args")
BUDGET_KEYS = ("max_total", "max_unit_price", "stale_pay", "delay_cost")
STALE_PAY = "stale_pay"
PRICED = ("rollout", "gradient", "evaluate")
REQUIRED = ("name", "model", "max_steps", "batch_size")


def join(table: str, key: str) -> str:
    """``table.key``, or ``key`` at the top of the file."""
    return f"{table}.{key}" if table else key


def file_key(location: Sequence[str | int]) -> str:
    """The file's name for a place in the spec: a key, or a table in brackets."""
    parts = tuple(str(part) for part in location)
    for table, keys in KEYS.items():
        for key, path in keys.items():
            if path == parts[: len(path)]:
                return join(table, key)
    for table, keys in KEYS.items():
        if table and any(path[: len(parts)] == parts for path in keys.values()):
            return f"[{table}]"
    if parts[0] == "environments" and len(parts) > 1:
        return ".".join([f"env[{parts[1]}]", *parts[2:4]])
    return ".".join(parts)
