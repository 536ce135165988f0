"""``python -m benchmarks.network [--only blobs leases] [--quick]``: the network's promises."""

from __future__ import annotations

import argparse
import importlib

from benchmarks.network.table import show

MODULES = (
    "blobs",
    "streams",
    "spread",
    "deltas",
    "homes",
    "leases",
    "crowd",
    "fuzz",
    "resilience",
)


def main() -> None:
    """Prints one table per module; ends with 1 when a bound was missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.network", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=MODULES, default=MODULES)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, smaller crowds")
    options = parser.parse_args()
    held = True
    for name in options.only:
        module = importlib.import_module(f"benchmarks.network.{name}")
        title = (module.__doc__ or name).splitlines()[0].rstrip(".")
        held = show(title, module.findings(quick=options.quick)) and held
    raise SystemExit(0 if held else 1)


if __name__ == "__main__":
    main()
