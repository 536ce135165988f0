"""The worker's log: one JSON object for each event, with the ids involved and never a secret."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

_EVENTS: Final = logging.getLogger("shoal.worker")
_ATTRIBUTE: Final = "shoal_event"

Field = str | int | float | bool | None


def log_event(event: str, level: int = logging.INFO, /, **fields: Field) -> None:
    """``event`` is in the log with its ``fields`` (job_id, lease_id, policy_version, …)."""
    _EVENTS.log(level, event, extra={_ATTRIBUTE: fields})


def log_failure(event: str, error: BaseException, /, **fields: Field) -> None:
    """``event`` is in the log as a warning with the error's kind and sentence."""
    log_event(event, logging.WARNING, error=type(error).__name__, message=str(error), **fields)


class JsonFormatter(logging.Formatter):
    """Renders every record as one line of JSON.

    Args:
        worker: The worker's name, in every line.
    """

    def __init__(self, worker: str) -> None:
        super().__init__()
        self._worker = worker

    def format(self, record: logging.LogRecord) -> str:
        """The record as JSON: time, level, worker, event, then the event's own fields."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "worker": self._worker,
            "event": record.getMessage(),
            **getattr(record, _ATTRIBUTE, {}),
        }
        if record.name != _EVENTS.name:
            line["logger"] = record.name
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line)


def configure_logging(worker: str, file: Path | None) -> logging.Handler:
    """The root logger writes JSON lines to ``file``, or to standard error; returns the handler."""
    handler: logging.Handler
    if file is None:
        handler = logging.StreamHandler()
    else:
        file.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(file, encoding="utf-8")
    handler.setFormatter(JsonFormatter(worker))
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    _EVENTS.setLevel(logging.INFO)
    return handler
