"""The operator's benchmarks: what data-centre GPUs do, by which work is priced below them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from shoal.market.reserve import gpu_prices, reserve_for
from shoal.protocol.certificate import ReserveTerms
from shoal.protocol.job import JobSpec
from shoal.protocol.market import MAX_UNITS, TaskKind
from shoal.protocol.record import MAX_INT


class Benchmark(BaseModel):
    """How much of one kind of work one GPU of the price table does; a ``[[reference]]`` row.

    It holds for every task of ``kind`` with ``max_tokens`` to a completion, and only for groups
    of ``group_size`` and for jobs on ``model`` where these are given.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    gpu: str
    kind: TaskKind
    max_tokens: int = Field(ge=1, le=MAX_UNITS)
    units_per_1000_gpu_hours: int = Field(ge=1, le=MAX_INT)
    group_size: int | None = Field(default=None, ge=1, le=MAX_UNITS)
    model: str | None = Field(default=None, min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _keys_are_known(cls, row: Any) -> Any:
        if isinstance(row, dict):
            for key in row.keys() - cls.model_fields.keys():
                raise ValueError(f"unknown key {key!r}; {_nearest(str(key), cls.model_fields)}")
        return row

    @field_validator("gpu")
    @classmethod
    def _has_a_price(cls, gpu: str) -> str:
        known = {row.gpu for row in gpu_prices()}
        if gpu not in known:
            raise ValueError(f"{gpu!r} is not in the table of GPU prices; {_nearest(gpu, known)}")
        return gpu

    @model_validator(mode="after")
    def _costs_something(self) -> Benchmark:
        if not self.reserve(MAX_INT).reserve_micros:
            raise ValueError(
                f"at {self.units_per_1000_gpu_hours} units in 1,000 hours a unit would cost less "
                "than a millionth of a dollar, which nobody can bid; count the units again"
            )
        return self

    def reserve(self, max_micros: int) -> ReserveTerms:
        """What a unit may cost where this benchmark holds."""
        return reserve_for(
            max_micros, gpu=self.gpu, units_per_1000_gpu_hours=self.units_per_1000_gpu_hours
        )

    def fits(self, kind: TaskKind, *, max_tokens: int, group_size: int, model: str) -> bool:
        """Whether it says anything of such work."""
        return (
            (self.kind, self.max_tokens) == (kind, max_tokens)
            and self.group_size in (None, group_size)
            and self.model in (None, model)
        )


def lowest_reserve(benchmarks: Iterable[Benchmark], max_micros: int) -> ReserveTerms:
    """What a unit may cost by the GPU that does it cheapest, or by the requester's maximum."""
    terms = [benchmark.reserve(max_micros) for benchmark in benchmarks]
    return min(terms, key=_reference, default=reserve_for(max_micros))


def reserves_of(spec: JobSpec, benchmarks: Sequence[Benchmark]) -> dict[TaskKind, ReserveTerms]:
    """What a unit of each kind of a job's work may cost while none has failed."""
    max_micros = {
        TaskKind.ROLLOUT: spec.budget.max_rollout_micros,
        TaskKind.GRADIENT: spec.budget.max_gradient_micros,
        TaskKind.EVALUATE: spec.budget.max_evaluate_micros,
    }
    reserves = {}
    for kind in TaskKind:
        fitting = [
            benchmark
            for benchmark in benchmarks
            if benchmark.fits(
                kind,
                max_tokens=spec.sampling.max_tokens,
                group_size=group_size(kind, spec),
                model=spec.model,
            )
        ]
        reserves[kind] = lowest_reserve(fitting, max_micros[kind])
    return reserves


def group_size(kind: TaskKind, spec: JobSpec) -> int:
    """How many completions a unit of the kind is about."""
    is_evaluation = kind is TaskKind.EVALUATE
    return spec.evaluation.samples_per_example if is_evaluation else spec.rollouts_per_example


def _reference(terms: ReserveTerms) -> int:
    return terms.reference_micros or 0


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.4)
    return f"did you mean {near[0]!r}?" if near else "remove it"
