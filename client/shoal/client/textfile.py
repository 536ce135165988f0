"""Text files a person wrote: read whole, with a cap, and every failure one sentence."""

from __future__ import annotations

from pathlib import Path

from shoal.protocol.errors import InvalidRequest, NotFound

_MAX_BYTES = 1 << 20


def read_text_file(path: Path, what: str) -> str:
    """The UTF-8 text in the file at ``path``, of at most 1 MiB.

    Args:
        path: The file.
        what: What a person calls it, for the sentence: "job file".

    Raises:
        NotFound: there is no such file.
        InvalidRequest: it cannot be read, is too large or is not UTF-8.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        raise NotFound(f"There is no {what} at {path}; check the path.") from None
    except OSError as error:
        raise InvalidRequest(f"The {what} {path} cannot be read: {error.strerror}.") from error
    if len(data) > _MAX_BYTES:
        raise InvalidRequest(f"The {what} {path} is larger than {_MAX_BYTES} bytes.")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            f"The {what} {path} is not UTF-8 text at byte {error.start}; save it as UTF-8."
        ) from None
