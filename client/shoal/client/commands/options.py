"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from shoal.client.output import Output

_C = TypeVar("_C", bound=Callable[..., Any])


def output_option(command: _C) -> _C:
    """Adds ``--json``, and passes the command an `Output` as ``output``."""

    def build(ctx: click.Context, param: click.Parameter, value: bool) -> Output:
        return Output(json_mode=value)

    return click.option(
        "--json", "output", is_flag=True, callback=build, help="Write JSON on standard output."
    )(command)


def url_option(command: _C) -> _C:
    """Adds ``--url``: which orchestrator to talk to."""
    return click.option(
        "--url",
        envvar="SHOAL_URL",
        metavar="URL",
        help="The orchestrator's API; the devnet running under this folder when absent.",
    )(command)


def data_option(command: _C) -> _C:
    """Adds ``--data``: the devnet's folder, as ``data_dir``."""
    return click.option(
        "--data",
        "data_dir",
        type=click.Path(path_type=Path, file_okay=False),
        default=Path(".shoal/devnet"),
        show_default=True,
        help="The devnet's folder.",
    )(command)
