"""Which job is served next when several want the same workers.

Each job carries a *tag*: the service it has had, divided by its weight.  The job with the
lowest tag is served next, so over any time in which two jobs both want work their services
stand in the ratio of their weights, up to one lease of each.  A job that wanted nothing for a
while, or that nobody could serve, has no claim on the past: no tag lies below the clock, which
is the tag of what was served last.

Source: start-time fair queuing, Goyal, Vin and Cheng, SIGCOMM 1996, §2.
"""

from __future__ import annotations

from collections.abc import Collection

from shoal.protocol.errors import InvalidRequest


class FairShares:
    """The tags of the jobs on the market; service is worker time in milliseconds.

    Example:
        >>> shares = FairShares()
        >>> shares.charge("a", 300, weight=3.0)
        >>> shares.charge("b", 300, weight=1.0)
        >>> shares.next_of(["a", "b"])
        'a'
    """

    def __init__(self) -> None:
        self._tags: dict[str, float] = {}
        self._clock = 0.0

    def next_of(self, job_ids: Collection[str]) -> str:
        """The job of ``job_ids`` to serve next; of equals the first.

        Raises:
            InvalidRequest: there is none to choose from.
        """
        if not job_ids:
            raise InvalidRequest("No job wants to be served.", code="no_jobs")
        return min(job_ids, key=self._tag)

    def charge(self, job_id: str, service_ms: float, *, weight: float) -> None:
        """The job is given ``service_ms`` of worker time.

        Raises:
            InvalidRequest: the service is negative or the weight is not above zero.
        """
        if service_ms < 0 or not weight > 0:
            raise InvalidRequest(
                f"A service of {service_ms} ms at weight {weight} cannot be charged; the weight "
                "must be above zero.",
                code="bad_charge",
            )
        start = self._tag(job_id)
        self._clock = start
        self._tags[job_id] = start + service_ms / weight

    def correct(self, job_id: str, difference_ms: float, *, weight: float) -> None:
        """What was charged in advance turns out to be ``difference_ms`` more (or less)."""
        if job_id in self._tags:
            self._tags[job_id] += difference_ms / weight

    def forget(self, job_id: str) -> None:
        """The job is not on the market any more."""
        self._tags.pop(job_id, None)

    def _tag(self, job_id: str) -> float:
        return max(self._tags.get(job_id, 0.0), self._clock)
