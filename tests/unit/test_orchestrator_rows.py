"""Rows written past the session are as good as those written through it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from shoal.orchestrator.store.database import Database
from shoal.orchestrator.store.rows import insert_rows, update_row
from shoal.orchestrator.store.tables import JobRow, LotRow


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(f"sqlite:///{tmp_path / 'o.db'}")
    yield database
    database.close()


def job(job_id: str) -> JobRow:
    return JobRow(
        job_id=job_id, record="r", base="b", state="running", escrow_deadline_s=1, created_ms=2
    )


def lot(lot_id: str, job_id: str) -> LotRow:
    return LotRow(lot_id=lot_id, job_id=job_id, record="r", opened_ms=1)


def versions(session: Session) -> dict[str, int]:
    return {row.job_id: row.policy_version for row in session.scalars(select(JobRow))}


def test_what_a_row_does_not_name_takes_its_columns_default(database: Database) -> None:
    database.run_now(lambda session: insert_rows(session, job("a"), lot("l", "a")))
    row = database.run_now(lambda session: session.get_one(JobRow, "a"))
    assert (row.record, row.epoch, row.policy_version, row.reason) == ("r", 1, 0, "")
    assert row.started_ms is None


def test_rows_are_written_in_order_and_only_if_all_can_be(database: Database) -> None:
    with pytest.raises(IntegrityError):
        # The first row refers to the second, which does not stand yet.
        database.run_now(lambda session: insert_rows(session, lot("l", "a"), job("a")))
    with pytest.raises(IntegrityError):
        database.run_now(lambda session: insert_rows(session, job("b"), lot("l", "nobody")))
    assert database.run_now(versions) == {}


def test_an_update_changes_the_values_named_of_the_row_named(database: Database) -> None:
    database.run_now(lambda session: insert_rows(session, job("a"), job("b")))
    database.run_now(lambda session: update_row(session, JobRow, "b", {"policy_version": 7}))
    database.run_now(lambda session: update_row(session, JobRow, "c", {"policy_version": 8}))
    assert database.run_now(versions) == {"a": 0, "b": 7}
    assert database.run_now(lambda session: session.get_one(JobRow, "b").state) == "running"
