"""What must hold before a worker uses a Ray cluster: a token, no stranger, nothing in public.

Ray runs any pickle that whoever reaches it sends.  Nothing here imports Ray into this
process: its settings hold for a whole process, so one of its own knocks at the cluster.
"""

from __future__ import annotations

import ipaddress
import os
import secrets
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Final

from shoal.protocol.errors import InvalidRequest, Unauthorised, Unavailable

_SOCKET_PATH_BYTES: Final = 103
"""The longest path of a Unix socket everywhere (macOS; Linux has four bytes more)."""
_SESSION_BYTES: Final = len("/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store")
_CONNECT_TIMEOUT_S: Final = 5.0
_KNOCK_TIMEOUT_S: Final = 60.0

_KNOCK: Final = """
import sys
from ray._raylet import GcsClient
from ray.exceptions import AuthenticationError
try:
    GcsClient(address=sys.argv[1])
except AuthenticationError:
    sys.exit(3)
"""


class _Answer(Enum):
    """What a cluster does with who knocks, by the exit code of the process that did."""

    ADMITTED = 0
    REFUSED = 3


def require_own_cluster(address: str) -> None:
    """Passes only if the cluster at ``address`` admits us by token, and no one without.

    Raises:
        InvalidRequest: the address is none, or strangers are admitted.
        Unauthorised: there is no token, or the cluster's is another.
        Unavailable: nothing answers, or it is no Ray of our version.
    """
    _require_reachable(address)
    if not find_token(os.environ, Path.home()):
        raise Unauthorised(
            "There is no Ray token; set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the one the "
            "cluster was started with.",
            code="ray_token",
        )
    require_guarded(address)
    if _knock(address, {**os.environ, "RAY_AUTH_MODE": "token"}) is not _Answer.ADMITTED:
        raise Unauthorised(
            f"The Ray cluster at {address} has another token than this worker; set "
            "RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's.",
            code="ray_token",
        )


def find_token(environment: Mapping[str, str], home: Path) -> bool:
    """Whether Ray would find a token: in the environment, the file it names, or at home.

    Source: Ray's documentation, "Ray token authentication", order of precedence.
    """
    if environment.get("RAY_AUTH_TOKEN"):
        return True
    named = environment.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else home / ".ray" / "auth_token"
    return path.is_file() and path.stat().st_size > 0


def require_guarded(address: str) -> None:
    """Passes only if the cluster turns away a caller that has no token.

    Raises:
        InvalidRequest: it admits whoever reaches it.
        Unavailable: what answers there is no Ray of our version.
    """
    answer = _knock(address, stranger_environment(os.environ))
    if answer is _Answer.ADMITTED:
        raise InvalidRequest(
            f"The Ray cluster at {address} obeys whoever reaches it; start every node of it "
            "with RAY_AUTH_MODE=token and one token.",
            code="ray_exposed",
        )
    if answer is None:
        raise Unavailable(
            f"What answers at {address} is no Ray cluster, or of another version than the Ray "
            "installed here; correct the address, or install the same Ray on every node.",
            code="ray_unavailable",
        )


def stranger_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """That of a caller without a token, who can talk to the cluster for all else.

    Without its TLS settings a cluster that uses TLS would answer nobody, token or not.
    """
    kept = {
        name: value
        for name, value in environment.items()
        if not name.startswith("RAY_") or name.startswith(("RAY_TLS_", "RAY_USE_TLS"))
    }
    return kept | {"RAY_AUTH_MODE": "disabled"}


def require_unexposed(address: str, dashboard: str, hosts: Sequence[str]) -> None:
    """Passes only if the cluster shows no dashboard, and its nodes no public address.

    Raises:
        InvalidRequest: it does; says how to start it otherwise.
    """
    if dashboard:
        raise InvalidRequest(
            f"The Ray cluster at {address} serves a dashboard at {dashboard}, which runs code "
            "for its callers; start its head with --include-dashboard=false.",
            code="ray_exposed",
        )
    public = [host for host in hosts if ipaddress.ip_address(host).is_global]
    if public and os.environ.get("RAY_USE_TLS") != "1":
        raise InvalidRequest(
            f"The Ray cluster at {address} has a node at the public address {public[0]}, and "
            "its token would cross the network in clear; use private addresses, or RAY_USE_TLS=1.",
            code="ray_exposed",
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address ``host``."""
    return ipaddress.ip_address(host).is_loopback


def make_temp_dir(data_dir: Path) -> Path:
    """An empty folder for Ray's files whose sockets' paths are short enough."""
    folder = data_dir.resolve() / "ray"
    if len(os.fsencode(folder)) + _SESSION_BYTES > _SOCKET_PATH_BYTES:
        # Not `tempfile`'s choice, which on macOS is too long itself.
        folder = Path("/tmp") / f"shoal-{secrets.token_hex(6)}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, mode=0o700)
    return folder


def _require_reachable(address: str) -> None:
    host, _, port = address.rpartition(":")
    is_port = port.isdecimal() and len(port) <= 5 and 0 < int(port) < 1 << 16
    if not host or not is_port or "/" in address:
        raise InvalidRequest(
            f"{address!r} is no Ray address; give HOST:PORT of the cluster's head, or nothing "
            "for a cluster on this machine.",
            code="ray_address",
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise Unavailable(
            f"Nothing answers at the Ray address {address}: {error}; start the cluster, or "
            "correct the address.",
            code="ray_unavailable",
        ) from None


def _knock(address: str, environment: Mapping[str, str]) -> _Answer | None:
    """What the cluster answers to a process with this environment; None if nothing of use."""
    try:
        code = subprocess.run(
            [sys.executable, "-c", _KNOCK, address],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            stdin=subprocess.DEVNULL,
            timeout=_KNOCK_TIMEOUT_S,
            check=False,
        ).returncode
        return _Answer(code)
    except (subprocess.TimeoutExpired, ValueError):
        return None
