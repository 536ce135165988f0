"""What every program of Shoal does alike at its edge: options, errors, ports, its parent's end."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence

from shoal.protocol.errors import InvalidRequest, ShoalError

DEBUG_VARIABLE = "SHOAL_DEBUG"
_SWITCH_INTERVAL_S = 0.0005
_PR_SET_PDEATHSIG = 1
"""Source: prctl(2)."""

_log = logging.getLogger(__name__)


def parse_pairs(pairs: Sequence[str]) -> dict[str, str]:
    """``["key=value", …]`` as a mapping.

    Raises:
        InvalidRequest: one has no ``=``.
    """
    options = {}
    for pair in pairs:
        key, sign, value = pair.partition("=")
        if not sign:
            raise InvalidRequest(f"--set {pair!r} has no '='; write --set key=value.")
        options[key.strip()] = value.strip()
    return options


def report_error(program: str, error: ShoalError, *, as_json: bool) -> int:
    """The error is on standard error, as one sentence or as JSON; its exit code.

    ``SHOAL_DEBUG=1`` adds the traceback.
    """
    if os.environ.get(DEBUG_VARIABLE):
        _log.exception("stopped")
    line = json.dumps(error.to_wire()) if as_json else f"{program}: {error.message}"
    sys.stderr.write(line + "\n")
    return error.exit_code


def share_interpreter() -> None:
    """A thread that wants the interpreter gets it within half a millisecond.

    Python lets a busy thread keep it for five, ten times as long.  One message passes between
    the event loop, the network's thread and the database's several times, and each time may
    wait for a thread that computes.

    Source: D. Beazley, "Understanding the Python GIL", PyCon 2010 (the convoy effect); figures
    in ``benchmarks/overhead``.
    """
    sys.setswitchinterval(_SWITCH_INTERVAL_S)


def end_with_parent() -> Callable[[], None] | None:
    """What a child process runs before its program, so that it ends if this one is killed.

    Everything is looked up here: between fork and exec only system calls may be made.  The
    kernel means the *thread* that starts the child.  Elsewhere than on Linux there is no
    such call, None is returned, and a killed parent leaves its children running.
    """
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl
    parent = os.getpid()

    def in_child() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died before the line above
            os._exit(1)

    return in_child


def claim_port(port: int, what: str) -> int:
    """``port``, or a free one for 0, found free just now.

    Raises:
        InvalidRequest: something listens there already.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # A port in TIME_WAIT is free, a listening one is not.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise InvalidRequest(
                f"Port {port} on 127.0.0.1 cannot be used for {what} ({error.strerror}); choose "
                "another port or stop what uses it.",
                code="port_in_use",
                port=port,
            ) from None
        return int(probe.getsockname()[1])
