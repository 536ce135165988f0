"""Work of different sizes in bins of like sums."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def pack_evenly(sizes: Sequence[int], num_bins: int) -> list[list[int]]:
    """The numbers of ``sizes`` in at most ``num_bins`` bins of like sums, none empty.

    Largest first, each into the bin that is emptiest so far and has room: no bin gets more
    than its share of the numbers, rounded up.  Ties go to the lower number, so the packing is
    the same everywhere.  Source: longest processing time first, Graham 1969.
    """
    count = min(num_bins, len(sizes))
    most = -(-len(sizes) // max(count, 1))
    bins: list[list[int]] = [[] for _ in range(count)]
    fill = [(0, number) for number in range(count)]
    for number in sorted(range(len(sizes)), key=lambda n: (-sizes[n], n)):
        total, place = heapq.heappop(fill)
        bins[place].append(number)
        if len(bins[place]) < most:
            heapq.heappush(fill, (total + max(sizes[number], 1), place))
    return [sorted(members) for members in bins]
