"""The Postgres that tests use is real, empty for each test, and gone afterwards."""

from __future__ import annotations

from postgres_server import running_postgres
from sqlalchemy import create_engine, text


def _make_table(url: str) -> list[str]:
    engine = create_engine(url)
    with engine.begin() as connection:
        before = connection.execute(
            text("SELECT tablename FROM pg_tables WHERE schemaname='public'")
        )
        names = [row[0] for row in before]
        connection.execute(text("CREATE TABLE only_here (n int)"))
    engine.dispose()
    return names


def test_a_test_gets_an_empty_database(postgres_url: str) -> None:
    assert _make_table(postgres_url) == []


def test_the_next_test_gets_another(postgres_url: str) -> None:
    assert _make_table(postgres_url) == []


def test_server_and_folder_are_gone_afterwards() -> None:
    with running_postgres() as server:
        folder = server.socket_dir
        engine = create_engine(server.url("postgres"))
        with engine.connect() as connection:
            assert "PostgreSQL" in connection.execute(text("SELECT version()")).scalar_one()
        engine.dispose()
        assert (folder / "postmaster.pid").exists()
    assert not folder.parent.exists()
