"""The job file: TOML a person writes, read into a `JobSpec`, and written back in full.

Every key of the file has one place in the spec.  What the file does not say takes the
spec's default; what it says and nobody knows is refused, with the nearest name that is known.
"""

from __future__ import annotations

import datetime
import difflib
import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from pydantic import ValidationError

from shoal.client.jobfile_keys import (
    BUDGET_KEYS,
    ENV_KEYS,
    KEYS,
    PRICED,
    REQUIRED,
    STALE_PAY,
    TUNING,
    TUNINGS,
    file_key,
    join,
)
from shoal.client.textfile import read_text_file
from shoal.protocol.errors import InvalidRequest
from shoal.protocol.job import JobSpec
from shoal.protocol.money import MAX_MICROS, format_dollars, parse_dollars
from shoal.protocol.record import MAX_INT

_PERMILLE = 1_000


def load_job_file(path: Path, overrides: Sequence[str] = ()) -> JobSpec:
    """The job in the file at ``path``, with ``overrides`` applied.

    Args:
        path: A TOML file.
        overrides: ``key=value`` or ``table.key=value``, as given to ``--set``; the value is
            TOML, or bare text.  ``env.0.weight=2`` reaches into the first environment.

    Raises:
        NotFound: there is no such file.
        InvalidRequest: the file or an override is not a valid job; the message names the
            file, the key and what to write there.
    """
    return parse_job(read_text_file(path, "job file"), str(path), overrides)


def parse_job(text: str, source: str, overrides: Sequence[str] = ()) -> JobSpec:
    """The job in ``text``; ``source`` names it in errors.

    Raises:
        InvalidRequest: as `load_job_file`.
    """
    try:
        document = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{source} is not valid TOML: {error}.", code="invalid_toml") from None
    for override in overrides:
        _apply_override(document, override)
    return _Reader(source).read(document)


def render_job_file(spec: JobSpec) -> str:
    """``spec`` as a job file with every default written out; it loads back equal."""
    data = spec.model_dump(mode="json")
    tuning = "full" if spec.lora is None else "lora"
    blocks = []
    for table, keys in KEYS.items():
        values = {key: _at(data, path) for key, path in keys.items()}
        lines = [f"{key} = {_render_value(v)}" for key, v in values.items() if v is not None]
        if not table:
            lines.append(f"{TUNING} = {_quote(tuning)}")
        elif lines:
            lines.insert(0, f"[{table}]")
        else:
            continue
        blocks.append(lines)
    for env in data["environments"]:
        args = ", ".join(f"{_quote(k)} = {_render_value(v)}" for k, v in env["args"].items())
        blocks.append(
            [
                "[[env]]",
                f"id = {_quote(env['id'])}",
                f"weight = {_render_value(env['weight'])}",
                f"args = {{ {args} }}" if args else "args = {}",
            ]
        )
    budget = spec.budget
    prices = ", ".join(
        f'{kind} = "{format_dollars(data["budget"][f"max_{kind}_micros"])}"' for kind in PRICED
    )
    blocks.append(
        [
            "[budget]",
            f'max_total = "{format_dollars(budget.max_total_micros)}"',
            f"max_unit_price = {{ {prices} }}",
            f"{STALE_PAY} = {budget.stale_pay_permille / _PERMILLE}",
            f'delay_cost = "{format_dollars(budget.delay_micros_per_s)}"',
        ]
    )
    return "\n\n".join("\n".join(lines) for lines in blocks) + "\n"


@dataclass(frozen=True)
class _Reader:
    """Turns a parsed document into a spec; ``source`` stands in every complaint."""

    source: str

    def read(self, document: Mapping[str, Any]) -> JobSpec:
        spec: dict[str, Any] = {}
        tables = [name for name in KEYS if name]
        self._check_known(document, "", [*KEYS[""], TUNING, *tables, "env", "budget"])
        for table, keys in KEYS.items():
            content = self._table(document, table) if table else document
            if table:
                self._check_known(content, table, list(keys))
            for key in keys:
                if key in content:
                    self._check_scalar(join(table, key), content[key])
                    _put(spec, keys[key], content[key])
        for key in REQUIRED:
            if key not in document:
                self._fail(f"the key {key!r} is missing", f"add {key} = … at the top of the file")
        if self._tunes_all(document):
            spec["lora"] = None
        spec["environments"] = self._environments(document)
        spec["budget"] = self._budget(document)
        try:
            # Through JSON, because strict validation takes names for enums only from there.
            return JobSpec.model_validate_json(json.dumps(spec))
        except ValidationError as error:
            self._explain(error)

    def _tunes_all(self, document: Mapping[str, Any]) -> bool:
        """Whether the job trains every weight rather than an adapter."""
        tuning = document.get(TUNING, TUNINGS[0])
        if tuning not in TUNINGS:
            self._fail(f"{TUNING} is {_found(tuning)}", 'write "lora" or "full"')
        if tuning == "full" and "lora" in document:
            self._fail('[lora] has no meaning with tuning = "full"', "remove one of the two")
        return bool(tuning == "full")

    def _environments(self, document: Mapping[str, Any]) -> list[dict[str, Any]]:
        value = document.get("env")
        if isinstance(value, dict):
            self._fail("[env] is a single table", "write [[env]], once for each environment")
        if value is None or value == []:
            self._fail("there is no environment", 'add [[env]] with id = "addition" or another')
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            self._fail(f"env is {_found(value)}", "write [[env]] tables")
        for number, env in enumerate(value):
            where = f"env[{number}]"
            self._check_known(env, where, list(ENV_KEYS))
            if "id" not in env:
                self._fail(f"{where} has no id", 'add for example id = "addition"')
            for key in ("id", "weight"):
                if key in env:
                    self._check_scalar(f"{where}.{key}", env[key])
            args = env.get("args", {})
            if not isinstance(args, dict):
                self._fail(
                    f"{where}.args is {_found(args)}", "write a table such as { digits = 2 }"
                )
            for key, item in args.items():
                self._check_scalar(f"{where}.args.{key}", item)
        return list(value)

    def _budget(self, document: Mapping[str, Any]) -> dict[str, int]:
        if "budget" not in document:
            self._fail("there is no [budget]", "add it with max_total and max_unit_price")
        budget = self._table(document, "budget")
        self._check_known(budget, "budget", list(BUDGET_KEYS))
        for key in ("max_total", "max_unit_price"):
            if key not in budget:
                self._fail(f"budget.{key} is missing", 'give dollars as text, such as "25.00"')
        spec = {"max_total_micros": self._price("budget.max_total", budget["max_total"])}
        spec |= self._unit_prices(budget["max_unit_price"])
        if STALE_PAY in budget:
            spec["stale_pay_permille"] = self._permille(f"budget.{STALE_PAY}", budget[STALE_PAY])
        if "delay_cost" in budget:
            spec["delay_micros_per_s"] = self._money("budget.delay_cost", budget["delay_cost"])
        return spec

    def _unit_prices(self, unit: object) -> dict[str, int]:
        where = "budget.max_unit_price"
        if not isinstance(unit, dict):
            return {f"max_{kind}_micros": self._price(where, unit) for kind in PRICED}
        self._check_known(unit, where, list(PRICED))
        missing = next((kind for kind in PRICED if kind not in unit), None)
        if missing is not None:
            self._fail(
                f"{where} has no price for {missing}",
                "price rollout, gradient and evaluate, or give one text for all three",
            )
        return {f"max_{kind}_micros": self._price(f"{where}.{kind}", unit[kind]) for kind in PRICED}

    def _price(self, key: str, value: object) -> int:
        micros = self._money(key, value)
        if micros == 0:
            self._fail(f"{key} is zero", "nothing can be bought for it; raise it")
        return micros

    def _money(self, key: str, value: object) -> int:
        if not isinstance(value, str):
            self._fail(f"{key} is {_found(value)}", 'give dollars as text, such as "25.00"')
        micros = parse_dollars(value, f"{self.source}: {key}")
        if micros > MAX_MICROS:
            self._fail(f"{key} is {value}", f"give at most {format_dollars(MAX_MICROS)}")
        return micros

    def _permille(self, key: str, value: object) -> int:
        """A share between 0 and 1 as the whole thousandths that money is cut by."""
        # A bool is an int to Python, and not a share.
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            self._fail(f"{key} is {_found(value)}", "give a share from 0 to 1, such as 0.9")
        # Floating point gives a whole number here for each of the 1,001 shares there are.
        permille = value * _PERMILLE
        if permille != int(permille):
            self._fail(f"{key} is {_found(value)}", "give at most three decimals")
        return int(permille)

    def _table(self, document: Mapping[str, Any], name: str) -> Mapping[str, Any]:
        value = document.get(name, {})
        if not isinstance(value, dict):
            self._fail(f"{name} is {_found(value)}", f"write it as a table, [{name}]")
        return value

    def _check_known(self, table: Mapping[str, Any], where: str, known: list[str]) -> None:
        for key in table:
            if key not in known:
                nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
                place = f" in [{where}]" if where else ""
                raise InvalidRequest(
                    f"{self.source}: there is no key {key!r}{place}; "
                    f"the nearest valid name is {nearest!r}.",
                    code="unknown_key",
                    key=join(where, key),
                )

    def _check_scalar(self, key: str, value: object) -> None:
        """Refuses what JSON cannot say; the spec's own types judge the rest."""
        if isinstance(value, (dict, list, datetime.date, datetime.time)):
            self._fail(f"{key} is {_found(value)}", "give a text, a number, true or false")
        if isinstance(value, float) and not math.isfinite(value):
            self._fail(f"{key} is {value}", "give a finite number")
        # Beyond this JSON's numbers are no longer exact.
        if isinstance(value, int) and abs(value) > MAX_INT:
            self._fail(f"{key} is {_found(value)}", f"give at most {MAX_INT}")

    def _explain(self, error: ValidationError) -> NoReturn:
        fault = error.errors(include_url=False, include_context=False)[0]
        # A rule between several keys: our own sentence, which names them.
        if fault["type"] == "value_error" and isinstance(fault["input"], dict):
            where = f" in {file_key(fault['loc'])}," if fault["loc"] else ""
            reason = fault["msg"].removeprefix("Value error, ")
            raise InvalidRequest(f"{self.source}:{where} {reason}.", code="invalid_job") from None
        key = file_key(fault["loc"])
        reason = fault["msg"].replace("Input should be", "it should be", 1)
        reason = reason.replace("String should", "it should", 1)
        raise InvalidRequest(
            f"{self.source}: {key} is {_found(fault['input'])}; {reason}.",
            code="invalid_value",
            key=key,
        ) from None

    def _fail(self, wrong: str, remedy: str) -> NoReturn:
        raise InvalidRequest(f"{self.source}: {wrong}; {remedy}.", code="invalid_job")


def _apply_override(document: dict[str, Any], override: str) -> None:
    """Writes one ``--set`` into ``document``."""
    path, equals, raw = override.partition("=")
    parts = path.strip().split(".")
    if not equals or not all(parts):
        raise InvalidRequest(
            f"--set {override!r} is not of the form key=value or table.key=value.",
            code="invalid_override",
        )
    node: Any = document
    for part in parts[:-1]:
        if isinstance(node, list):
            node = _list_item(node, part, override)
        elif isinstance(node, dict):
            node = node.setdefault(part, {})
    if not isinstance(node, dict):
        raise InvalidRequest(
            f"--set {override!r} goes into {'.'.join(parts[:-1])}, which is not a table; "
            "name a key of a table.",
            code="invalid_override",
        )
    # Dollars are text in the file; on a command line their quotes are the shell's.
    is_money = parts[0] == "budget" and parts[-1] != STALE_PAY
    node[parts[-1]] = raw.strip(" \"'") if is_money else _override_value(raw)


def _list_item(items: list[Any], part: str, override: str) -> Any:
    if not (part.isascii() and part.isdigit() and int(part) < len(items)):
        raise InvalidRequest(
            f"--set {override!r} names item {part!r} of a list of {len(items)}; "
            "items are numbered from 0.",
            code="invalid_override",
        )
    return items[int(part)]


def _override_value(raw: str) -> Any:
    """``raw`` as a TOML value, or as the text it is."""
    try:
        parsed = tomllib.loads(f"value = {raw}")
    except (ValueError, RecursionError):
        return raw.strip()
    return parsed["value"] if len(parsed) == 1 else raw.strip()


def _found(value: object) -> str:
    """``value`` in a person's words."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f"the text {value[:80]!r}"
    if isinstance(value, (int, float)):
        return f"the number {value}"
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, list):
        return "a list"
    return f"the date or time {value}"


def _put(target: dict[str, Any], path: tuple[str, ...], value: object) -> None:
    for part in path[:-1]:
        target = target.setdefault(part, {})
    target[path[-1]] = value


def _at(source: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    value: Any = source
    for part in path:
        value = None if value is None else value[part]
    return value


def _render_value(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return _quote(value) if isinstance(value, str) else repr(value)


def _quote(text: str) -> str:
    """``text`` as a TOML basic string: JSON's escapes, and DEL, which JSON leaves bare."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
