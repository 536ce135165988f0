"""What an orchestrator answers, and how a terminal draws it: builders for the client's tests."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

INFO: dict[str, Any] = {
    "software_version": "0.1.0",
    "protocol_version": 1,
    "domain": {"chain_id": 31337, "escrow": "0x" + "1" * 40},
    "contracts": {
        "token": "0x" + "2" * 40,
        "stake_vault": "0x" + "3" * 40,
        "job_escrow": "0x" + "1" * 40,
        "provenance_log": "0x" + "4" * 40,
        "fault_court": "0x" + "6" * 40,
        "model_shares": "0x" + "7" * 40,
    },
    "orchestrator": "0x" + "5" * 40,
    "peer_id": "12D3",
    "p2p_addresses": [],
    "blob_urls": [],
    "api_url": "",
    "rpc_urls": [],
    "min_stake_micros": 1,
    "challenge_window_s": 0,
}


def evaluation(policy_version: int, accuracy: float) -> dict[str, Any]:
    return {
        "policy_version": policy_version,
        "accuracy": accuracy,
        "accuracy_low": accuracy - 0.04,
        "accuracy_high": accuracy + 0.04,
        "num_examples": 512,
    }


def job(**changes: object) -> dict[str, Any]:
    return {
        "job_id": "0x" + "12" * 32,
        "name": "addition",
        "requester": "0x" + "ab" * 20,
        "state": "running",
        "policy_version": 75,
        "max_steps": 150,
        "created_ms": 1,
        "budget_micros": 25_000_000,
        "spent_micros": 5_250_000,
        "reward_recent": 0.5,
        "eta_s": 67.0,
        "evaluations": [
            evaluation(0, 0.1),
            evaluation(50, 0.45),
        ],
        "workers": [
            {
                "account": "0x" + "cd" * 20,
                "node": "12D3",
                "name": "worker-1",
                "connected": False,
                "tasks": {"rollout": {"leased": 9, "accepted": 7, "rejected": 1, "expired": 1}},
                "earned_micros": 2_000_000,
                "price_micros": {"rollout": 800},
            }
        ],
        **changes,
    }


def drawn(*parts: Any, width: int = 80) -> str:
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=False)
    for part in parts:
        console.print(part)
    return out.getvalue()
