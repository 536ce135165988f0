"""``python -m shoal.worker``: what ``shoal worker join``, ``claim`` and ``unstake`` run."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

from shoal.protocol.errors import ShoalError
from shoal.protocol.process import parse_pairs, report_error
from shoal.worker.config import (
    ENVIRONMENT_PREFIX,
    LOCAL_RAY,
    Capacity,
    FloorPrices,
    WorkerConfig,
    describe_config,
    load_config,
)

_EVALUATIONS_PER_GROUP = 8
"""How many held-out prompts ``--capacity`` counts as one group: as many as in the defaults."""


class OneLineParser(argparse.ArgumentParser):
    """A parser whose complaint is one sentence."""

    def error(self, message: str) -> NoReturn:
        """Ends the process, saying ``message``."""
        self.exit(2, f"{self.prog}: {message}. See `{self.prog} --help`.\n")


def build_parser() -> argparse.ArgumentParser:
    """The options of a worker, with their defaults told."""
    parser = OneLineParser(
        prog="shoal worker join",
        description="Work for the orchestrator at ADDRESS: a libp2p address or the URL of its API.",
        epilog="Options win over the environment (SHOAL_WORKER_…), which wins over the file.",
        # An abbreviation would change its meaning with the next option.
        allow_abbrev=False,
    )
    defaults = {name: field.default for name, field in WorkerConfig.model_fields.items()}
    parser.add_argument("orchestrator", nargs="?", metavar="ADDRESS")
    texts = (
        ("name", "NAME", f"what the orchestrator calls this worker ({defaults['name']})"),
        ("stake", "DOLLARS", "raise the account's stake to this much in all (leave it as it is)"),
        ("data-dir", "DIR", f"keys, models and receipts ({defaults['data_dir']})"),
        ("rpc-url", "URL", "a chain node of your own (the orchestrator's proposal)"),
        ("device", "NAME", f"auto, cpu, cuda or mps ({defaults['device']})"),
        ("engine", "NAME", f"what samples: auto, loop or vllm ({defaults['engine']})"),
    )
    for option, metavar, text in texts:
        parser.add_argument(f"--{option}", metavar=metavar, help=text)
    parser.add_argument(
        "--ray",
        nargs="?",
        const=LOCAL_RAY,
        metavar="RAY_ADDRESS",
        help="share each task among the actors of a Ray cluster of your own: the one whose head "
        "is at HOST:PORT, or one started on this machine",
    )
    units = {"rollout": "rolled-out group", "gradient": "differentiated group"}
    for kind in FloorPrices.model_fields:
        parser.add_argument(
            f"--price-{kind}",
            metavar="DOLLARS",
            help=f"the least for one {units.get(kind, 'scored held-out prompt')} "
            f"({getattr(FloorPrices(), kind)})",
        )
    parser.add_argument(
        "--capacity",
        metavar="GROUPS",
        type=int,
        help=f"groups held at once; {_EVALUATIONS_PER_GROUP} held-out prompts count as one "
        f"({Capacity().rollout} to roll out, {Capacity().gradient} to differentiate)",
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file with any setting")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="pairs",
        help="any setting of the file",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the configuration and stop")
    parser.add_argument("--json", action="store_true", help="errors as JSON")
    instead = parser.add_mutually_exclusive_group()
    # Commands of their own to people: `shoal worker claim`, `shoal worker unstake`.
    instead.add_argument("--claim", action="store_true", help=argparse.SUPPRESS)
    instead.add_argument("--unstake", action="store_true", help=argparse.SUPPRESS)
    return parser


def read_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The configuration keys that the command line sets; ``--set`` wins.

    Raises:
        InvalidRequest: a ``--set`` without ``=``.
    """
    names = ("orchestrator", "name", "stake", "data_dir", "rpc_url", "device", "engine")
    options = {name: getattr(arguments, name) for name in names}
    options["ray.address"] = arguments.ray
    for kind in FloorPrices.model_fields:
        options[f"price.{kind}"] = getattr(arguments, f"price_{kind}")
    if (groups := arguments.capacity) is not None:
        options |= {"capacity.rollout": groups, "capacity.gradient": groups}
        options["capacity.evaluate"] = groups * _EVALUATIONS_PER_GROUP
    given = {key: value for key, value in options.items() if value is not None}
    return given | parse_pairs(arguments.pairs)


def main() -> int:
    """Runs the worker the command line describes; returns its exit code."""
    parser = build_parser()
    arguments = parser.parse_args()
    try:
        options = read_options(arguments)
        named = "orchestrator" in options or f"{ENVIRONMENT_PREFIX}ORCHESTRATOR" in os.environ
        if not named and arguments.config is None:
            parser.error("name the orchestrator to work for: ADDRESS, or --config FILE")
        config = load_config(arguments.config, os.environ, options)
        if arguments.dry_run:
            _print_json(describe_config(config))
            return 0
        from shoal.worker.main import claim_all, run_worker, unstake

        if arguments.claim:
            _print_json({"paid_micros": asyncio.run(claim_all(config))})
        elif arguments.unstake:
            _print_json(asyncio.run(unstake(config)).to_json())
        else:
            asyncio.run(run_worker(config))
    except ShoalError as error:
        return report_error("shoal worker", error, as_json=arguments.json)
    except KeyboardInterrupt:
        return 130
    return 0


def _print_json(data: object) -> None:
    sys.stdout.write(json.dumps(data, indent=2) + "\n")


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    logging.shutdown()
    # Everything of ours is closed by now; taking torch and its threads apart one by one would
    # only keep the provider waiting, for seconds on a busy machine.
    os._exit(code)
