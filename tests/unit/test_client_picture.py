"""How a job and a demo's summary look."""

from __future__ import annotations

from pathlib import Path

import pytest
from client_records import drawn, evaluation, job
from hypothesis import given
from hypothesis import strategies as st

from shoal.client.commands.logs import health_words
from shoal.client.follow import JobWatch, PriceMemory, plain_line
from shoal.client.output import Output
from shoal.client.picture import dollars, duration, picture_of, sparkline
from shoal.client.views import JobView, parse_view
from shoal.protocol.errors import InvalidRequest, PeerFault


def test_the_picture_holds_the_figures_in_80_columns() -> None:
    text = drawn(picture_of(parse_view(JobView, job()), [0.1, 0.3, 0.5]))
    for figure in ("75/150", "1:07 left", "10.0% → 45.0%", "±4.0  +35.0 points", "$5.25 of $25.00"):
        assert figure in text
    assert "worker-1  gone" in text
    assert "0.000800" in text
    # Nothing wraps: a table of one worker has one line each.
    assert len([line for line in text.splitlines() if "worker-1" in line]) == 1


def test_the_first_and_the_last_accuracies_are_shown() -> None:
    evaluations = [evaluation(n, n / 10) for n in reversed(range(6))]
    text = drawn(picture_of(parse_view(JobView, job(evaluations=evaluations)), []))
    assert "0.0% … 30.0% → 40.0% → 50.0%" in text


NO_SPREAD = {
    "code": "no_spread",
    "finding": "78% of groups have zero reward spread",
    "remedy": "make tasks [easier]",
}


def test_what_is_wrong_is_drawn_with_its_remedy() -> None:
    text = drawn(picture_of(parse_view(JobView, job(health=[NO_SPREAD])), []))
    assert "! 78% of groups have zero reward spread: make tasks [easier]" in text
    assert "!" not in drawn(picture_of(parse_view(JobView, job()), []))


def test_a_watched_job_says_once_what_begins_and_ends_to_be_wrong(
    capsys: pytest.CaptureFixture[str],
) -> None:
    watch = JobWatch(Output(json_mode=False, picture_width=120), emit_json=False)
    for version, health in enumerate(([], [NO_SPREAD], [NO_SPREAD], [], [])):
        watch.see(parse_view(JobView, job(policy_version=20 * version, health=health)))
    lines = capsys.readouterr().out.splitlines()
    said = [line.strip() for line in lines if line.startswith("health:")]
    assert said == [
        "health: 78% of groups have zero reward spread: make tasks [easier]",
        "health: no_spread is over",
    ]
    assert len(lines) == 5 + len(said)


def test_a_health_event_reads_as_a_sentence() -> None:
    assert health_words(NO_SPREAD | {"active": True}) == (
        "78% of groups have zero reward spread: make tasks [easier]"
    )
    assert health_words(NO_SPREAD | {"active": False}) == "no_spread is over"


def test_prices_are_remembered_when_the_market_has_forgotten_them() -> None:
    memory = PriceMemory()
    before = parse_view(JobView, job())
    assert memory.fill(before) == before
    workers = [worker | {"price_micros": {}} for worker in job()["workers"]]
    assert memory.fill(parse_view(JobView, job(workers=workers))) == before
    assert PriceMemory().fill(parse_view(JobView, job(workers=workers))) != before


def test_the_picture_of_a_run_holds_what_was_said_and_asks_nobody_for_a_font(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = Output(json_mode=False, picture_width=60)
    output.say("[bold]market[/bold]")
    output.say("passing", kept=False)
    output.keep("result")
    output.save_picture(tmp_path / "run.svg", "a title")
    picture = (tmp_path / "run.svg").read_text()
    assert "market" in picture
    assert "result" in picture
    for absent in ("passing", "@font-face", "https://cdn"):
        assert absent not in picture
    assert capsys.readouterr().out.split() == ["market", "passing"]
    with pytest.raises(InvalidRequest, match="cannot be written"):
        output.save_picture(tmp_path / "none" / "run.svg", "a title")


def test_a_job_that_has_not_begun_is_drawn() -> None:
    view = parse_view(
        JobView, job(state="funding", reward_recent=None, eta_s=None, evaluations=[], workers=[])
    )
    text = drawn(picture_of(view, []))
    assert "not evaluated yet" in text
    assert "starting" in text


def test_markup_in_a_stranger_s_name_is_not_obeyed() -> None:
    view = parse_view(JobView, job(name="[red]x[/red]", reason="[bold]y"))
    text = drawn(picture_of(view, []))
    assert "[red]x[/red]" in text
    assert "[bold]y" in text


def test_the_plain_line() -> None:
    assert plain_line(parse_view(JobView, job())) == (
        "running   version 75/150  reward 0.500  held-out 45.0% ±4.0  spent $5.25 of $25.00  "
        "0 workers  1:07 left"
    )


@given(st.lists(st.floats(-1, 2), max_size=300), st.integers(1, 60))
def test_a_sparkline_keeps_its_width(values: list[float], width: int) -> None:
    assert len(sparkline(values, width)) == min(len(values), width)


def test_a_sparkline_s_scale_is_0_to_1() -> None:
    assert sparkline([0.0, 0.5, 1.0]) == "▁▅█"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0 s"), (42, "42 s"), (187, "3:07"), (3723, "1:02:03")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("micros", "text"), [(0, "$0.00"), (5_000, "$0.01"), (4_999, "$0.00"), (-1_250_000, "-$1.25")]
)
def test_money_for_reading(micros: int, text: str) -> None:
    assert dollars(micros) == text


@pytest.mark.parametrize("change", [{"state": "dancing"}, {"job_id": "x"}, {"max_steps": None}])
def test_an_answer_that_is_no_job_is_a_peer_fault(change: dict[str, object]) -> None:
    with pytest.raises(PeerFault, match="not a JobView"):
        parse_view(JobView, job(**change))


def test_fields_of_a_newer_orchestrator_are_ignored() -> None:
    assert parse_view(JobView, job(later="yes")).name == "addition"
