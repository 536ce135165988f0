"""``python -m shoal.worker``: what ``shoal worker join`` and its sister commands run."""

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
from shoal.protocol.process import parse_pairs, report_error, share_interpreter
from shoal.worker.config import (
    LOCAL_RAY,
    Capacity,
    FloorPrices,
    WorkerConfig,
    describe_config,
    load_config,
)

_VERBS = {
    "join": "Work for the orchestrator at ADDRESS: a libp2p address or the URL of its API.",
    "claim": "Claim all that jobs owe this worker's account, without working.",
    "unstake": "Take back this worker's stake: once to begin, once more when the wait is over.",
    "doctor": "Look at all that a worker rests on, and say how to mend what is wrong.",
    "status": "Say what the worker in DIR is doing and, when it does nothing, why.",
    "backup": "Put the worker's two keys, encrypted, into FILE.",
    "restore": "Bring back the keys that `shoal worker backup` put into FILE.",
}
_WITH_ORCHESTRATOR = {"join", "claim", "unstake"}
_BESIDE_WORK = {"doctor", "status", "backup", "restore"}
_WITH_FILE = {"backup", "restore"}

_EVALUATIONS_PER_GROUP = 8
"""How many held-out prompts ``--capacity`` counts as one group: as many as in the defaults."""


class OneLineParser(argparse.ArgumentParser):
    """A parser whose complaint is one sentence."""

    def error(self, message: str) -> NoReturn:
        """Ends the process, saying ``message``."""
        self.exit(2, f"{self.prog}: {message}. See `{self.prog} --help`.\n")


def _texts() -> tuple[tuple[str, str, str], ...]:
    """The options that are a key of the configuration and a word: name, word, meaning."""
    defaults = {name: field.default for name, field in WorkerConfig.model_fields.items()}
    return (
        ("name", "NAME", f"what the orchestrator calls this worker ({defaults['name']})"),
        ("stake", "DOLLARS", "raise the account's stake to this much in all (leave it as it is)"),
        ("data-dir", "DIR", f"keys, models and receipts ({defaults['data_dir']})"),
        ("trust", "ACCOUNT", "the account that the orchestrator must prove to speak for"),
        ("rpc-url", "URL", "a chain node of your own (the orchestrator's proposal)"),
        ("device", "NAME", f"auto, cpu, cuda or mps ({defaults['device']})"),
        ("engine", "NAME", f"what samples: auto, loop or vllm ({defaults['engine']})"),
    )


def build_parser(verb: str = "join") -> argparse.ArgumentParser:
    """The options of a worker, with their defaults told; all verbs take all of them."""
    parser = OneLineParser(
        prog=f"shoal worker {verb}",
        description=_VERBS[verb],
        epilog="Options win over the environment (SHOAL_WORKER_…), which wins over the file.",
        # An abbreviation would change its meaning with the next option.
        allow_abbrev=False,
    )
    if verb in _WITH_FILE:
        parser.add_argument("words", nargs="*", metavar="FILE", help="where the backup is")
    else:
        text = "several are ways to one orchestrator"
        parser.add_argument("words", nargs="*", metavar="ADDRESS", help=text)
    for option, metavar, text in _texts():
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
    parser.add_argument("--json", action="store_true", help="answers and errors as JSON")
    # Commands of their own to people, as `shoal worker claim`; here each is an option.
    instead = parser.add_mutually_exclusive_group()
    for other in _VERBS:
        instead.add_argument(
            f"--{other}", action="store_const", const=other, dest="verb", help=argparse.SUPPRESS
        )
    parser.set_defaults(verb="join")
    return parser


def read_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The configuration keys that the command line sets; ``--set`` wins.

    Raises:
        InvalidRequest: a ``--set`` without ``=``.
    """
    names = ("name", "stake", "data_dir", "rpc_url", "device", "engine", "trust")
    options = {name: getattr(arguments, name) for name in names}
    if arguments.words and arguments.verb not in _WITH_FILE:
        options["orchestrator"] = ",".join(arguments.words)
    options["ray.address"] = arguments.ray
    for kind in FloorPrices.model_fields:
        options[f"price.{kind}"] = getattr(arguments, f"price_{kind}")
    if (groups := arguments.capacity) is not None:
        options |= {"capacity.rollout": groups, "capacity.gradient": groups}
        options["capacity.evaluate"] = groups * _EVALUATIONS_PER_GROUP
    given = {key: value for key, value in options.items() if value is not None}
    return given | parse_pairs(arguments.pairs)


def main() -> int:
    """Does what the command line says; returns its exit code."""
    verb = next((verb for verb in _VERBS if f"--{verb}" in sys.argv), "join")
    parser = build_parser(verb)
    arguments = parser.parse_args()
    if verb in _WITH_FILE and len(arguments.words) != 1:
        parser.error("name one FILE")
    try:
        config = load_config(arguments.config, os.environ, read_options(arguments))
        if verb in _WITH_ORCHESTRATOR and not (config.orchestrator or config.is_finding):
            parser.error(
                "name the orchestrator to work for: ADDRESS, or --config FILE; or its account "
                "with --trust, to look for it through --set bootstrap=… or --set mdns=true"
            )
        if arguments.dry_run:
            _print_json(describe_config(config))
            return 0
        return _run(verb, config, arguments)
    except ShoalError as error:
        return report_error("shoal worker", error, as_json=arguments.json)
    except KeyboardInterrupt:
        return 130


def _run(verb: str, config: WorkerConfig, arguments: argparse.Namespace) -> int:
    """Runs the verb; its exit code."""
    if verb in _BESIDE_WORK:
        return _run_beside(verb, config, arguments)
    from shoal.worker.main import claim_all, run_worker, unstake

    match verb:
        case "claim":
            _print_json({"paid_micros": asyncio.run(claim_all(config))})
        case "unstake":
            _print_json(asyncio.run(unstake(config)).to_json())
        case _:
            share_interpreter()
            asyncio.run(run_worker(config))
    return 0


def _run_beside(verb: str, config: WorkerConfig, arguments: argparse.Namespace) -> int:
    from shoal.worker import verbs

    match verb:
        case "status":
            return verbs.tell_status(config, as_json=arguments.json)
        case "backup":
            return verbs.run_backup(config, Path(arguments.words[0]), as_json=arguments.json)
        case "restore":
            return verbs.run_restore(config, Path(arguments.words[0]), as_json=arguments.json)
    # Not `asyncio.run`, which would wait for threads that hang in a disk or a name look-up.
    loop = asyncio.new_event_loop()
    try:
        return loop.run_until_complete(verbs.run_doctor(config, as_json=arguments.json))
    finally:
        loop.close()


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
