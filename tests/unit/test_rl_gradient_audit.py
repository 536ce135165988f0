"""Gradients of every codec: honest ones pass, also from other arithmetic; cheats do not.

Each cheat is also sent without audit, and must then pass: it is the audit that finds it.
"""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from learning_fixtures import Lab, graded_groups, stir, write_base

from shoal.models.policy import Policy
from shoal.protocol.learning import CodecKind, CodecSpec, GradientSpec
from shoal.protocol.result import CheckName
from shoal.protocol.task import GradientTask
from shoal.rl import codec
from shoal.rl import differentiate as differentiate_module
from shoal.rl.batch import GradientPayload
from shoal.rl.gradient import (
    Group,
    decode_slice,
    encode_slice,
    run_gradient,
    slice_gradient,
)
from shoal.rl.gradient_audit import ResidualEvidence
from shoal.rl.local import blob_of
from shoal.rl.verification import (
    GradientVerification,
    audit_gradient,
    due_gradient,
    verify_gradient,
)

TOPK = CodecSpec(kind=CodecKind.TOPK, chunk=256, keep=64, bits=2, error_feedback=0.9)
SPECS = {
    "fp32": GradientSpec(),
    "fp16": GradientSpec(codec=CodecSpec(kind=CodecKind.FP16)),
    "int8": GradientSpec(codec=CodecSpec(kind=CodecKind.INT8, chunk=256)),
    "topk": GradientSpec(codec=TOPK.model_copy(update={"error_feedback": 0.0})),
    "steps": GradientSpec(local_steps=3),
    "steps-topk": GradientSpec(
        codec=TOPK.model_copy(update={"error_feedback": 0.0}), local_steps=3
    ),
}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab.open(write_base(tmp_path_factory.mktemp("base")))


@pytest.fixture(scope="module")
def groups(lab: Lab) -> list[Group]:
    return graded_groups(lab)


def work_of(lab: Lab, groups: list[Group], spec: GradientSpec) -> tuple[GradientTask, bytes]:
    rows = encode_slice(groups)
    data = rows.encode()
    task = lab.plan.gradient(
        0, lab.version(), blob_of(data), num_rows=rows.num_rows, num_groups=len(groups)
    )
    return task.model_copy(update={"gradient": spec, "learning_rate": 1e-3}), data


def judge(
    lab: Lab,
    work: tuple[GradientTask, bytes],
    data: bytes,
    *,
    audit: bool = True,
    evidence: ResidualEvidence | None = None,
) -> GradientVerification:
    task, rows = work
    tokens = decode_slice(lab.policy, task, rows).num_tokens
    return verify_gradient(
        lab.policy,
        task,
        lab.result(task, data, tokens),
        data,
        rows,
        audit=audit,
        evidence=evidence or ResidualEvidence(),
    )


def reason(verdict: GradientVerification) -> str:
    assert not verdict.accepted
    assert verdict.checks[-1].name is CheckName.GRADIENT
    return verdict.checks[-1].detail


@pytest.mark.parametrize("kind", SPECS)
def test_honest_gradients_pass_whatever_the_order_of_their_sums(
    lab: Lab, groups: list[Group], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = work_of(lab, groups, SPECS[kind])
    data = run_gradient(lab.policy, *work).payload
    assert judge(lab, work, data).accepted
    # Other micro-batches add up in another order, as another machine's arithmetic does.
    monkeypatch.setattr(differentiate_module, "MAX_ROWS", 3)
    other = run_gradient(lab.policy, *work).payload
    monkeypatch.undo()
    verdict = judge(lab, work, other)
    assert verdict.accepted, verdict.checks[-1].detail


@pytest.mark.parametrize("kind", SPECS)
def test_an_audit_finds_the_same_bit_for_bit_when_it_was_recomputed_ahead(
    lab: Lab, groups: list[Group], kind: str
) -> None:
    work = work_of(lab, groups, SPECS[kind])
    task, rows = work
    ahead = due_gradient(lab.policy, task, rows, lambda tokens: None)
    later = slice_gradient(lab.policy, task, decode_slice(lab.policy, task, rows))
    assert ahead.stats == later.stats
    for name, array in later.gradients.items():
        assert np.array_equal(ahead.gradients[name], array)
    data = run_gradient(lab.policy, *work).payload
    cheap, evidence = judge(lab, work, data, audit=False), ResidualEvidence()
    verdict = audit_gradient(lab.policy, task, cheap, evidence, ahead)
    assert verdict.accepted
    assert verdict.checks == judge(lab, work, data).checks
    assert len(verdict.checks) > len(cheap.checks)


@pytest.mark.parametrize("cheat", ["flipped", "scaled", "half", "slice", "stale"])
@pytest.mark.parametrize("kind", SPECS)
def test_cheats_are_found_on_audit_only(
    lab: Lab, groups: list[Group], kind: str, cheat: str
) -> None:
    work = work_of(lab, groups, SPECS[kind])
    task, rows = work
    honest = slice_gradient(lab.policy, task, decode_slice(lab.policy, task, rows))
    false = honest.gradients
    if cheat in ("flipped", "scaled", "half"):
        factor = np.float32({"flipped": -1.0, "scaled": 1.05, "half": 0.5}[cheat])
        false = {name: array * factor for name, array in false.items()}
    elif cheat == "slice":
        flipped = [replace(g, advantages=np.roll(g.advantages, 1)) for g in groups]
        false = slice_gradient(lab.policy, task, encode_slice(flipped)).gradients
    else:
        stale = Policy.load(lab.folder, lab.policy.lora, seed=0)
        stale.load_adapter(lab.policy.adapter_bytes())
        stir(stale, seed=5, scale=0.02)
        false = slice_gradient(stale, task, decode_slice(stale, task, rows)).gradients
    payload, _ = GradientPayload.pack(false, honest.stats, task.gradient.codec)
    assert "recomputed: off by" in reason(judge(lab, work, payload.encode()))
    assert judge(lab, work, payload.encode(), audit=False).accepted


@pytest.mark.parametrize("kind", SPECS)
def test_an_empty_or_absurd_gradient_is_refused_unread(
    lab: Lab, groups: list[Group], kind: str
) -> None:
    work = work_of(lab, groups, SPECS[kind])
    task, rows = work
    honest = slice_gradient(lab.policy, task, decode_slice(lab.policy, task, rows))
    for factor, why in ((0.0, "zero though"), (1e9, "is plausible")):
        false = {n: a * np.float32(factor) for n, a in honest.gradients.items()}
        payload, _ = GradientPayload.pack(false, honest.stats, task.gradient.codec)
        assert why in reason(judge(lab, work, payload.encode(), audit=False))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("loss_sum", 1e308),
        ("entropy_sum", -1e308),
        ("weight_max", 1e39),
        ("clipped_low", 1e308),
        ("num_clippable", -1.0),
        ("kl_tokens", 5e-324),
        ("masked_tokens", 0.5),
    ],
)
def test_a_figure_that_no_slice_can_have_is_refused_without_audit(
    lab: Lab, groups: list[Group], name: str, value: float
) -> None:
    """Else one unaudited worker could make the batch's metrics infinite."""
    work = work_of(lab, groups, SPECS["fp32"])
    task, rows = work
    honest = slice_gradient(lab.policy, task, decode_slice(lab.policy, task, rows))
    false = replace(honest.stats, **{name: value})
    payload, _ = GradientPayload.pack(honest.gradients, false, task.gradient.codec)
    assert f"{name} is" in reason(judge(lab, work, payload.encode(), audit=False))
    # The control: with the figures as counted it passes.
    payload, _ = GradientPayload.pack(honest.gradients, honest.stats, task.gradient.codec)
    assert judge(lab, work, payload.encode(), audit=False).accepted


@pytest.fixture(scope="module")
def chain(lab: Lab, groups: list[Group]) -> tuple[tuple[GradientTask, bytes], bytes, bytes, bytes]:
    """Work with error feedback, a residual, the payload that continues from it, the next one."""
    work = work_of(lab, groups, GradientSpec(codec=TOPK))
    before = run_gradient(lab.policy, *work).residual
    assert before is not None
    output = run_gradient(lab.policy, *work, residual=before)
    assert output.residual is not None
    return work, before, output.payload, output.residual


Chain = tuple[tuple[GradientTask, bytes], bytes, bytes, bytes]


def evidence_of(chain: Chain, **changes: object) -> ResidualEvidence:
    _, before, _, after = chain
    whole = ResidualEvidence(spendable=(codec.residual_sha256(before),), before=before, after=after)
    return replace(whole, **changes)  # type: ignore[arg-type]


def test_a_gradient_with_feedback_is_recomputed_with_its_residual(lab: Lab, chain: Chain) -> None:
    work, _, data, _ = chain
    verdict = judge(lab, work, data, evidence=evidence_of(chain))
    assert verdict.accepted, verdict.checks[-1].detail
    assert verdict.payload is not None
    assert verdict.payload.residual is not None
    # The first of a chain has nothing to show but what it left.
    first = run_gradient(lab.policy, *work)
    assert judge(lab, work, first.payload, evidence=ResidualEvidence(after=first.residual)).accepted


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"before": None}, "residual before it .* was not produced"),
        ({"after": None}, "residual after it .* was not produced"),
        ({"before": b"other"}, "other bytes came"),
        ({"after": b"other"}, "other bytes came"),
        ({"spendable": ()}, "which no accepted gradient left"),
    ],
)
def test_without_its_residuals_an_audited_gradient_fails(
    lab: Lab, chain: Chain, changes: dict[str, object], why: str
) -> None:
    work, _, data, _ = chain
    verdict = judge(lab, work, data, evidence=evidence_of(chain, **changes))
    assert re.search(why, reason(verdict))


def test_the_place_in_the_chain_is_checked_without_audit_too(lab: Lab, chain: Chain) -> None:
    work, before, data, _ = chain
    unknown = ResidualEvidence(spendable=())
    assert "no accepted gradient" in reason(judge(lab, work, data, audit=False, evidence=unknown))
    known = ResidualEvidence(spendable=(codec.residual_sha256(before),))
    assert judge(lab, work, data, audit=False, evidence=known).accepted
    # One that was accepted before a restart is not asked where it came from again.
    again = ResidualEvidence(spendable=None)
    assert judge(lab, work, data, audit=False, evidence=again).accepted


@pytest.mark.parametrize(("norm", "caught"), [(1e3, False), (5e4, True)])
def test_a_residual_of_ones_own_making_is_found(
    lab: Lab, chain: Chain, norm: float, caught: bool
) -> None:
    """Poison in the residual is sent with the gradient; its chain, or its length, tells."""
    work, before, _, _ = chain
    size = len(before) // 4
    poison = codec.encode_residual(np.full(size, norm / size**0.5, dtype=np.float32))
    output = run_gradient(lab.policy, *work, residual=poison)
    made = evidence_of(chain, before=poison, after=output.residual)
    assert "no accepted gradient" in reason(judge(lab, work, output.payload, evidence=made))
    # With the chain forged too, its length is what is left to tell.
    forged = replace(made, spendable=(codec.residual_sha256(poison),))
    verdict = judge(lab, work, output.payload, evidence=forged)
    assert verdict.accepted != caught
    assert not caught or "residual of norm" in reason(verdict)


def test_a_residual_after_that_was_not_left_is_found(lab: Lab, chain: Chain) -> None:
    work, _, data, after = chain
    spec = work[0].gradient.codec
    payload = GradientPayload.decode(data, lab.policy.shapes(), spec)
    assert payload.residual is not None
    false = codec.encode_residual(2 * codec.decode_residual(after, len(after) // 4))
    link = replace(payload.residual, after=codec.residual_sha256(false))
    lie = replace(payload, residual=link).encode()
    found = judge(lab, work, lie, evidence=evidence_of(chain, after=false))
    assert "residual after it is off by" in reason(found)
    assert judge(lab, work, lie, audit=False, evidence=evidence_of(chain)).accepted
