"""The pool file: TOML that names the providers a plan counts on, read into a `Pool`."""

from __future__ import annotations

import datetime
import difflib
import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from pydantic import ValidationError

from shoal.client.textfile import read_text_file
from shoal.protocol.errors import InvalidRequest
from shoal.protocol.money import MAX_MICROS, format_dollars, parse_dollars
from shoal.rl.capacity.pool import LearnerMachine, Pool, ProviderClass

_PRICE = "price_per_hour"
_PROVIDER_KEYS = [_PRICE, *(k for k in ProviderClass.model_fields if not k.startswith(_PRICE))]
_LEARNER_KEYS = list(LearnerMachine.model_fields)
_TABLES = ["provider", "orchestrator"]


def load_pool_file(path: Path) -> Pool:
    """The pool in the file at ``path``.

    Raises:
        NotFound: there is no such file.
        InvalidRequest: it is no valid pool; the message names the file and the key.
    """
    return parse_pool(read_text_file(path, "pool file"), str(path))


def parse_pool(text: str, source: str) -> Pool:
    """The pool in ``text``; ``source`` names it in errors.

    Raises:
        InvalidRequest: as `load_pool_file`.
    """
    try:
        document = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{source} is not valid TOML: {error}.", code="invalid_toml") from None
    _check_known(document, "", _TABLES, source)
    learner = document.get("orchestrator", {})
    if not isinstance(learner, dict):
        _fail(source, "orchestrator is no table", "write [orchestrator]")
    _check_known(learner, "orchestrator", _LEARNER_KEYS, source)
    providers = document.get("provider")
    if not isinstance(providers, list) or not providers:
        _fail(source, "there is no provider", "write [[provider]], once for each class of machine")
    pool = {
        "learner": learner,
        "providers": [_provider(item, number, source) for number, item in enumerate(providers)],
    }
    try:
        return Pool.model_validate_json(json.dumps(pool, default=_refuse_date))
    except ValidationError as error:
        _explain(error, source)


def _provider(item: object, number: int, source: str) -> dict[str, Any]:
    where = f"provider[{number}]"
    if not isinstance(item, dict):
        _fail(source, f"{where} is no table", "write [[provider]]")
    _check_known(item, where, _PROVIDER_KEYS, source)
    price = item.get(_PRICE)
    if not isinstance(price, str):
        _fail(source, f"{where}.{_PRICE} is no text", 'give dollars as text, such as "0.40"')
    micros = parse_dollars(price, f"{source}: {where}.{_PRICE}")
    if micros > MAX_MICROS:
        _fail(source, f"{where}.{_PRICE} is {price}", f"give at most {format_dollars(MAX_MICROS)}")
    rest = {key: value for key, value in item.items() if key != _PRICE}
    return {**rest, "price_per_hour_micros": micros}


def _check_known(table: Mapping[str, Any], where: str, known: Sequence[str], source: str) -> None:
    for key in table:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
            place = f" in [{where}]" if where else ""
            raise InvalidRequest(
                f"{source}: there is no key {key!r}{place}; the nearest valid name is {nearest!r}.",
                code="unknown_key",
                key=key,
            )


def _explain(error: ValidationError, source: str) -> NoReturn:
    fault = error.errors(include_url=False, include_context=False)[0]
    place = fault["loc"]
    table = "orchestrator" if place[0] == "learner" else f"provider[{place[1]}]"
    key = str(place[-1]) if isinstance(place[-1], str) and len(place) > 1 else ""
    where = f"{table}.{key}" if key else table
    reason = fault["msg"].removeprefix("Value error, ").replace("Input should be", "it should be")
    found = "" if isinstance(fault["input"], dict) else f" is {fault['input']!r}"
    raise InvalidRequest(
        f"{source}: {where}{found}; {reason}.", code="invalid_value", key=where
    ) from None


def _refuse_date(value: object) -> str:
    """A date becomes text, which no key of the file takes."""
    if isinstance(value, (datetime.date, datetime.time)):
        return f"the date or time {value}"
    raise TypeError(f"{value!r} came from no TOML file")


def _fail(source: str, wrong: str, remedy: str) -> NoReturn:
    raise InvalidRequest(f"{source}: {wrong}; {remedy}.", code="invalid_pool")
