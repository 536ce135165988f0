"""``python -m shoal.worker --config FILE [--set key=value …] [--claim] [--dry-run]``."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import sys
from pathlib import Path

from shoal.protocol.errors import ShoalError
from shoal.protocol.process import parse_pairs, report_error
from shoal.worker.config import describe_config, load_config


def main() -> int:
    """Runs the worker the command line describes; returns its exit code."""
    parser = argparse.ArgumentParser(prog="shoal worker join", description=__doc__)
    parser.add_argument("--config", type=Path, help="TOML file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="pairs")
    parser.add_argument("--claim", action="store_true", help="claim what is owed and stop")
    parser.add_argument("--json", action="store_true", help="errors as JSON")
    parser.add_argument("--dry-run", action="store_true", help="print the configuration and stop")
    arguments = parser.parse_args()
    try:
        options = parse_pairs(arguments.pairs)
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
        return report_error("shoal worker", error, as_json=arguments.json)
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    logging.shutdown()
    # Everything of ours is closed by now; taking torch and its threads apart one by one would
    # only keep the provider waiting, for seconds on a busy machine.
    os._exit(code)
