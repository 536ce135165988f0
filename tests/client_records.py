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


def clearing(**changes: object) -> dict[str, Any]:
    """Three bidders for 128 units, each paid what it asked."""
    return {
        "sha256": "5" * 64,
        "lot_id": "lot_0123456789",
        "kind": "rollout",
        "epoch": 57,
        "num_units": 128,
        "num_commitments": 4,
        "num_revealed": 4,
        "num_bidders": 3,
        "num_rungs": 3,
        "num_refused": 0,
        "unfilled_units": 0,
        "rule": "pay_as_bid",
        "clearing_price_micros": 264,
        "reserve": {"requester_max_micros": 300, "origin": "requester", "reserve_micros": 300},
        "freshness_permille": [1000, 500],
        "issued_at_ms": 1_790_000_000_000,
        **changes,
    }


def rung(place: int = 0, **changes: object) -> dict[str, Any]:
    return {
        "rung": place,
        "bid_digest": "0x" + "8" * 64,
        "account": "0x" + f"{place + 1:02d}" * 20,
        "node": "12D3KooWGzxzKZYveHXtpG6AsrUJBcWxHBFS2HsEoGTxrMLvKXtf",
        "name": f"worker-{place + 1}",
        "price_micros": 200 + 50 * place,
        "handicap_micros": 1,
        "pay_micros": 200 + 50 * place,
        "num_units": 128 if place == 0 else 0,
        "room_units": 128,
        "standby": False,
        **changes,
    }


def lease(**changes: object) -> dict[str, Any]:
    """An accepted lease of the first rung of `clearing`."""
    first = rung()
    return {
        "lease_id": "lease_0123456789",
        "job_id": "0x" + "12" * 32,
        "lot_id": "lot_0123456789",
        "task_id": "task_0123456789",
        "attempt": 1,
        "kind": "rollout",
        "state": "accepted",
        "reason": "",
        "account": first["account"],
        "node": first["node"],
        "num_units": 128,
        "unit_price_micros": 200,
        "pay_micros": 25_600,
        "issued_at_ms": 1_790_000_000_000,
        "ended_at_ms": 1_790_000_060_000,
        "certificate_sha256": "5" * 64,
        "rung": 0,
        "clearing": clearing(),
        "bid": first,
        "next_bid": rung(1),
        **changes,
    }
