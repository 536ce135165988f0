"""The ``shoal`` command: its list of commands, and the one place errors become exit codes.

Exit codes: 0 ok, 1 trouble elsewhere (a service down, a defect), 2 usage, 3 invalid job or
input, 4 no right to it, 5 budget, 6 the job failed, 130 interrupted, 141 broken pipe.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import click

from shoal.protocol.errors import ShoalError

DEBUG_VARIABLE = "SHOAL_DEBUG"
_EXIT_USAGE = 2
_EXIT_INTERRUPTED = 130
_EXIT_BROKEN_PIPE = 141

# name → (module under shoal.client.commands, the line `shoal --help` shows).  The modules
# are imported only when their command runs, so that help needs none of their imports.
_COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("demo", "Run a whole job on this machine, start to finish, and check it."),
    "up": ("up", "Start a market on this machine: chain, orchestrator, workers."),
    "plan": ("plan", "Say what a job needs: memory, traffic, time, money, machines."),
    "submit": ("submit", "Submit a job file and pay for it."),
    "jobs": ("jobs", "List jobs, or show one."),
    "cancel": ("cancel", "End a job; what was handed in is paid."),
    "refund": ("refund", "Take back what an ended job did not spend."),
    "logs": ("logs", "Show what happened to a job."),
    "models": ("models", "Download trained models."),
    "worker": ("worker", "Offer this machine's compute, and collect its pay."),
    "orchestrate": ("orchestrate", "Run an orchestrator."),
    "market": ("market", "Try the market out, or check what it did."),
    "provenance": ("provenance", "Check where a model comes from."),
    "chain": ("chain", "Run a local chain with the contracts deployed."),
    "version": ("version", "Show the installed version."),
}


class LazyGroup(click.Group):
    """A group that imports a command's module only when the command is named."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands, in the order a newcomer meets them."""
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command called ``cmd_name``, imported now."""
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(f"shoal.client.commands.{_COMMANDS[cmd_name][0]}")
        command = module.command
        if not isinstance(command, click.Command):
            raise TypeError(f"{module.__name__}.command is not a click command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the list from the table, importing nothing."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in _COMMANDS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does, but a misspelt command is answered with the nearest one."""
        if args and args[0] not in _COMMANDS and not args[0].startswith("-"):
            import difflib

            near = difflib.get_close_matches(args[0], _COMMANDS, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else " See `shoal --help`."
            ctx.fail(f"There is no command {args[0]!r}.{hint}")
        return super().resolve_command(ctx, args)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """A compute market for reinforcement-learning post-training.

    A requester brings a model, an environment and a budget; owners of machines compete to
    do the rollouts and the gradients; everyone can check who did what and was paid what.

    Start with `shoal demo`. Every command takes --json for programs.
    """


def main() -> NoReturn:
    """Runs the command line and exits with its code."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """The exit code of the command line ``arguments``; no exception leaves it."""
    json_mode = "--json" in arguments
    try:
        outcome = cli.main(args=list(arguments), prog_name="shoal", standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.ClickException as error:
        _report_usage(error, json_mode=json_mode)
        return _EXIT_USAGE
    except (KeyboardInterrupt, click.Abort):
        return _EXIT_INTERRUPTED
    except BrokenPipeError:
        # Nobody reads standard output; the interpreter's own flush at exit must not fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _EXIT_BROKEN_PIPE
    except ShoalError as error:
        return _report_error(error, json_mode=json_mode)
    except Exception as error:
        return _report_crash(error, json_mode=json_mode)
    return outcome if isinstance(outcome, int) else 0


def _report_usage(error: click.ClickException, *, json_mode: bool) -> None:
    context = getattr(error, "ctx", None)
    where = context.command_path if isinstance(context, click.Context) else "shoal"
    message = error.format_message()
    if json_mode:
        _write_error_json({"error": "UsageError", "code": "usage", "message": message})
    else:
        hint = "" if "--help" in message else f" See `{where} --help`."
        sys.stderr.write(f"{where}: {message}{hint}\n")


def _report_error(error: ShoalError, *, json_mode: bool) -> int:
    if json_mode:
        _write_error_json(error.to_wire())
    else:
        sys.stderr.write(f"shoal: {error.message}\n")
    _show_trace_if_debugging(error)
    return error.exit_code


def _report_crash(error: Exception, *, json_mode: bool) -> int:
    descriptor, log = tempfile.mkstemp(prefix="shoal-crash-", suffix=".log")
    with os.fdopen(descriptor, "w") as file:
        file.write("".join(traceback.format_exception(error)))
    message = (
        f"Shoal stopped on a defect of its own ({type(error).__name__}); the details are in "
        f"{Path(log)}, please report it with them."
    )
    if json_mode:
        _write_error_json(
            {"error": "Crash", "code": "crash", "message": message, "context": {"log": log}}
        )
    else:
        sys.stderr.write(f"shoal: {message}\n")
    _show_trace_if_debugging(error)
    return 1


def _show_trace_if_debugging(error: Exception) -> None:
    if os.environ.get(DEBUG_VARIABLE):
        sys.stderr.write("".join(traceback.format_exception(error)))


def _write_error_json(data: dict[str, object]) -> None:
    sys.stderr.write(json.dumps(data, ensure_ascii=False) + "\n")
