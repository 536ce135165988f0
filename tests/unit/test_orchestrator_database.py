"""What the database promises beyond one transaction."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
from pathlib import Path

from sqlalchemy.orm import Session

from shoal.orchestrator.store.database import Database
from shoal.orchestrator.store.tables import NodeRow


def _write(session: Session) -> None:
    session.add(NodeRow(node="n", account="a", name="x", device="d", bound_node="{}", joined_ms=1))


def _survivors(file: Path, copy: Path) -> int:
    """Rows in the file alone, as if its write-ahead log had been lost with the power."""
    shutil.copy(file, copy)
    with sqlite3.connect(copy) as connection:
        count = connection.execute("SELECT count(*) FROM nodes").fetchone()[0]
    connection.close()
    return int(count)


def test_what_is_made_durable_does_not_depend_on_the_log(tmp_path: Path) -> None:
    async def run() -> tuple[int, int]:
        file = tmp_path / "o.db"
        database = Database(f"sqlite:///{file}")
        await database.make_durable()
        await database.run(_write)
        before = _survivors(file, tmp_path / "before.db")
        await database.make_durable()
        after = _survivors(file, tmp_path / "after.db")
        database.close()
        return before, after

    assert asyncio.run(run()) == (0, 1)
