"""The node's signed statement of its own work, which the provenance log will hold."""

from __future__ import annotations

from shoal.network.identity import NodeIdentity
from shoal.protocol.market import Lease
from shoal.protocol.result import Result
from shoal.provenance.dsse import sign
from shoal.provenance.statement import work_statement
from shoal.worker.ports import AnyTask


def sign_statement(identity: NodeIdentity, lease: Lease, task: AnyTask, result: Result) -> str:
    """The statement of ``result`` in an envelope signed by the node key, as one line of JSON."""
    payload = work_statement(lease, task, result)
    return sign(payload, key_id=identity.peer_id, sign=identity.sign).to_text()
