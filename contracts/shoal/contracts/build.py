"""Compiles the Solidity sources into the artefacts that ship with the package.

Run from a checkout as ``python -m shoal.contracts.build``; add ``--check`` to compare
instead of write.  The compiler is the npm one pinned in ``tools/chain``; settings are fixed
here and metadata is left out of the bytecode, so the same sources give the same bytes on
every machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import posixpath
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from shoal.contracts.artefact import CONTRACTS
from shoal.protocol.errors import InvalidRequest, InvariantBroken, Unavailable

COMPILE_TIMEOUT_S = 600
SETTINGS: dict[str, Any] = {
    "evmVersion": "cancun",
    "optimizer": {"enabled": True, "runs": 1000},
    "metadata": {"bytecodeHash": "none", "appendCBOR": False},
}
"""Compiler settings; ``contracts/solidity/foundry.toml`` holds the same for forge."""

_IMPORT = re.compile(r'^\s*import\s+(?:[^"\';]*\sfrom\s+)?["\']([^"\']+)["\']', re.MULTILINE)


def checkout_root() -> Path:
    """The checkout this package is imported from.

    Raises:
        InvalidRequest: the package is installed from a wheel, which carries no sources.
    """
    root = Path(__file__).resolve().parents[3]
    if not (root / "contracts" / "solidity" / "src").is_dir():
        raise InvalidRequest(
            "The contracts can only be built from a checkout; this package has no Solidity "
            "sources. Use the artefacts it ships with.",
            code="no_sources",
        )
    return root


def collect_sources(root: Path) -> dict[str, str]:
    """Every Solidity file our contracts reach, by the name the compiler knows it under.

    Ours are ``src/NAME.sol``; the library's are ``@openzeppelin/…``.
    """
    pending = [f"src/{name}.sol" for name in CONTRACTS]
    sources: dict[str, str] = {}
    while pending:
        name = pending.pop()
        if name in sources:
            continue
        sources[name] = _path_of(root, name).read_text(encoding="utf-8")
        for target in _IMPORT.findall(sources[name]):
            relative = target.startswith(".")
            joined = posixpath.join(posixpath.dirname(name), target) if relative else target
            pending.append(posixpath.normpath(joined))
    return dict(sorted(sources.items()))


def source_digests(root: Path) -> dict[str, str]:
    """SHA-256 of each of our own sources that the shipped artefacts were compiled from."""
    folder = root / "contracts" / "solidity"
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted((folder / "src").rglob("*.sol"))
    }


def compile_artefacts(root: Path) -> dict[str, bytes]:
    """The artefact files, by name, as they must stand in ``artefacts/``.

    Raises:
        Unavailable: node or the npm packages are missing.
        InvalidRequest: a source does not compile.
    """
    output = _run_compiler(
        root,
        {
            "language": "Solidity",
            "sources": {name: {"content": text} for name, text in collect_sources(root).items()},
            "settings": SETTINGS
            | {"outputSelection": {"*": {"*": ["abi", "evm.bytecode.object"]}}},
        },
    )
    faults = [e for e in output.get("errors", []) if e["severity"] in ("error", "warning")]
    if faults:
        raise InvalidRequest(
            f"The Solidity sources do not compile cleanly: {faults[0]['formattedMessage']}",
            code="solidity_error",
        )
    digests = source_digests(root)
    return {f"{name}.json": _artefact(name, output, digests) for name in CONTRACTS}


def _artefact(name: str, output: dict[str, Any], digests: dict[str, str]) -> bytes:
    compiled = output["contracts"][f"src/{name}.sol"][name]
    record = {
        "contract": name,
        "compiler": output["compiler"],
        "settings": SETTINGS,
        "sources": digests,
        "abi": compiled["abi"],
        "bytecode": "0x" + compiled["evm"]["bytecode"]["object"],
    }
    return (json.dumps(record, indent=1, sort_keys=True) + "\n").encode()


def _path_of(root: Path, name: str) -> Path:
    if name.startswith("@openzeppelin/"):
        path = root / "tools" / "chain" / "node_modules" / name
        if not path.is_file():
            raise Unavailable(
                f"The Solidity library file {name} is missing; run "
                "`npm ci --prefix tools/chain --ignore-scripts` in the checkout.",
                code="npm_missing",
            )
        return path
    return root / "contracts" / "solidity" / name


def _run_compiler(root: Path, standard_json: dict[str, Any]) -> dict[str, Any]:
    node = shutil.which("node")
    if node is None:
        raise Unavailable(
            "Compiling the contracts needs node, which is not on PATH; install Node 20 or later "
            "(Debian: `apt-get install nodejs npm`).",
            code="node_missing",
        )
    wrapper = root / "tools" / "chain" / "solc"
    version = subprocess.run(
        [node, str(wrapper), "--version"],
        capture_output=True,
        check=True,
        timeout=COMPILE_TIMEOUT_S,
        text=True,
    ).stdout.split("Version: ")[1]
    try:
        done = subprocess.run(
            [node, str(wrapper)],
            input=json.dumps(standard_json),
            capture_output=True,
            check=False,
            timeout=COMPILE_TIMEOUT_S,
            text=True,
        )
    except subprocess.TimeoutExpired as error:
        raise Unavailable(
            f"The Solidity compiler was not done after {COMPILE_TIMEOUT_S} s; the machine is too "
            "busy. Run it again.",
            code="compiler_slow",
        ) from error
    if done.returncode:
        raise InvariantBroken(f"The Solidity compiler stopped: {done.stderr.strip()[-500:]}")
    output: dict[str, Any] = json.loads(done.stdout)
    output["compiler"] = version.strip()
    return output


def main(argv: list[str] | None = None) -> int:
    """Writes the artefacts, or with ``--check`` says whether they are up to date."""
    parser = argparse.ArgumentParser(prog="python -m shoal.contracts.build", description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    check = parser.parse_args(argv).check
    folder = Path(__file__).resolve().parent / "artefacts"
    built = compile_artefacts(checkout_root())
    stale = [
        name
        for name, data in built.items()
        if not (folder / name).is_file() or (folder / name).read_bytes() != data
    ]
    if not check:
        folder.mkdir(exist_ok=True)
        for name in stale:
            (folder / name).write_bytes(built[name])
    verb = "stale" if check else "written"
    names = ", ".join(stale) or "none"
    sys.stdout.write(f"{len(built)} artefacts, {len(stale)} {verb}: {names}\n")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
