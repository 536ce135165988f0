"""Options that several commands share."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

from shoal.client.output import Output

_C = TypeVar("_C", bound=Callable[..., Any])


class FiniteRange(click.FloatRange):
    """A number within a range, as `click.FloatRange`, but never ``nan`` nor ``inf``."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """``value`` as a number; the command's user hears why it is none."""
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is no finite number.", param, ctx)
        return number


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


def key_option(command: _C) -> _C:
    """Adds ``--key``: the requester's keystore."""
    return click.option(
        "--key",
        type=click.Path(path_type=Path, dir_okay=False),
        help="The requester's keystore; the running devnet's when absent.",
    )(command)


def rpc_option(command: _C) -> _C:
    """Adds ``--rpc-url``: the chain node to trust."""
    return click.option(
        "--rpc-url",
        metavar="URL",
        help="A chain node you trust; the orchestrator's proposal when absent.",
    )(command)


@dataclass(frozen=True, kw_only=True)
class Wallet:
    """Who pays, at which orchestrator, through which chain node; as given, absent or not."""

    url: str | None
    key: Path | None
    rpc_url: str | None


def wallet_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds ``--url``, ``--key`` and ``--rpc-url``, passed as one `Wallet` ``wallet``."""

    @functools.wraps(command)
    def wrapped(
        *args: Any, url: str | None, key: Path | None, rpc_url: str | None, **rest: Any
    ) -> Any:
        return command(*args, wallet=Wallet(url=url, key=key, rpc_url=rpc_url), **rest)

    return url_option(key_option(rpc_option(wrapped)))


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
