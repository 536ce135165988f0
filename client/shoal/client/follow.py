"""Watches a job until it ends: a live picture, plain lines, or JSON lines."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from rich.markup import escape

from shoal.client.api import ShoalClient
from shoal.client.output import Output
from shoal.client.picture import dollars, picture_of, plus_minus, time_left
from shoal.client.views import JobView
from shoal.protocol.errors import Unavailable

if TYPE_CHECKING:
    from rich.live import Live

POLL_S = 0.5
LOST_LIMIT_S = 60.0
"""How long an orchestrator may be silent (a restart) before watching gives up."""
_PLAIN_LINES = 20

OnView = Callable[[JobView], Awaitable[None]]


class PriceMemory:
    """The prices each node asked, which are gone from the market once the node or the job is."""

    def __init__(self) -> None:
        self.prices: dict[str, dict[str, int]] = {}

    def fill(self, view: JobView) -> JobView:
        """``view``, with the last price known where it has none."""
        workers = []
        for worker in view.workers:
            if worker.price_micros:
                self.prices[worker.node] = worker.price_micros
            known = self.prices.get(worker.node, {})
            workers.append(worker.model_copy(update={"price_micros": known}))
        return view.model_copy(update={"workers": tuple(workers)})


class JobWatch:
    """What has been seen of one job, and what is worth saying about it.

    Args:
        emit_json: Whether changes are JSON documents on standard output.
        output: Where to say it.
    """

    def __init__(self, output: Output, *, emit_json: bool) -> None:
        self.rewards: dict[int, float] = {}
        self._prices = PriceMemory()
        self._output = output
        self._emit_json = emit_json
        self._said: tuple[object, ...] | None = None
        self._wrong: dict[str, str] = {}
        self._live: Live | None = None

    def picture(self) -> AbstractContextManager[object]:
        """While entered, the job is drawn anew at every view; nothing on a plain stream."""
        if self._emit_json or not self._output.live:
            return nullcontext()
        from rich.live import Live

        self._live = Live(console=self._output.console, refresh_per_second=4)
        return self._live

    def see(self, view: JobView) -> None:
        """Shows ``view`` if it says something new."""
        if view.reward_recent is not None:
            self.rewards[view.policy_version] = view.reward_recent
        view = self._prices.fill(view)
        picture = picture_of(view, list(self.rewards.values()))
        if view.ended:
            self._output.keep(picture)
        if self._live is not None:
            self._live.update(picture)
            return
        stride = max(1, view.max_steps // _PLAIN_LINES)
        gone = tuple(worker.node for worker in view.workers if not worker.connected)
        wrong = {diagnosis.code: diagnosis.sentence for diagnosis in view.health}
        news = (view.state, view.policy_version // stride, len(view.evaluations), gone, *wrong)
        if news == self._said:
            return
        self._said = news
        if self._emit_json:
            self._output.emit({"type": "progress", "job": view.model_dump(mode="json")})
            return
        for line in health_lines(self._wrong, wrong):
            self._output.say(escape(line), kept=False)
        self._wrong = wrong
        self._output.say(plain_line(view), kept=False)

    def trouble(self, error: Unavailable) -> None:
        """Says that the orchestrator is out of reach; watching goes on."""
        if self._said != ("lost",):
            self._said = ("lost",)
            self._output.say(f"[yellow]{error.message} Still trying.[/yellow]", kept=False)


async def follow_job(
    client: ShoalClient,
    job_id: str,
    output: Output,
    *,
    on_view: OnView | None = None,
    emit_json: bool | None = None,
) -> JobView:
    """The job once its state is final, shown all along.

    Args:
        client: Connected to the job's orchestrator.
        job_id: Which job.
        output: Where it is shown.
        on_view: Awaited with each view, e.g. to act half-way.
        emit_json: Whether changes are JSON on standard output; as ``output`` when absent.

    Raises:
        Unavailable: the orchestrator has been silent for `LOST_LIMIT_S`.
    """
    watch = JobWatch(output, emit_json=output.json_mode if emit_json is None else emit_json)
    loop = asyncio.get_running_loop()
    last_seen_s = loop.time()
    with watch.picture():
        while True:
            try:
                view = await client.job(job_id)
            except Unavailable as error:
                if loop.time() - last_seen_s > LOST_LIMIT_S:
                    raise
                watch.trouble(error)
            else:
                last_seen_s = loop.time()
                watch.see(view)
                if on_view is not None:
                    await on_view(view)
                if view.ended:
                    return view
            await asyncio.sleep(POLL_S)


def health_lines(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What began to be wrong and what ended, by code; each is said once."""
    begun = [f"health: {sentence}" for code, sentence in now.items() if code not in before]
    return begun + [f"health: {code} is over" for code in before if code not in now]


def plain_line(view: JobView) -> str:
    """The job as one line of text."""
    parts = [f"{view.state.value:9} version {view.policy_version}/{view.max_steps}"]
    if view.reward_recent is not None:
        parts.append(f"reward {view.reward_recent:.3f}")
    if view.evaluations:
        last = view.evaluations[-1]
        parts.append(f"held-out {100 * last.accuracy:.1f}% {plus_minus(last.margin)}")
    parts.append(f"spent {dollars(view.spent_micros)} of {dollars(view.budget_micros)}")
    connected = sum(worker.connected for worker in view.workers)
    parts.append(f"{connected} workers")
    if not view.ended:
        parts.append(time_left(view))
    elif view.reason:
        parts.append(view.reason)
    return "  ".join(parts)
