"""A worker's receipt and the verdict on it."""

from __future__ import annotations

from eth_account import Account as EthAccount
from worker_double import DOMAIN, JOB_ID

from shoal.network.identity import NodeIdentity
from shoal.protocol.result import Check, CheckName, Receipt, Verdict
from shoal.protocol.signing import Signed, sign

ACCOUNT = EthAccount.create()
ORCHESTRATOR = EthAccount.create()


def receipt(lease_id: str = "lease_00000000") -> Signed[Receipt]:
    record = Receipt(
        lease_id=lease_id,
        lease_epoch=1,
        job_id=JOB_ID,
        result_sha256="0" * 64,
        account=ACCOUNT.address,
        node=NodeIdentity(b"w" * 32).peer_id,
    )
    return sign(record, DOMAIN, ACCOUNT)


def verdict(lease_id: str = "lease_00000000") -> Signed[Verdict]:
    record = Verdict(
        lease_id=lease_id,
        lease_epoch=1,
        job_id=JOB_ID,
        result_sha256="0" * 64,
        accepted=True,
        num_units=1,
        pay_micros=1,
        audited=False,
        checks=(Check(name=CheckName.FORM, passed=True, detail="fine"),),
    )
    return sign(record, DOMAIN, ORCHESTRATOR)
