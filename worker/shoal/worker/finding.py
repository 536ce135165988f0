"""Looking for an orchestrator that nobody named, and whose word to take that it is the one.

Whoever is found is a stranger: it names the chain, the contracts that money goes to and who
signs leases.  So a found orchestrator is joined only if its account is the one that the
provider trusts, and it proves that it is.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from shoal.network.identity import peer_id_of, verify
from shoal.network.port import Network
from shoal.protocol.clock import TimeSource
from shoal.protocol.discovery import ORCHESTRATORS_KEY, Contact
from shoal.protocol.errors import InvalidRequest, PeerFault, ShoalError, Unauthorised, Unavailable
from shoal.protocol.ids import PeerId
from shoal.protocol.node import HelloReply
from shoal.worker.config import WorkerConfig
from shoal.worker.events import log_event

_LAN_TIMEOUT_S: Final = 3.0
_TABLE_TIMEOUT_S: Final = 10.0
_MAX_FOUND: Final = 16

Search = Callable[[], Awaitable[Sequence[Contact]]]
Find = Callable[[], Awaitable[tuple[str, ...]]]


class Finder:
    """Asks each place where orchestrators may be found, the nearest first.

    Args:
        searches: What to ask, by the name that the provider reads.
    """

    def __init__(self, searches: dict[str, Search]) -> None:
        self._searches = searches

    async def __call__(self) -> tuple[str, ...]:
        """The addresses found.

        Raises:
            InvalidRequest: there is no place to ask.
            Unavailable: nobody was found just now; says where was looked.
        """
        if not self._searches:
            raise InvalidRequest(
                "No orchestrator is named and there is nowhere to look for one; name its address, "
                "or set mdns = true or bootstrap to the addresses of nodes you know.",
                code="nowhere_to_look",
            )
        found: dict[str, None] = {}
        tried = []
        for name, search in self._searches.items():
            try:
                contacts = await search()
            except ShoalError as error:
                tried.append(f"{name}: {error.message}")
                continue
            tried.append(f"{name}: {len(contacts)} found")
            found |= dict.fromkeys(a for contact in contacts for a in contact.addresses)
        words = "; ".join(tried)
        log_event("orchestrators_looked_for", tried=words)
        if not found:
            raise Unavailable(
                f"No orchestrator was found ({words}); name one's address, or wait.",
                code="none_found",
            )
        return tuple(found)[:_MAX_FOUND]


def finder_of(config: WorkerConfig, network: Network, time: TimeSource) -> Finder:
    """The finder that the configuration asks for: the local network, then bootstrap nodes.

    Raises:
        InvalidRequest: a bootstrap address does not end in ``/p2p/<peer id>``.
    """
    searches: dict[str, Search] = {}
    if config.mdns:

        async def ask_lan() -> Sequence[Contact]:
            # Only now: a worker that does not ask needs no multicast sockets.
            from shoal.network.lan import nearby

            return await nearby(_LAN_TIMEOUT_S)

        searches["local network"] = ask_lan
    if config.bootstrap:
        from shoal.network.discovery import Discovery

        table = Discovery(network, time=time, bootstrap=config.bootstrap)

        async def ask_table() -> Sequence[Contact]:
            return await table.find_providers(ORCHESTRATORS_KEY, timeout_s=_TABLE_TIMEOUT_S)

        searches["bootstrap nodes"] = ask_table
    return Finder(searches)


def require_trusted(
    greeting: HelloReply, peer: PeerId, trust: str | None, *, address: str | None
) -> None:
    """Passes the orchestrator the provider named, or whose account it trusts and that proves it.

    Args:
        greeting: What the node at the other end says.
        peer: That node, as the handshake proved it.
        trust: The account the provider trusts; None where it named an address instead.
        address: Where a stranger was found; None where the provider named the address itself.

    Raises:
        InvalidRequest: nobody vouches for a stranger that was found.
        Unauthorised: the node at a named address does not prove that it is the trusted account.
        Unavailable: the same of one that was found, where the right one may be found yet.
    """
    if trust is None:
        if address is None:
            return
        raise InvalidRequest(
            f"An orchestrator of account {greeting.orchestrator} on chain "
            f"{greeting.domain.chain_id} was found at {address}. Finding it proves nothing: if "
            f"you know that account, join it with --trust {greeting.orchestrator}.",
            code="untrusted_orchestrator",
        )
    fault = _fault_of(greeting, peer, trust)
    if fault is None:
        return
    sentence = f"The orchestrator that answers is not the trusted {trust}: {fault}."
    if address is None:
        raise Unauthorised(sentence + " Name another address.", code="untrusted_orchestrator")
    raise Unavailable(sentence, code="untrusted_orchestrator")


def _fault_of(greeting: HelloReply, peer: PeerId, trust: str) -> str | None:
    if greeting.orchestrator.lower() != trust.lower():
        return f"it says it is {greeting.orchestrator}"
    bound = greeting.bound_node
    if bound is None:
        return "it does not show that its node belongs to the account"
    binding = bound.binding.record
    node_key = bytes.fromhex(binding.node_key[2:])
    if binding.account.lower() != trust.lower() or binding.node != peer:
        return "it shows the binding of another node or account"
    try:
        # The domain is part of what is signed, so the account vouches for chain and escrow too.
        bound.binding.require_signer(greeting.domain, trust)
        if peer_id_of(node_key) != peer:
            return "the binding is of another node key"
    except (Unauthorised, InvalidRequest, PeerFault):
        return "the account did not sign the binding of its node"
    signature = bytes.fromhex(bound.node_signature[2:])
    if not verify(node_key, binding.node_message(), signature):
        return "the node did not countersign its binding"
    return None
