"""`shoal market simulate`: what it says, to people and to programs, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from shoal.client import command
from shoal.client.output import Output
from shoal.client.simulate_view import plot_study, study_json, study_picture
from shoal.market.simulation.comparison import Effort, compare, compare_thickness
from shoal.market.simulation.population import Scenario
from shoal.market.simulation.trial import Study
from shoal.protocol.errors import InvalidRequest

SMALL = ("--providers", "6", "--markets", "4", "--rounds", "8")
PNG = b"\x89PNG\r\n\x1a\n"


def small_study() -> Study:
    effort = Effort(markets=4, rounds=6)
    scenario = Scenario(num_providers=5)
    return Study(
        effort=effort,
        comparisons=(compare("five", scenario, effort)[0],),
        steady=compare_thickness(scenario, effort, (4, 6)),
        varying=compare_thickness(replace(scenario, load_spread=0.25), effort, (4, 6)),
    )


def test_a_program_gets_every_rule_and_the_work(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.run(["market", "simulate", *SMALL, "--units", "500", "--json"]) == 0

    document = json.loads(capsys.readouterr().out)
    rules = {result["rule"] for result in document["comparison"]["rules"]}
    assert rules == {"pay_as_bid", "uniform", "clarke", "posted", "truthful_uniform"}
    assert document["work"]["units"] == 500
    assert document["work"]["rule"] == "pay_as_bid"


def test_one_market_has_no_interval(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.run(["market", "simulate", *SMALL, "--markets", "1", "--json"]) == 0

    document = json.loads(capsys.readouterr().out)
    assert document["comparison"]["rules"][0]["unit_price"]["half_width"] is None


def test_people_get_tables_and_a_picture(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "new" / "market.png"

    assert command.run(["market", "simulate", *SMALL, "--plot", str(path)]) == 0

    said = capsys.readouterr().out
    for word in ("pay as bid", "Clarke", "largest quarter", "makespan", "cheaters caught"):
        assert word in said
    assert path.read_bytes().startswith(PNG)


def test_a_study_reads_as_tables_as_json_and_as_a_picture(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    study = small_study()
    path = tmp_path / "study.png"

    Output(json_mode=False).say(*study_picture(study))
    plot_study(study, path)

    assert "one price saves" in capsys.readouterr().out
    assert path.read_bytes().startswith(PNG)
    document = json.loads(json.dumps(study_json(study), allow_nan=False))
    assert [item["num_providers"] for item in document["steady"]] == [4, 6]


def test_a_picture_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(InvalidRequest, match="cannot be written"):
        plot_study(small_study(), tmp_path / "file" / "plot.png")


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("--giants", "9", "--providers", "4"), 3),
        (("--load", "0"), 3),
        (("--audit-rate", "0"), 3),
        (("--providers", "1"), 2),
        (("--crashes", "1.5"), 2),
    ],
)
def test_what_cannot_be_simulated_is_refused(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], code: int
) -> None:
    assert command.run(["market", "simulate", *arguments]) == code

    said = capsys.readouterr()
    assert said.out == ""
    assert "Traceback" not in said.err


def test_a_simulation_imports_neither_torch_nor_a_chain_nor_a_plotter() -> None:
    code = (
        "import sys\n"
        "from shoal.client.command import run\n"
        f"code = run(['market', 'simulate', *{SMALL!r}, '--json'])\n"
        "heavy = {'torch', 'transformers', 'web3', 'ray', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(code or len(heavy))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
