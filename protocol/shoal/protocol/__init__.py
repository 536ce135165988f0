"""The words every part of Shoal shares: ids, money, errors, canonical form, signing, records."""

import contextlib as _contextlib
import sys as _sys

_RAISED_LIMIT = 100_000
_LIMIT = 1_000

# What eth-account imports raises the interpreter's recursion limit so far that deeply nested JSON,
# a model's configuration or a chain's answer, overflows the stack of whoever parses it with the
# standard library, and ends the process.  Imported here first, it cannot do so again later.
with _contextlib.suppress(ImportError):
    import py_ecc as _py_ecc  # noqa: F401
if _sys.getrecursionlimit() == _RAISED_LIMIT:
    _sys.setrecursionlimit(_LIMIT)
