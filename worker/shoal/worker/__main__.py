"""``python -m shoal.worker --config FILE [--set key=value …] [--claim] [--dry-run]``."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import sys
from pathlib import Path

from shoal.protocol.errors import InvalidRequest, ShoalError
from shoal.worker.config import describe_config, load_config


def main() -> int:
    """Runs the worker the command line describes; returns its exit code."""
    parser = argparse.ArgumentParser(prog="shoal worker join", description=__doc__)
    parser.add_argument("--config", type=Path, help="TOML file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="pairs")
    parser.add_argument("--claim", action="store_true", help="claim what is owed and stop")
    parser.add_argument("--dry-run", action="store_true", help="print the configuration and stop")
    arguments = parser.parse_args()
    try:
        options = dict(_pair(pair) for pair in arguments.pairs)
        config = load_config(arguments.config, os.environ, options)
        if arguments.dry_run:
            sys.stdout.write(json.dumps(describe_config(config), indent=2) + "\n")
            return 0
        from shoal.worker.main import claim_all, run_worker

        if arguments.claim:
            paid_micros = asyncio.run(claim_all(config))
            sys.stdout.write(json.dumps({"paid_micros": paid_micros}) + "\n")
        else:
            asyncio.run(run_worker(config))
    except ShoalError as error:
        if os.environ.get("SHOAL_DEBUG"):
            logging.getLogger(__name__).exception("stopped")
        sys.stderr.write(json.dumps(error.to_wire()) + "\n")
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


def _pair(text: str) -> tuple[str, str]:
    key, sign, value = text.partition("=")
    if not sign:
        raise InvalidRequest(f"--set {text!r} has no '='; write --set key=value.")
    return key, value


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    logging.shutdown()
    # Everything of ours is closed by now; taking torch and its threads apart one by one would
    # only keep the provider waiting, for seconds on a busy machine.
    os._exit(code)
