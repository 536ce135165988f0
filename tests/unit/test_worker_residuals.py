"""A residual is spent once: by the gradient that was accepted, and by none that was not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from worker_double import ScriptedEngine, make_task

from shoal.protocol.canonical import sha256_hex
from shoal.protocol.errors import Clock, Expired
from shoal.protocol.ids import Digest
from shoal.protocol.learning import CodecKind, CodecSpec, GradientSpec
from shoal.protocol.market import TaskKind
from shoal.protocol.task import GradientTask
from shoal.worker.ports import AnyTask, TaskInput, TaskOutput
from shoal.worker.residuals import FeedbackEngine, ResidualBook

JOB, OTHER = "0x" + "a" * 64, "0x" + "b" * 64
FEEDBACK = GradientSpec(codec=CodecSpec(kind=CodecKind.TOPK, error_feedback=0.9))


@pytest.fixture
def book(tmp_path: Path) -> ResidualBook:
    return ResidualBook(tmp_path / "residuals")


def work(book: ResidualBook, task: str, residual: bytes, job: str = JOB) -> bytes | None:
    """One gradient computed and handed in; its lease is named after its task."""
    lent = book.lend(task, job)
    book.keep(task, residual)
    book.name_lease(f"lease {task}", task)
    return lent


def files(tmp_path: Path) -> set[str]:
    return {path.name for path in (tmp_path / "residuals").glob("*")}


def test_an_accepted_gradient_leaves_its_residual_to_the_next(
    book: ResidualBook, tmp_path: Path
) -> None:
    assert work(book, "t1", b"one") is None
    book.judged("lease t1", accepted=True)
    assert work(book, "t2", b"two") == b"one"
    book.judged("lease t2", accepted=True)
    assert files(tmp_path) == {sha256_hex(b"two")}
    assert work(book, "t3", b"three") == b"two"


def test_a_rejected_or_lost_gradient_gives_back_what_it_was_lent(book: ResidualBook) -> None:
    work(book, "t1", b"one")
    book.judged("lease t1", accepted=True)
    assert work(book, "t2", b"two") == b"one"
    book.judged("lease t2", accepted=False)
    assert work(book, "t3", b"three") == b"one"
    book.give_back("t3")
    # A verdict that comes after all changes nothing more.
    book.judged("lease t3", accepted=True)
    assert work(book, "t4", b"four") == b"one"


def test_what_awaits_its_verdict_is_lent_to_nobody_else(book: ResidualBook) -> None:
    """Two at once would feed the same values back twice."""
    work(book, "t1", b"one")
    book.judged("lease t1", accepted=True)
    assert work(book, "t2", b"two") == b"one"
    assert work(book, "t3", b"three") is None
    book.judged("lease t3", accepted=True)
    book.judged("lease t2", accepted=True)
    assert {work(book, "t4", b"4"), work(book, "t5", b"5"), work(book, "t6", b"6")} == {
        b"two",
        b"three",
        None,
    }


def test_the_same_task_again_starts_from_the_same_residual(book: ResidualBook) -> None:
    work(book, "t1", b"one")
    book.judged("lease t1", accepted=True)
    assert work(book, "t2", b"two") == b"one"
    assert work(book, "t2", b"two") == b"one"


def test_jobs_do_not_share_residuals_and_closed_ones_keep_none(
    book: ResidualBook, tmp_path: Path
) -> None:
    work(book, "t1", b"one", JOB)
    work(book, "t2", b"two", OTHER)
    book.judged("lease t1", accepted=True)
    book.judged("lease t2", accepted=True)
    book.retain([OTHER])
    assert files(tmp_path) == {sha256_hex(b"two")}
    assert work(book, "t3", b"three", JOB) is None
    assert work(book, "t4", b"four", OTHER) == b"two"


def test_a_new_session_starts_from_nothing_but_answers_for_what_it_sent(
    book: ResidualBook,
) -> None:
    work(book, "t1", b"one")
    book.judged("lease t1", accepted=True)
    work(book, "t2", b"two")
    book.forget()
    assert book.find("lease t2", sha256_hex(b"two")) == b"two"
    assert book.find("lease t2", sha256_hex(b"one")) == b"one"
    assert work(book, "t3", b"three") is None


def test_only_what_a_lease_committed_to_is_shown_and_until_its_verdict(
    book: ResidualBook, tmp_path: Path
) -> None:
    work(book, "t1", b"one")
    digest = sha256_hex(b"one")
    assert book.find("lease t1", digest) == b"one"
    assert book.find("lease t1", sha256_hex(b"other")) is None
    assert book.find("lease t9", digest) is None
    book.judged("lease t1", accepted=True)
    assert book.find("lease t1", digest) is None
    work(book, "t2", b"two")
    (tmp_path / "residuals" / digest).write_bytes(b"damaged")
    assert book.find("lease t2", digest) is None


def test_a_damaged_residual_is_not_lent(book: ResidualBook, tmp_path: Path) -> None:
    work(book, "t1", b"one")
    book.judged("lease t1", accepted=True)
    (tmp_path / "residuals" / sha256_hex(b"one")).write_bytes(b"damaged")
    assert book.lend("t2", JOB) is None


def test_room_is_made_by_dropping_free_residuals(tmp_path: Path) -> None:
    book = ResidualBook(tmp_path / "residuals", max_bytes=10)
    for number in range(3):
        work(book, f"t{number}", bytes([number]) * 4)
    for number in range(3):
        book.judged(f"lease t{number}", accepted=True)
    work(book, "t3", b"new!")
    sizes = [path.stat().st_size for path in (tmp_path / "residuals").iterdir()]
    assert sum(sizes) <= 10


def test_a_restart_finds_an_empty_book(tmp_path: Path) -> None:
    first = ResidualBook(tmp_path / "residuals")
    work(first, "t1", b"one")
    first.judged("lease t1", accepted=True)
    assert files(tmp_path)
    again = ResidualBook(tmp_path / "residuals")
    assert not files(tmp_path)
    assert again.lend("t2", JOB) is None


class LeavingEngine(ScriptedEngine):
    """Leaves a residual named after the one it was given."""

    def run(self, task: AnyTask, inputs: TaskInput, on_progress: Callable[[], None]) -> TaskOutput:
        output = super().run(task, inputs, on_progress)
        return replace(output, residual=(inputs.residual or b"") + b"+")


def inputs_of(tmp_path: Path) -> TaskInput:
    return TaskInput(
        base_folder=tmp_path, base_sha256=Digest("0" * 64), adapter=b"", batch_slice=b"s"
    )


def gradient(number: int, spec: GradientSpec = FEEDBACK) -> GradientTask:
    task = make_task(TaskKind.GRADIENT, number)
    assert isinstance(task, GradientTask)
    return task.model_copy(update={"gradient": spec})


def test_the_engine_feeds_back_only_where_the_job_asks(book: ResidualBook, tmp_path: Path) -> None:
    engine = FeedbackEngine(LeavingEngine(), book)
    for number, spec in enumerate([FEEDBACK, FEEDBACK, GradientSpec(), FEEDBACK]):
        task = gradient(number, spec)
        output = engine.run(task, inputs_of(tmp_path), lambda: None)
        assert output.residual == [b"+", b"++", b"+", b"+++"][number]
        book.name_lease(f"lease {number}", task.digest())
        book.judged(f"lease {number}", accepted=True)
    rollout = make_task(TaskKind.ROLLOUT)
    assert engine.run(rollout, inputs_of(tmp_path), lambda: None).residual == b"+"


def test_a_gradient_that_fails_gives_its_residual_back(book: ResidualBook, tmp_path: Path) -> None:
    inner = LeavingEngine()
    engine = FeedbackEngine(inner, book)
    task = gradient(1)
    engine.run(task, inputs_of(tmp_path), lambda: None)
    book.name_lease("lease 1", task.digest())
    book.judged("lease 1", accepted=True)
    for failure in (MemoryError(), Expired("revoked", clock=Clock.HEARTBEAT)):
        inner.failure = failure
        with pytest.raises(type(failure)):
            engine.run(gradient(2), inputs_of(tmp_path), lambda: None)
    inner.failure = None
    assert engine.run(gradient(3), inputs_of(tmp_path), lambda: None).residual == b"++"


@pytest.mark.parametrize("accepted", [True, False])
def test_what_was_under_way_when_a_session_ended_is_not_continued_from(
    book: ResidualBook, tmp_path: Path, accepted: bool
) -> None:
    """A restarted orchestrator knows neither residual and would reject an honest gradient."""
    work(book, "t1", b"one")
    book.judged("lease t1", accepted=True)
    work(book, "t2", b"two")
    book.forget()
    book.judged("lease t2", accepted=accepted)
    assert files(tmp_path) == set()
    assert work(book, "t3", b"three") is None
    # The control: within the new session residuals are fed back as ever.
    book.judged("lease t3", accepted=True)
    assert work(book, "t4", b"four") == b"three"
