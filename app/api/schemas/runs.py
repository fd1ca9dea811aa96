"""External runs and the decisions their trainers fetch."""

from typing import Any, Literal

from app.api.schemas.base import Identified, Page, Schema, unix, unix_or_none
from app.api.schemas.decisions import DecisionBody, shared_fields
from app.db.models import DecisionRow, Job
from app.domain.external import Instruction, RunLever, RunSpec, run_state
from app.domain.identifiers import public_id
from app.domain.policy import Policy
from app.services.external_runs import run_key
from app.services.orders import told_by


class RunObject(Identified):
    """A training that Retain watches and steers, but does not execute."""

    object: Literal["retention.run"] = "retention.run"
    created_at: int
    name: str | None
    model: str
    status: str
    branch: int
    step: int
    total_steps: int | None
    policy: Policy
    levers: list[RunLever]
    baseline: str
    is_baseline_own: bool
    strengths: dict[str, float]
    learning_rate_scale: float
    power: dict[str, Any] | None
    verdict: dict[str, Any] | None
    error: dict[str, Any] | None
    metadata: dict[str, str] | None
    finished_at: int | None


class RunDecisionObject(DecisionBody):
    """A decision on a run, with what its trainer is to do, in this order."""

    run_id: str
    instructions: list[Instruction]
    acknowledged_step: int | None  # before which it took effect, as the trainer said


class RunDecisions(Page[RunDecisionObject]):
    """Decisions after a cursor, oldest first; without any, `last_id` is the cursor that was sent."""


class AcknowledgedObject(Schema):
    """A decision that took effect."""

    object: Literal["retention.decision.acknowledged"] = "retention.decision.acknowledged"
    id: str
    step: int


def show_run(run: Job) -> RunObject:
    """A run as clients see it."""
    spec = RunSpec.model_validate(run.spec)
    state = run.controller_state or run_state(spec.request.levers).model_dump(mode="json")
    return RunObject(
        id=public_id("run", run.id),
        created_at=unix(run.created_at),
        name=spec.request.name,
        model=spec.request.model,
        status=run.state.value,
        branch=run.branch,
        step=run.step,
        total_steps=run.total_steps,
        policy=spec.policy,
        levers=list(spec.request.levers),
        baseline=spec.request.baseline,
        is_baseline_own=spec.baseline_key == run_key(run.id),
        strengths=state["strengths"],
        learning_rate_scale=state["learning_rate_scale"],
        power=run.power,
        verdict=(run.report or {}).get("verdict"),
        error=run.error,
        metadata=run.metadata_,
        finished_at=unix_or_none(run.finished_at),
    )


def show_run_decision(
    row: DecisionRow, acknowledged_step: int | None, *, with_evidence: bool = False
) -> RunDecisionObject:
    """A run's decision as clients see it."""
    return RunDecisionObject(
        **shared_fields(row, with_evidence=with_evidence),
        run_id=public_id("run", row.job_id),
        instructions=list(told_by(row)),
        acknowledged_step=acknowledged_step,
    )


def build_decisions(
    items: list[RunDecisionObject], *, has_more: bool, after: str | None
) -> RunDecisions:
    """Decisions after a cursor."""
    return RunDecisions(
        data=items,
        has_more=has_more,
        first_id=items[0].id if items else None,
        last_id=items[-1].id if items else after,
    )
