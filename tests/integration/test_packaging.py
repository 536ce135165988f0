"""The wheel holds ``shoal/`` and nothing else, and light entry points stay light."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = (
    "protocol",
    "models",
    "market",
    "rl",
    "contracts",
    "provenance",
    "network",
    "worker",
    "orchestrator",
    "client",
)


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What a wheel built from the tracked files holds, with no index and no network."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "source"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", *PACKAGES):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(
                source / "shoal",
                copy / name / "shoal",
                ignore=shutil.ignore_patterns("__pycache__"),
            )
        else:
            shutil.copy(source, copy)
    shutil.copytree(ROOT / "examples", copy / "examples")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder / "dist")],
        cwd=copy,
        check=True,
        capture_output=True,
    )
    (wheel,) = (folder / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_wheel_holds_only_shoal(wheel_names: list[str]) -> None:
    tops = {name.split("/")[0] for name in wheel_names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"shoal"}
    assert "shoal/__init__.py" not in wheel_names


def test_wheel_holds_every_package_typed(wheel_names: list[str]) -> None:
    for package in PACKAGES:
        assert f"shoal/{package}/__init__.py" in wheel_names
        assert f"shoal/{package}/py.typed" in wheel_names


def test_wheel_holds_all_that_is_not_python(wheel_names: list[str]) -> None:
    wanted = {
        str(path.relative_to(ROOT / package))
        for package in PACKAGES
        for path in (ROOT / package / "shoal").rglob("*")
        if path.is_file() and path.suffix not in {".py", ".pyc"}
    }
    assert any(name.startswith("shoal/contracts/") and name.endswith(".json") for name in wanted)
    wanted.add("shoal/client/examples/addition.toml")
    assert wanted <= set(wheel_names)


def _modules_after(code: str) -> set[str]:
    """The modules that are loaded once ``code`` has run in a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport json, sys; print(json.dumps(list(sys.modules)))"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


_HELP = """
import sys
from shoal.client import command
sys.argv = ["shoal", "--help"]
try:
    command.main()
except SystemExit as stop:
    assert not stop.code
"""
_LIGHT = {
    "help": _HELP,
    "planning": "import shoal.rl.prompts, shoal.rl.environments, shoal.rl.addition",
    "auction": "import shoal.market.clearing, shoal.market.sealing, shoal.market.replay",
    "settlement": "import shoal.market.settlement",
    "jobfile": "import shoal.client.jobfile",
}


@pytest.mark.parametrize("code", _LIGHT.values(), ids=_LIGHT.keys())
def test_entry_points_leave_torch_alone(code: str) -> None:
    assert "torch" not in _modules_after(code)


def test_torch_would_be_noticed() -> None:
    assert "torch" in _modules_after("import shoal.rl.loss")
