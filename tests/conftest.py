"""Fixtures that more than one suite uses."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
from hypothesis import settings
from postgres_server import PostgresServer, running_postgres

# A shared machine may stall for longer than Hypothesis's deadline allows an example.
settings.register_profile("shoal", deadline=None)
settings.load_profile("shoal")

_database_numbers = itertools.count()


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """A real Postgres, started on first use and stopped with the session."""
    with running_postgres() as server:
        yield server


@pytest.fixture
def postgres_url(postgres_server: PostgresServer) -> Iterator[str]:
    """SQLAlchemy's address of an empty database that no other test sees."""
    name = f"test_{next(_database_numbers)}"
    postgres_server.create(name)
    yield postgres_server.url(name)
    postgres_server.drop(name)
