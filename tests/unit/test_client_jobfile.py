"""Job files: what is right loads, what is wrong is named in one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TypeGuard, get_args

import pytest
from pydantic import BaseModel

from shoal.client.jobfile import load_job_file, parse_job, render_job_file
from shoal.client.jobfile_keys import KEYS
from shoal.protocol.errors import InvalidRequest, NotFound
from shoal.protocol.job import JobSpec
from shoal.protocol.learning import LoraSpec, LossKind

EXAMPLES = Path(__file__).parents[2] / "examples"
GOOD = """\
name = "n"
model = "builtin:tiny-addition"
max_steps = 3
batch_size = 16
rollouts_per_example = 8
learning_rate = 1e-3
[algorithm]
type = "dapo"
clip_low = 0.1
[optimizer]
warmup_steps = 2
[[env]]
id = "addition"
args = { digits = 2 }
[budget]
max_total = "1.50"
max_unit_price = "0.01"
"""


def test_file_becomes_spec_and_the_rest_is_default() -> None:
    spec = parse_job(GOOD, "job.toml")
    assert spec.loss.kind is LossKind.DAPO
    assert spec.loss.clip_low == 0.1
    assert spec.optimizer.learning_rate == 1e-3
    assert spec.optimizer.warmup_steps == 2
    assert spec.environments[0].args == {"digits": 2}
    assert spec.budget.max_total_micros == 1_500_000
    assert spec.budget.max_gradient_micros == 10_000
    assert spec.evaluation.interval == 20
    assert parse_job(render_job_file(spec), "again") == spec


@pytest.mark.parametrize(
    ("kind", "low", "high"),
    [("grpo", 0.2, 0.2), ("cispo", 0.2, 5.0), ("gspo", 3e-4, 4e-4), ("dapo", 0.2, 0.28)],
)
def test_an_absent_clip_is_the_usual_one_of_its_loss(kind: str, low: float, high: float) -> None:
    text = GOOD.replace('type = "dapo"\nclip_low = 0.1', f'type = "{kind}"')
    spec = parse_job(text, "job.toml")
    assert (spec.loss.clip_low, spec.loss.clip_high) == (low, high)
    assert f"clip_high = {high}" in render_job_file(spec)


def test_a_cispo_cap_below_one_is_refused_by_name() -> None:
    text = GOOD.replace('type = "dapo"\nclip_low = 0.1', 'type = "cispo"\nclip_high = 0.2')
    with pytest.raises(
        InvalidRequest, match=r"in \[algorithm\], clip_high 0\.2 would cap every CISPO"
    ):
        parse_job(text, "job.toml")


def test_full_tuning_has_no_adapter() -> None:
    full = parse_job('tuning = "full"\n' + GOOD, "job.toml")
    assert full.lora is None
    rendered = render_job_file(full)
    assert 'tuning = "full"' in rendered
    assert "[lora]" not in rendered
    assert parse_job(rendered, "again") == full
    assert parse_job('tuning = "lora"\n' + GOOD, "job.toml").lora == LoraSpec()
    with pytest.raises(InvalidRequest, match=r"\[lora\] has no meaning with tuning = \"full\""):
        parse_job('tuning = "full"\n' + GOOD + "[lora]\nr = 4\n", "job.toml")


def test_every_field_of_the_spec_has_a_key() -> None:
    """A default somebody cannot change, or cannot see in a dry run, is a defect."""
    paths = {path for keys in KEYS.values() for path in keys.values()}
    for path in _leaves(JobSpec):
        assert path[0] in ("environments", "budget") or path in paths, path
    assert paths <= set(_leaves(JobSpec))


def _leaves(record: type[BaseModel], prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, field in record.model_fields.items():
        inner = next(
            (a for a in (field.annotation, *get_args(field.annotation)) if _is_record(a)), None
        )
        if inner is None or name in ("environments", "budget"):
            yield (*prefix, name)
        else:
            yield from _leaves(inner, (*prefix, name))


def _is_record(annotation: object) -> TypeGuard[type[BaseModel]]:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def test_prices_by_kind() -> None:
    table = 'max_unit_price = { rollout = "3", gradient = "2", evaluate = "0.000001" }'
    budget = parse_job(GOOD.replace('max_unit_price = "0.01"', table), "job.toml").budget
    assert (budget.max_rollout_micros, budget.max_gradient_micros, budget.max_evaluate_micros) == (
        3_000_000,
        2_000_000,
        1,
    )


def test_what_waiting_and_age_cost_is_in_the_budget() -> None:
    plain = parse_job(GOOD, "job.toml")
    assert (plain.budget.stale_pay_permille, plain.budget.delay_micros_per_s) == (1_000, 0)
    spec = parse_job(GOOD + 'stale_pay = 0.875\ndelay_cost = "0.0001"\n', "job.toml")
    assert (spec.budget.stale_pay_permille, spec.budget.delay_micros_per_s) == (875, 100)
    rendered = render_job_file(spec)
    assert 'stale_pay = 0.875\ndelay_cost = "0.0001"' in rendered
    assert parse_job(rendered, "again") == spec
    whole = [parse_job(f"{GOOD}stale_pay = {share}\n", "job.toml") for share in (0, 1)]
    assert [spec.budget.stale_pay_permille for spec in whole] == [0, 1_000]


@pytest.mark.parametrize(
    "path",
    sorted(path for path in EXAMPLES.glob("*.toml") if path.name != "pool.toml"),
    ids=lambda path: path.stem,
)
def test_examples_load(path: Path) -> None:
    assert load_job_file(path).groups_per_batch >= 1


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("max_steps", "max_step", "job.toml: there is no key 'max_step'; .*'max_steps'"),
        ("clip_low", "clip_lo", r"no key 'clip_lo' in \[algorithm\]; .*'clip_low'"),
        ("[optimizer]", "[optimiser]", "no key 'optimiser'; .*'optimizer'"),
        ("id =", "idd =", r"no key 'idd' in \[env\[0\]\]; .*'id'"),
        ("max_total", "maxtotal", r"no key 'maxtotal' in \[budget\]; .*'max_total'"),
        ("max_steps = 3", 'max_steps = "3"', "max_steps is the text '3'; it should be a valid int"),
        ("max_steps = 3", "max_steps = true", "max_steps is true; it should be a valid int"),
        ("max_steps = 3", "max_steps = 0", "max_steps is the number 0; it should be greater"),
        ("max_steps = 3", "", "the key 'max_steps' is missing"),
        ("batch_size = 16", "batch_size = 12", "batch_size 12 is not a multiple"),
        ("1e-3", "nan", "learning_rate is nan; give a finite number"),
        ("1e-3", "2026-01-01", "learning_rate is the date or time 2026-01-01"),
        ("1e-3", "[1]", "learning_rate is a list"),
        ('"dapo"', '"ppo"', "algorithm.type is the text 'ppo'; it should be 'grpo', 'd"),
        ("clip_low = 0.1", "clip_low = 2", "algorithm.clip_low is the number 2"),
        ("[algorithm]", "[[algorithm]]", r"algorithm is a list; write it as a table, \[algorithm"),
        ("[[env]]", "[env]", r"\[env\] is a single table; write \[\[env\]\]"),
        ('[[env]]\nid = "addition"\nargs = { digits = 2 }', "", "there is no environment"),
        ('id = "addition"', "", r"env\[0\] has no id"),
        ('id = "addition"', "id = 7", r"env\[0\]\.id is the number 7"),
        ("{ digits = 2 }", "3", r"env\[0\]\.args is the number 3"),
        ("{ digits = 2 }", "{ digits = [2] }", r"env\[0\]\.args\.digits is a list"),
        ('"1.50"', '"0.00"', r"budget\.max_total is zero"),
        ('"1.50"', "1.5", r"budget\.max_total is the number 1\.5; give dollars as text"),
        ('"1.50"', '"cheap"', r"job\.toml: budget\.max_total is 'cheap'"),
        ('"1.50"', '"99999999999"', "give at most"),
        (
            "{ digits = 2 }",
            "{ digits = 9007199254740993 }",
            r"env\[0\]\.args\.digits is the number",
        ),
        ('max_total = "1.50"', "", r"budget\.max_total is missing"),
        ('"0.01"', '"0.01"\nstale_pay = 1.1', r"budget\.stale_pay is the number 1\.1; give a sh"),
        ('"0.01"', '"0.01"\nstale_pay = -0.1', r"stale_pay is the number -0\.1; give a share from"),
        ('"0.01"', '"0.01"\nstale_pay = nan', r"budget\.stale_pay is the number nan; give a"),
        ('"0.01"', '"0.01"\nstale_pay = "0.9"', r"budget\.stale_pay is the text '0\.9'; give a"),
        ('"0.01"', '"0.01"\nstale_pay = true', r"budget\.stale_pay is true; give a share"),
        ('"0.01"', '"0.01"\nstale_pay = 0.9005', r"number 0\.9005; give at most three decimals"),
        ('"0.01"', '"0.01"\ndelay_cost = 0.1', r"budget\.delay_cost is the number 0\.1; give dol"),
        ('"0.01"', '"0.01"\ndelay_cost = "0.1.1"', r"job\.toml: budget\.delay_cost is '0\.1\.1'"),
        ('"0.01"', '"0.01"\nstale = 0.9', r"no key 'stale' in \[budget\]; .*'stale_pay'"),
        ('"0.01"', '{ rollout = "1" }', "has no price for gradient"),
        ('[budget]\nmax_total = "1.50"\nmax_unit_price = "0.01"', "", r"there is no \[budget\]"),
        ("max_steps = 3", "max_steps = ", r"job\.toml is not valid TOML: .*line 3"),
        ("name =", "schema = 2\nname =", "schema is the number 2; it should be less than"),
        (
            "name =",
            'tuning = "lorra"\nname =',
            'tuning is the text .lorra.; write "lora" or "full"',
        ),
        ("name =", "tuning = [1]\nname =", 'tuning is a list; write "lora" or "full"'),
        ("name =", "tunning = 1\nname =", "no key 'tunning'; .*'tuning'"),
        ("[[env]]", "[correction]\ntoken_bound = 'cut'\n[[env]]", "correction.token_bound is the"),
        ("[[env]]", "[correction]\ntoken_cap = 2.0\n[[env]]", r"in \[correction\]; .*'token_max'"),
        ("[[env]]", "[gradient]\ncodec = 'top'\n[[env]]", "gradient.codec is the text 'top'"),
        (
            "[[env]]",
            "[gradient]\ncodec = 'topk'\nkeep = 5000\n[[env]]",
            r"in \[gradient\], keep 5000 is more than",
        ),
        (
            "[[env]]",
            "[gradient]\nerror_feedback = 0.9\n[[env]]",
            r"job\.toml: in \[gradient\], error_feedback has nothing to feed back",
        ),
        (
            "[[env]]",
            "[eval]\nsamples_per_example = 4\n[[env]]",
            r"in \[eval\], samples_per_example 4 would repeat .*; set temperature above 0\.$",
        ),
        ("[[env]]", "[checkpoint]\nrelease = 'first'\n[[env]]", "checkpoint.release is the text"),
        ("[[env]]", "[tasks]\nrollout = 0\n[[env]]", "tasks.rollout is the number 0"),
        ("max_steps = 3", "max_steps = 3\ndynamic_sampling_rounds = 17", "dynamic_sampling_rounds"),
    ],
)
def test_what_is_wrong_is_named(old: str, new: str, expected: str) -> None:
    assert old in GOOD
    with pytest.raises(InvalidRequest, match=expected) as caught:
        parse_job(GOOD.replace(old, new, 1), "job.toml")
    assert caught.value.exit_code == 3
    assert "\n" not in caught.value.message


def test_overrides_reach_every_part() -> None:
    spec = parse_job(
        GOOD,
        "job.toml",
        [
            *("seed=9", "name=other", "lora.r=4", "env.0.weight=2", "budget.max_total=3.00"),
            *("budget.stale_pay=0.5", "budget.delay_cost='0.01'"),
        ],
    )
    assert (spec.seed, spec.name, spec.lora) == (9, "other", LoraSpec(r=4))
    assert spec.environments[0].weight == 2.0
    assert spec.budget.max_total_micros == 3_000_000
    assert (spec.budget.stale_pay_permille, spec.budget.delay_micros_per_s) == (500, 10_000)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed", "is not of the form key=value"),
        (".=1", "is not of the form key=value"),
        ("seeed=1", "nearest valid name is 'seed'"),
        ("name.x=1", "goes into name, which is not a table"),
        ("env.3.weight=1", "item '3' of a list of 1"),
        ("lora.r=big", "lora.r is the text 'big'"),
    ],
)
def test_bad_overrides_are_named(override: str, expected: str) -> None:
    with pytest.raises(InvalidRequest, match=expected):
        parse_job(GOOD, "job.toml", [override])


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="There is no job file at"):
        load_job_file(tmp_path / "absent.toml")
    with pytest.raises(InvalidRequest, match="cannot be read"):
        load_job_file(tmp_path)
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"name = \xff")
    with pytest.raises(InvalidRequest, match="not UTF-8 text at byte 7"):
        load_job_file(binary)
    huge = tmp_path / "huge.toml"
    huge.write_bytes(b"#" * (1 << 21))
    with pytest.raises(InvalidRequest, match="larger than"):
        load_job_file(huge)
