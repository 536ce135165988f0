"""Homes: a blob from one home network to another, directly, through a hole, and relayed.

``python -m benchmarks.network.homes [--quick]``
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.network.table import Finding, main_of, median

# The lab of network namespaces that the tests use.
sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from nat_child import Child
from netlab import Nat, NetLab, why_not

from shoal.network.libp2p_relay import RelayLimits

# More than the machine relays, so that the relay itself is measured.
UNCAPPED_BYTES_PER_S = 1 << 30
_TEXT = "homes"


def fetch_s(asker: Child, holder: Child, source: str, size_bytes: int, mark: int) -> float:
    """The seconds in which a blob of about `size_bytes` is fetched, checked and stored."""
    text = f"{_TEXT}{mark:06d}"
    blob = holder.get("add", text, size_bytes // len(text))
    begun_s = time.perf_counter()
    asker.get("fetch", blob, source)
    return time.perf_counter() - begun_s


def reach_s(asker: Child, holder: Child, wanted: str) -> float:
    """The seconds until the holder is reached in the wanted way."""
    assert holder.peer_id
    while True:
        begun_s = time.perf_counter()
        found = asker.tell("reach", holder.peer_id).get("ok")
        if found == wanted:
            return time.perf_counter() - begun_s


def findings(*, quick: bool) -> Iterator[Finding]:
    """Rates between two homes, and how long the way takes to be found."""
    reason = why_not()
    if reason is not None:
        yield Finding(what="a blob from home to home", measured=f"not measured: {reason}")
        return
    size_bytes, count = (16 << 20, 3) if quick else (64 << 20, 5)
    with TemporaryDirectory(prefix="shoal-bench-") as name, NetLab() as lab:
        folder = Path(name)
        relay = Child(lab.host("relay"), folder / "relay", "relay", str(UNCAPPED_BYTES_PER_S))
        homes = {
            home: Child(
                lab.natted(home, kind=kind), folder / home, "worker", relay.address, "punch"
            )
            for home, kind in (
                ("asker", Nat.PORT_RESTRICTED),
                ("punched", Nat.PORT_RESTRICTED),
                ("relayed", Nat.SYMMETRIC),
            )
        }
        asker = homes["asker"]
        punched_s = reach_s(asker, homes["punched"], "direct")
        relayed_s = reach_s(asker, homes["relayed"], "relayed")
        ways = {
            "a public node, dialled": (relay, relay.address),
            "another home, through a hole": (homes["punched"], homes["punched"].source),
            "another home, relayed": (homes["relayed"], homes["relayed"].source),
        }
        taken: dict[str, list[float]] = {way: [] for way in ways}
        for number in range(count):
            for mark, (way, (holder, source)) in enumerate(ways.items(), number * len(ways)):
                # Bytes of its own each time: what is already held is not fetched again.
                taken[way].append(fetch_s(asker, holder, source, size_bytes, mark))
    for way, seconds in taken.items():
        rate = size_bytes / median(seconds) / 1e6
        yield Finding(what=f"{size_bytes >> 20} MiB from {way}", measured=f"{rate:.1f} MB/s")
    yield Finding(what="a hole punched between two homes", measured=f"{punched_s:.1f} s")
    yield Finding(
        what="reached by the relay where no hole can be punched",
        measured=f"{relayed_s:.1f} s",
    )
    yield Finding(
        what="what all relayed circuits together may carry, unless configured otherwise",
        measured=f"{RelayLimits().bytes_per_s / 1e6:.1f} MB/s",
    )


if __name__ == "__main__":
    main_of(__doc__, findings)
