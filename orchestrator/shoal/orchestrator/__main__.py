"""``python -m shoal.orchestrator --config FILE [--set key=value …] [--dry-run]``."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import sys
from pathlib import Path

from shoal.orchestrator.config import load_config
from shoal.protocol.errors import InvalidRequest, ShoalError
from shoal.protocol.logs import configure_logs


def main() -> int:
    """Runs the orchestrator the command line describes; returns its exit code."""
    parser = argparse.ArgumentParser(prog="shoal orchestrate", description=__doc__)
    parser.add_argument("--config", type=Path, help="TOML file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="pairs")
    parser.add_argument("--dry-run", action="store_true", help="print the configuration and stop")
    arguments = parser.parse_args()
    configure_logs()
    try:
        config = load_config(arguments.config, dict(_pair(pair) for pair in arguments.pairs))
        if arguments.dry_run:
            sys.stdout.write(config.model_dump_json(indent=2) + "\n")
            return 0
        from shoal.orchestrator.main import run_orchestrator

        asyncio.run(run_orchestrator(config))
    except ShoalError as error:
        if os.environ.get("SHOAL_DEBUG"):
            logging.getLogger(__name__).exception("stopped")
        sys.stderr.write(json.dumps(error.to_wire()) + "\n")
        return error.exit_code
    return 0


def _pair(text: str) -> tuple[str, str]:
    key, sign, value = text.partition("=")
    if not sign:
        raise InvalidRequest(f"--set {text!r} has no '='; write --set key=value.")
    return key, value


if __name__ == "__main__":
    raise SystemExit(main())
