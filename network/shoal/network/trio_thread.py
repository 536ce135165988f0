"""A thread of its own for trio, which libp2p runs on, with one door from asyncio and one back."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import threading
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final, TypeVar, cast

import trio

from shoal.protocol.errors import Unavailable

T = TypeVar("T")
_LOG: Final = logging.getLogger(__name__)
_GRACE_S: Final = 1.5
_STOP_TIMEOUT_S: Final = 5.0

Service = Callable[["TrioThread", Callable[[], None]], Awaitable[None]]


class TrioThread:
    """Runs one trio service in a daemon thread and carries calls across.

    Args:
        name: The thread's name, seen in stack dumps.
        service: Called in the thread as ``service(self, started)``; it calls `started` once
            it may be used, and returns soon after `stopping` is set.
    """

    def __init__(self, name: str, service: Service) -> None:
        self._service = service
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._started: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._scope: trio.CancelScope | None = None
        self._nursery: trio.Nursery | None = None
        self._token: trio.lowlevel.TrioToken | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        # Calls that are not answered yet; touched in the asyncio loop only.
        self._pending: set[asyncio.Future[Any]] = set()
        self.stopping = trio.Event()

    async def start(self) -> None:
        """The service has called `started`; whatever it raised before that is raised here."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        try:
            await asyncio.wrap_future(self._started)
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """The service has ended, by itself or else cancelled, and so has the thread."""
        self.post(self.stopping.set)
        await asyncio.to_thread(self._thread.join, _GRACE_S)
        self.post(self._cancel)
        await asyncio.to_thread(self._thread.join, _STOP_TIMEOUT_S)
        if self._thread.is_alive():
            _LOG.error("the network thread did not end within %s s", _STOP_TIMEOUT_S)

    async def call(self, function: Callable[[], Awaitable[T]]) -> T:
        """What `function` returns or raises when run in the trio thread.

        Cancelling the caller cancels the call.

        Raises:
            Unavailable: The thread has ended, or ends before the call does.
        """
        outcome: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._pending.add(outcome)
        outcome.add_done_callback(self._pending.discard)
        scope = trio.CancelScope()

        async def run() -> None:
            try:
                with scope:
                    result = await function()
                if scope.cancelled_caught:
                    self._settle(outcome, _stopped())
                else:
                    self._settle(outcome, result=result)
            except trio.Cancelled:
                self._settle(outcome, _stopped())
                raise
            except Exception as error:
                self._settle(outcome, error)

        def begin() -> None:
            try:
                if self._nursery is None:
                    raise RuntimeError("no nursery")
                self._nursery.start_soon(run)
            except RuntimeError:
                self._settle(outcome, _stopped())

        if not self.post(begin):
            outcome.cancel()
            raise _stopped()
        try:
            return await outcome
        except asyncio.CancelledError:
            self.post(scope.cancel)
            raise

    async def call_asyncio(self, coroutine: Coroutine[object, object, T]) -> T:
        """What `coroutine` returns or raises when run in the asyncio loop; called from trio.

        Cancelling the trio caller cancels the coroutine.
        """
        if self._loop is None or self._loop.is_closed():
            coroutine.close()
            raise _stopped()
        loop, done = self._loop, trio.Event()
        tasks: list[asyncio.Task[T]] = []

        def ended(task: asyncio.Task[T]) -> None:
            # Asked for here, since a caller that is cancelled no longer does.
            if not task.cancelled():
                task.exception()
            self.post(done.set)

        def begin() -> None:
            tasks.append(loop.create_task(coroutine))
            tasks[0].add_done_callback(ended)

        try:
            loop.call_soon_threadsafe(begin)
        except RuntimeError:
            coroutine.close()
            raise _stopped() from None
        try:
            await done.wait()
        except trio.Cancelled:
            # Posted after `begin`, so the task is there by then.
            self.post_asyncio(lambda: tasks[0].cancel())
            raise
        try:
            return tasks[0].result()
        except asyncio.CancelledError:
            raise _stopped() from None

    def post_asyncio(self, function: Callable[[], object]) -> None:
        """`function` will run in the asyncio loop, unless that loop is already closed."""
        if self._loop is not None:
            # The loop may be closed at any moment by its own thread.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(function)

    def post(self, function: Callable[[], object]) -> bool:
        """Runs `function` soon in the trio thread; False when the thread has ended."""
        if self._token is None:
            return False
        try:
            self._token.run_sync_soon(function)
        except trio.RunFinishedError:
            return False
        return True

    def _cancel(self) -> None:
        if self._scope is not None:
            self._scope.cancel()

    def _run(self) -> None:
        try:
            trio.run(self._main, strict_exception_groups=True)
        except BaseException as error:
            self._ended(error)
        else:
            self._ended(_stopped())

    def _ended(self, error: BaseException) -> None:
        # A call posted as the run ends is never begun, so its caller is answered here.
        self.post_asyncio(self._fail_pending)
        if not self._started.done():
            cause = _first_leaf(error)
            self._started.set_exception(cause)
        elif self.stopping.is_set():
            # Teardown of a busy swarm may end in "Nursery is closed to new arrivals" inside
            # an exception group; the thread is gone either way, and callers were told.
            _LOG.debug("the network thread ended with %r", error)
        else:
            _LOG.error("the network thread ended by itself", exc_info=error)

    def _settle(
        self, outcome: asyncio.Future[T], error: Exception | None = None, *, result: T | None = None
    ) -> None:
        """The asyncio caller gets its result or error; called in the trio thread."""

        def settle() -> None:
            if outcome.done():
                return
            if error is not None:
                outcome.set_exception(error)
            else:
                outcome.set_result(cast(T, result))

        self.post_asyncio(settle)

    def _fail_pending(self) -> None:
        for outcome in tuple(self._pending):
            if not outcome.done():
                outcome.set_exception(_stopped())

    async def _main(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        with trio.CancelScope() as self._scope:
            async with trio.open_nursery() as self._nursery:
                await self._service(self, self._mark_started)
                self._nursery.cancel_scope.cancel()

    def _mark_started(self) -> None:
        if not self._started.done():
            self._started.set_result(None)


def _stopped() -> Unavailable:
    return Unavailable("This node's network has stopped; start it again.", code="network_stopped")


def _first_leaf(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
