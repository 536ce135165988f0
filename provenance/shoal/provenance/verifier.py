"""The offline check of a bundle: file → signature → node → leaf → root → head → links.

Nothing here uses a network.  What it cannot know offline, that the head is the chain's, it
takes as ``pinned_head`` or says it has not checked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import base58
from eth_abi.exceptions import EncodingError

from shoal.protocol.canonical import sha256_hex
from shoal.protocol.errors import PeerFault, ShoalError
from shoal.protocol.node import BoundNode
from shoal.protocol.signing import Domain
from shoal.provenance import dsse, links
from shoal.provenance.bundle import BUNDLE_FILE, Bundle, hash_file
from shoal.provenance.links import Entry
from shoal.provenance.log import EpochLog, replay_head
from shoal.provenance.report import Outcome, Report, Step
from shoal.provenance.statement import decode

# Identity multihash of the protobuf message {Type: Ed25519, Data: 32 bytes}.
# Source: libp2p specs, peer-ids/peer-ids.md.
_PEER_ID_PREFIX = bytes([0x00, 36, 0x08, 0x01, 0x12, 32])


class _Steps:
    """The steps so far; after a failure no further one runs."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.failed = False

    def run(self, name: str, check: Callable[[], str]) -> None:
        """The step is done and noted, unless an earlier one failed."""
        if self.failed:
            self.skip(name, "not reached")
            return
        try:
            self.steps.append(Step(name=name, outcome=Outcome.PASSED, detail=check()))
        except ShoalError as error:
            self._fail(name, error.message)
        except (ValueError, EncodingError):
            self._fail(name, "A number or address in the bundle has no exact canonical form.")

    def _fail(self, name: str, why: str) -> None:
        self.failed = True
        self.steps.append(Step(name=name, outcome=Outcome.FAILED, detail=why))

    def skip(self, name: str, why: str) -> None:
        """The step is noted as not done."""
        self.steps.append(Step(name=name, outcome=Outcome.NOT_CHECKED, detail=why))


def verify_bundle(
    bundle: Bundle, folder: Path | None = None, *, pinned_head: bytes | None = None
) -> Report:
    """Every step of the offline check, and whether all that were done passed.

    Args:
        bundle: What to check; it may come from anyone.
        folder: Where the released files are; absent leaves their bytes unchecked.
        pinned_head: The head the chain holds for this job, from a source the caller trusts;
            absent leaves the bundle checked for consistency only.
    """
    steps = _Steps()
    # Filled by one step and read by the next, which runs only if that step passed.
    entries: list[Entry] = []
    accepted: dict[str, Entry] = {}
    chain = links.Chain(updates=(), versions={})

    def read_signatures() -> str:
        entries.extend(_open_envelopes(bundle))
        return f"{len(entries)} statements, each signed by its node"

    def check_pay() -> str:
        detail, found = links.check_pay(bundle, entries)
        accepted.update(found)
        return detail

    def check_updates() -> str:
        nonlocal chain
        detail, chain = links.check_updates(bundle, entries, accepted)
        return detail

    if folder is None:
        steps.skip("files", "no folder was given")
    else:
        steps.run("files", lambda: check_files(bundle, folder))
    steps.run("job", lambda: check_job(bundle))
    steps.run("signatures", read_signatures)
    steps.run("nodes", lambda: check_nodes(bundle))
    steps.run("roles", lambda: links.check_roles(bundle, entries))
    steps.run("roots", lambda: check_roots(bundle, entries))
    steps.run("head", lambda: check_head(bundle))
    if pinned_head is None:
        steps.skip("pinned head", "no head was given; compare the head with the chain's")
    else:
        steps.run("pinned head", lambda: check_pinned_head(bundle, pinned_head))
    steps.run("environments", lambda: links.check_environments(bundle, entries))
    steps.run("pay", check_pay)
    steps.run("updates", check_updates)
    steps.run("release", lambda: links.check_release(bundle, entries, accepted, chain))
    return Report(
        steps=tuple(steps.steps),
        passed=not steps.failed,
        head_pinned=pinned_head is not None,
        num_statements=len(bundle.statements),
    )


def check_files(bundle: Bundle, folder: Path) -> str:
    """Every released file is in ``folder`` with the bytes stated; what else is there, is named.

    Raises:
        PeerFault: a file is missing, is a link, or has other bytes.
    """
    if not bundle.files:
        raise PeerFault("The bundle names no files, so the folder cannot be checked.")
    for file in bundle.files:
        path = folder / file.path
        # A link could lead out of the folder to bytes that change later.
        if path.is_symlink() or not path.is_file():
            raise PeerFault(f"{file.path} is missing from the folder, or is not a plain file.")
        if path.stat().st_size != file.size_bytes or hash_file(path) != file.sha256:
            raise PeerFault(f"{file.path} does not have the bytes that were released.")
    known = {file.path for file in bundle.files} | {BUNDLE_FILE}
    others = sorted(path.name for path in folder.iterdir() if path.name not in known)
    note = f"; not covered by the release: {', '.join(others[:8])}" if others else ""
    return f"{len(bundle.files)} files have the released digests{note}"


def check_job(bundle: Bundle) -> str:
    """The job is its requester's, its id follows from it, and the deployment is one.

    Raises:
        PeerFault: something differs.
        Unauthorised: the requester did not sign it for this chain and escrow.
    """
    job = bundle.job.record
    bundle.job.require_signer(bundle.domain, job.requester)
    if job.job_id() != bundle.job_id:
        raise PeerFault("The bundle's job id is not that of its job.")
    if bundle.contracts.job_escrow.lower() != bundle.domain.escrow.lower():
        raise PeerFault("The bundle's escrow is not the one signatures are for.")
    return f"{bundle.job_id[:10]}… signed by {job.requester} for chain {bundle.domain.chain_id}"


def _open_envelopes(bundle: Bundle) -> Sequence[Entry]:
    keys = {node.binding.record.node: node.binding.record for node in bundle.nodes}
    if len(keys) != len(bundle.nodes):
        raise PeerFault("A node is bound twice.")
    entries: list[Entry] = []
    for logged in bundle.statements:
        place = f"Statement {logged.seq} of epoch {logged.epoch}"
        binding = keys.get(logged.envelope.key_id)
        if binding is None:
            raise PeerFault(f"{place} is signed by a node that is bound to no account.")
        try:
            payload = dsse.verify(logged.envelope, bytes.fromhex(binding.node_key[2:]))
            statement = decode(payload)
        except PeerFault as fault:
            raise PeerFault(f"{place}: {fault.message}", code=fault.code) from None
        if statement.kind is not logged.kind:
            raise PeerFault(f"{place} is logged as another kind than it is.")
        if logged.contributor.lower() != binding.account.lower():
            raise PeerFault(f"{place} is logged for another account than its signer's.")
        entries.append(Entry(logged=logged, statement=statement, sha256=sha256_hex(payload)))
    return entries


def check_nodes(bundle: Bundle) -> str:
    """Every node key is tied to its account by both of their signatures.

    Raises:
        PeerFault: a peer id is not its key's, or the node key did not countersign.
        Unauthorised: the account did not sign.
    """
    for node in bundle.nodes:
        check_binding(node, bundle.domain)
    return f"{len(bundle.nodes)} nodes, each bound by its account and its key"


def check_binding(node: BoundNode, domain: Domain) -> None:
    """Passes only if account and node key each signed the binding.

    Raises:
        PeerFault: the peer id is not the key's, or the node key did not countersign.
        Unauthorised: the account did not sign for this chain and escrow.
    """
    binding = node.binding.record
    key = bytes.fromhex(binding.node_key[2:])
    if base58.b58encode(_PEER_ID_PREFIX + key).decode() != binding.node:
        raise PeerFault(f"The peer id {binding.node} is not that of its key.")
    node.binding.require_signer(domain, binding.account)
    message = binding.node_message()
    if not dsse.verify_ed25519(key, message, bytes.fromhex(node.node_signature[2:])):
        raise PeerFault(
            f"The node {binding.node} did not countersign its binding to {binding.account}."
        )


def check_roots(bundle: Bundle, entries: Sequence[Entry]) -> str:
    """Every epoch's provenance root is that of its statements, in order, none left over.

    Raises:
        PeerFault: a root, a count or a position differs.
    """
    logs = _replay_log(bundle, entries)
    for position, epoch in enumerate(bundle.epochs, start=1):
        if epoch.number != position:
            raise PeerFault(f"Epoch {epoch.number} stands where epoch {position} belongs.")
        log = logs.pop(epoch.number, EpochLog(bundle.job_id, epoch.number))
        if len(log) != epoch.num_statements or "0x" + log.root.hex() != epoch.provenance_root:
            raise PeerFault(
                f"Epoch {epoch.number} posted {epoch.num_statements} statements under "
                f"{epoch.provenance_root}; the bundle's {len(log)} give 0x{log.root.hex()}."
            )
    if logs:
        raise PeerFault(f"Statements of epoch {min(logs)} belong to no posted epoch.")
    return f"{len(bundle.epochs)} epochs recompute to their roots"


def _replay_log(bundle: Bundle, entries: Sequence[Entry]) -> dict[int, EpochLog]:
    logs: dict[int, EpochLog] = {}
    latest = 0
    for entry in entries:
        logged = entry.logged
        log = logs.setdefault(logged.epoch, EpochLog(bundle.job_id, logged.epoch))
        if logged.epoch < latest or logged.seq != len(log):
            raise PeerFault(f"{entry.place.capitalize()} is out of the log's order.")
        latest = logged.epoch
        log.append(logged.kind, entry.sha256, logged.contributor)
    return logs


def check_head(bundle: Bundle) -> str:
    """The anchors, replayed, give the bundle's head.

    Raises:
        PeerFault: they give another.
    """
    anchors = [(bytes.fromhex(e.provenance_root[2:]), e.num_statements) for e in bundle.epochs]
    head = replay_head(anchors)
    if "0x" + head.hex() != bundle.head:
        raise PeerFault(f"The epochs replay to 0x{head.hex()}, not to {bundle.head}.")
    return bundle.head


def check_pinned_head(bundle: Bundle, pinned_head: bytes) -> str:
    """The bundle's head is the one the caller pinned.

    Raises:
        PeerFault: it is another.
    """
    if bytes.fromhex(bundle.head[2:]) != pinned_head:
        raise PeerFault(f"The pinned head is 0x{pinned_head.hex()}, not {bundle.head}.")
    return "equals the head given"
