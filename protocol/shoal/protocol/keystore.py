"""Account keys on disk.

Source: Web3 Secret Storage (keystore V3), through ``eth_account``.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from eth_account import Account as EthAccount
from eth_account.signers.local import LocalAccount

from shoal.protocol.canonical import parse_json
from shoal.protocol.errors import InvalidRequest, Unauthorised

PASSPHRASE_VARIABLE = "SHOAL_PASSPHRASE"
# Without a passphrase the file's mode is its only protection, and a slow key derivation
# would protect nothing; with one, eth_account's default work factor applies.
_EMPTY_PASSPHRASE_ITERATIONS = 2


def load_or_create_account(path: Path) -> LocalAccount:
    """The account in ``path``; a new one is written there (mode 0600) if the file is absent.

    Raises:
        InvalidRequest: the file is not a keystore, or cannot be written.
        Unauthorised: the passphrase does not open it.
    """
    return load_account(path) if path.exists() else create_account(path)


def create_account(path: Path) -> LocalAccount:
    """A new account, encrypted to ``path`` with the passphrase in ``SHOAL_PASSPHRASE``.

    Raises:
        InvalidRequest: ``path`` cannot be written, or is there already.
    """
    account: LocalAccount = EthAccount.create()
    store_account(path, account)
    return account


def store_account(path: Path, account: LocalAccount) -> None:
    """``account`` encrypted to ``path`` (mode 0600); an existing file is never replaced.

    Raises:
        InvalidRequest: ``path`` cannot be written, or is there already.
    """
    passphrase = os.environ.get(PASSPHRASE_VARIABLE, "")
    iterations = None if passphrase else _EMPTY_PASSPHRASE_ITERATIONS
    encrypted = EthAccount.encrypt(account.key, passphrase, iterations=iterations)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            json.dump(encrypted, file)
    except OSError as error:
        raise InvalidRequest(
            f"The key file {path} cannot be written: {error.strerror}.", code="key_not_written"
        ) from None


def load_account(path: Path) -> LocalAccount:
    """The account in ``path``.

    Raises:
        InvalidRequest: the file is missing or is not a keystore.
        Unauthorised: the passphrase does not open it.
    """
    try:
        encrypted = parse_json(path.read_bytes())
    except FileNotFoundError:
        raise InvalidRequest(
            f"There is no key file at {path}; name an existing one.", code="no_key"
        ) from None
    except (OSError, ValueError) as error:
        raise InvalidRequest(
            f"The key file {path} is not a V3 keystore: {error}.", code="bad_key_file"
        ) from None
    try:
        key = EthAccount.decrypt(encrypted, os.environ.get(PASSPHRASE_VARIABLE, ""))
    except ValueError:
        raise Unauthorised(
            f"The passphrase in {PASSPHRASE_VARIABLE} does not open {path}.", code="bad_passphrase"
        ) from None
    except (KeyError, TypeError):
        raise InvalidRequest(
            f"The key file {path} is not a V3 keystore.", code="bad_key_file"
        ) from None
    account: LocalAccount = EthAccount.from_key(key)
    return account
