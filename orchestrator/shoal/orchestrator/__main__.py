"""``python -m shoal.orchestrator --config FILE [--set key=value …] [--dry-run]``."""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path

from shoal.orchestrator.config import load_config
from shoal.protocol.errors import ShoalError
from shoal.protocol.logs import configure_logs
from shoal.protocol.process import parse_pairs, report_error, share_interpreter


def main() -> int:
    """Runs the orchestrator the command line describes; returns its exit code."""
    parser = argparse.ArgumentParser(prog="shoal orchestrate", description="Run an orchestrator.")
    parser.add_argument("--config", type=Path, help="TOML file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="pairs")
    parser.add_argument("--json", action="store_true", help="errors as JSON")
    parser.add_argument("--dry-run", action="store_true", help="print the configuration and stop")
    arguments = parser.parse_args()
    configure_logs()
    try:
        config = load_config(arguments.config, parse_pairs(arguments.pairs))
        if arguments.dry_run:
            sys.stdout.write(config.model_dump_json(indent=2) + "\n")
            return 0
        from shoal.orchestrator.main import run_orchestrator

        share_interpreter()
        asyncio.run(run_orchestrator(config))
    except ShoalError as error:
        return report_error("shoal orchestrate", error, as_json=arguments.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
