"""The development chain: anvil as a child process with saved state.

The child listens on the loopback address only, mines a block per transaction, and dies with
the process that started it.  Its accounts come from a phrase the whole world knows: nothing
of value may ever be sent to them on another chain.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
from pathlib import Path
from types import TracebackType
from typing import Self

import aiohttp
from eth_account import Account as EthAccount
from eth_account.signers.local import LocalAccount

from shoal.protocol.errors import InvalidRequest, Unavailable
from shoal.protocol.process import claim_port, end_with_parent

CHAIN_ID = 31337
"""Anvil's own; no public chain has it."""
DEV_MNEMONIC = "test test test test test test test test test test test junk"
"""Public by design; the phrase every Ethereum development chain starts with."""
DEV_ACCOUNTS = 20
START_TIMEOUT_S = 20.0
STOP_TIMEOUT_S = 10.0
SETTLE_BEFORE_STOP_S = 0.5
"""A stop right after a transaction, while the interval dump runs, saved a torn state in one
of ten trials; after this pause in none of ten."""
_POLL_S = 0.02
_MAX_LOG_BYTES = 65_536
_PORT_ATTEMPTS = 3
_INSTALL = "`npm ci --prefix tools/chain --ignore-scripts` in the checkout"


class Anvil:
    """A running chain, as an async context: inside it `rpc_url` answers.

    Args:
        directory: Holds ``chain.json`` (the state, saved each second and on stop) and
            ``anvil.log``; made when missing. A later chain in it continues where this ended.
        port: TCP port on 127.0.0.1; 0 picks a free one.
        binary: The native anvil; found by `find_anvil` when absent.

    The child is killed when the *thread* that started it ends (Linux); start it from a
    thread that lives as long as the chain should, such as the main one.  Elsewhere than on
    Linux a killed parent leaves it running.

    Example:
        >>> async def block_zero(directory: Path) -> str:
        ...     async with Anvil(directory) as chain:
        ...         return chain.rpc_url
    """

    def __init__(self, directory: Path, *, port: int = 0, binary: Path | None = None) -> None:
        self.directory = directory
        self.port = port
        self.chain_id = CHAIN_ID
        self._fixed_port = port != 0
        self._binary = binary
        self._process: asyncio.subprocess.Process | None = None
        self._log_path = directory / "anvil.log"
        self._log_start = 0

    @property
    def rpc_url(self) -> str:
        """Where the chain answers JSON-RPC."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int | None:
        """The child's process id while it runs."""
        return None if self._process is None else self._process.pid

    async def start(self) -> None:
        """The chain answers at `rpc_url`.

        Raises:
            InvalidRequest: the port asked for is in use (``port_in_use``).
            Unavailable: the binary is missing, or the chain does not come up.
        """
        binary = self._binary or find_anvil()
        self.directory.mkdir(parents=True, exist_ok=True)
        attempts = 1 if self._fixed_port else _PORT_ATTEMPTS
        for attempt in range(1, attempts + 1):
            self.port = claim_port(self.port if self._fixed_port else 0, "the chain")
            self._process = await self._spawn(binary)
            try:
                await self._wait_ready(self._process)
            except Unavailable:
                await self._end(self._process)
                self._process = None
                if attempt == attempts:
                    raise
            except BaseException:
                await self._end(self._process)
                self._process = None
                raise
            else:
                return

    async def stop(self) -> None:
        """The state is saved and the child has ended; stopping twice is harmless."""
        process, self._process = self._process, None
        if process is None or process.returncode is not None:
            return
        await asyncio.sleep(SETTLE_BEFORE_STOP_S)
        await self._end(process)

    async def wait(self) -> int:
        """The exit status of a chain that ended by itself; a supervisor awaits this."""
        return 0 if self._process is None else await self._process.wait()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await asyncio.shield(self.stop())

    async def _spawn(self, binary: Path) -> asyncio.subprocess.Process:
        arguments = (
            *("--host", "127.0.0.1", "--port", str(self.port), "--chain-id", str(self.chain_id)),
            *("--mnemonic", DEV_MNEMONIC, "--accounts", str(DEV_ACCOUNTS)),
            *("--hardfork", "cancun", "--order", "fifo"),
            *("--state", str(self.directory / "chain.json"), "--state-interval", "1"),
            "--quiet",
        )
        with self._log_path.open("ab") as log:
            self._log_start = log.tell()
            return await asyncio.create_subprocess_exec(
                str(binary),
                *arguments,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # A session of its own: Ctrl-C reaches us alone, and we stop the chain last.
                start_new_session=True,
                preexec_fn=end_with_parent(),
            )

    async def _wait_ready(self, process: asyncio.subprocess.Process) -> None:
        body = {"jsonrpc": "2.0", "id": 1, "method": "eth_chainId", "params": []}
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(START_TIMEOUT_S), aiohttp.ClientSession() as session:
                while process.returncode is None:
                    with contextlib.suppress(aiohttp.ClientError, ValueError):
                        async with session.post(self.rpc_url, json=body) as reply:
                            answer = await reply.json()
                            if answer.get("result") == hex(self.chain_id):
                                return
                    await asyncio.sleep(_POLL_S)
        ended = process.returncode
        state = "gave no answer" if ended is None else f"ended with status {ended}"
        raise Unavailable(
            f"The development chain {state} at {self.rpc_url}: {self._last_words()}",
            code="chain_not_started",
        )

    def _last_words(self) -> str:
        with self._log_path.open("rb") as log:
            log.seek(self._log_start)
            said = log.read(_MAX_LOG_BYTES).decode(errors="replace").splitlines()
        faults = [line.strip() for line in said if "error" in line.lower()]
        return faults[-1][:300] if faults else f"see {self._log_path}."

    async def _end(self, process: asyncio.subprocess.Process) -> None:
        if process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(process.wait(), STOP_TIMEOUT_S)
        except TimeoutError:
            process.kill()
            await process.wait()


def find_anvil() -> Path:
    """The native anvil binary: ``SHOAL_ANVIL``, else the checkout's npm package, else PATH.

    Raises:
        Unavailable: there is none; the message says how to get it.
    """
    named = os.environ.get("SHOAL_ANVIL")
    if named:
        if not os.access(named, os.X_OK):
            raise Unavailable(
                f"SHOAL_ANVIL names {named}, which is no executable file; correct it or unset it.",
                code="anvil_missing",
            )
        return Path(named)
    packages = Path(__file__).resolve().parents[3] / "tools/chain/node_modules/@foundry-rs"
    for path in sorted(packages.glob("anvil-*/bin/anvil")):
        if os.access(path, os.X_OK):
            return path
    found = shutil.which("anvil")
    if found is None:
        raise Unavailable(
            f"The development chain needs anvil, which is not installed: run {_INSTALL}, or set "
            "SHOAL_ANVIL to the binary.",
            code="anvil_missing",
        )
    return Path(found)


def dev_account(index: int) -> LocalAccount:
    """The development chain's account ``index``, which starts with 10,000 ether.

    Source: BIP-32/39/44 derivation ``m/44'/60'/0'/0/index`` of `DEV_MNEMONIC`.
    """
    if not 0 <= index < DEV_ACCOUNTS:
        raise InvalidRequest(
            f"The development chain has no account {index}; it has 0 to {DEV_ACCOUNTS - 1}.",
            code="no_such_account",
        )
    EthAccount.enable_unaudited_hdwallet_features()
    account: LocalAccount = EthAccount.from_mnemonic(
        DEV_MNEMONIC, account_path=f"m/44'/60'/0'/0/{index}"
    )
    return account
