"""The operator's benchmarks: what they must be, and that no unit costs more than they allow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from learning_fixtures import make_spec, write_base
from orchestrator_jobs import ended, submitted
from orchestrator_lab import open_lab, run

from shoal.market.reserve import raised, reference_price, reserve_for
from shoal.orchestrator.config import load_config
from shoal.orchestrator.jobrun import JobRun
from shoal.orchestrator.reference import Benchmark, lowest_reserve
from shoal.orchestrator.workload import Delivery
from shoal.protocol.certificate import ReserveOrigin
from shoal.protocol.errors import InvalidRequest
from shoal.protocol.market import TaskKind

GPU, DEAR_GPU = "NVIDIA RTX A6000", "NVIDIA H200"
UNITS = 1_000_000
MAX_MICROS = 1_000
"""What the lab's jobs pay at most for a unit of any kind."""
GIVEN = {
    "data_dir": "/data",
    "rpc_url": "http://127.0.0.1:8545",
    "deployment_file": "/deployment.json",
    "key_file": "/key.json",
}
ROW: dict[str, Any] = {
    "gpu": GPU,
    "kind": "rollout",
    "max_tokens": 4,
    "units_per_1000_gpu_hours": UNITS,
}


def file_of(folder: Path, **changes: Any) -> Path:
    """A configuration file with one row."""
    file = folder / "orchestrator.toml"
    row = {key: value for key, value in (ROW | changes).items() if value is not None}
    lines = [
        f"{key} = {value!r}" if isinstance(value, int) else f'{key} = "{value}"'
        for key, value in row.items()
    ]
    file.write_text("\n".join(["[[reference]]", *lines, ""]))
    return file


def test_a_row_is_read_from_the_file(tmp_path: Path) -> None:
    (row,) = load_config(file_of(tmp_path, group_size=8), GIVEN).reference
    assert row == Benchmark(**ROW, group_size=8)
    assert load_config(None, GIVEN).reference == ()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"gpu": "NVIDIA A6000"}, "did you mean 'NVIDIA RTX A6000'?"),
        ({"gpu": "RTX 4090"}, "did you mean 'NVIDIA GeForce RTX 4090'?"),
        ({"gpus": "NVIDIA H200"}, "unknown key 'gpus'; did you mean 'gpu'?"),
        ({"max_tokens": 0}, "reference.0.max_tokens"),
        ({"kind": "training"}, "reference.0.kind"),
        ({"units_per_1000_gpu_hours": 0}, "reference.0.units_per_1000_gpu_hours"),
        ({"units_per_1000_gpu_hours": 2**53 - 1}, "less than a millionth of a dollar"),
        ({"units_per_1000_gpu_hours": None}, "reference.0.units_per_1000_gpu_hours"),
    ],
)
def test_a_row_that_says_nothing_usable_stops_the_start(
    tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        load_config(file_of(tmp_path, **changes), GIVEN)
    assert says in caught.value.message


@pytest.mark.parametrize(
    ("row", "fits"),
    [
        ({}, True),
        ({"group_size": 2, "model": "a/model"}, True),
        ({"group_size": 4}, False),
        ({"model": "another/model"}, False),
        ({"max_tokens": 8}, False),
        ({"kind": "gradient"}, False),
    ],
)
def test_a_row_holds_for_its_own_class_alone(row: dict[str, Any], fits: bool) -> None:
    benchmark = Benchmark(**(ROW | row))
    assert benchmark.fits(TaskKind.ROLLOUT, max_tokens=4, group_size=2, model="a/model") is fits


def test_the_gpu_that_does_it_cheapest_is_the_reference() -> None:
    rows = [Benchmark(**(ROW | {"gpu": gpu})) for gpu in (DEAR_GPU, GPU)]
    terms = lowest_reserve(rows, 1 << 40)
    price = reference_price(GPU)
    assert price is not None
    assert (terms.gpu, terms.reference_micros) == (GPU, price.micros_per_hour * 1_000 // UNITS)
    assert terms.reserve_micros == price.micros_per_hour * 900 // UNITS
    assert lowest_reserve([], 7) == reserve_for(7)


@pytest.mark.parametrize("is_benchmarked", [True, False])
def test_what_a_job_announces_and_sells_is_below_the_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_benchmarked: bool
) -> None:
    base = str(write_base(tmp_path / "base"))

    async def scenario() -> None:
        max_tokens = make_spec().sampling.max_tokens
        row = Benchmark(**(ROW | {"max_tokens": max_tokens + (not is_benchmarked)}))
        async with open_lab(tmp_path, allow_local_models=True, reference=(row,)) as lab:
            below = reserve_for(MAX_MICROS, gpu=GPU, units_per_1000_gpu_hours=UNITS)
            assert below.reserve_micros < MAX_MICROS

            async def deliver(delivery: Delivery) -> None:
                raise AssertionError("nobody works here")

            async def play(job_run: JobRun) -> str:
                assert job_run.policy is not None
                auctioneer = lab.orchestrator.auctioneer
                workload = job_run._planner.rollouts(0, job_run.policy, [0, 1], deliver)
                expected = below if is_benchmarked else reserve_for(MAX_MICROS)
                assert workload.reserve == expected
                assert workload.lot.reserve_micros == expected.reserve_micros
                assert (workload.reserve.origin is ReserveOrigin.REFERENCE) is is_benchmarked
                spec, digest = job_run.learner.spec, job_run.learner.base.content_digest()
                assert workload.work == (
                    f"rollout:{digest[:16]}:{max_tokens}:{spec.rollouts_per_example}"
                )
                await auctioneer.open(workload)
                assert announced() == {
                    TaskKind.ROLLOUT: expected.reserve_micros,
                    TaskKind.GRADIENT: MAX_MICROS,
                    TaskKind.EVALUATE: MAX_MICROS,
                }
                # What has failed may cost more, and who was too dear hears of it.
                workload.reserve = raised(expected)
                raise_to = min(-(-expected.reserve_micros * 11 // 10), MAX_MICROS)
                assert announced()[TaskKind.ROLLOUT] == raise_to
                return ""

            def announced() -> dict[TaskKind, int]:
                (job,) = lab.orchestrator.jobs.open_jobs()
                return job.reserve_micros

            monkeypatch.setattr(JobRun, "run", play)
            job_id = await submitted(lab, base)
            await lab.orchestrator.jobs.start(job_id)
            row_at_end = await ended(lab, job_id)
            assert (row_at_end.state, row_at_end.reason) == ("complete", "")

    run(scenario)
