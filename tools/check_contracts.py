"""Checks the contracts: forge's tests, what transactions cost, halmos's proofs, slither's findings.

Usage: ``python tools/check_contracts.py PROVERS``, where PROVERS is the virtual environment that
holds halmos and slither; ``make contracts-check`` makes it and runs this.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOLIDITY = ROOT / "contracts" / "solidity"
FOUNDRY = ROOT / "tools" / "chain" / "node_modules" / "@foundry-rs"
STEP_TIMEOUT_S = 900
_REFUTED = 1
"""What halmos writes for a property it found a counterexample to; see its ``Exitcode``."""


class CheckFailed(Exception):
    """A step failed; the message says which and what to do."""


def run(environment: dict[str, str], *command: str) -> int:
    """Runs ``command`` beside the sources, its output shown; returns its exit status."""
    print(f"$ {' '.join(command)}", flush=True)
    return subprocess.run(
        command, cwd=SOLIDITY, env=environment, check=False, timeout=STEP_TIMEOUT_S
    ).returncode


def test_with_forge(environment: dict[str, str]) -> None:
    """Every forge test passes, gas ceilings included; what transactions cost is printed."""
    if run(environment | {"FORGE_SNAPSHOT_EMIT": "true"}, "forge", "test", "--offline"):
        raise CheckFailed("A forge test fails; its output is above.")
    costs: dict[str, str] = json.loads((SOLIDITY / "snapshots" / "gas.json").read_text())
    print("\nGas of whole transactions (ceilings: test/GasCeilings.t.sol)")
    for name, gas in costs.items():
        print(f"  {name:<24}{int(gas):>9,}")


def prove_with_halmos(environment: dict[str, str]) -> None:
    """What ``test/Proofs.t.sol`` states is proved, and of a contract that breaks it, refuted."""
    # The default of a minute for one question to the solver is short on a busy machine.
    patience = ("--solver-timeout-assertion", "300s")
    prove = ("halmos", "--no-status", *patience, "--function", "check_", "--contract")
    if run(environment, *prove, "Proofs"):
        raise CheckFailed("Halmos does not prove what test/Proofs.t.sol states; see above.")
    report = SOLIDITY / "out" / "halmos-control.json"
    report.unlink(missing_ok=True)
    run(environment, *prove, "ProofsControl", "--json-output", str(report))
    found = json.loads(report.read_text())["test_results"] if report.exists() else {}
    outcomes = [result["exitcode"] for results in found.values() for result in results]
    if outcomes != [_REFUTED]:
        raise CheckFailed(
            "Halmos does not refute the escrow without a cap (ProofsControl), so its proofs mean "
            "nothing; see above."
        )
    print("The counterexamples above are meant: they refute the escrow without a cap.\n")


def search_with_slither(environment: dict[str, str]) -> None:
    """Slither finds nothing of high or medium impact that the sources do not give a reason for."""
    # Slither empties the build folder it uses, so it has one of its own.
    own = {"FOUNDRY_OUT": "out/slither", "FOUNDRY_CACHE_PATH": "out/slither/cache"}
    if run(environment | own, "slither", ".", "--foundry-out-directory", "out/slither"):
        raise CheckFailed(
            "Slither finds something; see above. Mend it, or where it is meant put "
            "`// slither-disable-next-line NAME` above the line and the reason above that."
        )


def main() -> int:
    """Runs the three steps in order and stops at the first that fails."""
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    provers = Path(sys.argv[1]).absolute() / "bin"
    # Not the launcher in .bin: that one exits with 0 when tests fail.
    forges = sorted(FOUNDRY.glob("forge-*/bin/forge"))
    missing = [tool for tool in ("halmos", "slither") if not (provers / tool).exists()]
    if missing or not forges:
        names = ", ".join([*missing, *([] if forges else ["forge"])])
        print(f"Not installed: {names}; run `make contracts-check`.", file=sys.stderr)
        return 1
    path = os.pathsep.join([str(forges[0].parent), str(provers), os.environ.get("PATH", "")])
    environment = {**os.environ, "PATH": path}
    try:
        test_with_forge(environment)
        prove_with_halmos(environment)
        search_with_slither(environment)
    except CheckFailed as failure:
        print(failure, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
