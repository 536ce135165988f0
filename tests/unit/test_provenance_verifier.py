"""The offline check: an honest bundle passes, and each way to be dishonest fails at its step."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from market_records import DOMAIN, account, node_key
from provenance_story import (
    BASE,
    ENVIRONMENT,
    JOB,
    JOB_ID,
    ORCHESTRATOR,
    Story,
    bound,
    peer_of,
    policy,
)

from shoal.protocol.errors import InvalidRequest
from shoal.protocol.job import Job
from shoal.protocol.signing import Domain
from shoal.protocol.signing import sign as sign_record
from shoal.provenance import dsse, statement
from shoal.provenance.bundle import Bundle, read_bundle, write_bundle
from shoal.provenance.report import Outcome, Report
from shoal.provenance.statement import UpdatePredicate
from shoal.provenance.verifier import verify_bundle


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("released")


@pytest.fixture(scope="module")
def honest(folder: Path) -> Bundle:
    return Story().tell(folder)


def failed_step(report: Report) -> str:
    assert not report.passed
    failure = report.failure()
    assert failure is not None
    assert failure.detail in report.text()
    return failure.name


def edit(bundle: Bundle, **changes: Any) -> Bundle:
    return bundle.model_copy(update=changes)


def edit_statement(bundle: Bundle, index: int, **changes: Any) -> Bundle:
    entries = list(bundle.statements)
    entries[index] = entries[index].model_copy(update=changes)
    return edit(bundle, statements=tuple(entries))


def test_an_honest_bundle_passes_every_step(honest: Bundle, folder: Path) -> None:
    report = verify_bundle(honest, folder, pinned_head=bytes.fromhex(honest.head[2:]))
    assert report.passed, report.text()
    assert {step.outcome for step in report.steps} == {Outcome.PASSED}
    assert report.num_statements == len(honest.statements) == 30
    assert "Does not prove" in report.text()
    assert "No head was pinned" not in report.text()


def test_what_was_not_checked_is_said(honest: Bundle) -> None:
    report = verify_bundle(honest)
    assert report.passed
    skipped = [step.name for step in report.steps if step.outcome is Outcome.NOT_CHECKED]
    assert skipped == ["files", "pinned head"]
    assert not report.head_pinned
    assert "No head was pinned" in report.text()


def test_a_bundle_survives_the_disk(honest: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "bundle.json"
    write_bundle(honest, path)
    assert read_bundle(path) == honest
    assert list(tmp_path.iterdir()) == [path]
    data = json.loads(path.read_text())
    assert "payloadType" in data["statements"][0]["envelope"]


def test_a_job_still_running_has_a_bundle_without_files(tmp_path: Path) -> None:
    story = Story()
    environment = statement.environment_statement(JOB_ID, ENVIRONMENT, "6" * 64)
    story.append(environment, ORCHESTRATOR)
    story.work(story.evaluate(0), 1)
    assert failed_step(verify_bundle(story.bundle(tmp_path))) == "roots"
    story.end_epoch()
    report = verify_bundle(story.bundle(tmp_path))
    assert report.passed, report.text()
    assert "nothing is released yet" in report.text()
    assert failed_step(verify_bundle(story.bundle(tmp_path), tmp_path)) == "files"


def test_a_bundle_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bundle.json"
    with pytest.raises(InvalidRequest, match="cannot be read"):
        read_bundle(path)
    path.write_text('{"schema_version": 1}')
    with pytest.raises(InvalidRequest, match="not a provenance bundle"):
        read_bundle(path)
    with pytest.raises(InvalidRequest, match="larger"):
        read_bundle(path, max_bytes=5)


@pytest.mark.parametrize("damage", ["changed", "missing", "link", "grown"])
def test_a_damaged_file_fails(honest: Bundle, folder: Path, tmp_path: Path, damage: str) -> None:
    for file in honest.files:
        (tmp_path / file.path).write_bytes((folder / file.path).read_bytes())
    assert verify_bundle(honest, tmp_path).passed
    target = tmp_path / "adapter_model.safetensors"
    match damage:
        case "changed":
            target.write_bytes(b"Adapter 3")
        case "grown":
            target.write_bytes(target.read_bytes() + b"!")
        case "missing":
            target.unlink()
        case _:
            target.unlink()
            target.symlink_to(folder / target.name)
    assert failed_step(verify_bundle(honest, tmp_path)) == "files"


def test_a_file_beside_the_release_is_named(honest: Bundle, folder: Path, tmp_path: Path) -> None:
    for file in honest.files:
        (tmp_path / file.path).write_bytes((folder / file.path).read_bytes())
    (tmp_path / "adapter_model.bin").write_bytes(b"pickle")
    assert "adapter_model.bin" in verify_bundle(honest, tmp_path).text()


def _flip(text: str, position: int) -> str:
    swapped = "A" if text[position] != "A" else "B"
    return text[:position] + swapped + text[position + 1 :]


@pytest.mark.parametrize("part", ["payload", "signature", "type", "key"])
@pytest.mark.parametrize("index", [0, 2, 3, 9, 21])
def test_no_part_of_any_envelope_can_change(honest: Bundle, part: str, index: int) -> None:
    envelope = honest.statements[index].envelope
    signature = envelope.signatures[0]
    match part:
        case "payload":
            changed = envelope.model_copy(update={"payload": _flip(envelope.payload, 40)})
        case "type":
            changed = envelope.model_copy(update={"payload_type": "application/json"})
        case "signature":
            other = signature.model_copy(update={"sig": _flip(signature.sig, 10)})
            changed = envelope.model_copy(update={"signatures": (other,)})
        case _:
            keyid = next(
                peer_of(node_key(n)) for n in (1, 2) if peer_of(node_key(n)) != signature.keyid
            )
            other = signature.model_copy(update={"keyid": keyid})
            changed = envelope.model_copy(update={"signatures": (other,)})
    bundle = edit_statement(honest, index, envelope=changed)
    assert failed_step(verify_bundle(bundle)) == "signatures"


def test_a_foreign_key_fails(honest: Bundle) -> None:
    foreign = node_key(77)
    payload = honest.statements[2].envelope.payload_bytes()
    envelope = dsse.sign(payload, key_id=peer_of(foreign), sign=foreign.sign)
    bundle = edit_statement(honest, 2, envelope=envelope)
    assert failed_step(verify_bundle(bundle)) == "signatures"
    # Even a bound node may not speak in another's name.
    bundle = edit(bundle, nodes=(*honest.nodes, bound(77)))
    assert failed_step(verify_bundle(bundle)) == "signatures"
    bundle = edit_statement(bundle, 2, contributor=account(77).address)
    assert failed_step(verify_bundle(bundle)) == "roles"


def _drop(bundle: Bundle) -> Bundle:
    return edit(bundle, statements=bundle.statements[:4] + bundle.statements[5:])


def _drop_last(bundle: Bundle) -> Bundle:
    return edit(bundle, statements=bundle.statements[:-1])


def _swap(bundle: Bundle) -> Bundle:
    a, b, *rest = bundle.statements
    return edit(
        bundle,
        statements=(
            b.model_copy(update={"seq": a.seq}),
            a.model_copy(update={"seq": b.seq}),
            *rest,
        ),
    )


def _repeat(bundle: Bundle) -> Bundle:
    return edit(bundle, statements=(*bundle.statements, bundle.statements[-1]))


def _move(bundle: Bundle) -> Bundle:
    return edit_statement(bundle, 6, epoch=1, seq=6)


def _drop_epoch(bundle: Bundle) -> Bundle:
    return edit(bundle, epochs=bundle.epochs[:-1])


def _renumber(bundle: Bundle) -> Bundle:
    epochs = (bundle.epochs[0].model_copy(update={"number": 2}), *bundle.epochs[1:])
    return edit(bundle, epochs=epochs)


def _root(bundle: Bundle) -> Bundle:
    changed = bundle.epochs[1].model_copy(update={"provenance_root": "0x" + "0" * 64})
    return edit(bundle, epochs=(bundle.epochs[0], changed, *bundle.epochs[2:]))


@pytest.mark.parametrize(
    "tamper", [_drop, _drop_last, _swap, _repeat, _move, _drop_epoch, _renumber, _root]
)
def test_the_log_admits_no_change(honest: Bundle, tamper: Callable[[Bundle], Bundle]) -> None:
    assert failed_step(verify_bundle(tamper(honest))) == "roots"


def test_the_head_must_be_the_logs_and_the_pinned_one(honest: Bundle) -> None:
    bundle = edit(honest, head="0x" + "1" * 64)
    assert failed_step(verify_bundle(bundle)) == "head"
    assert failed_step(verify_bundle(honest, pinned_head=b"\1" * 32)) == "pinned head"


def test_a_consistent_forgery_passes_alone_and_fails_against_the_chain(
    honest: Bundle, tmp_path: Path
) -> None:
    forged = Story(rollout_versions=(0, 1, 1)).tell(tmp_path)
    assert verify_bundle(forged).passed
    report = verify_bundle(forged, pinned_head=bytes.fromhex(honest.head[2:]))
    assert failed_step(report) == "pinned head"


def test_another_chain_job_or_requester_fails(honest: Bundle) -> None:
    elsewhere = Domain(chain_id=1, escrow=DOMAIN.escrow)
    assert failed_step(verify_bundle(edit(honest, domain=elsewhere))) == "job"
    other = Job(spec=JOB.spec, requester=JOB.requester, nonce=2)
    unsigned = honest.job.model_copy(update={"record": other})
    assert failed_step(verify_bundle(edit(honest, job=unsigned))) == "job"
    signed = sign_record(other, DOMAIN, account(8))
    assert failed_step(verify_bundle(edit(honest, job=signed))) == "job"
    replayed = edit(honest, job=signed, job_id=other.job_id())
    assert failed_step(verify_bundle(replayed)) == "roles"


def test_every_node_must_be_bound_by_both_keys(honest: Bundle) -> None:
    one, two, orchestrator = honest.nodes
    stolen = one.model_copy(update={"node_signature": two.node_signature})
    assert failed_step(verify_bundle(edit(honest, nodes=(stolen, two, orchestrator)))) == "nodes"
    unsigned = one.binding.model_copy(update={"signature": two.binding.signature})
    forged = one.model_copy(update={"binding": unsigned})
    assert failed_step(verify_bundle(edit(honest, nodes=(forged, two, orchestrator)))) == "nodes"
    misnamed = bound(1, node=peer_of(node_key(3)))
    report = verify_bundle(edit(honest, nodes=(*honest.nodes, misnamed)))
    assert failed_step(report) == "nodes"
    assert failed_step(verify_bundle(edit(honest, nodes=(one, two)))) == "signatures"
    doubled = edit(honest, nodes=(*honest.nodes, one))
    assert failed_step(verify_bundle(doubled)) == "signatures"


def test_only_the_orchestrator_gives_verdicts(tmp_path: Path) -> None:
    bundle = Story(verdict_signer=1).tell(tmp_path)
    assert failed_step(verify_bundle(bundle)) == "roles"


def test_every_environment_must_be_stated(tmp_path: Path) -> None:
    bundle = Story(with_environment=False).tell(tmp_path)
    assert failed_step(verify_bundle(bundle)) == "environments"


def test_pay_above_the_price_fails(tmp_path: Path) -> None:
    report = verify_bundle(Story(pay_factor=2).tell(tmp_path))
    assert failed_step(report) == "pay"
    assert "price" in report.text()


def test_paying_a_failed_check_fails(tmp_path: Path) -> None:
    def excuse(verdict: Any) -> Any:
        failed = tuple(check.model_copy(update={"passed": False}) for check in verdict.checks)
        return verdict.model_copy(update={"checks": failed})

    assert failed_step(verify_bundle(Story(alter_verdict=excuse).tell(tmp_path))) == "pay"


def test_a_verdict_without_work_or_paid_twice_fails(tmp_path: Path) -> None:
    for twice in (False, True):
        story = Story()
        bundle = story.tell(tmp_path)
        assert verify_bundle(bundle).passed
        task = story.rollout(0)
        lease, result = story.deliver(task, 1)
        if twice:
            again = story.work(task, 1)
            assert again
            story.work(task, 2)
        else:
            story.judge(lease, result, "f" * 64)
        story.end_epoch()
        report = verify_bundle(story.bundle(tmp_path))
        assert failed_step(report) == "pay"
        assert ("second time" if twice else "stated nowhere") in report.text()


def test_the_posted_totals_must_follow_from_the_verdicts(honest: Bundle) -> None:
    for change in ({"cumulative_micros": 1}, {"pay_root": "0x" + "0" * 64}):
        last = honest.epochs[-1].model_copy(update=change)
        bundle = edit(honest, epochs=(*honest.epochs[:-1], last))
        assert failed_step(verify_bundle(bundle)) == "pay"
    less = honest.payouts[0].model_copy(update={"cumulative_micros": 1})
    bundle = edit(honest, payouts=(less, *honest.payouts[1:]))
    assert failed_step(verify_bundle(bundle)) == "pay"
    assert failed_step(verify_bundle(edit(honest, payouts=honest.payouts[1:]))) == "pay"


def _other_parent(update: UpdatePredicate) -> UpdatePredicate:
    return update.model_copy(update={"parent": policy(0)})


def _unknown_rollout(update: UpdatePredicate) -> UpdatePredicate:
    return update.model_copy(update={"rollouts": ("f" * 64,)})


def _gradient_twice(update: UpdatePredicate) -> UpdatePredicate:
    return update.model_copy(update={"gradients": update.gradients[:1] * 2})


def _rollout_as_gradient(update: UpdatePredicate) -> UpdatePredicate:
    return update.model_copy(update={"rollouts": (), "gradients": update.rollouts})


@pytest.mark.parametrize(
    "alter", [_other_parent, _unknown_rollout, _gradient_twice, _rollout_as_gradient]
)
def test_a_broken_update_fails(
    tmp_path: Path, alter: Callable[[UpdatePredicate], UpdatePredicate]
) -> None:
    bundle = Story(alter_update=alter).tell(tmp_path)
    assert failed_step(verify_bundle(bundle)) == "updates"


def test_a_rollout_of_a_version_not_yet_made_fails(tmp_path: Path) -> None:
    bundle = Story(rollout_versions=(1, 1, 1)).tell(tmp_path)
    assert failed_step(verify_bundle(bundle)) == "updates"


def test_a_rollout_older_than_the_job_allows_fails(tmp_path: Path) -> None:
    report = verify_bundle(Story(rollout_versions=(0, 0, 0)).tell(tmp_path))
    assert failed_step(report) == "updates"
    assert "more than 1 before 2" in report.text()


def test_releasing_another_version_fails(tmp_path: Path) -> None:
    assert failed_step(verify_bundle(Story(released_version=1).tell(tmp_path))) == "release"


def test_the_files_listed_must_be_the_files_released(honest: Bundle) -> None:
    assert failed_step(verify_bundle(edit(honest, files=honest.files[1:]))) == "release"
    base = BASE.model_copy(update={"files": (BASE.files[0], BASE.files[0])})
    assert failed_step(verify_bundle(edit(honest, base=base))) == "updates"


def test_a_hostile_number_is_a_failed_step(honest: Bundle) -> None:
    job = JOB.model_copy(update={"nonce": 2**60})
    bundle = edit(honest, job=honest.job.model_copy(update={"record": job}))
    assert failed_step(verify_bundle(bundle)) == "job"
