"""What both networks do with an arriving request: caps, a deadline, and errors made safe."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from shoal.network.bans import Fault
from shoal.network.framing import handler_failed, overloaded, too_large, too_often
from shoal.network.meters import Meters
from shoal.network.pacing import Pacer
from shoal.network.port import (
    MAX_TOPIC_MESSAGE_BYTES,
    Handler,
    Limits,
    LostHandler,
    TopicCheck,
    TopicHandler,
    TopicVerdict,
)
from shoal.protocol.errors import Clock, Expired, InvalidRequest, PeerFault, ShoalError
from shoal.protocol.ids import PeerId

_LOG: Final = logging.getLogger(__name__)
_MAX_TOPIC_TASKS: Final = 256


@dataclass(frozen=True, kw_only=True)
class Service:
    """A protocol this node answers, the largest request it reads for it, and for whom."""

    protocol: str
    handler: Handler
    max_request_bytes: int
    for_guests: bool = False


class Dispatcher:
    """Calls handlers in the asyncio loop; nothing a handler does ends the node.

    Args:
        limits: Requests at once and per peer, message size and handler deadline.
        meters: Where requests and their outcomes are counted.
        penalise: Holds a fault against a peer.
    """

    def __init__(
        self, limits: Limits, meters: Meters, penalise: Callable[[PeerId, Fault], None]
    ) -> None:
        self.meters = meters
        self._limits = limits
        self._penalise = penalise
        rate = limits.requests_per_s_per_peer
        self._pace = Pacer(rate, 2 * rate, time.monotonic)
        self._num_in_flight = 0
        self._services: dict[str, Service] = {}
        self._topics: dict[str, list[TopicHandler]] = {}
        self._checks: dict[str, TopicCheck] = {}
        self._lost: list[LostHandler] = []
        self._tasks: set[asyncio.Task[None]] = set()

    def serve(
        self, protocol: str, handler: Handler, max_request_bytes: int, *, for_guests: bool = False
    ) -> Service:
        """The protocol's service, once its name and cap are known to be usable."""
        if not protocol.startswith("/") or len(protocol) > 128:
            raise InvalidRequest(
                f"{protocol[:64]!r} is not a protocol name; write it like /shoal/bid/1."
            )
        if not 0 <= max_request_bytes <= self._limits.max_message_bytes:
            raise InvalidRequest(
                f"The request cap of {protocol} is {max_request_bytes} bytes; it must lie "
                f"between 0 and the node's {self._limits.max_message_bytes}."
            )
        service = Service(
            protocol=protocol,
            handler=handler,
            max_request_bytes=max_request_bytes,
            for_guests=for_guests,
        )
        self._services[protocol] = service
        return service

    def services(self) -> tuple[Service, ...]:
        """Everything served so far."""
        return tuple(self._services.values())

    def service(self, protocol: str) -> Service | None:
        """What answers `protocol`, if anything does."""
        return self._services.get(protocol)

    def subscribe(self, topic: str, handler: TopicHandler, check: TopicCheck | None = None) -> bool:
        """True when this is the topic's first handler."""
        if check is not None:
            self._checks[topic] = check
        handlers = self._topics.setdefault(topic, [])
        handlers.append(handler)
        return len(handlers) == 1

    def topics(self) -> tuple[str, ...]:
        """Every topic with a handler."""
        return tuple(self._topics)

    def admits(self, topic: str, bearer: PeerId, payload: bytes) -> bool:
        """Whether a message may be handled and passed on; may be asked in any thread.

        One that nobody honest would have passed on counts against `bearer`, who did.
        """
        verdict = self._verdict(topic, payload)
        if verdict is TopicVerdict.ACCEPT:
            return True
        self.meters.count("gossip_dropped", cause=verdict.value)
        if verdict is TopicVerdict.REJECT:
            self._penalise(bearer, Fault.BAD_GOSSIP)
        return False

    def _verdict(self, topic: str, payload: bytes) -> TopicVerdict:
        check = self._checks.get(topic)
        if len(payload) > MAX_TOPIC_MESSAGE_BYTES:
            return TopicVerdict.REJECT
        try:
            return TopicVerdict.ACCEPT if check is None else check(payload)
        except Exception:
            # Ours is the fault then, not the forwarder's.
            _LOG.exception("the check of topic %s failed", topic)
            return TopicVerdict.IGNORE

    def on_peer_lost(self, handler: LostHandler) -> None:
        """`handler` is called for each peer lost from now on."""
        self._lost.append(handler)

    async def answer(self, service: Service, peer: PeerId, payload: bytes) -> bytes:
        """The handler's reply.

        Raises:
            ShoalError: What the handler raised on purpose, or a stand-in that shows nothing
                of an accident inside it.
        """
        try:
            reply = await self._answer(service, peer, payload)
        except ShoalError as error:
            self.meters.count(
                "requests_served", protocol=service.protocol, outcome=type(error).default_code
            )
            if isinstance(error, PeerFault):
                self._penalise(peer, Fault.BAD_RECORD)
            raise
        self.meters.count("requests_served", protocol=service.protocol, outcome="ok")
        return reply

    async def _answer(self, service: Service, peer: PeerId, payload: bytes) -> bytes:
        if not self._pace.take(peer):
            raise too_often(self._limits.requests_per_s_per_peer)
        if self._num_in_flight >= self._limits.max_requests_in_flight:
            raise overloaded(self._num_in_flight)
        self._num_in_flight += 1
        try:
            async with asyncio.timeout(self._limits.handler_timeout_s) as deadline:
                reply = await service.handler(peer, payload)
        except TimeoutError:
            if deadline.expired():
                raise self._too_slow(service) from None
            _LOG.exception("the %s handler failed on a request from %s", service.protocol, peer)
            raise handler_failed(service.protocol) from None
        except ShoalError:
            raise
        except Exception:
            _LOG.exception("the %s handler failed on a request from %s", service.protocol, peer)
            raise handler_failed(service.protocol) from None
        finally:
            self._num_in_flight -= 1
        if len(reply) > self._limits.max_message_bytes:
            _LOG.error("the %s handler's reply has %d bytes", service.protocol, len(reply))
            raise too_large(len(reply), self._limits.max_message_bytes, "in a reply")
        return reply

    def deliver(self, topic: str, peer: PeerId, payload: bytes) -> None:
        """Every handler of `topic` is started on the message; over the cap it is dropped."""
        self.meters.count("gossip_in", topic=topic)
        for handler in self._topics.get(topic, ()):
            if len(self._tasks) >= _MAX_TOPIC_TASKS:
                _LOG.warning("dropped a message on %s: handlers are behind", topic)
                return
            task = asyncio.ensure_future(self._handle_topic(handler, topic, peer, payload))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def peer_lost(self, peer: PeerId, cause: str) -> None:
        """Every lost-handler heard of it; one that raises does not stop the others."""
        for handler in self._lost:
            _guard(lambda handler=handler: handler(peer, cause))  # type: ignore[misc]

    async def stop(self) -> None:
        """No topic handler is running any more."""
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _handle_topic(
        self, handler: TopicHandler, topic: str, peer: PeerId, payload: bytes
    ) -> None:
        try:
            async with asyncio.timeout(self._limits.handler_timeout_s):
                await handler(peer, payload)
        except Exception:
            _LOG.exception("a handler of topic %s failed on a message from %s", topic, peer)

    def _too_slow(self, service: Service) -> Expired:
        return Expired(
            f"The peer's {service.protocol} handler did not finish within "
            f"{self._limits.handler_timeout_s:g} s.",
            clock=Clock.DEADLINE,
        )


def _guard(call: Callable[[], None]) -> None:
    try:
        call()
    except Exception:
        _LOG.exception("a peer-lost handler failed")
