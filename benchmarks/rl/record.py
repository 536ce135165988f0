"""The runs of a benchmark that are done, so that a call that is cut short need not begin anew."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shoal.protocol.job import JobSpec


class Record:
    """What runs came to, by their job's digest, in a JSON file.

    Args:
        path: The file; it and its folder are made if they do not exist.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._runs: dict[str, dict[str, Any]] = (
            json.loads(path.read_text()) if path.exists() else {}
        )

    def find_or_do(
        self, label: str, spec: JobSpec, do: Callable[[JobSpec], dict[str, Any]]
    ) -> dict[str, Any]:
        """What ``do`` made of ``spec``: on record, or else done now and then on record."""
        key = spec.digest()
        if key not in self._runs:
            started_s = time.process_time()
            self._runs[key] = do(spec)
            self._path.write_text(json.dumps(self._runs, indent=1) + "\n")
            sys.stderr.write(f"{label}: {time.process_time() - started_s:.0f} CPU seconds\n")
        return self._runs[key]
