"""Plain counters and gauges of one node, by name and labels, cheap enough to sit on every path."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

# A label may carry what a stranger chose; beyond this many sets of labels the rest are one.
_MAX_LABEL_SETS: Final = 256
_OTHER: Final = "other"

_Labels = tuple[tuple[str, str], ...]


class Kind(StrEnum):
    """How a sample's value moves."""

    COUNTER = "counter"
    GAUGE = "gauge"


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One value at one moment.

    Example:
        >>> Sample(name="bans", kind=Kind.COUNTER, labels=(("reason", "flood"),), value=2).value
        2
    """

    name: str
    kind: Kind
    labels: _Labels
    value: float


class Meters:
    """Counts and levels that any thread may change and read.

    Example:
        >>> meters = Meters()
        >>> meters.count("requests_served", protocol="/shoal/bid/1", outcome="ok")
        >>> meters.value("requests_served", protocol="/shoal/bid/1", outcome="ok")
        1
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kinds: dict[str, Kind] = {}
        self._values: dict[str, dict[_Labels, float]] = {}

    def count(self, name: str, by: float = 1, **labels: str) -> None:
        """The counter of that name and those labels is `by` higher."""
        with self._lock:
            values = self._values_of(name, Kind.COUNTER)
            key = _key(values, labels)
            values[key] = values.get(key, 0) + by

    def gauge(self, name: str, value: float, **labels: str) -> None:
        """The gauge of that name and those labels stands at `value`."""
        with self._lock:
            values = self._values_of(name, Kind.GAUGE)
            values[_key(values, labels)] = value

    def value(self, name: str, **labels: str) -> float:
        """The value now; 0 when it was never counted."""
        with self._lock:
            return self._values.get(name, {}).get(tuple(sorted(labels.items())), 0)

    def snapshot(self) -> tuple[Sample, ...]:
        """Every value at one moment, sorted by name and labels."""
        with self._lock:
            found = [
                Sample(name=name, kind=self._kinds[name], labels=labels, value=value)
                for name, values in self._values.items()
                for labels, value in values.items()
            ]
        return tuple(sorted(found, key=lambda sample: (sample.name, sample.labels)))

    def _values_of(self, name: str, kind: Kind) -> dict[_Labels, float]:
        values = self._values.get(name)
        if values is None:
            values = self._values[name] = {}
            self._kinds[name] = kind
        return values


def _key(values: dict[_Labels, float], labels: dict[str, str]) -> _Labels:
    key = tuple(labels.items()) if len(labels) < 2 else tuple(sorted(labels.items()))
    if key in values or len(values) < _MAX_LABEL_SETS:
        return key
    return tuple((label, _OTHER) for label, _ in key)
