"""Which worker nodes are here, whose they are, and whether they may work."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from shoal.network.identity import peer_id_of
from shoal.network.identity import verify as verify_node_signature
from shoal.orchestrator.context import Context
from shoal.orchestrator.store.tables import NodeRow
from shoal.protocol.errors import InvalidRequest, Unauthorised
from shoal.protocol.ids import LeaseId, PeerId
from shoal.protocol.money import format_dollars
from shoal.protocol.node import (
    PROTOCOL_VERSION,
    BoundNode,
    HelloReply,
    HelloRequest,
    JoinRequest,
    NodeBinding,
)
from shoal.protocol.result import Verdict
from shoal.protocol.signing import Signed, sign
from shoal.protocol.version import SOFTWARE_VERSION

_MAX_ADDRESSES: Final = 16
_MISSED_BEATS: Final = 2
_LATE_BEATS: Final = 0.5
"""How late a heartbeat may be before it counts as missed."""
_LEAST_PATIENCE_MS: Final = 1_000
"""A busy machine may be late by this much, however often it is to beat."""


@dataclass(kw_only=True)
class Member:
    """One joined node.

    ``stake_micros`` is its account's active stake as last read from the chain.
    ``undelivered`` verdicts are resent until acknowledged; ``failures`` counts the leases it
    did not fulfil, by cause.  One that is ``leaving`` gave a lease back because it stops: it is
    leased nothing more until it joins again.
    """

    node: PeerId
    account: str
    name: str
    device: str
    stake_micros: int = 0
    connected: bool = True
    leaving: bool = False
    last_seen_ms: int
    consecutive_valid: int = 0
    audited: int = 0
    undelivered: dict[LeaseId, Signed[Verdict]] = field(default_factory=dict)
    failures: Counter[str] = field(default_factory=Counter)


def own_binding(context: Context) -> BoundNode:
    """That the orchestrator's node speaks for its account, signed by both."""
    binding = NodeBinding(
        account=context.account.address,
        node=context.identity.peer_id,
        node_key="0x" + context.identity.public_key.hex(),
        valid_from_ms=0,
    )
    return BoundNode(
        binding=sign(binding, context.domain, context.account),
        node_signature="0x" + context.identity.sign(binding.node_message()).hex(),
    )


class Roster:
    """Admits nodes and remembers them while the process lives."""

    def __init__(self, context: Context, api_url: str, blob_url: Callable[[], str]) -> None:
        self._context = context
        self.api_url = api_url
        self._blob_url = blob_url
        self._members: dict[str, Member] = {}
        self._own_binding = own_binding(context)

    @property
    def blob_urls(self) -> tuple[str, ...]:
        """Where blobs are fetched from; results are put at the first."""
        return (self._blob_url(), *self._context.config.mirrors)

    @property
    def p2p_addresses(self) -> tuple[str, ...]:
        """Where our node is dialled; a wildcard is the host that the operator made public."""
        kind = "ip4" if self._context.config.public_host.replace(".", "").isdigit() else "dns4"
        public = f"/{kind}/{self._context.config.public_host}/"
        addresses = self._context.network.addresses[:_MAX_ADDRESSES]
        return tuple(address.replace("/ip4/0.0.0.0/", public, 1) for address in addresses)

    def hello(self, request: HelloRequest) -> HelloReply:
        """What a worker needs to know before it joins.

        Raises:
            InvalidRequest: the worker speaks another version of the protocol.
        """
        if request.protocol_version != PROTOCOL_VERSION:
            raise InvalidRequest(
                f"This orchestrator speaks protocol version {PROTOCOL_VERSION} (Shoal "
                f"{SOFTWARE_VERSION}) and the worker speaks {request.protocol_version} (Shoal "
                f"{request.software_version}); install the matching release of Shoal.",
                code="stale_version",
            )
        return HelloReply(
            protocol_version=PROTOCOL_VERSION,
            software_version=SOFTWARE_VERSION,
            domain=self._context.domain,
            contracts=self._context.deployment.contracts(),
            orchestrator=self._context.account.address,
            min_stake_micros=self._context.config.min_stake_micros,
            rpc_urls=(self._context.config.rpc_url,),
            api_url=self.api_url,
            blob_urls=self.blob_urls,
            p2p_addresses=self.p2p_addresses,
            heartbeat_ms=self._context.config.heartbeat_ms,
            bound_node=self._own_binding,
        )

    async def join(self, peer: PeerId, request: JoinRequest) -> Member:
        """Admits the node behind ``peer``.

        Raises:
            Unauthorised: a signature, the binding on the chain or the stake is missing.
        """
        binding = request.bound_node.binding.record
        self._check_signatures(peer, request)
        stake_micros = await self._check_chain(binding.account, bytes.fromhex(binding.node_key[2:]))
        now_ms = self._context.time.now_ms()
        row = NodeRow(
            node=peer,
            account=binding.account,
            name=request.name,
            device=request.device,
            bound_node=request.bound_node.encode().decode(),
            joined_ms=now_ms,
        )
        await self._context.database.run(lambda session: session.merge(row) and None)
        # It may have gone while the chain and the database were asked.
        connected = peer in self._context.network.peers()
        known = self._members.get(peer)
        if known is not None:
            known.connected, known.last_seen_ms = connected, now_ms
            known.name, known.device = request.name, request.device
            known.stake_micros, known.leaving = stake_micros, False
            return known
        member = Member(
            node=peer,
            account=binding.account,
            name=request.name,
            device=request.device,
            stake_micros=stake_micros,
            connected=connected,
            last_seen_ms=now_ms,
        )
        self._members[peer] = member
        return member

    def _check_signatures(self, peer: PeerId, request: JoinRequest) -> None:
        binding = request.bound_node.binding.record
        node_key = bytes.fromhex(binding.node_key[2:])
        request.bound_node.binding.require_signer(self._context.domain, binding.account)
        signature = bytes.fromhex(request.bound_node.node_signature[2:])
        if binding.node != peer or peer_id_of(node_key) != peer:
            raise Unauthorised(
                f"The binding names node {binding.node} but the connection is from {peer}; "
                "join with the node's own key.",
                code="wrong_node",
            )
        if not verify_node_signature(node_key, binding.node_message(), signature):
            raise Unauthorised(
                "The node key did not countersign the binding; sign it with the node's own key.",
                code="wrong_node",
            )

    async def _check_chain(self, account: str, node_key: bytes) -> int:
        owner = await self._context.chain.vault.node_owner(node_key)
        if owner is None or owner.lower() != account.lower():
            raise Unauthorised(
                f"The stake vault on chain {self._context.domain.chain_id} does not bind this "
                f"node to account {account}; call bindNode from that account first.",
                code="unbound_node",
            )
        stake = await self._context.chain.vault.stake_of(account)
        minimum = self._context.config.min_stake_micros
        if stake.active_micros < minimum:
            raise Unauthorised(
                f"Account {account} has a stake of ${format_dollars(stake.active_micros)} and "
                f"${format_dollars(minimum)} is needed; stake the difference and join again.",
                code="no_stake",
            )
        return stake.active_micros

    async def refresh_stakes(self) -> None:
        """Each connected member's stake is as the chain has it now.

        Raises:
            Unavailable: the chain does not answer; what was known before still counts.
        """
        for account in {member.account for member in self.members() if member.connected}:
            stake = await self._context.chain.vault.stake_of(account)
            for member in self.members():
                if member.account == account:
                    member.stake_micros = stake.active_micros

    def member(self, peer: PeerId) -> Member:
        """The joined node behind ``peer``.

        Raises:
            Unauthorised: it has not joined since this process started.
        """
        member = self._members.get(peer)
        if member is None:
            raise Unauthorised(f"Node {peer} has not joined; join first.", code="not_joined")
        return member

    def find(self, peer: str) -> Member | None:
        """The node ``peer`` if it has joined since this process started."""
        return self._members.get(peer)

    def heard(self, peer: PeerId) -> None:
        """The node has just been heard of; one that never joined is passed over."""
        member = self._members.get(peer)
        if member is not None:
            member.last_seen_ms = self._context.time.now_ms()

    def is_here(self, member: Member) -> bool:
        """Whether the node is connected and has not missed two heartbeats.

        A process that is stopped, or whose link is dead, keeps its connection for a while: it
        is awarded nothing meanwhile, and is back with its next sign of life.  What it holds
        already follows the clocks of its leases.
        """
        beat_ms = self._context.config.heartbeat_ms
        patience_ms = max(round((_MISSED_BEATS + _LATE_BEATS) * beat_ms), _LEAST_PATIENCE_MS)
        return member.connected and (
            self._context.time.now_ms() - member.last_seen_ms <= patience_ms
        )

    def members(self) -> list[Member]:
        """Every node that joined since this process started."""
        return list(self._members.values())

    def lost(self, peer: PeerId) -> None:
        """Notes that the connection to ``peer`` is gone."""
        member = self._members.get(peer)
        if member is not None:
            member.connected = False
