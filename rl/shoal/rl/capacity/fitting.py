"""Whether a role fits a machine's memory, and if not, the nearest thing that does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from shoal.protocol.job import JobSpec
from shoal.rl.capacity.footprint import AVAILABLE, GIB, BaseFormat, Role, Setup, footprint_of
from shoal.rl.capacity.known_models import SIZES, find_shape

_SMALLEST_TOKENS = 16
_RANKS = (8, 4, 1)


@dataclass(frozen=True, kw_only=True)
class Remedy:
    """The smallest change after which a role fits; ``available`` if a worker can do it today."""

    change: str
    needs_bytes: int
    available: bool

    def sentence(self) -> str:
        """The change and what it takes."""
        later = "" if self.available else " (not available yet)"
        return f"{self.change} takes {gib(self.needs_bytes)}{later}"


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Whether ``role`` fits; ``remedies`` are the nearest things that do.

    The first is the smallest change of all; where workers cannot do that yet, a second is
    the smallest they can do today.  ``runs`` is false where the engine refuses the job
    whatever the memory.
    """

    role: Role
    needs_bytes: int
    has_bytes: int
    runs: bool = True
    remedies: tuple[Remedy, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether the memory suffices as things are."""
        return self.runs and self.needs_bytes <= self.has_bytes

    def sentence(self) -> str:
        """What a person should know about it."""
        if self.fits:
            return f"fits: {gib(self.needs_bytes)} of {gib(self.has_bytes)}"
        need = f"needs {gib(self.needs_bytes)} and has {gib(self.has_bytes)}"
        if not self.runs:
            need += ", and one completion's keys and values exceed what workers hold"
        if not self.remedies:
            return f"{need}; nothing the planner knows makes it fit"
        return f"{need}; " + "; ".join(remedy.sentence() for remedy in self.remedies)


def gib(size_bytes: int) -> str:
    """``size_bytes`` as people read memory."""
    if size_bytes < GIB // 10:
        return f"{size_bytes / (1 << 20):.1f} MiB"
    return f"{size_bytes / GIB:,.1f} GiB"


def fit_role(role: Role, setup: Setup, has_bytes: int) -> Fit:
    """Whether ``role`` fits in ``has_bytes``."""
    needs = footprint_of(role, setup).total_bytes
    runs = _runs(role, setup)
    remedies = () if runs and needs <= has_bytes else _remedies(role, setup, has_bytes)
    return Fit(role=role, needs_bytes=needs, has_bytes=has_bytes, runs=runs, remedies=remedies)


def _runs(role: Role, setup: Setup) -> bool:
    return role is not Role.ROLLOUT or setup.can_sample


def _remedies(role: Role, setup: Setup, has_bytes: int) -> tuple[Remedy, ...]:
    found: list[Remedy] = []
    for change, candidate, available in _candidates(role, setup):
        if found and not available:
            continue
        needs = footprint_of(role, candidate).total_bytes
        if needs <= has_bytes and _runs(role, candidate):
            found.append(Remedy(change=change, needs_bytes=needs, available=available))
            if available:
                break
    return tuple(found)


def _candidates(role: Role, setup: Setup) -> Iterator[tuple[str, Setup, bool]]:
    """Changes in the order of what they cost the job: settings, other bases, other models."""
    for change, candidate in _smaller(role, setup):
        yield change, candidate, True
    quantised = [
        replace(setup, base=base)
        for base in BaseFormat
        if base not in AVAILABLE and setup.spec.lora is not None
    ]
    for candidate in quantised:
        yield f"a base in {candidate.base}", candidate, False
    for candidate in quantised:
        for change, smaller in _smaller(role, candidate):
            yield f"a base in {candidate.base} with {change}", smaller, False
    for name in reversed(SIZES.values()):
        shape = find_shape(name)
        if shape.num_parameters < setup.shape.num_parameters:
            yield f"the model {name}", replace(setup, shape=shape), True


def _smaller(role: Role, setup: Setup) -> Iterator[tuple[str, Setup]]:
    """The job with ever less at once; each change keeps those before it that helped."""
    settings: dict[str, int] = {}
    least = footprint_of(role, setup).total_bytes
    for key, value in _steps(role, setup.spec):
        candidate = replace(setup, spec=_with(setup.spec, key, value))
        needs = footprint_of(role, candidate).total_bytes
        if needs < least:
            setup, least = candidate, needs
            settings[key] = value
            yield ", ".join(f"{name} = {number}" for name, number in settings.items()), setup


def _steps(role: Role, spec: JobSpec) -> Iterator[tuple[str, int]]:
    """Keys of the job file and smaller values for them."""
    if role is not Role.LEARNER:
        units = spec.tasks.rollout if role is Role.ROLLOUT else spec.tasks.gradient
        yield from ((f"tasks.{role}", value) for value in _halved(units, 1))
    tokens = _halved(spec.sampling.max_tokens, _SMALLEST_TOKENS)
    yield from (("sampling.max_tokens", value) for value in tokens)
    if spec.lora is not None:
        yield from (("lora.r", rank) for rank in _RANKS if rank < spec.lora.r)


def _with(spec: JobSpec, key: str, value: int) -> JobSpec:
    table, name = key.split(".")
    return spec.model_copy(update={table: getattr(spec, table).model_copy(update={name: value})})


def _halved(value: int, smallest: int) -> Iterator[int]:
    while value > smallest:
        value = max(smallest, value // 2)
        yield value
