"""Run by an interpreter that has hivemind, never by Shoal's own: two peers average one tensor.

``python averaging.py BYTES ROUNDS`` prints the seconds of each round, in JSON.
"""

from __future__ import annotations

import importlib
import json
import sys
import threading
import time
from typing import Any


def main() -> None:
    """Prints how long each round took the slower peer, finding each other not included."""
    import torch

    dht_of: Any = importlib.import_module("hivemind").DHT
    averager_of: Any = importlib.import_module("hivemind.averaging").DecentralizedAverager
    numbers, rounds = int(sys.argv[1]) // 4, int(sys.argv[2])
    first = dht_of(start=True, host_maddrs=["/ip4/127.0.0.1/tcp/0"])
    second = dht_of(
        start=True,
        host_maddrs=["/ip4/127.0.0.1/tcp/0"],
        initial_peers=[str(address) for address in first.get_visible_maddrs()],
    )
    peers = [
        averager_of(
            [torch.full((numbers,), float(rank))],
            dht,
            start=True,
            prefix="bench",
            target_group_size=2,
            min_matchmaking_time=2.0,
            request_timeout=1.0,
        )
        for rank, dht in enumerate((first, second))
    ]
    taken = []
    for _ in range(rounds):
        controls = [peer.step(wait=False, require_trigger=True, timeout=120) for peer in peers]
        # Matchmaking waits for company; only the averaging itself is timed.
        time.sleep(4.0)
        begun_s = time.perf_counter()
        for control in controls:
            control.allow_allreduce()
        waiting = [threading.Thread(target=control.result) for control in controls]
        for thread in waiting:
            thread.start()
        for thread in waiting:
            thread.join()
        taken.append(time.perf_counter() - begun_s)
    for peer in peers:
        peer.shutdown()
    second.shutdown()
    first.shutdown()
    print(json.dumps(taken))


if __name__ == "__main__":
    main()
