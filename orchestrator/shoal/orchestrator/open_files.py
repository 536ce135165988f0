"""How many files and sockets the process may hold: many systems allow 1,024 at first."""

from __future__ import annotations

import logging
import resource
from typing import Final

# The API's and the blob server's callers, the database, blobs being read and written.
_BESIDES_CONNECTIONS: Final = 2048
_LOG: Final = logging.getLogger(__name__)


def allow_connections(num_connections: int) -> bool:
    """True when the process may now hold that many connections beside its other files."""
    wanted = num_connections + _BESIDES_CONNECTIONS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    if most < wanted:
        _LOG.warning(
            "this process may open %d files, but %d connections and what else it does may take "
            "%d; raise the limit (ulimit -n, or LimitNOFILE= in systemd)",
            most,
            num_connections,
            wanted,
        )
    return most == wanted
