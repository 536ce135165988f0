"""Opening the database: engine, migrations, and one thread that talks to it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from alembic import command
from alembic.config import Config
from sqlalchemy import Engine, create_engine, event, text
from sqlalchemy.exc import DBAPIError, OperationalError, SQLAlchemyError
from sqlalchemy.orm import Session, sessionmaker

from shoal.protocol.errors import InvalidRequest, Unavailable

_MIGRATIONS = Path(__file__).parent.parent / "migrations"
_BUSY_TIMEOUT_MS = 10_000

_T = TypeVar("_T")


class DatabaseDown(Unavailable):
    """The database did not answer.

    Nothing was written, unless only the answer to a commit was lost on its way.
    """

    default_code = "database"


class Database:
    """A migrated database and the one thread every transaction runs in.

    One thread keeps SQLite's single writer and the order of writes simple; each call of
    `run` is one short transaction, and nothing inside it may wait on a network.
    """

    def __init__(self, url: str) -> None:
        self._engine = _open_engine(url)
        try:
            _migrate(self._engine)
        except BaseException:
            self._engine.dispose()
            raise
        self._sessions = sessionmaker(self._engine, expire_on_commit=False)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="database")

    def run_now(self, work: Callable[[Session], _T]) -> _T:
        """``work`` in one committed transaction, in this thread."""
        with self._sessions.begin() as session:
            return work(session)

    async def run(self, work: Callable[[Session], _T]) -> _T:
        """``work`` in one committed transaction, in the database's thread.

        Raises:
            DatabaseDown: the database did not answer.
        """
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._thread, self.run_now, work)
        except OperationalError as error:
            raise DatabaseDown(f"The database did not accept the write: {error.orig}.") from error

    async def make_durable(self) -> None:
        """Everything committed so far survives a power cut; on Postgres it does already."""
        if self._engine.dialect.name == "sqlite":
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._thread, self._checkpoint)

    def _checkpoint(self) -> None:
        # A checkpoint syncs the write-ahead log first.  It may not run inside a transaction.
        with self._engine.connect() as connection:
            connection.execution_options(isolation_level="AUTOCOMMIT")
            connection.execute(text("PRAGMA wal_checkpoint(PASSIVE)")).all()

    def close(self) -> None:
        """Waits for the transaction under way and closes every connection."""
        self._thread.shutdown(wait=True)
        self._engine.dispose()


def _open_engine(url: str) -> Engine:
    try:
        # Each connection is tried before use: the server may have been restarted.
        engine = create_engine(url, pool_pre_ping=True)
    except (SQLAlchemyError, ImportError) as error:
        raise InvalidRequest(
            f"The database URL {url.split('@')[-1]!r} cannot be used: {error}; write "
            "sqlite:///FILE or postgresql+psycopg://USER@HOST/NAME.",
            code="bad_database_url",
        ) from None
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _tune_sqlite)
    return engine


def _tune_sqlite(connection: Any, _record: object) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    # NORMAL: a commit survives the process's death at once, and a power cut only from the next
    # `make_durable` on.  Waiting for the disk at each commit would hold up every lease.
    cursor.execute("PRAGMA synchronous=NORMAL")
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.execute(f"PRAGMA busy_timeout={_BUSY_TIMEOUT_MS}")
    cursor.close()


def _migrate(engine: Engine) -> None:
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS))
    try:
        with engine.begin() as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
    except DBAPIError as error:
        raise DatabaseDown(
            f"The database at {engine.url.render_as_string(hide_password=True)} cannot be "
            f"opened: {error.orig}; check that it runs and that the URL is right.",
        ) from None
