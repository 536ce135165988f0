"""A provider's own Ray cluster as a pool of actors that share one task's parts.

The only module that imports Ray.  A cluster is used only under the conditions of
`shoal.rl.ray_guard`; one started here listens on the loopback interface alone.

One thread, that of the caller, drives an actor pool: each part goes to an idle actor, and
the part of an actor that died goes to another one.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import secrets
import shutil
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from shoal.protocol.canonical import sha256_hex
from shoal.protocol.errors import InvalidRequest, InvariantBroken, Unavailable
from shoal.protocol.version import SOFTWARE_VERSION
from shoal.rl.ray_guard import (
    is_loopback,
    make_temp_dir,
    require_guarded,
    require_own_cluster,
    require_unexposed,
)
from shoal.rl.site import Actor, OnProgress, Runner, SiteShape, count_actors

# Ray reads these when it is imported, and the processes it starts inherit them.
os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
# Ray starts its workers at niceness 15 unless told otherwise: many times slower beside load.
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  # Ray spells it so
# Named after the systems on which it is the default: a node started here takes the loopback
# address and listens there alone.
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
# A part that was called off ends with an error nobody waits for.
os.environ["RAY_IGNORE_UNHANDLED_ERRORS"] = "1"

import ray
from ray.exceptions import RayError, RayTaskError

_TICK_S: Final = 1.0
_CLOSE_TIMEOUT_S: Final = 3.0
_MAX_LOSSES: Final = 3
"""Actors that may die over one part: it may be the part that kills them."""
_PREPARING: Final = -1
"""In place of a part's: an actor that died before it was given one."""
_MAX_FAILED_STARTS: Final = 3
_MAX_KEPT_BLOBS: Final = 4


@dataclass(eq=False)
class Member:
    """One actor of the site, seen from the driver.

    Attributes:
        handle: Ray's handle.
        node_id: Ray's id of the node it runs on; empty until it has started.
        pid: Its process there.
    """

    handle: Any
    node_id: str = ""
    pid: int = 0


@dataclass(eq=False)
class _Run:
    """The parts of one task, and where each is."""

    calls: Sequence[Sequence[Any]]
    outputs: dict[int, Any] = field(default_factory=dict)
    waiting: deque[int] = field(default_factory=deque)
    busy: dict[Any, tuple[Member, int, int]] = field(default_factory=dict)
    watches: dict[Any, tuple[Member, int, int]] = field(default_factory=dict)
    losses: Counter[int] = field(default_factory=Counter)


class RaySite:
    """The actors of a connected cluster; made by `open_site`.

    Args:
        shape: What each actor is given.
        num_actors: How many there are to be.
        gpus_per_actor: GPUs of each.
        temp_dir: Ray's files, removed at the end; None where the cluster is not ours.
    """

    def __init__(
        self, shape: SiteShape, num_actors: int, gpus_per_actor: float, temp_dir: Path | None
    ) -> None:
        self.num_actors = num_actors
        self.start_timeout_s = shape.start_timeout_s
        self.node_id = _locate()
        self._temp_dir = temp_dir
        self._numbers = itertools.count()
        self._members: list[Member] = []
        self._starting: dict[Any, Member] = {}
        self._failed_starts = 0
        self._empty_since_s = time.monotonic()
        self._last_loss = "none has started"
        self._blobs: OrderedDict[str, Any] = OrderedDict()
        self._factory: Callable[[], Runner] | None = None
        self._on_loss: Callable[[str], None] = lambda _: None
        self._closing = threading.Event()
        self._driving = threading.Lock()
        # Spread, so that a node's death costs as few actors as can be.
        make: Any = ray.remote  # its types lack concurrency groups
        self._class = make(
            num_cpus=shape.cpus_per_actor,
            num_gpus=gpus_per_actor,
            scheduling_strategy="SPREAD",
            concurrency_groups={"control": 2},
        )(Actor)

    @property
    def members(self) -> tuple[Member, ...]:
        """The actors that have started, and are not known to have died."""
        return tuple(self._members)

    def start(
        self, factory: Callable[[], Runner], on_loss: Callable[[str], None] = lambda _: None
    ) -> None:
        """The actors are starting; each makes its runner with ``factory``.

        ``on_loss`` is told why, whenever one dies or fails to start.
        """
        self._factory = factory
        self._on_loss = on_loss
        self._empty_since_s = time.monotonic()
        with self._driving:
            self._recruit()

    def wait_ready(self, num_actors: int = 1) -> None:
        """At least ``num_actors`` have started.

        Raises:
            Unavailable: none did in time, or several failed to.
            InvalidRequest: one runs another version of Shoal.
        """
        with self._driving:
            self._await_members(num_actors)

    def call(self, member: Member, method: str, *arguments: Any) -> Any:
        """What the runner's ``method`` returns, in the actor's compute thread.

        Raises:
            RayError: the actor is gone.
            Exception: whatever the runner raised.
        """
        ref = member.handle.call.remote(method, *arguments)
        self._wait([ref])
        with _unwrapped():
            return ray.get(ref)

    def put(self, data: bytes) -> Any:
        """A reference under which every actor finds ``data``; equal bytes are stored once."""
        key = sha256_hex(data)
        if key not in self._blobs:
            self._blobs[key] = ray.put(data)
        self._blobs.move_to_end(key)
        while len(self._blobs) > _MAX_KEPT_BLOBS:
            self._blobs.popitem(last=False)
        return self._blobs[key]

    def run(
        self,
        calls: Sequence[Sequence[Any]],
        prepare: Callable[[Member], Sequence[Any]],
        on_progress: OnProgress,
    ) -> list[Any]:
        """The output of each call of the runner's ``run``, in the order of ``calls``.

        A reference among a call's arguments arrives as what it refers to.

        Args:
            calls: The arguments of each part.
            prepare: Called with each actor before it is given a part; returns the arguments
                that come before those of the part.
            on_progress: Called after each step of any part; what it raises ends the run.

        Raises:
            Unavailable: no actor is left, or parts were lost too often.
            Exception: whatever a runner raised.
        """
        work = _Run(calls=calls, waiting=deque(range(len(calls))))
        with self._driving:
            self._await_members(1)
            try:
                while len(work.outputs) < len(calls):
                    self._hand_out(work, prepare)
                    self._advance(work, on_progress)
            finally:
                self._call_off(work)
        return [work.outputs[place] for place in range(len(calls))]

    def close(self) -> None:
        """The actors are gone, and a cluster started here with them; a run ends early."""
        self._closing.set()
        # Ray must not be taken down under a thread that waits on it.
        if self._driving.acquire(timeout=_CLOSE_TIMEOUT_S):
            self._driving.release()
        _leave(self._temp_dir)

    def _recruit(self) -> None:
        """As many actors as there should be have started or are about to."""
        # Ray, once shut down, would start anew by itself.
        self._require_open()
        while len(self._members) + len(self._starting) < self.num_actors:
            handle = self._class.remote(self._factory)
            self._starting[handle.ready.remote(_locate)] = Member(handle)

    def _require_open(self) -> None:
        if self._closing.is_set():
            raise Unavailable("The Ray site is being closed.", code="site_closed")

    def _await_members(self, num_actors: int) -> None:
        self._recruit()
        asked_s = time.monotonic()
        while len(self._members) < num_actors:
            self._await_start(asked_s if self._members else self._empty_since_s)

    def _wait(self, refs: Sequence[Any], timeout_s: float = math.inf) -> Any:
        """The first of ``refs`` to have something; None when the time is up.

        Raises:
            Unavailable: the site is being closed.
        """
        deadline_s = time.monotonic() + timeout_s
        while True:
            self._require_open()
            left_s = max(0.0, deadline_s - time.monotonic())
            done, _ = ray.wait(
                list(refs), num_returns=1, timeout=min(_TICK_S, left_s), fetch_local=False
            )
            if done or left_s == 0.0:
                return done[0] if done else None

    def _hand_out(self, work: _Run, prepare: Callable[[Member], Sequence[Any]]) -> None:
        """Every idle actor has a part, as long as there are any."""
        occupied = {id(member) for member, _, _ in work.busy.values()}
        for member in self.members:
            if not work.waiting:
                return
            if id(member) in occupied:
                continue
            try:
                given = prepare(member)
            except RayError as error:
                self._lose(work, _PREPARING, member, error)
                continue
            place, number = work.waiting.popleft(), next(self._numbers)
            ref = member.handle.run.remote(number, *given, *work.calls[place])
            work.busy[ref] = (member, place, number)
            self._watch(work, member, number, 0)

    def _advance(self, work: _Run, on_progress: OnProgress) -> None:
        """Something has happened: a part ended or made a step, an actor started or died."""
        if not work.busy:
            self._await_start(self._empty_since_s)
            return
        ref = self._wait([*work.busy, *work.watches, *self._starting])
        if ref in self._starting:
            self._enlist(ref)
        elif ref in work.watches:
            self._note_step(work, ref, on_progress)
        else:
            self._collect(work, ref)
            on_progress()

    def _note_step(self, work: _Run, ref: Any, on_progress: OnProgress) -> None:
        member, number, seen = work.watches.pop(ref)
        try:
            steps = int(ray.get(ref))
        except RayError:
            return  # its part's own reference tells of the actor's death
        if any(number == running for _, _, running in work.busy.values()):
            self._watch(work, member, number, steps)
        if steps != seen:
            on_progress()

    def _watch(self, work: _Run, member: Member, number: int, seen: int) -> None:
        method = member.handle.watch.options(concurrency_group="control")
        work.watches[method.remote(number, seen)] = (member, number, seen)

    def _collect(self, work: _Run, ref: Any) -> None:
        member, place, _ = work.busy.pop(ref)
        try:
            with _unwrapped():
                work.outputs[place] = ray.get(ref)
        except RayError as error:
            work.waiting.appendleft(place)
            self._lose(work, place, member, error)

    def _note_loss(self, error: BaseException) -> None:
        self._last_loss = _gist(error)
        self._on_loss(self._last_loss)

    def _lose(self, work: _Run, place: int, member: Member, error: RayError) -> None:
        """The actor counts no more; its process ends if it still runs.

        Raises:
            Unavailable: too many have died over this place.
        """
        self._note_loss(error)
        self._members.remove(member)
        if not self._members:
            self._empty_since_s = time.monotonic()
        ray.kill(member.handle)
        self._recruit()
        work.losses[place] += 1
        if work.losses[place] >= _MAX_LOSSES:
            raise self._lost(f"{_MAX_LOSSES} died over the same part") from None

    def _await_start(self, since_s: float) -> None:
        """One more actor has started, or failed to; the time it may take began at ``since_s``.

        So one task waits for a site that lost all its actors for good, and those after it end
        at once.
        """
        self._recruit()
        deadline_s = since_s + self.start_timeout_s
        ref = self._wait(list(self._starting), max(0.0, deadline_s - time.monotonic()))
        if ref is None:
            raise self._lost(f"none started within {self.start_timeout_s:.0f} s")
        self._enlist(ref)

    def _enlist(self, ref: Any) -> None:
        member = self._starting.pop(ref)
        try:
            with _unwrapped():
                member.node_id, member.pid, version = ray.get(ref)
        except Exception as error:  # whatever it is, another actor may have more luck
            self._note_loss(error)
            self._failed_starts += 1
            if self._members:
                return  # whoever waits next tries again
            if self._failed_starts >= _MAX_FAILED_STARTS:
                self._failed_starts = 0
                raise self._lost(f"{_MAX_FAILED_STARTS} in a row failed to start") from None
            self._recruit()
            return
        if version != SOFTWARE_VERSION:
            raise InvalidRequest(
                f"Ray node {member.node_id[:12]} runs Shoal {version} and this worker "
                f"{SOFTWARE_VERSION}; install the same version on every node.",
                code="ray_version",
            )
        self._failed_starts = 0
        self._members.append(member)

    def _call_off(self, work: _Run) -> None:
        """No part of the run is being computed for longer than until its next step."""
        for member, _, number in work.busy.values():
            member.handle.stop.options(concurrency_group="control").remote(number)

    def _lost(self, why: str) -> Unavailable:
        return Unavailable(
            f"The Ray site has no actor to compute with: {why} (last: {self._last_loss}); "
            "look at the cluster's nodes and memory.",
            retry_after_s=30,
            code="site_lost",
        )


def open_site(address: str | None, shape: SiteShape, data_dir: Path) -> RaySite:
    """A connected site, whose actors are still to be started.

    Args:
        address: ``HOST:PORT`` of a running cluster one of whose nodes is this machine; None
            starts a cluster of this machine alone.
        shape: What each actor is given.
        data_dir: Where a local cluster keeps its files, if the path is short enough.

    Raises:
        InvalidRequest: the address is none, the cluster is exposed or has no room.
        Unauthorised: there is no token, or the cluster's is another.
        Unavailable: nothing answers at the address, or this machine is no node of it.
    """
    logging.getLogger("ray").setLevel(logging.ERROR)
    temp_dir, dashboard = None, ""
    if address is None:
        temp_dir = make_temp_dir(data_dir)
        address = _start_local(shape, temp_dir)
    else:
        require_own_cluster(address)
        dashboard = _join(address)
    try:
        if temp_dir is not None:
            require_guarded(address)
        else:
            hosts = [str(node["NodeManagerAddress"]) for node in _nodes()]
            require_unexposed(address, dashboard, hosts)
        gpus = _gpus_per_actor(shape)
        return RaySite(shape, _num_actors(shape, gpus), gpus, temp_dir)
    except BaseException:
        _leave(temp_dir)
        raise


def _start_local(shape: SiteShape, temp_dir: Path) -> str:
    """A cluster of this machine alone runs; returns its address."""
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    os.environ.pop("RAY_AUTH_TOKEN_PATH", None)
    num_cpus = None
    if shape.num_actors is not None:
        num_cpus = math.ceil(shape.num_actors * shape.cpus_per_actor)
    try:
        context: Any = ray.init(
            address="local",
            num_cpus=num_cpus,
            object_store_memory=shape.object_store_bytes,
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
            _temp_dir=str(temp_dir),
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise Unavailable(
            f"Ray did not start on this machine: {_gist(error)}; look at {temp_dir}.",
            code="ray_unavailable",
        ) from None
    host = str(context.address_info["node_ip_address"])
    if not is_loopback(host):
        _leave(temp_dir)
        raise InvariantBroken(
            f"Ray was to listen on the loopback interface and took {host}; it was stopped.",
            code="ray_exposed",
        )
    return str(context.address_info["gcs_address"])


def _join(address: str) -> str:
    """This process is a driver of the cluster; returns its dashboard's address or nothing."""
    try:
        context: Any = ray.init(address=address, log_to_driver=False, configure_logging=False)
    except (RayError, ConnectionError, RuntimeError) as error:
        raise Unavailable(
            f"The worker cannot join the Ray cluster at {address}: {_gist(error)}; start "
            f"Ray on this machine with `ray start --address={address}`.",
            code="ray_unavailable",
        ) from None
    return str(context.dashboard_url or "")


def _leave(temp_dir: Path | None) -> None:
    """This process is no driver any more, and a cluster of its own leaves nothing behind."""
    ray.shutdown()
    if temp_dir is not None:
        shutil.rmtree(temp_dir, ignore_errors=True)


def _locate() -> str:
    """Ray's id of the node this process runs on."""
    return str(ray.get_runtime_context().get_node_id())


def _nodes() -> list[dict[str, Any]]:
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return [node for node in nodes if node["Alive"]]


def _gpus_per_actor(shape: SiteShape) -> float:
    if shape.gpus_per_actor is not None:
        return shape.gpus_per_actor
    return 1.0 if any(node["Resources"].get("GPU") for node in _nodes()) else 0.0


def _num_actors(shape: SiteShape, gpus_per_actor: float) -> int:
    resources = [node["Resources"] for node in _nodes()]
    room = count_actors(resources, shape.cpus_per_actor, gpus_per_actor)
    wanted = shape.num_actors or max(room, 1)
    if wanted > room:
        raise InvalidRequest(
            f"The Ray cluster has room for {room} actors of {shape.cpus_per_actor:g} CPUs and "
            f"{gpus_per_actor:g} GPUs, and {wanted} are wanted; lower ray.actors, "
            "ray.cpus_per_actor or ray.gpus_per_actor.",
            code="ray_room",
        )
    return wanted


@contextmanager
def _unwrapped() -> Iterator[None]:
    """An exception raised inside an actor is raised here as itself."""
    try:
        yield
    except RayTaskError as error:
        if isinstance(error.cause, RayError):
            # What was raised there does not travel; the actor itself lives.
            raise RuntimeError(_gist(error.cause)) from None
        raise error.cause from None


def _gist(error: BaseException) -> str:
    """The line of Ray's long messages that says what happened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    # A constructor's failure comes as a traceback, which ends with it.
    line = lines[-1] if "creation task" in lines[0] else lines[0]
    return line[:200].rstrip(".")
