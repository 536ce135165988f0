"""Records for market and provenance tests, and the accounts that sign them."""

from __future__ import annotations

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from eth_account import Account as EthAccount
from eth_account.signers.local import LocalAccount

from shoal.protocol.market import ANY_JOB, Bid, Lease, Lot, LotClass, TaskKind
from shoal.protocol.signing import Domain

JOB_ID = "0x" + "ab" * 32
DOMAIN = Domain(chain_id=31337, escrow="0x" + "5" * 40)
NOW_MS = 1_700_000_000_000
SEED = bytes(range(32))


def account(number: int) -> LocalAccount:
    """The same account for the same number."""
    made: LocalAccount = EthAccount.from_key(number.to_bytes(32, "big"))
    return made


def node_key(number: int) -> Ed25519PrivateKey:
    """The same node key for the same number."""
    return Ed25519PrivateKey.from_private_bytes(number.to_bytes(32, "big"))


def peer(number: int) -> str:
    """A peer id for bids, whose form alone matters."""
    return "12D3KooW" + "abcdefghijkmnopqrstuvwxyz"[number % 25] * 40


def bid(node: int = 1, **changes: object) -> Bid:
    """A rollout bid of node ``node`` for any job."""
    fields: dict[str, object] = {
        "job_id": ANY_JOB,
        "kind": TaskKind.ROLLOUT,
        "epoch_from": 0,
        "epoch_to": 100,
        "price_micros": 100,
        "capacity": 8,
        "account": account(node).address,
        "node": peer(node),
        "valid_until_ms": NOW_MS + 60_000,
        "nonce": 1,
    }
    return Bid.model_validate(fields | changes)


def lot(num_units: int = 16, **changes: object) -> Lot:
    """A rollout lot of the test job."""
    fields: dict[str, object] = {
        "lot_id": "lot_0123456789",
        "job_id": JOB_ID,
        "epoch": 7,
        "lot_class": LotClass(
            kind=TaskKind.ROLLOUT,
            environment_sha256="1" * 64,
            policy_sha256="2" * 64,
            token_bucket=64,
        ),
        "num_units": num_units,
        "reserve_micros": 200,
    }
    return Lot.model_validate(fields | changes)


def lease(node: int = 1, **changes: object) -> Lease:
    """A lease of four rollout units, issued now."""
    fields: dict[str, object] = {
        "lease_id": "lease_0123456789",
        "lease_epoch": 2,
        "certificate_sha256": "c" * 64,
        "rung": 0,
        "lot_id": "lot_0123456789",
        "job_id": JOB_ID,
        "task_id": "task_0123456789",
        "task_sha256": "3" * 64,
        "kind": TaskKind.ROLLOUT,
        "account": account(node).address,
        "node": peer(node),
        "num_units": 4,
        "unit_price_micros": 100,
        "issued_at_ms": NOW_MS,
        "start_by_ms": NOW_MS + 2_000,
        "deadline_ms": NOW_MS + 60_000,
        "heartbeat_ms": 1_000,
    }
    return Lease.model_validate(fields | changes)
