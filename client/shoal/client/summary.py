"""What a demo run came to: the figures of ``summary.json`` and their table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Self

from pydantic import Field, model_validator

from shoal.client.views import WorkerView
from shoal.protocol.ids import Address, Hex32, Sha256
from shoal.protocol.market import TaskKind
from shoal.protocol.record import Record

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text

    from shoal.contracts.records import EscrowState, Payment

_PRICED = (TaskKind.ROLLOUT, TaskKind.GRADIENT)


class WorkerSummary(Record):
    """One worker's part; ``paid_micros`` is what the chain paid its account.

    ``tasks`` counts leases given, ``accepted`` those accepted, ``price_micros`` is per unit.
    """

    account: Address
    node: str
    name: str
    killed: bool
    tasks: int
    accepted: int
    accepted_by_kind: dict[str, int]
    price_micros: dict[str, int]
    paid_micros: int


class EscrowSummary(Record):
    """The job's money in micros, as the chain has it: all of it is accounted for."""

    funded: int
    paid: int
    refunded: int

    @model_validator(mode="after")
    def _nothing_is_lost(self) -> Self:
        if self.funded != self.paid + self.refunded:
            raise ValueError(
                f"{self.funded} micros were funded but {self.paid} paid and {self.refunded} "
                "refunded"
            )
        return self


class ChainSummary(Record):
    """The chain's work from the first deployment to the refund."""

    chain_id: int
    transactions: int
    gas_used: int


class ModelSummary(Record):
    """The downloaded adapter's folder and the digest of its weights."""

    path: str
    sha256: Sha256


class ProvenanceSummary(Record):
    """How many statements the bundle holds, and whether the offline check passed."""

    statements: int
    verified: bool


class DemoSummary(Record):
    """``summary.json``.  Writer: `shoal demo`.  Reader: people and tests.

    Rewards are avg@k (0 to 1) on held-out prompts, each with its 95 % confidence interval;
    ``wall_s`` runs from the submission to the job's completion.
    """

    job_id: Hex32
    reward_before: float
    reward_before_interval: tuple[float, float]
    reward_after: float
    reward_after_interval: tuple[float, float]
    steps: int
    wall_s: float = Field(ge=0)
    tasks: dict[TaskKind, int]
    workers: tuple[WorkerSummary, ...]
    escrow: EscrowSummary
    chain: ChainSummary
    model: ModelSummary
    provenance: ProvenanceSummary


def summarise_workers(
    workers: Sequence[WorkerView],
    payments: Sequence[Payment],
    prices: Mapping[str, Mapping[str, int]],
    killed_account: str | None,
) -> tuple[WorkerSummary, ...]:
    """Each worker's part.

    Args:
        workers: As the orchestrator reports them.
        payments: The job's, as found in the chain's log.
        prices: By node, what each asked for a unit of each kind.
        killed_account: Whose worker was killed.
    """
    paid: dict[str, int] = {}
    for payment in payments:
        account = payment.account.lower()
        paid[account] = paid.get(account, 0) + payment.amount_micros
    return tuple(
        WorkerSummary(
            account=worker.account,
            node=worker.node,
            name=worker.name,
            killed=killed_account is not None and worker.account.lower() == killed_account.lower(),
            tasks=worker.leased(),
            accepted=worker.accepted(),
            accepted_by_kind={kind: counts.accepted for kind, counts in worker.tasks.items()},
            price_micros=dict(prices.get(worker.node, worker.price_micros)),
            paid_micros=paid.get(worker.account.lower(), 0),
        )
        for worker in sorted(workers, key=lambda item: item.name)
    )


def summarise_escrow(state: EscrowState, payments: Sequence[Payment]) -> EscrowSummary:
    """The escrow's three sums; ``paid`` is counted from the payments themselves."""
    return EscrowSummary(
        funded=state.funded_micros,
        paid=sum(payment.amount_micros for payment in payments),
        refunded=state.refunded_micros,
    )


def summary_picture(summary: DemoSummary) -> list[RenderableType]:
    """The summary as people read it."""
    from rich.text import Text

    passed = summary.provenance.verified
    verdict = Text("PASS", style="bold green") if passed else Text("FAIL", style="bold red")
    return [
        "",
        _result_table(summary, verdict),
        "",
        _worker_table(summary),
        _legend(summary),
    ]


def _result_table(summary: DemoSummary, verdict: Text) -> Table:
    from rich.table import Table
    from rich.text import Text

    from shoal.client.picture import dollars, duration, plus_minus

    before, after = _half(summary.reward_before_interval), _half(summary.reward_after_interval)
    gain = 100 * (summary.reward_after - summary.reward_before)
    grid = Table.grid(padding=(0, 3))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column()
    grid.add_row(
        "held-out accuracy",
        Text.assemble(
            f"{100 * summary.reward_before:.1f}% {plus_minus(before)} → ",
            (f"{100 * summary.reward_after:.1f}%", "bold green"),
            f" {plus_minus(after)}  "
            f"({gain:+.1f} points, {summary.steps} updates, {duration(summary.wall_s)})",
        ),
    )
    grid.add_row("tasks", "  ".join(f"{n} {kind.value}" for kind, n in summary.tasks.items()))
    escrow = summary.escrow
    grid.add_row(
        "escrow",
        f"{dollars(escrow.funded)} = {dollars(escrow.paid)} paid + "
        f"{dollars(escrow.refunded)} refunded",
    )
    chain = summary.chain
    grid.add_row(
        "chain", f"{chain.transactions} transactions, {chain.gas_used:,} gas (id {chain.chain_id})"
    )
    grid.add_row("model", f"{summary.model.path}  sha256 {summary.model.sha256[:16]}…")
    statements = f"  {summary.provenance.statements} signed statements, checked offline"
    grid.add_row("provenance", Text.assemble(verdict, statements))
    return grid


def _half(interval: tuple[float, float]) -> float:
    return (interval[1] - interval[0]) / 2


def _worker_table(summary: DemoSummary) -> Table:
    from rich.table import Table
    from rich.text import Text

    from shoal.client.picture import short
    from shoal.protocol.money import MICROS_PER_DOLLAR

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", show_edge=False)
    table.add_column("provider", no_wrap=True)
    table.add_column("account")
    for title in ("rollout", "gradient", "eval", "lost", "$ per 1000", "paid"):
        table.add_column(title, justify="right")
    for worker in summary.workers:
        table.add_row(
            Text(f"✗ {worker.name}", style="red") if worker.killed else f"  {worker.name}",
            Text(short(worker.account), style="dim"),
            *(str(worker.accepted_by_kind.get(kind, 0)) for kind in TaskKind),
            str(worker.tasks - worker.accepted),
            " / ".join(_per_thousand(worker.price_micros.get(kind)) for kind in _PRICED),
            f"${worker.paid_micros / MICROS_PER_DOLLAR:.4f}",
        )
    return table


def _per_thousand(price_micros: int | None) -> str:
    """The price of a thousand units in dollars, which a micro is too fine to show."""
    return "—" if price_micros is None else f"{price_micros / 1000:.2f}"


def _legend(summary: DemoSummary) -> Text:
    from rich.text import Text

    killed = "  ✗ killed half-way on purpose." if any(w.killed for w in summary.workers) else ""
    return Text(
        "Tasks are those accepted; prices are for a thousand groups to roll out / to "
        f"differentiate; paid is read from the chain.{killed}",
        style="dim",
    )
