"""Decisions: what was done, what set it off, the numbers, what else was open, and who ordered it."""

from typing import Any, Literal

from app.api.schemas.base import Identified, Schema, unix
from app.db.models import DecisionRow, Job
from app.domain.decisions import Decision, Reading, Verdict
from app.domain.identifiers import public_id
from app.domain.states import JobKind


class Trigger(Schema):
    """What set a decision off: the tested quantity that stands worst against its limit."""

    verdict: str
    look: int
    alpha: float  # spent on a harmful call at this look
    of: str  # `general_mean`, or a benchmark's name
    drop: float | None
    lower: float | None
    upper: float | None
    limit: float | None
    severe: bool


class Alternative(Schema):
    """Something else that could have been done; `why_not` is null where it was open and came later on the ladder."""

    action: str
    why_not: str | None


class ShownDiagnosis(Schema):
    """What a handful of replay steps, taken on a throw-away copy of the weights, brought back of a confirmed drop."""

    kind: Literal["format", "knowledge", "unclear"]  # the first comes back by a few steps
    reason: str | None  # why there are no numbers
    benchmarks: list[str]
    n_items: int  # scored again; none overlaps a replay row
    drop: float | None  # on these items, in limits
    share: float | None  # of the drop that came back
    lower: float | None  # one-sided 95 %
    upper: float | None
    steps: int
    rows: int
    rate: float | None  # of the steps, as a multiple of the job's learning rate
    held_before: float | None  # nats per token of other general rows
    held_after: float | None
    seconds: float


class PersonsOrder(Schema):
    """Who ordered it, on which decision, and why."""

    by: str
    reason: str | None
    decision_id: str


class DecisionBody(Identified):
    """What every decision shows."""

    object: Literal["retention.decision"] = "retention.decision"
    created_at: int
    branch: int
    step: int
    look: int
    origin: str
    action: str
    code: str
    reason: str
    state: str
    trigger: Trigger
    reading: dict[str, Any]
    before: dict[str, Any]
    after: dict[str, Any]
    lever: str | None
    alternatives: list[Alternative]
    details: dict[str, Any]
    diagnosis: ShownDiagnosis | None
    ordered: PersonsOrder | None
    evidence: dict[str, Any] | None
    decision: dict[str, Any] | None


class DecisionObject(DecisionBody):
    """What the controller did at one evaluation point of a job, with the numbers it rested on."""

    fine_tuning_job_id: str
    target_checkpoint_id: str | None


class FoundDecision(DecisionBody):
    """A decision on a job or on an external run, found by its id."""

    subject_id: str


def show_found(row: DecisionRow, job: Job, *, with_evidence: bool) -> FoundDecision:
    """A decision with the id of what it was made on."""
    kind = "run" if job.kind is JobKind.EXTERNAL else "job"
    return FoundDecision(
        **shared_fields(row, with_evidence=with_evidence), subject_id=public_id(kind, job.id)
    )


def show_decision(row: DecisionRow, *, with_evidence: bool) -> DecisionObject:
    """A job's decision as clients see it; its evidence is all that `decide()` got."""
    target = row.target_checkpoint_id
    return DecisionObject(
        **shared_fields(row, with_evidence=with_evidence),
        fine_tuning_job_id=public_id("job", row.job_id),
        target_checkpoint_id=None if target is None else public_id("checkpoint", target),
    )


def shared_fields(row: DecisionRow, *, with_evidence: bool) -> dict[str, Any]:
    """The fields of `DecisionBody`."""
    decision = Decision.model_validate(row.decision)
    return {
        "id": public_id("decision", row.id),
        "created_at": unix(row.created_at),
        "branch": row.branch,
        "step": row.step,
        "look": row.look,
        "origin": row.origin,
        "action": row.action,
        "code": row.code,
        "reason": row.reason,
        "state": row.state,
        "trigger": find_trigger(Reading.model_validate(row.evidence["look"]["reading"])),
        "reading": row.evidence["look"]["reading"],
        "before": row.evidence["state"],
        "after": row.decision["state"],
        "lever": decision.lever,
        "alternatives": [_alternative(text) for text in decision.alternatives],
        "details": {k: v for k, v in decision.details.items() if k != "diagnosis"},
        "diagnosis": decision.details.get("diagnosis"),
        "ordered": _ordered(row),
        "evidence": row.evidence if with_evidence else None,
        "decision": row.decision if with_evidence else None,
    }


def find_trigger(reading: Reading) -> Trigger:
    """The tested quantity whose estimate is the largest multiple of its limit; regressed ones go first."""
    tested: list[tuple[bool, float, str, Any]] = []
    if reading.drop is not None:
        is_own = reading.verdict is Verdict.REGRESS and (reading.lower or 0.0) > reading.limit
        tested.append((is_own, reading.drop / reading.limit, "general_mean", reading))
    tested += [
        (found.verdict is Verdict.REGRESS, found.drop / found.limit, found.name, found)
        for found in reading.benchmarks
        if found.drop is not None and found.limit is not None
    ]
    _, _, name, worst = max(
        tested, key=lambda one: one[:2], default=(False, 0.0, "general_mean", reading)
    )
    return Trigger(
        verdict=reading.verdict.value,
        look=reading.look,
        alpha=reading.alpha,
        of=name,
        drop=worst.drop,
        lower=worst.lower,
        upper=worst.upper,
        limit=worst.limit,
        severe=reading.severe,
    )


def _alternative(text: str) -> Alternative:
    action, has_why, why = text.partition(": ")
    return Alternative(action=action, why_not=why if has_why else None)


def _ordered(row: DecisionRow) -> PersonsOrder | None:
    told = row.evidence.get("override") or row.evidence.get("accepted")
    if told is None:
        return None
    return PersonsOrder(by=told["by"], reason=told.get("reason"), decision_id=told["decision_id"])
